"""A checkpoint in one safetensors file, in the layout that Stability AI publishes.

The file holds the transformer (``model.diffusion_model.…``) and often the autoencoder and text encoders, but
no configuration and no tokenizers. Sizes of the transformer follow from the shapes of its weights; the other
parts are those of every published SD3 (:mod:`emag_export.families.sd3.configs`). Nothing is downloaded.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from emag_export.errors import ModelError
from emag_export.families.family import Family
from emag_export.families.sd3.components import T5
from emag_export.families.sd3.configs import CLASSES, CONFIGS
from emag_export.families.source_model import SourceModel
from emag_export.families.weight_files import is_half_precision
from emag_export.hashing import hash_file, hash_files, hash_json

__all__ = ["SingleFileModel", "open_single_file"]

_PREFIXES: Mapping[str, str] = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
_HEAD_DIM = 64
"""Of every SD3; a file does not say, unless it has norms of queries."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, kw_only=True)
class SingleFileModel(SourceModel):
    """``path`` is the file. Text encoders count where their tokenizers lie beside it."""

    loaded_whole: ClassVar[bool] = True
    shapes: Mapping[str, tuple[tuple[int, ...], int]] = field(repr=False)
    """Shape and bytes of every tensor."""

    @cached_property
    def _transformer(self) -> dict[str, Any]:
        return _transformer_config({name: shape for name, (shape, _) in self.shapes.items()}, self.path)

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration."""
        if component == "transformer":
            return dict(self._transformer)
        published: dict[str, Any] = json.loads(json.dumps(dict(CONFIGS["sd3"][component])))
        return published

    def files(self) -> Iterator[Path]:
        """The checkpoint and the tokenizers beside it."""
        yield self.path
        for encoder, tokenizer in self.family.tokenizers.items():
            if self.has(encoder):
                folder = self.path.parent / tokenizer
                yield from sorted(
                    path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model")
                )

    def fingerprint(self) -> str:
        """SHA-256 of the file; with tokenizers, over both."""
        first, *others = self.files()
        digest = hash_file(first)
        return hash_json([digest, hash_files(self.path.parent, others)]) if others else digest

    def weight_bytes(self, *components: str) -> int:
        """Bytes of the weights of these components, or of all."""
        prefixes = tuple(_PREFIXES[name] for name in components or _PREFIXES if name in _PREFIXES)
        return sum(size for name, (_, size) in self.shapes.items() if name.startswith(prefixes))

    def copied(self, component: str) -> Iterator[tuple[str, bytes]]:
        """Files of the scheduler or of a tokenizer that a bundle takes over, by name."""
        if component == "scheduler":
            yield "scheduler_config.json", json.dumps(self.config(component), indent=2).encode()
            return
        for path in self.files():
            if path.parent.name == component:
                yield path.name, path.read_bytes()

    def variant(self, component: str) -> str | None:
        """None: a file has no variants."""
        return None

    def bytes_per_weight(self) -> int:
        """2 or 4: how most of the transformer is stored."""
        return 2 if is_half_precision(self.path, _PREFIXES["transformer"]) else 4

    def load(self, component: str, model_class: Any, **options: Any) -> Any:
        """A component with its weights, converted by diffusers' single-file loaders.

        Args:
            component: Folder that diffusers would save it in.
            model_class: Its class in diffusers or transformers.
            **options: ``dtype`` or ``torch_dtype``.
        """
        dtype = options.get("dtype", options.get("torch_dtype"))
        whole = hasattr(model_class, "from_single_file")
        # The converters copy a third of the weights: rounded first, that is a third of the smaller ones. A
        # text encoder rounds itself, because it keeps some in float32.
        weights = self._weights(_PREFIXES[component], dtype if whole else None)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / component
            target.mkdir()
            (target / "config.json").write_text(json.dumps(self.config(component)), "utf-8")
            if whole:
                model = model_class.from_single_file(
                    weights, config=folder, subfolder=component, torch_dtype=dtype, local_files_only=True
                )
            else:
                model = _text_encoder(component, model_class, weights, folder, dtype)
        if missing := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
            raise ModelError(
                f"{self.path} has no weights for {len(missing)} tensors of {component} ({missing[0]}); "
                "the checkpoint is incomplete: download it again"
            )
        return model

    def unread(self, component: str, model_class: Any, dtype: Any) -> None:
        """None: diffusers' converters join and split weights, and do so in memory."""

    def _weights(self, prefix: str, dtype: Any) -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {
                name: file.get_tensor(name).to(dtype=dtype)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }


