"""EMAG inside diffusers' own pipelines, without an export: CFG and hard negatives side by side.

    python examples/diffusers_guider.py

Draws with the embedded model in PyTorch. Needs ``pip install "emag-export[report]"``. Takes half a minute.
Writes ``out/diffusers.png``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline, StableDiffusion3Pipeline

from emag_export import EMAGuidance, guide_pipeline
from emag_export.runtime.pictures.gallery import save_gallery
from emag_export.tiny_sd3 import MODEL_DIR

PROMPTS = [
    "a large red circle on a blue background",
    "a small yellow ring",
    "a green triangle above a white square",
]
SCALE = 4.0
OUTPUT = Path("out") / "diffusers.png"

asked: dict[str, Any] = {"prompt": PROMPTS, "height": 64, "width": 64, "num_inference_steps": 28}
asked |= {"max_sequence_length": 20}


def generators() -> list[torch.Generator]:
    """The same noise for every column."""
    return [torch.Generator().manual_seed(seed) for seed, _ in enumerate(PROMPTS)]


# A plain pipeline is guided within the `with`, and is called as ever.
pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
columns = {"CFG": pipeline(**asked, guidance_scale=SCALE, generator=generators()).images}
for variant in ("emag-q", "emag", "skip"):
    with guide_pipeline(pipeline, variant=variant, model="tiny-sd3"):
        columns[variant] = pipeline(**asked, guidance_scale=SCALE, generator=generators()).images

# A modular pipeline takes a guider. For CFG it must be given a negative prompt, if only an empty one.
modular = ModularPipeline.from_pretrained(str(MODEL_DIR))
modular.load_components()
modular.update_components(guider=EMAGuidance(guidance_scale=SCALE, variant="emag-q", model="tiny-sd3"))
columns["emag-q, modular"] = modular(**asked, negative_prompt="", generator=generators(), output="images")

save_gallery({name: np.stack([*map(np.asarray, drawn)]) for name, drawn in columns.items()}, PROMPTS, OUTPUT)
changed = np.abs(np.asarray(columns["emag-q"][0], dtype=int) - np.asarray(columns["CFG"][0], dtype=int))
print(f"{OUTPUT}; EMAG-Q changes the first picture by up to {changed.max()} of 255")
