"""Watch a picture come into being: every step's preview in one animation, and how to stop a run early.

    python examples/stream_previews.py out/bundle
    python examples/stream_previews.py out/bundle --stop-after 10 --output out/early.gif

Needs ``pip install "emag-export[cpu]"`` and a bundle (``first_picture.py`` makes one). Takes 6 s. Writes
``out/steps.webp``, or a GIF, whose last frame is the finished picture.
"""

import argparse
from contextlib import closing
from pathlib import Path

from PIL import Image

import emag_export as emag

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bundle", nargs="?", default="out/bundle")
parser.add_argument("--prompt", default="a large red circle on a blue background")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--stop-after", type=int, metavar="STEPS", help="leave the run after so many steps")
parser.add_argument("--output", type=Path, default=Path("out/steps.webp"), help=".webp or .gif")
options = parser.parse_args()

frames: list[Image.Image] = []
with (
    emag.Pipeline.open(options.bundle) as pipeline,
    # Closed, the run gives its buffers back at once, also where the loop below is left early.
    closing(pipeline.stream(options.prompt, previews=True, seed=options.seed)) as run,
):
    for step in run:
        # A preview is the picture that the step predicts; the last step has the picture itself.
        frames.append(step.images[0] if step.images else step.previews[0])
        if options.stop_after == step.index + 1:
            print(f"left after {step.index + 1} of {step.steps} steps")
            break

options.output.parent.mkdir(parents=True, exist_ok=True)
milliseconds = [80] * (len(frames) - 1) + [1500]
frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
print(f"{options.output}: {len(frames)} frames")
