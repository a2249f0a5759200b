"""What a family of models is: facts, and where its code lies. Importing it loads no torch.

A family is one folder beside this file. ``__init__.py`` holds its :class:`Family`; what needs torch lies in
modules of fixed names, imported when they are first used:

========== ================================================================== ===========================
module     what it defines                                                    used by
========== ================================================================== ===========================
graph      ``blocks(model)``: the denoiser cut into embed, blocks and head    exporter
prompt     ``encode(prompt, texts)``: what the text encoders' outputs become  runtime
oracle     ``predict``, ``attention_blocks``, ``image_tokens`` and           reference
           ``STREAMS`` of the *unmodified* model; ``latents_size``,
           ``cond_rows``, ``SEPARATE_CALLS`` and ``PIPELINE_ATTRIBUTES`` of
           its pipeline's calls                                               diffusers_guidance
========== ================================================================== ===========================
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from emag_export.contract import DenoiserContract, GraphSpec, TensorSpec
from emag_export.kinds import Renorm, Variant
from emag_export.labels import ClassLabels
from emag_export.models import KnownModel, NegativeDefaults, SamplingDefaults
from emag_export.shapes import Dim, Sizes
from emag_export.sizes import TextRange

__all__ = ["Component", "Config", "Family", "Latents", "Shape", "Sigmas", "load"]

Sigmas = Literal["scheduler", "linear"]
"""``scheduler``: its own; ``linear``: 1, 1 - 1/n … 1/n, which some pipelines hand to it."""

Config = Mapping[str, Any]
"""A component's ``config.json``."""


