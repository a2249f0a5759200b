"""How well picture and prompt fit, by a CLIP model: CLIPScore, PickScore and HPSv2."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from emag_export.errors import ModelError
from emag_export.evaluation.metrics.protocol import Column, Pixels, Scores
from emag_export.hashing import hash_files, hash_json

__all__ = ["ClipScore", "HpsScore", "PickScore"]


class _Clip:
    """A CLIP model and its preprocessing, loaded when first asked.

    Args:
        model: Folder that ``save_pretrained`` wrote with model, tokenizer and image processor, or a hub id.
        device: Where it runs.

    Raises:
        ModelError: If it cannot be loaded.
    """

    name = ""
    columns: tuple[Column, ...] = ()

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        self._model, self._device = model, device or "cpu"

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        try:
            model: Any = CLIPModel.from_pretrained(self._model).eval().requires_grad_(False)
            tokenizer = CLIPTokenizerFast.from_pretrained(self._model)
            images = self._processor(CLIPImageProcessor, model.config.vision_config.image_size)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{self._model} is no CLIP model for the metric {self.name} ({error}); give a hub id, or a "
                "folder with model, tokenizer and preprocessor_config.json"
            ) from error
        return model.to(self._device), tokenizer, images

    def _processor(self, kind: Any, side: int) -> Any:
        """Turns pictures into the model's input, side x side."""
        return kind.from_pretrained(self._model)

    def key(self) -> str:
        """Metric and identity of the weights: hash of a local folder, commit of a hub id."""
        folder = Path(self._model)
        if folder.is_dir():
            identity = hash_files(folder, [path for path in folder.rglob("*") if path.is_file()])
        else:
            identity = hash_json([self._model, getattr(self._loaded[0].config, "_commit_hash", None)])
        return f"{self.name}-{identity[:12]}"

    def features(self, pixels: Pixels) -> Float[np.ndarray, " features"]:
        """The picture's embedding, not yet of unit length."""
        import torch

        model, _, images = self._loaded
        inputs = images(images=[pixels], return_tensors="pt")["pixel_values"].to(self._device)
        with torch.inference_mode():
            pooled = model.vision_model(pixel_values=inputs).pooler_output
            made: np.ndarray = model.visual_projection(pooled)[0].float().cpu().numpy()
        return made

    def similarity(self, prompt: str, pixels: Pixels) -> tuple[float, float]:
        """Cosine of prompt and picture, and the model's own logit."""
        import torch

        model, tokenizer, images = self._loaded
        longest = model.config.text_config.max_position_embeddings
        words = tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt")
        inputs = images(images=[pixels], return_tensors="pt")
        with torch.inference_mode():
            made = model(
                input_ids=words["input_ids"].to(self._device),
                attention_mask=words["attention_mask"].to(self._device),
                pixel_values=inputs["pixel_values"].to(self._device),
            )
            cosine = torch.nn.functional.cosine_similarity(made.text_embeds, made.image_embeds)
        return float(cosine), float(made.logits_per_image)


class ClipScore(_Clip):
    """CLIPScore of picture and prompt.

    Source:
        arXiv:2104.08718, section 3, scaled to 100 as torchmetrics does.
    """

    name = "clip"
    columns = (
        Column(
            name="clip_score",
            better="higher",
            summary="100 times the cosine of picture and prompt, negative ones as 0",
        ),
    )

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """0 to 100."""
        return {"clip_score": 100 * max(self.similarity(prompt, pixels)[0], 0.0)}


class PickScore(_Clip):
    """PickScore of picture and prompt: the logit of a CLIP model that was tuned on people's choices.

    Source:
        arXiv:2305.01569, eq. 1.
    """

    name = "pickscore"
    columns = (
        Column(
            name="pick_score", better="higher", summary="scaled cosine; differences of 1 are 73 to 27 choices"
        ),
    )

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """About 15 to 25 with the published weights."""
        return {"pick_score": self.similarity(prompt, pixels)[1]}


class HpsScore(_Clip):
    """Human preference score: the cosine of a CLIP model that was tuned on people's choices.

    Source:
        arXiv:2306.09341, in hundredths as the paper of EMAG gives it (29.22 for SD3 under CFG).
    """

    name = "hps"
    columns = (Column(name="hps", better="higher", summary="100 times the cosine of picture and prompt"),)

    def _processor(self, kind: Any, side: int) -> Any:
        """The converted weights come without a processor; theirs is CLIP's own."""
        try:
            return super()._processor(kind, side)
        except OSError:
            return kind(size={"shortest_edge": side}, crop_size=side)

    def score(self, prompt: str, pixels: Pixels) -> Scores:
        """About 20 to 35 with the published weights."""
        return {"hps": 100 * self.similarity(prompt, pixels)[0]}
