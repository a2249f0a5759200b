"""Measure on a GPU, part by part: ``python -m benchmarks.gpu --part eager onnxruntime``.

Without ``--part`` all parts run, one after the other. Every engine and bundle runs in a process of its own
with a time limit, and every result, and every failure with its reason, is a line of JSON on the disk at once.
The same command continues: what has a line of the same commit, device, driver and versions is not run again.
At the end the lines are put together in one JSON file and one table.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from benchmarks.gpu.items import PARTS, Options
from benchmarks.gpu.lines import Lines, this_machine
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.summary import markdown, summarise
from emag_export.bench.report import describe_machine
from emag_export.contract import PRECISIONS
from emag_export.families import KNOWN_MODELS

_PIXELS = 1024
"""Of a model that is not known by name."""


def main() -> int:
    """Run the parts, print what is found, write the summary."""
    arguments = _parser().parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("PyTorch sees no NVIDIA GPU; run this on a machine with one", file=sys.stderr)
        return 2
    known = KNOWN_MODELS.get(arguments.model)
    pixels = arguments.pixels or (_PIXELS if known is None else known.defaults.height)
    names = ("bundles", "device", "model", "weights", "precision", "steps", "runs")
    options = Options(**{name: getattr(arguments, name) for name in names}, pixels=pixels)
    identity = this_machine(arguments.device, arguments.commit)
    name = "gpu-" + "-".join(identity.device.lower().split()) if options.device != "cpu" else "gpu-on-cpu"
    lines = Lines(arguments.output / f"{name}.jsonl", identity)
    runner = Runner(
        options=options,
        lines=lines,
        seconds=60 * arguments.minutes,
        limit=arguments.limit,
        retry=arguments.retry,
        report=lambda text: print(text, flush=True),
    )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the child, too
    try:
        for part in arguments.part:
            runner.run(part, PARTS[part])
    finally:
        summary = summarise(lines, describe_machine())
        path, text = lines.path.with_suffix(".json"), markdown(summary)
        path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
        path.with_suffix(".md").write_text(text, "utf-8")
    print(f"\n{text}\n{path}")
    if runner.left:
        print(f"{len(runner.left)} items had no time left: run the same command again")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="Default: all.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="Folder of the files."
    )
    parser.add_argument("--bundles", type=Path, default=Path("out/gpu"), help="Built here, and kept.")
    parser.add_argument("--minutes", type=float, default=10, help="That a part may take. Default 10.")
    parser.add_argument(
        "--limit", type=float, help="Seconds that an item may take, in place of its own limit."
    )
    parser.add_argument("--retry", action="store_true", help="Run again what failed before.")
    parser.add_argument("--commit", help="Of the code, where it lies outside its repository.")
    parser.add_argument("--device", default="cuda", help="cuda or cpu.")
    parser.add_argument("--model", default="sd3", help="Whose speed is measured. Default sd3.")
    parser.add_argument("--weights", choices=["random", "checkpoint"], default="random")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp16")
    parser.add_argument("--pixels", type=int, help="Height and width; default: the model's own.")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--runs", type=int, default=5, help="Whole runs that count.")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
