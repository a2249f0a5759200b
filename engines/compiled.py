"""torch.compile: the exported module, compiled for each kind of call, with CUDA graphs on a GPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emag_export.contract import GraphSpec
from emag_export.engines.eager import EagerEngine
from emag_export.engines.protocol import allocate_outputs
from emag_export.errors import EngineError

__all__ = ["MAX_KINDS", "CompiledEngine"]

MAX_KINDS = 32
"""Kinds of call that one engine compiles. Each keeps its code, on a GPU its graphs too; further ones run
without compiling, since nothing compiled can be given back on its own."""

_NO_LIMIT = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
"""PyTorch stops at 8 per function, counting those of other engines; here :data:`MAX_KINDS` is the limit."""

_REMEDIES = {
    "C++ compiler": "install a C++ compiler (apt install g++) or name one in CXX",
    "Python.h": "install the headers of Python (apt install python3-dev)",
    "triton installation": "install Triton (pip install triton)",
}
"""By what the message of PyTorch holds."""


class CompiledEngine(EagerEngine):
    """Runs a module under ``torch.compile``; shapes are static, so each kind of call compiles once.

    A run with EMAG has two kinds, with and without the perturbed rows. The first call of a kind compiles it,
    on a GPU the second records a CUDA graph and later ones replay it. The graph's inputs, the averages too,
    are copied into its own memory and results out of it. All calls must come from one thread then.

    Args:
        module: In eval mode, already on ``device``, and traceable as a whole.
        spec: What it takes and gives.
        device: Where it runs.
        cuda_graphs: Capture calls and replay them, on a GPU.
        backend: Of ``torch.compile``; ``aot_eager`` traces everything and generates no code.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: GraphSpec,
        device: str = "cpu",
        *,
        cuda_graphs: bool = True,
        backend: str = "inductor",
    ) -> None:
        super().__init__(module, spec, device)
        self.name = f"torch.compile ({device})"
        self._cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self._kinds: set[tuple[tuple[str, int], ...]] = set()
        self._compiled: Any = torch.compile(
            module,
            fullgraph=True,
            dynamic=False,
            backend=backend,
            mode="reduce-overhead" if self._cuda_graphs else None,
        )

    def _call(self, feeds: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Any:
        kind = tuple(sorted(sizes.items()))
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            return super()._call(feeds, sizes)
        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch._dynamo.config.patch(_NO_LIMIT):
                results = self._compiled(**{name: _alike(tensor) for name, tensor in feeds.items()})
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{self.name} ran out of device memory in {self.spec.name}; generate fewer or smaller "
                f"pictures per call (`batch_size`), or end other programs on this GPU: {error}"
            ) from error
        except Exception as error:
            raise self._failure(error) from error
        self._kinds.add(kind)
        return results

    def _buffers(self, sizes: Mapping[str, int], out: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Results of a CUDA graph lie where the next call writes its own: each is copied out."""
        if self._cuda_graphs:
            return allocate_outputs(self.spec, sizes, self.device, out)
        return super()._buffers(sizes, out)

    def _failure(self, error: Exception) -> EngineError:
        text = str(error)
        lines = [line for line in text.splitlines() if line.strip() and not line.endswith("raised:")]
        reason = lines[0].strip() if lines else type(error).__name__
        remedies = [remedy for sign, remedy in _REMEDIES.items() if sign in text]
        remedies.append("`backend` torch runs it without compiling")
        return EngineError(f"{self.name} failed in {self.spec.name}: {reason}; {', or '.join(remedies)}")

    def close(self) -> None:
        """Let the module and its compiled code go."""
        self.__dict__.pop("_compiled", None)
        super().close()


def _alike(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous and marked as made in inference mode, which compiled code is picky about.

    The mark decides for which tensors the code is valid, and inputs come with and without it: embeddings
    with, latents without. A copy is made of non-contiguous tensors only.
    """
    tensor = tensor.contiguous()
    if tensor.is_inference():
        return tensor
    alike = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alike.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
