"""The bundle on disk: what ``build`` writes and everything else reads.

The layout follows diffusers: ``model_index.json``, ``scheduler/``, ``tokenizer*/``, and one folder per
graph with ``model.onnx`` and its external data. ``bundle.json`` beside them holds the contract, the
provenance and the SHA-256 of every file; a file that does not match is refused, never used.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.errors import BundleError, Call, InputError
from emag_export.families import KNOWN_MODELS, family_of
from emag_export.families.family import Family, load
from emag_export.hashing import hash_file
from emag_export.kinds import Variant, member
from emag_export.labels import ClassLabels
from emag_export.manifest import EncodersRecord, FileRecord, Manifest, PreviewFactors, Provenance
from emag_export.models import SamplingDefaults
from emag_export.options import BuildOptions, Lora, given
from emag_export.quantisation import Quantisation, Ranges
from emag_export.records import Upgrade, read_record
from emag_export.sizes import Geometry

__all__ = [
    "DENOISER",
    "GRAPH_FILE",
    "MANIFEST",
    "RANGES",
    "Bundle",
    "engine_graph_file",
    "file_records",
]

MANIFEST = "bundle.json"
GRAPH_FILE = "model.onnx"
DENOISER = "transformer"
_UPGRADES: Mapping[int, Upgrade] = MappingProxyType(
    {1: lambda data: load("emag_export.families.sd3.version1:upgrade")(data)}
)
RANGES = "calibration/ranges.json"
ENGINES = "engines"
"""Folder of compiled plans; they carry their own hashes and are not part of the bundle's."""
_HASHED_BESIDE = 1 << 26
"""Files with more bytes are hashed while they are loaded. Graphs themselves have less: a parser sees only
what was checked."""


def engine_graph_file(engine: str) -> str:
    """Name of the graph that one backend takes instead of the standard one, over the same external data.

    Args:
        engine: The backend, ``onnxruntime``.
    """
    return f"{engine}.onnx"


