"""Build a bundle, open it, draw a picture and save it: the four calls that most programs need.

    python examples/first_picture.py

Needs ``pip install "emag-export[cpu,export]"``. The first run exports the model that is embedded in the
package and takes a minute; later ones find its bundle, ``out/bundle``, which the other examples open, and
take 6 s. Writes ``out/first.png``.
"""

import argparse
from pathlib import Path

import emag_export as emag

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tiny-sd3", help="known name, diffusers folder or hub id")
parser.add_argument("--bundle", default="out/bundle", help="folder of the bundle; made if it is not there")
parser.add_argument("--prompt", default="a large red circle on a blue background")
parser.add_argument("--seed", type=int, default=1)
options = parser.parse_args()

told: set[str] = set()


def report(event: emag.Event) -> None:
    """Print every phase of every component once."""
    line = f"{event.component}: {event.phase}"
    if line not in told:
        told.add(line)
        print(line)


bundle = emag.build(options.model, options.bundle, progress=report)  # returns at once if it is up to date
with emag.Pipeline.open(bundle) as pipeline:
    (picture,) = pipeline.generate(options.prompt, guidance="emag", seed=options.seed)

Path("out").mkdir(exist_ok=True)
picture.save("out/first.png")  # the PNG remembers its parameters: `emag-export generate --like out/first.png`
print("out/first.png")
