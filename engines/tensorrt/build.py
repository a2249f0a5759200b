"""Engines for every graph of a bundle: what is up to date stays, the rest is built one by one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emag_export.bundle import ENGINES, Bundle
from emag_export.contract import GraphSpec
from emag_export.engines.tensorrt.builder import build_plan
from emag_export.engines.tensorrt.flavour import CURRENT, Flavour, capability_of
from emag_export.engines.tensorrt.gpu import Gpu, current_gpu, require_memory
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.engines.tensorrt.profiles import Profile, profiles_of
from emag_export.engines.tensorrt.store import EngineFolder, EngineHeader, PlanRecord, plan_key
from emag_export.errors import Call
from emag_export.progress import Event, Progress, silent

__all__ = ["EngineBuild", "compile_call", "plan_engine_build"]


def compile_call(bundle: Bundle, backend: str, targets: tuple[str, ...] = (CURRENT,)) -> Call:
    """The call that builds the engines of a bundle anew."""
    where = {} if targets == (CURRENT,) else {"targets": targets}
    return Call(verb="compile", arguments={"bundle": bundle.path, "backend": backend, **where})


@dataclass(frozen=True, kw_only=True)
class _Part:
    component: str
    spec: GraphSpec
    profiles: tuple[Profile, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """A checked build: where its plans go, and which of them are still to be made."""

    bundle: Bundle
    flavour: Flavour
    options: EngineOptions
    version: str
    gpu: Gpu | None
    """The device it is for; None where it is for named targets."""
    folder: EngineFolder
    parts: tuple[_Part, ...]
    missing: tuple[str, ...]
    """Components without an up-to-date plan."""

    def run(self, progress: Progress = silent) -> Mapping[str, PlanRecord]:
        """Build what is missing; each plan is saved as soon as it is done.

        Args:
            progress: Told of every step of the builder.

        Raises:
            EngineError: If a build fails; plans that were finished stay.
            KeyboardInterrupt: After Ctrl-C; likewise.
        """
        for part in self.parts:
            if part.component not in self.missing:
                progress(Event(component=part.component, phase="reuse", done=1, total=1))
                continue
            progress(Event(component=part.component, phase="compile", done=0, total=1))
            graph = self.bundle.graph(part.component)
            if self.gpu is not None:
                need = _weights(graph) + _inputs_and_outputs(part)
                require_memory(self.gpu, need, f"building {part.component}")

            def report(phase: str, step: int, steps: int, component: str = part.component) -> None:
                progress(Event(component=component, phase=phase.lower(), done=step, total=steps))

            if self.options.timing_cache:
                self.folder.path.mkdir(parents=True, exist_ok=True)
            plan = build_plan(
                graph,
                part.spec,
                part.profiles,
                self.flavour,
                self.options,
                timing_cache=self.folder.timing_cache if self.options.timing_cache else None,
                on_phase=report,
            )
            self.folder.save(
                part.component,
                plan,
                key=part.key,
                header=EngineHeader(
                    backend=self.flavour.backend,
                    version=self.version,
                    targets=self.options.targets,
                    device=None if self.gpu is None else self.gpu.name,
                ),
                precision=self.bundle.contract.precision,
                profiles=part.profiles,
                options=self.options,
            )
            del plan  # before the next one is built: plans are as large as the weights
        return self.folder.read().plans


def plan_engine_build(bundle: Bundle, flavour: Flavour, options: EngineOptions) -> EngineBuild:
    """Check everything that can be checked before a build, and find what is already there.

    Raises:
        InputError: If an option does not fit the module or the model.
        MissingDependencyError: If the module is absent.
        EngineError: If it is for this machine's GPU and there is none that fits.
    """
    options.check(flavour)
    quantisation = bundle.quantisation
    if quantisation is not None:
        quantisation.check_backend(flavour.backend)
        for target in options.targets:
            if target != CURRENT:
                quantisation.check_capability(target, capability_of(target))
    version = flavour.version()
    gpu = current_gpu(flavour, instead=flavour.without_gpu()) if options.targets == (CURRENT,) else None
    if quantisation is not None and gpu is not None:
        quantisation.check_capability(gpu.name, gpu.capability)
    place = re.sub(r"[^\w.+-]", "-", "+".join(options.targets) if gpu is None else gpu.slug)
    parts = []
    for component in bundle.components:
        profiles = profiles_of(bundle, bundle.spec(component), options, flavour)
        key = plan_key(
            bundle,
            component,
            backend=flavour.backend,
            version=version,
            device=None if gpu is None else gpu.name,
            profiles=profiles,
            options=options,
        )
        parts.append(_Part(component=component, spec=bundle.spec(component), profiles=profiles, key=key))
    folder = EngineFolder(
        bundle.path / ENGINES / f"{flavour.backend}-{version}-{place}",
        compile_call(bundle, flavour.backend, options.targets),
    )
    missing = tuple(part.component for part in parts if not folder.holds(part.component, part.key))
    return EngineBuild(
        bundle=bundle,
        flavour=flavour,
        options=options,
        version=version,
        gpu=gpu,
        folder=folder,
        parts=tuple(parts),
        missing=missing,
    )


def _weights(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _inputs_and_outputs(part: _Part) -> int:
    """Bytes of all inputs and outputs at the largest sizes: a lower bound, known before anything is built."""
    sizes = {name: size.max for name, size in part.profiles[-1].items()}
    return sum(tensor.nbytes(sizes) for tensor in (*part.spec.inputs, *part.spec.outputs))