def _text_encoder(component: str, model_class: Any, weights: dict[str, Any], folder: str, dtype: Any) -> Any:
    from diffusers.loaders import single_file_utils

    options = {"subfolder": component, "config": folder, "torch_dtype": dtype, "local_files_only": True}
    if component != T5.name:
        return single_file_utils.create_diffusers_clip_model_from_ldm(model_class, weights, **options)
    model = single_file_utils.create_diffusers_t5_model_from_checkpoint(model_class, weights, **options)
    # Both names are one tensor; files have one or both, and diffusers ties nothing.
    if not model.shared.weight.is_meta:
        model.encoder.embed_tokens.weight = model.shared.weight
    return model


def open_single_file(path: Path, family: Family) -> SingleFileModel:
    """Open a checkpoint without reading its weights.

    Args:
        path: The file. Folders ``tokenizer``, ``tokenizer_2`` and ``tokenizer_3`` beside it, as in the
            published repositories, make its text encoders usable.
        family: SD3's.

    Raises:
        ModelError: If it is no safetensors file, or no SD3.
    """
    shapes = _header(path)
    if f"{_PREFIXES['transformer']}joint_blocks.0.x_block.attn.qkv.weight" not in shapes:
        raise ModelError(
            f"{path} is no SD3 checkpoint in the published layout: it has no "
            f"{_PREFIXES['transformer']}joint_blocks, but {', '.join(_kinds(shapes))}; give an SD3 or SD3.5 "
            "file, or the folder that pipeline.save_pretrained wrote"
        )
    there = {
        component for component, prefix in _PREFIXES.items() if any(n.startswith(prefix) for n in shapes)
    }
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": list(CLASSES["scheduler"]),
    }
    for component in _PREFIXES:
        tokenizer = family.tokenizers.get(component)
        usable = component in there and (tokenizer is None or (path.parent / tokenizer).is_dir())
        index[component] = list(CLASSES[component]) if usable else [None, None]
        if tokenizer is not None:
            index[tokenizer] = ["transformers", "AutoTokenizer"] if usable else [None, None]
    source = SingleFileModel(
        name=str(path), path=path, revision=None, index=index, family=family, shapes=shapes
    )
    source.config("transformer")
    return source


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path} is no safetensors file; .ckpt, .pt and .bin are pickles, and a pickle can run any code "
            "when it is read: give the checkpoint's .safetensors file, or convert it where you trust it with "
            "pipe.save_pretrained(folder, safe_serialization=True)"
        )
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}; download it again") from error
    return {name: (shape, math.prod(shape) * _BYTES.get(kind, 4)) for name, (shape, kind) in shapes.items()}


def _kinds(names: Mapping[str, Any]) -> list[str]:
    """The first words of the tensors' names, a few of them."""
    return sorted({".".join(name.split(".")[:2]) for name in names})[:4] or ["nothing"]


def _transformer_config(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    prefix = _PREFIXES["transformer"]
    names = [name.removeprefix(prefix).split(".") for name in shapes if name.startswith(prefix)]
    norm = shapes.get(f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight")
    try:
        width, channels, patch, _ = shapes[f"{prefix}x_embedder.proj.weight"]
        caption, text_dim = shapes[f"{prefix}context_embedder.weight"]
        positions = shapes[f"{prefix}pos_embed"][1]
        out = shapes[f"{prefix}final_layer.linear.weight"][0]
        pooled = shapes[f"{prefix}y_embedder.mlp.0.weight"][1]
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(f"{path} is an incomplete SD3 checkpoint ({error}); download it again") from error
    head_dim = norm[0] if norm else _HEAD_DIM
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": CONFIGS["sd3"]["transformer"]["sample_size"],
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": out // patch**2,
        "num_layers": 1 + max(int(parts[1]) for parts in names if parts[0] == "joint_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": text_dim,
        "caption_projection_dim": caption,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": math.isqrt(positions),
        "qk_norm": "rms_norm" if norm else None,
        "dual_attention_layers": sorted({int(parts[1]) for parts in names if "attn2" in parts}),
    }
