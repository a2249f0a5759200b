"""What the matrix units of this device do in practice: ``python -m benchmarks.gpu.product --device cuda``.

The largest share of a data sheet's number that one large product of matrices reaches in PyTorch.
"""

import argparse
import json
from itertools import pairwise
from statistics import median

import torch

from benchmarks.gpu.clock import mark, seconds_between
from emag_export.bench.timing import wait_for
from emag_export.contract import PRECISIONS
from emag_export.engines.protocol import TORCH_DTYPES

_SIDE = {"cuda": 8192, "cpu": 512}
_PRODUCTS = 40


def main() -> int:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp16")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), TORCH_DTYPES[PRECISIONS[options.precision]]
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    marks = [mark(device)]
    for _ in range(_PRODUCTS):
        left @ right
        marks.append(mark(device))
    wait_for(device)
    # The first half warms up: libraries are loaded, and clocks rise.
    seconds = median([seconds_between(*pair) for pair in pairwise(marks)][_PRODUCTS // 2 :])
    print(json.dumps({"side": side, "tflop_per_second": 2 * side**3 / seconds / 1e12}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
