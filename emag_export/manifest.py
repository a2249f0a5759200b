"""``bundle.json``: what a bundle says of itself, as plain data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.errors import BundleError
from emag_export.labels import ClassLabels
from emag_export.models import SamplingDefaults
from emag_export.quantisation import Quantisation
from emag_export.sizes import Geometry

__all__ = [
    "EncodersRecord",
    "FileRecord",
    "LoraRecord",
    "Manifest",
    "PreviewFactors",
    "Provenance",
    "weights_of",
]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file, as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """A LoRA that was merged into the transformer."""

    name: str
    """Path as the user gave it."""
    sha256: str
    scale: float
    """Dimensionless; 1 is what was trained."""


def weights_of(fingerprint: str, loras: Sequence[LoraRecord]) -> tuple[object, ...]:
    """Equal for the same weights with the same LoRAs in them, wherever their files lie."""
    return (fingerprint, *((lora.sha256, lora.scale) for lora in loras))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a bundle came from."""

    model: str
    """As the user named it: a known name, a folder, or a hub id."""
    revision: str | None
    """Commit of a hub model."""
    fingerprint: str
    """SHA-256 over the source's configuration and weights."""
    versions: Mapping[str, str]
    """Package to version of what exported it."""
    seed: int | None = None
    """Of random weights; None where the weights are the checkpoint's."""
    loras: tuple[LoraRecord, ...] = ()
    """In the order in which they were given."""
    timestep_shift: float | None = None
    """Of the frequencies that embed time; None is the model's own."""

    @property
    def weights(self) -> tuple[object, ...]:
        """What :func:`weights_of` says of the model."""
        return weights_of(self.fingerprint, self.loras)


@dataclass(frozen=True, kw_only=True)
class PreviewFactors:
    """A linear map from latents to colours in 0 … 1, fitted to the source's VAE."""

    factors: tuple[tuple[float, float, float], ...]
    """One RGB triple per latent channel."""
    bias: tuple[float, float, float]
    """RGB."""
    r2: float
    """Share of the colours' variance that it explained when it was fitted."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for row in (*self.factors, self.bias) for value in row):
            raise BundleError("the preview factors are not all finite numbers")

    @property
    def channels(self) -> int:
        """Latent channels that it takes."""
        return len(self.factors)


@dataclass(frozen=True, kw_only=True)
class EncodersRecord:
    """Text encoders, tokenizers and decoder that lie in another bundle."""

    path: str
    """Of that bundle; relative to this one where the two lie below the same folder."""
    components: tuple[str, ...]
    files: Mapping[str, str]
    """SHA-256 of every file that is used from there, by its path in it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in ``bundle.json``."""

    format_version: int = 2
    key: str
    """SHA-256 over all that decides the content."""
    contract: DenoiserContract
    defaults: SamplingDefaults
    """How to sample when nothing else is asked for."""
    geometry: Geometry
    graphs: Mapping[str, GraphSpec]
    """By folder."""
    precision_notes: Mapping[str, str]
    """Component to what is kept in float32 in a graph of half precision, and why."""
    preview: PreviewFactors | None
    """None without a VAE, or with random weights."""
    source: Provenance
    encoders: EncodersRecord | None = None
    labels: ClassLabels | None = None
    """Classes that prompts name; None where they are text."""
    quantisation: Quantisation | None = None
    """How the denoiser was quantised; None where it was not."""
    files: Mapping[str, FileRecord]
    """By path in the bundle."""

    def __post_init__(self) -> None:
        channels = self.contract.channels
        if self.preview is not None and self.preview.channels != channels:
            raise BundleError(
                f"preview.factors has {self.preview.channels} triples, the contract says {channels} channels"
            )
