"""What people write first: a diffusers pipeline behind FastAPI, one request at a time.

``python -m benchmarks.serving.diffusers_server PORT``. Answers the same requests as ``emag-export serve``,
always with plain CFG.
"""

import base64
import sys
from asyncio import Lock, to_thread
from io import BytesIO

import torch
import uvicorn
from diffusers import StableDiffusion3Pipeline
from fastapi import FastAPI
from pydantic import BaseModel

from emag_export.tiny_sd3 import MODEL_DIR

__all__ = ["Body", "application"]


class Body(BaseModel):
    """Of a request."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float = 7.0
    size: str = "64x64"


def application() -> FastAPI:
    """The server; the model is loaded now."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    app, lock = FastAPI(), Lock()

    def draw(body: Body) -> bytes:
        height, width = map(int, body.size.split("x"))
        picture = pipeline(
            prompt=body.prompt,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            height=height,
            width=width,
            generator=torch.Generator().manual_seed(body.seed),
        ).images[0]
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()

    @app.post("/v1/images/generations")
    async def generations(body: Body) -> dict[str, list[dict[str, str]]]:
        async with lock:
            png = await to_thread(draw, body)
        return {"data": [{"b64_json": base64.b64encode(png).decode()}]}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


if __name__ == "__main__":
    uvicorn.run(application(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
