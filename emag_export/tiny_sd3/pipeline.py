"""Put trained weights into diffusers' SD3 pipeline and write it to a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTokenizer

from emag_export.tiny_sd3.mute_t5 import make_mute_t5
from emag_export.tiny_sd3.networks import make_denoiser, make_scheduler, make_vae
from emag_export.tiny_sd3.tokenizer import MODEL_MAX_LENGTH


def fresh_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Build transformer and text encoders that fit a tokenizer.

    Args:
        tokenizer: Either of the two.

    Returns:
        Networks with fresh weights from torch's global generator.
    """
    return make_denoiser(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id, MODEL_MAX_LENGTH)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A finished pipeline, taken apart to be trained further.

    Attributes:
        vae: Its autoencoder, float32, without gradients.
        denoiser: Its transformer and text encoders, float32.
        facts: Its ``training.json``.
    """

    vae: AutoencoderKL
    denoiser: nn.ModuleDict
    facts: dict[str, Any]


def load_parts(folder: Path) -> Parts:
    """Load what :func:`write` and the trainer wrote to ``folder``."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder)  # float32, however it is stored
    names = ("transformer", "text_encoder", "text_encoder_2")
    return Parts(
        vae=pipeline.vae.requires_grad_(False),
        denoiser=nn.ModuleDict({name: getattr(pipeline, name) for name in names}),
        facts=json.loads((folder / "training.json").read_text()),
    )


def assemble(
    vae: AutoencoderKL,
    scales: dict[str, float],
    denoiser: nn.ModuleDict,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
) -> StableDiffusion3Pipeline:
    """Build the pipeline from trained parts; the parts themselves are left as they are.

    Args:
        vae: The trained autoencoder.
        scales: Its ``scaling_factor`` and ``shift_factor``.
        denoiser: The trained transformer and text encoders.
        tokenizers: Both tokenizers.

    Returns:
        The pipeline, float32, with diffusers' own attention.
    """
    scaled = make_vae(**scales)
    scaled.load_state_dict(vae.state_dict())
    clean = fresh_denoiser(tokenizers[0])
    clean.load_state_dict(denoiser.state_dict())
    tokenizer_3, text_encoder_3 = make_mute_t5()
    return StableDiffusion3Pipeline(
        transformer=clean["transformer"].eval(),
        scheduler=make_scheduler(),
        vae=scaled.eval(),
        text_encoder=clean["text_encoder"].eval(),
        tokenizer=tokenizers[0],
        text_encoder_2=clean["text_encoder_2"].eval(),
        tokenizer_2=tokenizers[1],
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def write(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save a pipeline: transformer and autoencoder in half precision, text encoders in single.

    transformers loads text encoders in the type they are stored in, diffusers the rest in float32.

    Args:
        pipeline: What to save; its transformer and autoencoder are half precision afterwards.
        folder: Where to.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        _write_vocabulary(getattr(pipeline, name), folder / name)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # transformers makes them readable by the owner only, which a package must not be


def _write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write CLIP's classic files, which transformers 5 leaves out but other readers want."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
