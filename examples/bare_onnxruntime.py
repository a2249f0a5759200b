"""A bundle without this package: onnxruntime and numpy draw the picture that ``Pipeline`` draws from a seed.

    python examples/bare_onnxruntime.py out/bundle

For whoever puts the graphs into C++ or another runtime: text encoders, noise, schedule, the loop with its
phases and moving averages, guidance and decoder, from ``bundle.json`` and the graphs alone. What they do is
explained in docs/concepts.

Needs ``pip install onnxruntime numpy tokenizers pillow``, and a bundle of SD3 or SD3.5 with the variant
``emag-q`` in float32 or float16 (``first_picture.py`` makes one). Takes 2 s. Writes ``out/bare.png``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

Array = NDArray[Any]
Graph = Callable[..., dict[str, Array]]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
BETA = 0.988
"""Decay of the moving averages per step; the default of every model."""


def open_graph(folder: Path) -> Graph:
    """A function from named inputs to named outputs, which gives every input the dtype of the graph."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    dtypes = {tensor.name: DTYPES[tensor.type] for tensor in session.get_inputs()}
    outputs = [tensor.name for tensor in session.get_outputs()]

    def run(**feeds: Any) -> dict[str, Array]:
        typed = {name: np.asarray(value, dtypes[name]) for name, value in feeds.items()}
        return dict(zip(outputs, session.run(None, typed), strict=True))

    return run


def token_ids(folder: Path, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Tokens of every prompt, cut or filled up to a length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    padding = json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(padding), pad_token=padding)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]


def encode(bundle: Path, manifest: dict[str, Any], prompts: Sequence[str]) -> dict[str, Array]:
    """The conditioning of SD3, a row per prompt: both CLIPs side by side, and T5's tokens behind theirs."""
    states, pooled = [], []
    for number in ("", "_2"):
        (tokens,) = manifest["graphs"][f"text_encoder{number}"]["inputs"]
        ids = token_ids(bundle / f"tokenizer{number}", prompts, tokens["dims"][1])
        output = open_graph(bundle / f"text_encoder{number}")(input_ids=ids)
        states.append(output["penultimate_hidden_state"])
        pooled.append(output["text_embeds"])
    ids = token_ids(bundle / "tokenizer_3", prompts, manifest["defaults"]["max_sequence_length"])
    t5 = open_graph(bundle / "text_encoder_3")(input_ids=ids)["last_hidden_state"]
    clip = np.concatenate(states, axis=-1)
    clip = np.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
    return {
        "encoder_hidden_states": np.concatenate([clip, t5], axis=1),
        "pooled_projections": np.concatenate(pooled, axis=-1),
    }


def initial_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """The numbers of ``torch.randn`` on a CPU: 24 bits of a Mersenne twister, Box-Muller over blocks of 16.

    C++ has that generator as ``std::mt19937``. The count must be a multiple of 16, as it is for latents.
    """
    bits = np.random.RandomState(seed).randint(0, 2**32, size=(np.prod(shape) // 16, 2, 8), dtype=np.uint32)
    uniform = (bits & (2**24 - 1)).astype(np.float32) / np.float32(2**24)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * np.pi) * uniform[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape)


def noise_levels(steps: int, shift: float) -> Array:
    """Sigma of every step, and the finished picture's 0: diffusers' ``FlowMatchEulerDiscreteScheduler``."""

    def shifted(sigma: Any) -> Any:
        return shift * sigma / (1 + (shift - 1) * sigma)

    sigmas = shifted(np.linspace(shifted(1.0), shifted(1 / 1000), steps))
    return np.append(sigmas, 0).astype(np.float32)


def phase_of(index: int, steps: int, defaults: dict[str, Any]) -> str:
    """``plain``, ``track`` (move the averages) or ``guide`` (perturb as well). Windows count from the end."""
    start, delta, stop = (
        round(defaults[f"emag_{n}"] * (steps - 1) / 250) for n in ("start", "delta", "stop")
    )
    left = steps - 1 - index
    if not stop <= left <= start:
        return "plain"
    return "guide" if left <= start - delta else "track"


def denoise(
    transformer: Graph, manifest: dict[str, Any], text: dict[str, Array], x: Array, sigmas: Array
) -> Array:
    """One picture's latents through all steps, with EMAG over classifier-free guidance."""
    contract, defaults, steps = manifest["contract"], manifest["defaults"], len(sigmas) - 1
    blocks, (height, width) = len(contract["blocks"]), (side // 2 for side in x.shape[-2:])
    average: Array = np.zeros((1, blocks, contract["heads"], height, width, contract["head_dim"]))
    delta, started = np.zeros((1, blocks)), False
    for index in range(steps):
        phase = phase_of(index, steps, defaults)
        mask = np.zeros((1, blocks))
        if phase == "guide":  # the block that moved most in the step before
            mask[0, delta.argmax()] = 1
        out = transformer(
            hidden_states=np.concatenate([x, x]),  # trunk rows: without the prompt, with it
            timestep=np.full(2, 1000 * sigmas[index]),
            **text,
            branch_rows=[0, 1, 1] if phase == "guide" else [0, 1],  # the last row is averaged, and perturbed
            ema_state=average,
            ema_step=[0 if phase == "plain" else 1 - BETA if started else 1],
            layer_mask=mask,
        )
        average = out["ema_state_out"]
        if phase != "plain":  # the first average has nothing older to differ from
            delta, started = out["layer_delta"] if started else delta, True
        u, c, *perturbed = out["noise_pred"].astype(np.float32)
        for p in perturbed:
            c = p + defaults["emag_scale"] * (c - p)
        x = x + (sigmas[index + 1] - sigmas[index]) * (u + defaults["guidance_scale"] * (c - u))
    return x


def decode(bundle: Path, latents: Array) -> Image.Image:
    """Latents to an 8-bit picture."""
    config = json.loads((bundle / "vae_decoder" / "config.json").read_text())
    z = latents / config["scaling_factor"] + config["shift_factor"]
    sample = open_graph(bundle / "vae_decoder")(latent_sample=z)["sample"][0].astype(np.float32)
    pixels = (sample / 2 + 0.5).clip(0, 1).transpose(1, 2, 0)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def draw(bundle: Path, prompt: str, seed: int) -> Image.Image:
    """The picture of ``Pipeline.open(bundle).generate(prompt, guidance="emag", seed=seed)``."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    contract, defaults = manifest["contract"], manifest["defaults"]
    if (contract["family"], contract["variant"]) != ("sd3", "emag-q"):
        raise SystemExit(
            "this loop is for the variant emag-q of sd3; the contract in bundle.json says what others take"
        )
    scheduler = json.loads((bundle / "scheduler" / "scheduler_config.json").read_text())
    text = encode(bundle, manifest, ["", prompt])
    sides = (defaults[side] // manifest["geometry"]["pixels_per_latent"] for side in ("height", "width"))
    noise = initial_noise(seed, (1, contract["latents"][0], *sides))
    sigmas = noise_levels(defaults["steps"], scheduler["shift"])
    return decode(bundle, denoise(open_graph(bundle / "transformer"), manifest, text, noise, sigmas))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("out/bundle"))
    parser.add_argument("--prompt", default="a large red circle on a blue background")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    Path("out").mkdir(exist_ok=True)
    draw(options.bundle, options.prompt, options.seed).save("out/bare.png")
    print("out/bare.png")
