"""The same seeds with several guidances on one labelled sheet: ``emag-export generate --grid`` in Python.

    python examples/compare_guidance.py out/bundle --methods cfg,emag,apg

Needs ``pip install "emag-export[cpu]"`` and a bundle (``first_picture.py`` makes one). Takes 9 s. Writes
``out/guidance.png``, and prints how far each method moved the pictures from those of the first one.
"""

import argparse
from pathlib import Path

import numpy as np

import emag_export as emag
from emag_export.evaluation.contact import SheetRow, sheet
from emag_export.evaluation.methods import methods_named
from emag_export.evaluation.settings import settings_of
from emag_export.runtime.keywords import SamplingKeywords

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bundle", nargs="?", default="out/bundle")
parser.add_argument("--methods", default="cfg,emag,apg", help="as for emag-export eval")
parser.add_argument("--prompt", default="a small purple cross at the left of an orange background")
parser.add_argument("--images", type=int, default=4, help="pictures of each method")
parser.add_argument("--seed", type=int, default=1, help="of the first picture; the next ones count up")
options = parser.parse_args()

rows: list[SheetRow] = []
with emag.Pipeline.open(options.bundle) as pipeline:
    # A setting is a method at the scales of the bundle: its keywords draw it, its label names it.
    for setting in settings_of(methods_named(options.methods), [pipeline.bundle]):
        sampling: SamplingKeywords = {**setting.keywords, "seed": options.seed}
        pictures = pipeline.generate(options.prompt, images=options.images, **sampling)
        rows.append(SheetRow(label=setting.label, pictures=[np.asarray(picture) for picture in pictures]))

first = np.stack(rows[0].pictures).astype(int)
for row in rows[1:]:
    moved = np.abs(np.stack(row.pictures) - first)
    print(f"{row.label}: {moved.mean():.1f} of 255 from {rows[0].label} on average, {moved.max()} at most")

Path("out").mkdir(exist_ok=True)
sheet(options.prompt, rows).save("out/guidance.png")
print("out/guidance.png")