def load(name: str) -> Any:
    """The object ``"package.module:attribute"``, imported now.

    Args:
        name: Module and attribute, with a colon between them.
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What ``transformer/config.json`` decides; the fields of the contract, where they are explained."""

    num_blocks: int
    heads: int
    head_dim: int
    latents: tuple[Dim, ...]
    out_channels: int
    grid: tuple[Dim, ...]
    keys: Dim
    conditioning: tuple[TensorSpec, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    prediction: str = "velocity"
    native_side: int
    """Latents along a side of the pictures that the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """How latents of the denoiser and of the autoencoder belong together: ``z / scale + shift``."""

    pixels_per_latent: int
    """Along a side."""
    scale: tuple[float, ...]
    """One number, or one per channel."""
    shift: tuple[float, ...]


def _never(config: Config) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Component:
    """A graph of a bundle besides the denoiser, and how it is loaded, described and traced."""

    name: str
    """Its folder in a bundle."""
    folder: str
    """Its folder in the source pipeline."""
    library: str
    """``diffusers`` or ``transformers``."""
    model_class: str
    wrapper: str
    """``module:class`` of a module with named inputs and outputs around the model."""
    spec: Callable[[str, Config, str], GraphSpec]
    """(name, configuration, precision) to its graph."""
    example: Sizes
    check: tuple[Sizes, ...]
    tokenizer: str | None = None
    """Folder of the tokenizer that feeds it."""
    added_tokens: int = 0
    """Of a template around every prompt, where it takes more of them than ``max_sequence_length``."""
    label: str
    """What people call it."""
    optional: str | None = None
    """Name of the switch that leaves it out; None where pictures need it."""
    note: str = ""
    """What a float16 bundle computes in float32 in it, and why."""
    keeps_float32: Callable[[Config], bool] = _never
    """Whether its weights stay in float32 in a float16 bundle."""
    half_size: float = 1.0
    """Bytes of its half-precision graph, in multiples of half precision throughout."""

    def weights_precision(self, config: Config, precision: str) -> str:
        """In which its weights are loaded for a bundle of this precision.

        Args:
            config: The component's own.
            precision: Of the bundle, a dtype.
        """
        return "float32" if precision == "float16" and self.keeps_float32(config) else precision


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share their code here."""

    name: str
    """Its folder beside this file, and ``contract.family``."""
    title: str
    """What people call it."""
    pipelines: tuple[str, ...]
    """``_class_name`` in ``model_index.json``."""
    transformer: str
    """Class of the denoiser in diffusers."""
    legacy_transformers: tuple[str, ...] = ()
    """What that class was called when older checkpoints were saved."""
    components: tuple[Component, ...]
    """In the order in which a bundle lists them; those with a tokenizer encode text."""
    decoder: str
    """Name of the component that makes pictures of latents."""
    encoder: str
    """``module:function`` from the autoencoder and pictures to its latents, for previews."""
    shape: Callable[[Config, str], Shape]
    """(transformer configuration, precision) to its shape."""
    latents: Callable[[Config], Latents]
    """From the autoencoder's configuration."""
    text: Callable[[Callable[[str], Config], SamplingDefaults], TextRange]
    """(configuration by folder, defaults) to the number of text tokens."""
    longest_text: int = 0
    """Largest ``max_sequence_length``; 0 where prompts are no text."""
    labels: Callable[[Mapping[str, Any], Config], ClassLabels] | None = None
    """(``model_index.json``, transformer configuration) to the classes that prompts name; None: prompts are
    text."""
    sigmas: Sigmas = "scheduler"
    """Noise levels of flow matching before the scheduler shifts them."""
    unguided: str = ""
    """Why its pipeline cannot be guided inside diffusers; empty where it can."""
    annealed: str | None = None
    """Conditioning tensor that CADS mixes noise into; None where there is no text."""
    attentions: Callable[[Config], int]
    """Attentions in one call of the denoiser."""
    settings: tuple[str, ...] = ()
    """Fields of ``BuildOptions`` that only some families have."""
    models: Mapping[str, KnownModel]
    """Known by name."""
    negatives: Mapping[Variant, NegativeDefaults]
    """Kinds of negatives that are sampled otherwise than EMAG, for models that say nothing of their own."""
    defaults: Callable[[int, int], SamplingDefaults]
    """(pixels along a side of the pictures it was trained on, blocks) of a model not known by name."""
    configs: Mapping[str, Mapping[str, Config]]
    """Name to the configuration of every folder: what random weights are made for."""
    classes: Mapping[str, tuple[str, str]]
    """Folder to library and class, as ``model_index.json`` names them."""
    parameters: Mapping[str, int]
    """Numbers in a model's transformer, by name of the model, and in the other folders."""
    token_limits: Mapping[str, int] = field(default_factory=dict)
    """Folder of a tokenizer to its longest text."""
    vocabulary: str = ""
    """Folder in this package with tokenizers for models with random weights."""
    vocabulary_folders: Mapping[str, str] = field(default_factory=dict)
    """Folder of a tokenizer to its folder there, where the names differ."""
    single_file: str | None = None
    """``module:function`` that opens a checkpoint of one file; None where there is no such format."""

    def part(self, name: str) -> Any:
        """The family's module ``graph``, ``prompt`` or ``oracle``.

        Args:
            name: One of the three.
        """
        return import_module(f"emag_export.families.{self.name}.{name}")

    def component(self, name: str) -> Component:
        """The component of this name.

        Args:
            name: Its folder in a bundle.
        """
        return next(component for component in self.components if component.name == name)

    @property
    def folders(self) -> Mapping[str, str]:
        """Folder in a bundle to folder in the source, the denoiser first."""
        return {"transformer": "transformer", **{part.name: part.folder for part in self.components}}

    @property
    def tokenizers(self) -> Mapping[str, str]:
        """Text encoder to the folder of the tokenizer that feeds it."""
        return {part.name: part.tokenizer for part in self.components if part.tokenizer is not None}

    @property
    def optional(self) -> Mapping[str, str]:
        """Components that may be left out: name to switch."""
        return {part.name: part.optional for part in self.components if part.optional is not None}

    @property
    def needed(self) -> tuple[str, ...]:
        """Components without which there is no picture of a prompt, the denoiser first."""
        return ("transformer", *(part.name for part in self.components if part.optional is None))

    def contract_in(self, contract: DenoiserContract, config: Config, precision: str) -> DenoiserContract:
        """The contract of the same denoiser in another precision.

        Args:
            contract: Of the denoiser.
            config: Of the transformer.
            precision: Of the weights, a dtype.
        """
        return self.contract(
            config,
            variant=contract.variant,
            blocks=contract.blocks,
            renorm=contract.renorm,
            precision=precision,
            state_dtype=contract.state_dtype,
        )

    def contract(
        self,
        config: Config,
        *,
        variant: Variant,
        blocks: tuple[int, ...],
        renorm: Renorm = Renorm.ROW,
        precision: str = "float32",
        state_dtype: str = "float32",
    ) -> DenoiserContract:
        """The contract of a model with this ``transformer/config.json``, forked at ``blocks[0]``.

        Args:
            config: Of the transformer.
            variant: What is averaged.
            blocks: Candidates.
            renorm: How a partly replaced row is brought back to sum one.
            precision: Of the weights, a dtype.
            state_dtype: Of the averages between two steps.

        Raises:
            InputError: If a candidate block lies outside the model, or the variant does not exist for it.
        """
        shape = self.shape(config, precision)
        facts = {name: getattr(shape, name) for name in Shape.__dataclass_fields__ if name != "native_side"}
        return DenoiserContract(
            family=self.name,
            variant=variant,
            blocks=blocks,
            renorm=renorm,
            precision=precision,
            state_dtype=state_dtype,
            **facts,
        )
