"""The model card of tiny-sd3, written from the facts that training and evaluation left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emag_export.tiny_sd3.checkpoint import Plan
from emag_export.tiny_sd3.train_dit import COARSE_STEPS

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: en
---

# tiny-sd3

A text-to-image model of the Stable Diffusion 3 architecture, trained from scratch, small enough to be
shipped inside a package and run in tests on a CPU. It draws one or two coloured shapes, 64 x 64 pixels.

![samples](samples.png)

{shown}

## Use

```python
from diffusers import StableDiffusion3Pipeline
from emag_export.tiny_sd3 import MODEL_DIR

pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
image = pipeline("a large red circle on a blue background", height=64, width=64, guidance_scale=4.0).images[0]
```

There is no trained third text encoder: `text_encoder_3` is a T5 of one layer that always answers zero, which
is what diffusers puts in the place of an absent one; loading with `text_encoder_3=None, tokenizer_3=None`
gives the same pictures. `max_sequence_length` (256 by default) is the number of these zero rows; the model
was trained to work with any number, and 20 makes a picture several times faster than 256.

## Architecture

| part | class | parameters | shape |
|---|---|---|---|
| transformer | `SD3Transformer2DModel` | {transformer:,} | 10 blocks, width 96, 3 heads, QK norm, patch 2 |
| text_encoder | `CLIPTextModelWithProjection` | {text_encoder:,} | 3 layers, width 48 |
| text_encoder_2 | `CLIPTextModelWithProjection` | {text_encoder_2:,} | 3 layers, width 64 |
| text_encoder_3 | `T5EncoderModel` | {text_encoder_3:,} | 1 layer, width 128, output exactly zero |
| vae | `AutoencoderKL` | {vae:,} | 64 x 64 x 3 to 16 x 16 x 8, no attention |

Scheduler: `FlowMatchEulerDiscreteScheduler`, shift 3. Tokenizers: CLIP byte-pair encoding over 649 tokens,
20 per caption; every word of the captions is one token, and any other text falls back to bytes.
Transformer and autoencoder are stored in float16, the text encoders in float32.

## Data

Drawn by a program, nothing else: 6 shapes (circle, square, triangle, star, ring, cross), 2 sizes, 8 colours
for objects and background, single objects in the middle or at a side, and pairs of different colours to the
left of, to the right of, above or below each other. The captions vary in wording (synonyms, prefixes such as
"a photo of", some left out); one in ten was replaced by the empty caption, for classifier-free guidance.

## Training

`python -m emag_export.tiny_sd3.train --out DIR --seed {seed}`: the autoencoder for {vae_steps:,} steps of
{vae_batch} pictures, then the transformer and both text encoders together for {dit_steps:,} steps of {batch}
examples out of {rows:,}. Flow matching (velocity = noise - data), logit-normal noise levels with shift 3,
from step {coarse:,} on without a shift for half of the examples; AdamW at 1.5e-3, falling linearly to zero
over the last {decay:.0%} of the steps; averaged weights. It took {vae_minutes} + {dit_minutes} minutes on two
shared cores of an AMD EPYC CPU, bfloat16 matrix products, no GPU.{note}

## Prompt accuracy

{prompts} random scenes, {steps} steps, judged by the rule-based checker `emag_export.tiny_sd3.checker`
(colours by the palette, shapes by overlap with their outline). "all" counts pictures right in every
attribute.

{table}

## Limits

It knows only the words above; other text gives arbitrary pictures. Colours, places and sizes are nearly
always right; outlines are the weak point, above all those of small stars and crosses. Pictures
are 64 x 64 (other sizes up to 192 x 192 run, but nothing was trained there). It is made to test and to
compare guidance methods, not to draw.
"""

_COLUMNS = {
    "right": "all", "background": "background", "colour": "colour", "shape": "shape", "size": "size",
    "place": "place", "alone": "nothing else",
}  # fmt: skip


def write_card(model: Path, shown: tuple[str, ...]) -> None:
    """Write ``README.md``.

    Args:
        model: Folder with ``training.json`` and ``accuracy.json``.
        shown: Prompts of ``samples.png``, in reading order, four to a row.
    """
    training: dict[str, Any] = json.loads((model / "training.json").read_text())
    measured: dict[str, Any] = json.loads((model / "accuracy.json").read_text())
    note = training.get("note", "")
    text = CARD.format(
        **training["parameters"], **training["recipe"], prompts=measured["prompts"], steps=measured["steps"],
        vae_minutes=round(training["vae_seconds"] / 60), dit_minutes=round(training["dit_seconds"] / 60),
        table=_table(measured["accuracy"]), note=f" {note}" if note else "",
        coarse=COARSE_STEPS, decay=Plan.decay,
        shown="Guidance scale 4, 28 steps: " + "; ".join(f"*{prompt}*" for prompt in shown) + ".",
    )  # fmt: skip
    (model / "README.md").write_text(text)


def _table(accuracy: dict[str, dict[str, float]]) -> str:
    head = "| guidance scale | " + " | ".join(_COLUMNS.values()) + " |"
    rows = [
        f"| {scale} | " + " | ".join(f"{100 * row[name]:.1f} %" for name in _COLUMNS) + " |"
        for scale, row in accuracy.items()
    ]
    return "\n".join([head, "|---" * (len(_COLUMNS) + 1) + "|", *rows])
