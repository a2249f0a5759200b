"""Text encoders, tokenizers and decoder of another bundle, stored once for several transformers.

``bundle.json`` then says where that bundle is and the SHA-256 of every file that is used from it::

    "encoders": {
      "path": "../sd3",
      "components": ["text_encoder", …],
      "files": {"text_encoder/model.onnx": "…", …}
    }

``path`` is relative where the two lie below the same folder, so that they can be moved together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emag_export.bundle import COMPONENTS, DENOISER, TOKENIZERS, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import BundleError, InputError
from emag_export.manifest import EncodersRecord, Geometry

__all__ = ["components_of", "home_of", "record_encoders", "shared_files"]


def shared_files(encoders: Bundle, components: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every file that is used from another bundle, by its path there.

    Args:
        encoders: The bundle that has them.
        components: Used from there; text encoders together with their tokenizers.
    """
    folders = {*components, *(TOKENIZERS[name] for name in components if name in TOKENIZERS)}
    return {name: record.sha256 for name, record in encoders.files.items() if name.split("/")[0] in folders}


def record_encoders(
    encoders: Bundle,
    out: Path,
    contract: DenoiserContract,
    geometry: Geometry,
    components: Sequence[str],
) -> EncodersRecord:
    """What a new bundle's manifest says under ``encoders``; nothing is written here.

    Args:
        encoders: The finished bundle that has them.
        out: Where the new bundle will be.
        contract: Of the new bundle's denoiser.
        geometry: What the new denoiser needs.
        components: To use from ``encoders``.

    Raises:
        InputError: If one is not there, or does not fit the denoiser.
    """
    for name in components:
        if name == DENOISER or name not in encoders.components:
            has = ", ".join(part for part in encoders.components if part != DENOISER) or "none"
            raise InputError(
                f"{encoders.path} has no {name} of its own to share, it has {has}; give another bundle with "
                "--encoders, or export the component"
            )
    for what, got, wanted in _widths(encoders, contract, geometry, components):
        if got != wanted:
            raise InputError(
                f"{encoders.path} does not fit: {what} is {got}, the transformer needs {wanted}; "
                "give --encoders a bundle of the same model family"
            )
    return EncodersRecord(
        path=_recorded_path(encoders.path, out),
        components=tuple(name for name in COMPONENTS if name in components),
        files=shared_files(encoders, components),
    )


def _widths(
    encoders: Bundle, contract: DenoiserContract, geometry: Geometry, components: Sequence[str]
) -> list[tuple[str, int, int]]:
    """(what, got, wanted) for everything that the denoiser and the components must agree on."""
    outputs = {
        name: {tensor.name: tensor.dims[-1] for tensor in encoders.spec(name).outputs} for name in components
    }
    clips = [name for name in ("text_encoder", "text_encoder_2") if name in outputs]
    checks: list[tuple[str, Any, int]] = []
    if len(clips) == 2:
        pooled = sum(int(outputs[name]["text_embeds"]) for name in clips)
        checks.append(("the width of CLIP's pooled states", pooled, contract.pooled_dim))
        width = sum(int(outputs[name]["penultimate_hidden_state"]) for name in clips)
        most = contract.text_dim  # narrower states are padded with zeros
        checks.append(("the width of CLIP's states", max(width, most), most))
    if clips:
        checks.append(("CLIP's number of tokens", encoders.clip_tokens, geometry.clip_tokens))
    if "text_encoder_3" in outputs:
        t5 = outputs["text_encoder_3"]["last_hidden_state"]
        checks.append(("the width of T5's states", t5, contract.text_dim))
    if "vae_decoder" in outputs:
        channels = encoders.spec("vae_decoder").inputs[0].dims[1]
        checks.append(("the decoder's number of latent channels", channels, contract.in_channels))
        checks.append(("the decoder's pixels per latent", encoders.vae_factor, geometry.vae_factor))
    return checks


def _recorded_path(encoders: Path, out: Path) -> str:
    target, parent = encoders.resolve(), out.resolve().parent
    if target.is_relative_to(parent):
        return f"../{target.relative_to(parent).as_posix()}"
    return target.as_posix()


def components_of(bundle: Bundle) -> list[str]:
    """Components that a pipeline of this bundle opens, its own and shared ones, the denoiser first."""
    shared = () if bundle.encoders is None else bundle.encoders.components
    return [name for name in COMPONENTS if name in bundle.components or name in shared]


def home_of(bundle: Bundle, folder: str) -> Bundle:
    """The bundle that holds a component's or a tokenizer's folder: this one, or the one it shares with.

    Args:
        bundle: Any bundle.
        folder: ``text_encoder``, ``tokenizer`` and so on.

    Raises:
        BundleError: If the other bundle is missing, or its files are not those that were recorded. Its
            files are compared with its own records when they are opened.
    """
    entry = bundle.encoders
    if entry is None or folder not in {name.split("/")[0] for name in entry.files}:
        return bundle
    path = bundle.path / entry.path
    try:
        encoders = Bundle(path)
    except BundleError as error:
        raise BundleError(
            f"{bundle.path} uses the encoders of {path}, which cannot be opened: {error}. Put that bundle "
            "back, or build this one again with --encoders and the bundle's new place"
        ) from error
    files = encoders.files
    for name, digest in entry.files.items():
        if name.split("/")[0] == folder and (name not in files or files[name].sha256 != digest):
            raise BundleError(
                f"{bundle.path} was made with another {path / name}: its SHA-256 differs; put the original "
                "back, or build this bundle again with --encoders"
            )
    return encoders
