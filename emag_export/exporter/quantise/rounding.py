"""Round a weight per output channel, when it is written: one at a time, and read once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir import DataType

__all__ = ["FORMATS", "Format", "Rounded"]

_LEAST_SCALE = 6e-8
"""The smallest number above zero that float16 holds: the scale of a channel of zeros."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Numbers of eight bits."""

    dtype: DataType
    numpy: Any
    largest: float
    """What the largest absolute value of a channel becomes."""


FORMATS = {
    "int8": Format(dtype=DataType.INT8, numpy=np.int8, largest=127.0),
    "fp8": Format(dtype=DataType.FLOAT8E4M3FN, numpy=ml_dtypes.float8_e4m3fn, largest=448.0),
}
"""By name. Symmetric: int8 leaves -128 out."""


class Rounded:
    """A weight in eight bits, and the scales that it is multiplied with.

    Args:
        weight: [outputs, inputs] or the other way round; its numbers may be yet to be read.
        outputs_axis: Which of the two are the outputs.
        form: What it becomes.
        scale_dtype: Of the scales, the graph's precision.
        transpose: Whether it is stored the other way round than it came.
    """

    def __init__(
        self,
        weight: Any,
        outputs_axis: int,
        form: Format,
        scale_dtype: DataType,
        *,
        transpose: bool = False,
    ) -> None:
        self._weight, self._axis, self._form = weight, outputs_axis, form
        self._scale_dtype = scale_dtype
        self._transpose = transpose
        self._scales: NDArray[Any] | None = None

    @property
    def outputs(self) -> int:
        """Number of scales."""
        return int(self._weight.shape[self._axis])

    @property
    def axis(self) -> int:
        """The axis of outputs, as it is stored."""
        return 1 - self._axis if self._transpose else self._axis

    def numbers(self, name: str) -> Any:
        """The rounded weight, for onnx_ir: made when it is asked for."""
        shape = tuple(int(side) for side in self._weight.shape)
        return self._lazily(name, self._form.dtype, shape[::-1] if self._transpose else shape, self._round)

    def scales(self, name: str) -> Any:
        """One per output, for onnx_ir; no second reading where the numbers were made before."""

        def scales() -> NDArray[Any]:
            if self._scales is None:
                self._round()
            assert self._scales is not None, "rounding finds them"
            return self._scales

        return self._lazily(name, self._scale_dtype, (self.outputs,), scales)

    @staticmethod
    def _lazily(name: str, dtype: DataType, shape: tuple[int, ...], make: Callable[[], Any]) -> Any:
        def tensor() -> Any:
            return onnx_ir.tensor(make(), name=name)

        return onnx_ir.LazyTensor(tensor, dtype=dtype, shape=onnx_ir.Shape(shape), name=name)

    def _round(self) -> NDArray[Any]:
        weight = self._weight.numpy().astype(np.float32)
        within = 1 - self._axis
        scales = np.abs(weight).max(axis=within) / self._form.largest
        self._scales = np.maximum(scales, _LEAST_SCALE).astype(self._scale_dtype.numpy())
        scaled = weight / np.expand_dims(self._scales.astype(np.float32), within)
        if self._form.dtype == DataType.INT8:
            scaled = np.round(scaled)
        most = self._form.largest
        rounded = np.maximum(np.minimum(scaled, most), -most).astype(self._form.numpy)
        return np.ascontiguousarray(rounded.T if self._transpose else rounded)
