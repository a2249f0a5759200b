"""The model card of tiny-dit, written from the facts that training and evaluation left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emag_export.tiny_dit.classes import LARGEST, SMALLEST
from emag_export.tiny_dit.loss import BOUND_WEIGHT, SNR_LIMIT
from emag_export.tiny_sd3.checkpoint import Plan

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# tiny-dit

A class-conditional model of the DiT architecture, trained from scratch, small enough to be shipped inside a
package and run in tests on a CPU. It draws one coloured shape on a background of another colour, 64 x 64
pixels. Its 48 classes are six shapes in eight colours.

![samples](samples.png)

{shown}

## Use

```
emag-export build --model tiny-dit -o bundle
emag-export generate bundle --prompt "red circle" --guidance emag -o circle.png
```

With diffusers alone, through the loader of this package:

```python
from emag_export.tiny_dit import MODEL_DIR
from emag_export.tiny_dit.pipeline import load

pipeline = load(MODEL_DIR)
image = pipeline(pipeline.get_label_ids("red circle"), guidance_scale=4.0, num_inference_steps=25).images[0]
```

`DiTPipeline.from_pretrained` loads it too, but its guidance asks for ImageNet's null class, 1000, whatever
the model has; this model's is 48. The loader puts that right.

## Architecture

| part | class | parameters | shape |
|---|---|---|---|
| transformer | `DiTTransformer2DModel` | {transformer:,} | 8 blocks, width 80, 5 heads, patch 2 |
| vae | `AutoencoderKL` | {vae:,} | that of tiny-sd3: 64 x 64 x 3 to 16 x 16 x 8, no attention |

Scheduler: `DDIMScheduler`, linear betas from 0.0001 to 0.02 in 1000 steps. Stored in float16.

## Data

Drawn by a program, nothing else: {rows:,} pictures, every class as often; radius {smallest:g} to {largest:g}
pixels, anywhere on the canvas. One label in ten was replaced by the null class, for classifier-free guidance.

## Training

`python -m emag_export.tiny_dit.train --out DIR --seed {seed}`: {steps:,} steps of {batch} examples.
The loss is the squared error of the noise, weighted as the error of the velocity with min-SNR {snr:g}, and
{bound:g} times the variational bound for the variance; AdamW at 1.5e-3, falling linearly to zero over the
last {decay:.0%} of the steps; averaged weights. It took {minutes} minutes on one shared core ({processor}),
{precision} matrix products, no GPU.

## Accuracy

Pictures that show their class, judged by the rule-based checker `emag_export.tiny_dit.checker` (colours by
the palette, shapes by overlap with their outline): {pictures} pictures where nothing else is said, from the
same noise in every row. "all" counts pictures right in every attribute.

{table}

With this package's engines and other guidance: `python -m benchmarks.prompt_accuracy --model tiny-dit` in a
checkout of the repository.

## EMAG

Where EMAG for DiT is not the code released with its paper (arXiv:2512.17303): the block is chosen by the
previous step's statistic and not by the same step's; the average follows the conditional row alone, not the
unconditional one after it; all latent channels are guided, not three of them (`--guided-channels 3` does
that). `docs/families/dit.md` in the repository says why.

## Limits

It knows its 48 classes and 64 x 64 pixels. It is made to test and to compare guidance methods, not to draw.
"""

_COLUMNS = {"right": "all", "colour": "colour", "shape": "shape", "alone": "nothing else"}


def write_card(model: Path, shown: str) -> None:
    """Write ``README.md``.

    Args:
        model: Folder with ``training.json`` and ``accuracy.json``.
        shown: What ``samples.png`` shows.
    """
    training: dict[str, Any] = json.loads((model / "training.json").read_text())
    measured: dict[str, Any] = json.loads((model / "accuracy.json").read_text())
    recipe = training["recipe"]
    text = CARD.format(
        **training["parameters"], **{name: recipe[name] for name in ("rows", "seed", "steps", "batch")},
        shown=shown, smallest=SMALLEST, largest=LARGEST, snr=SNR_LIMIT, bound=BOUND_WEIGHT,
        decay=Plan.decay, minutes=round(training["seconds"] / 60), processor=training["processor"],
        precision="bfloat16" if recipe["bfloat16"] else "float32", pictures=measured["pictures"],
        table=_table(measured["accuracy"]),
    )  # fmt: skip
    (model / "README.md").write_text(text)


def _table(accuracy: dict[str, dict[str, float]]) -> str:
    head = "| sampler | " + " | ".join(_COLUMNS.values()) + " |"
    rows = [
        f"| {name} | " + " | ".join(f"{100 * row[column]:.1f} %" for column in _COLUMNS) + " |"
        for name, row in accuracy.items()
    ]
    return "\n".join([head, "|---" * (len(_COLUMNS) + 1) + "|", *rows])
