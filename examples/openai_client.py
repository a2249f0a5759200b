"""Pictures from a server with the official OpenAI client: two at once, and one with its previews.

    emag-export serve bundle
    python examples/openai_client.py

Needs ``pip install openai`` and a server that runs. Its address and key come from ``OPENAI_BASE_URL`` and
``OPENAI_API_KEY``, as the client has it. Takes 3 s. Writes ``out/picture-0.png``, ``out/preview-0.png`` and
so on.
"""

import base64
import os
from pathlib import Path

from openai import OpenAI

PROMPT = "a large red circle on a blue background"
OUTPUT = Path("out")
OUTPUT.mkdir(exist_ok=True)

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "not needed without keys"),
)

# What OpenAI's API has no words for goes into extra_body: diffusers' names, and one object of ours.
pictures = client.images.generate(
    prompt=PROMPT,
    n=2,
    extra_body={"seed": 1, "num_inference_steps": 12, "emag": {"guidance": "emag", "scale": 1.5}},
)
for index, picture in enumerate(pictures.data or ()):
    (OUTPUT / f"picture-{index}.png").write_bytes(base64.b64decode(picture.b64_json or ""))

# Watch it come into being: two previews, then the picture.
for event in client.images.generate(
    prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 12}
):
    name = "streamed.png"
    if event.type == "image_generation.partial_image":
        name = f"preview-{event.partial_image_index}.png"
    (OUTPUT / name).write_bytes(base64.b64decode(event.b64_json))
    print(OUTPUT / name)
