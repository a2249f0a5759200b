"""Reference on the host, engine elsewhere: every tensor is moved, none is mixed; on a pretended device."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from emag_export.engines.eager import EagerEngine
from emag_export.exporter.graph.fork import fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.reference.compare import Pictures, compare
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.guidance.rules import Guidance, Rows
from emag_export.runtime.sampling.plan import make_plan
from emag_export.runtime.sampling.rows import place_rows
from emag_export.runtime.sampling.schedule import flow_match_schedule
from tests.reference_inputs import golden_model, random_inputs

ELSEWHERE = torch.device("xpu")
"""Nothing of it is touched: it only has to differ from the host."""
CPU = torch.device("cpu")


class Away(Tensor):
    """A host tensor that says it lies elsewhere."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return ELSEWHERE


class PretendedDevice(TorchFunctionMode):
    """Computes on the host, and refuses what a real device would: operands of both places."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        away = any(isinstance(tensor, Away) for tensor in tensors)
        if away and not all(isinstance(tensor, Away) or tensor.ndim == 0 for tensor in tensors):
            raise RuntimeError(f"{func} was given tensors of two devices")
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs))
        result = func(*args, **kwargs)
        place = Away if (devices[0] == ELSEWHERE if devices else away) else Tensor
        return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(place), result)


class EngineElsewhere(EagerEngine):
    """Takes and gives tensors of the other device only; :func:`check_feeds` sees to that."""

    def __init__(self, engine: EagerEngine) -> None:
        super().__init__(engine.module, engine.spec)
        self.device = ELSEWHERE

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        assert all(isinstance(tensor, Away) for tensor in [*feeds.values(), *(out or {}).values()])
        with torch._C.DisableTorchFunction():
            here = EagerEngine(self.module, self.spec)
            plain = [
                {name: tensor.as_subclass(Tensor) for name, tensor in group.items()}
                for group in (feeds, out or {})
            ]
            outputs = here.run(plain[0], plain[1])
            return {name: tensor.as_subclass(Away) for name, tensor in outputs.items()}


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    place_rows.cache_clear()
    with PretendedDevice():
        yield
    place_rows.cache_clear()


@pytest.mark.usefixtures("_elsewhere")
def test_the_pretence_sees_a_mixture() -> None:
    moved = torch.ones(2).to(ELSEWHERE)
    assert moved.device == ELSEWHERE
    assert (moved + 1).device == torch.zeros(2, device=ELSEWHERE).device == ELSEWHERE
    assert moved.to(CPU).device == CPU
    with pytest.raises(RuntimeError, match="two devices"):
        moved + torch.ones(2)


def test_an_engine_elsewhere_is_compared_to_the_same_numbers() -> None:
    model = golden_model()
    contract = FAMILIES["sd3"].contract(model.config, variant=Variant.EMAG, blocks=(6, 7, 8))
    plan = make_plan(contract, flow_match_schedule({"shift": 3.0}, 6, image_tokens=24), Guidance())
    steps = list(two_pass_denoise(model, plan, *random_inputs(model)))
    engine = EagerEngine(fork(model, contract), contract.graph)

    def decode(latents: Rows) -> Pictures:
        assert latents.device == CPU
        return (latents[:, :3].permute(0, 2, 3, 1) * 20 + 128).clamp(0, 255).to(torch.uint8).numpy()

    here = compare(engine, plan, steps, decode=decode)
    place_rows.cache_clear()
    with PretendedDevice():
        there = compare(EngineElsewhere(engine), plan, steps, decode=decode)
    place_rows.cache_clear()
    assert there.passed
    assert there.to_json() == here.to_json()