def file_records(root: Path, hash_of: Callable[[Path], str] = hash_file) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file below ``root``, keyed by relative POSIX path.

    Args:
        root: A folder.
        hash_of: Hashes one file; for callers that know the hash, or want to tell how far it is.
    """
    return {
        path.relative_to(root).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=hash_of(path))
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != MANIFEST and path.relative_to(root).parts[0] != ENGINES
    }


class Bundle:
    """A finished bundle, opened read-only.

    Args:
        path: The folder ``build`` wrote.

    Raises:
        BundleError: If the folder is not a bundle, or was written by a newer contract version.

    Examples:
        >>> from emag_export import Bundle
        >>> bundle = Bundle("bundle")
        >>> bundle.components
        ['transformer', 'text_encoder', 'text_encoder_2', 'text_encoder_3', 'vae_decoder']
        >>> bundle.contract.graph.inputs[0].dims, bundle.defaults.steps
        (('trunk_rows', 8, '2*h', '2*w'), 28)
        >>> bundle.check()  # every file against its SHA-256
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise BundleError(
                f"{self.path} is not a bundle: it has no {MANIFEST}; make one",
                remedy=Call(verb="build", arguments={"model": next(iter(KNOWN_MODELS)), "output": self.path}),
            )
        self.manifest = read_record(
            Manifest,
            manifest.read_bytes(),
            name=str(manifest),
            remedy="rebuild the bundle with `overwrite`",
            upgrades=_UPGRADES,
        )

    @property
    def contract(self) -> DenoiserContract:
        """What its denoiser takes and gives."""
        return self.manifest.contract

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the content."""
        return self.manifest.key

    @property
    def provenance(self) -> Provenance:
        """Where this bundle came from."""
        return self.manifest.source

    @property
    def family(self) -> Family:
        """What its model is one of."""
        return family_of(self.contract)

    @property
    def geometry(self) -> Geometry:
        """Pixels per latent, and how long a text is."""
        return self.manifest.geometry

    @property
    def options(self) -> BuildOptions:
        """The options that build this bundle again, all spelt out."""
        contract, source, shared = self.contract, self.provenance, self.encoders
        own = tuple(self.manifest.graphs)
        left_out = () if shared is None else (n for n in self.family.optional if n not in shared.components)
        return BuildOptions(
            variant=contract.variant,
            renorm=contract.renorm,
            emag_candidates=contract.blocks,
            precision=contract.precision,
            state_precision=contract.state_dtype,
            revision=source.revision,
            weights_seed=source.seed,
            components=None if shared is not None or set(own) == set(self.family.folders) else own,
            without=tuple(left_out),
            encoders=None if shared is None else Path(os.path.relpath(self.path / shared.path)),
            loras=tuple(Lora(path=Path(lora.name), scale=lora.scale) for lora in source.loras),
            max_sequence_length=self.defaults.max_sequence_length or None,
            timestep_shift=source.timestep_shift,
            **self._quantisation_options(),
        )

    def _quantisation_options(self) -> dict[str, Any]:
        found = self.quantisation
        if found is None:
            return {}
        options: dict[str, Any] = {"quantize": found.scheme, "fp8_attention": found.attention}
        if found.calibration is not None:
            file = found.calibration.file
            options |= {
                "calibration_prompts": None if file is None else Path(file),
                "calibration_steps": found.calibration.steps,
                "calibration_size": found.calibration.pixels,
            }
        return options

    def rebuild(self, path: Path | None = None, **changed: Any) -> Call:
        """The call that builds this bundle again.

        Args:
            path: Where to; None replaces it.
            **changed: Options that shall differ.

        Returns:
            A call of :func:`emag_export.build` as data; ``str()`` writes it in Python.
        """
        options = replace(self.options, **changed)
        where = {"output": self.path, "overwrite": True} if path is None else {"output": path}
        return Call(verb="build", arguments={"model": self.provenance.model, **where, **given(options)})

    @property
    def defaults(self) -> SamplingDefaults:
        """How to sample when nothing else is asked for."""
        return self.manifest.defaults

    @property
    def labels(self) -> ClassLabels | None:
        """Classes that prompts name; None where they are text."""
        return self.manifest.labels

    @property
    def preview(self) -> PreviewFactors | None:
        """Colours of latents; None without a VAE, or with random weights."""
        return self.manifest.preview

    @property
    def encoders(self) -> EncodersRecord | None:
        """Components that lie in another bundle."""
        return self.manifest.encoders

    @property
    def quantisation(self) -> Quantisation | None:
        """How the denoiser was quantised; None where it was not."""
        return self.manifest.quantisation

    @property
    def described_precision(self) -> str:
        """Of weights and arithmetic, in a word or two."""
        precision = self.contract.precision
        return precision if self.quantisation is None else f"{precision} + {self.quantisation.scheme}"

    def ranges(self) -> Mapping[str, float]:
        """Largest values that the calibration measured, by name of a linear; empty where there was none.

        Raises:
            BundleError: If their file does not match its hash, or cannot be read.
        """
        if RANGES not in self.files:
            return {}
        self.check(RANGES)
        path = self.path / RANGES
        remedy = "rebuild the bundle with `overwrite`"
        return read_record(Ranges, path.read_bytes(), name=str(path), remedy=remedy).largest

    @property
    def components(self) -> list[str]:
        """Folders that hold a graph, the denoiser first."""
        return [name for name in self.family.folders if name in self.manifest.graphs]

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Size and SHA-256 by relative path."""
        return self.manifest.files

    @cached_property
    def model_index(self) -> dict[str, Any]:
        """Pipeline class and component classes, as diffusers writes them."""
        self.check("model_index.json")
        return dict(json.loads((self.path / "model_index.json").read_text("utf-8")))

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """The checked configuration file of one component.

        Args:
            component: Folder in the bundle; ``scheduler`` and tokenizers count here, too.
            name: Of the file.

        Returns:
            What its JSON says.

        Raises:
            BundleError: If it does not match its hash.
        """
        relative = f"{component}/{name}"
        self.check(relative)
        return dict(json.loads((self.path / relative).read_text("utf-8")))

    def spec(self, component: str) -> GraphSpec:
        """Inputs and outputs of one graph.

        Args:
            component: Folder in the bundle.
        """
        if component == DENOISER:
            return self.contract.graph
        return self.manifest.graphs[component]

    def graph(self, component: str) -> Path:
        """Path of one graph, after checking the hashes of everything in its folder.

        Args:
            component: Folder in the bundle.

        Raises:
            BundleError: If the component is absent or a file does not match its hash.
        """
        path = self._graph_path(component)
        self.check(f"{component}/")
        return path

    def _graph_path(self, component: str) -> Path:
        if component not in self.components:
            raise BundleError(
                f"{self.path} has no {component}, only {', '.join(self.components)}; the source model has "
                "none, or `components` left it out"
            )
        return self.path / component / GRAPH_FILE

    def check(self, prefix: str = "") -> None:
        """Compare files whose relative path starts with ``prefix`` against their recorded hashes.

        Args:
            prefix: For example ``transformer/``; empty checks all.

        Raises:
            BundleError: Naming the first file that is missing or differs.
        """
        for relative in self.files:
            if relative.startswith(prefix):
                self._check_size(relative)
                self._check_hash(relative)

    @contextmanager
    def loading(self, component: str, engine: str | None = None) -> Iterator[Path]:
        """Path of one graph, for a ``with`` that loads it: its weights are hashed at the same time.

        Hashing takes about as long as loading, so nobody waits for it. What was loaded may be used only after
        the ``with``.

        Args:
            component: Folder in the bundle.
            engine: Backend whose own graph is taken, where the component has one.

        Yields:
            The ONNX file.

        Raises:
            BundleError: If the component is absent or a file does not match its hash; at the end of the
                ``with`` where its bytes differ.
        """
        path = self._graph_path(component)
        if engine is not None and f"{component}/{engine_graph_file(engine)}" in self.files:
            path = path.with_name(engine_graph_file(engine))
        files = {name: record for name, record in self.files.items() if name.startswith(f"{component}/")}
        large = [name for name, record in files.items() if record.bytes > _HASHED_BESIDE]
        for name in files:
            self._check_size(name)
            if name not in large:
                self._check_hash(name)
        with ThreadPoolExecutor(max_workers=1) as pool:
            checks = [pool.submit(self._check_hash, name) for name in large]
            try:
                yield path
            finally:
                for check in checks:
                    check.result()

    def _check_size(self, relative: str) -> None:
        path, wanted = self.path / relative, self.files[relative].bytes
        if not path.is_file():
            raise BundleError(f"{path} is missing; rebuild the bundle with `overwrite`")
        size = path.stat().st_size
        if size != wanted:
            raise BundleError(
                f"{path} has {size} bytes, {wanted} were written; "
                "it is truncated or was replaced: rebuild the bundle with `overwrite`"
            )

    def _check_hash(self, relative: str) -> None:
        path = self.path / relative
        if hash_file(path) != self.files[relative].sha256:
            raise BundleError(
                f"{path} does not match its SHA-256; it is corrupted or was edited: "
                "rebuild the bundle with `overwrite`"
            )

    def require_variant(self, variant: Variant | str | None) -> None:
        """Refuse if the caller asked for another variant than the graph holds.

        Args:
            variant: A member or its value; None is content with any.

        Raises:
            InputError: With the call that builds the wanted variant; or if there is no such variant.
        """
        if variant is None:
            return
        wanted = member(Variant, variant, "variant")
        if wanted != self.contract.variant:
            raise InputError(
                f"{self.path} holds the variant {self.contract.variant}, {wanted} was asked for; build it",
                remedy=self.rebuild(Path(f"{self.path}-{wanted}"), variant=wanted),
            )
