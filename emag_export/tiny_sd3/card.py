"""The model card of tiny-sd3, written from the facts that training and evaluation left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emag_export.tiny_sd3.checkpoint import Plan
from emag_export.tiny_sd3.networks import SHIFT
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

`python -m emag_export.tiny_sd3.train --out DIR`, from the second run on with `--start` of the model before.
Flow matching (velocity = noise - data); AdamW, its rate
falling linearly to zero over the last {decay:.0%} of the steps; averaged weights; an AMD EPYC CPU with two
shared cores, bfloat16 matrix products, no GPU. The autoencoder: {vae_steps:,} steps of {vae_batch} pictures,
{vae_minutes} minutes. The transformer and both text encoders, together:

{runs}

## Prompt accuracy

{prompts} random scenes, {steps} steps, judged by the rule-based checker `emag_export.tiny_sd3.checker`
(colours by the palette, shapes by overlap with their outline). "all" counts pictures right in every
attribute.

{table}

## Limits

It knows only the words above; other text gives arbitrary pictures. {limits} Pictures
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
    runs = _runs(training)
    first = runs[0]["recipe"]
    text = CARD.format(
        **training["parameters"], prompts=measured["prompts"], steps=measured["steps"], decay=Plan.decay,
        vae_steps=first["vae_steps"], vae_batch=first["vae_batch"],
        vae_minutes=round(runs[0]["vae_seconds"] / 60),
        runs="\n".join(_run(number, facts) for number, facts in enumerate(runs, 1)),
        table=_table(measured["accuracy"]), limits=_limits(measured["accuracy"]),
        shown="Guidance scale 4, 28 steps: " + "; ".join(f"*{prompt}*" for prompt in shown) + ".",
    )  # fmt: skip
    (model / "README.md").write_text(text)


def _runs(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that led to the weights, the first one first."""
    before = training.get("start")
    return [*([] if before is None else _runs(before)), training]


def _run(number: int, facts: dict[str, Any]) -> str:
    """One item of the list of runs."""
    recipe, note = facts["recipe"], facts.get("note", "")
    rate = recipe.get("learning_rate", 1.5e-3)  # of a run from before it could be chosen
    levels = (
        f"noise levels logit-normal with shift {SHIFT:g}, from step {COARSE_STEPS:,} on without a shift for "
        "part of the examples"
        if number == 1
        else "from the weights of the run before, two thirds of the noise levels without a shift"
    )
    return (
        f"{number}. {recipe['dit_steps']:,} steps of {recipe['batch']} examples out of {recipe['rows']:,}, "
        f"rate {rate:g}, {levels}; {round(facts['dit_seconds'] / 60)} minutes.{f' {note}' if note else ''}"
    )


def _limits(accuracy: dict[str, dict[str, float]]) -> str:
    """Its weak point, from the figures: the attribute that is wrong most often at scale 4."""
    shares = {name: value for name, value in accuracy["4"].items() if name != "right"}
    worst = min(shares, key=lambda name: shares[name])
    return (
        f"At scale 4 the attribute that is wrong most often is {_COLUMNS[worst]}, in {1 - shares[worst]:.1%}."
    )


def _table(accuracy: dict[str, dict[str, float]]) -> str:
    head = "| guidance scale | " + " | ".join(_COLUMNS.values()) + " |"
    rows = [
        f"| {scale} | " + " | ".join(f"{100 * row[name]:.1f} %" for name in _COLUMNS) + " |"
        for scale, row in accuracy.items()
    ]
    return "\n".join([head, "|---" * (len(_COLUMNS) + 1) + "|", *rows])
