"""Pictures from a server with the official OpenAI client: ``python examples/openai_client.py``.

Start one first: ``emag-export serve bundle``. Its address and key come from ``OPENAI_BASE_URL`` and
``OPENAI_API_KEY``, as the client has it.
"""

import base64
import os
from pathlib import Path

from openai import OpenAI

PROMPT = "a large red circle on a blue background"

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
    Path(f"picture-{index}.png").write_bytes(base64.b64decode(picture.b64_json or ""))

# Watch it come into being: up to three previews, then the picture.
for event in client.images.generate(
    prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 12}
):
    done = event.type == "image_generation.completed"
    name = "streamed.png" if done else f"preview-{event.partial_image_index}.png"
    Path(name).write_bytes(base64.b64decode(event.b64_json))
    print(name)
