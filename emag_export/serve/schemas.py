"""Bodies of requests and answers: the OpenAI Images API, diffusers' sampling names, one object of ours."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Completed",
    "EmagFacts",
    "EmagOptions",
    "ErrorBody",
    "ErrorFacts",
    "GenerationBody",
    "ImageData",
    "ImagesResponse",
    "ModelAbilities",
    "ModelFacts",
    "ModelList",
    "PartialImage",
    "RequestState",
    "Usage",
]

_LARGEST_SEED = 2**63 - 1
# Strict where a conversion would hide a mistake ("4" steps), and nothing is ignored that was asked for.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class EmagOptions(BaseModel):
    """What only this server knows."""

    model_config = _STRICT

    guidance: str | None = Field(
        default=None, description="cfg, emag, emag-only, emag+apg, emag+cads, apg, cads or none."
    )
    scale: float | None = Field(
        default=None, description="How far to steer away from the hard negative; 1 is none."
    )
    embedded_guidance: float | None = Field(
        default=None,
        description="Scale that the model takes as an input, where guidance was distilled into it.",
    )
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="Steer towards the prompt in this part of a run only: low and high, from 0, the first "
        "step, to 1, the last.",
    )
    cfg_rescale: float | None = Field(
        default=None,
        description="phi of rescaled CFG, 0 to 1: keep the spread of the conditional prediction.",
    )
    cfg_zero_star: bool | None = Field(
        default=None, description="CFG-Zero*: scale the unconditional prediction, and begin with one of 0."
    )
    cfg_zero_init: int | None = Field(default=None, description="For so many steps, with cfg_zero_star.")
    tcfg: bool | None = Field(
        default=None, description="Tangential damping of the unconditional prediction (TCFG)."
    )
    guided_channels: int | None = Field(
        default=None, description="Guide the first so many channels of the prediction only."
    )
    beta: float | None = Field(default=None, description="Decay of the moving average per step.")
    start: int | None = Field(
        default=None, description="Where averaging begins, in 250ths of a run before its end."
    )
    delta: int | None = Field(default=None, description="How many 250ths later perturbation begins.")
    stop: int | None = Field(default=None, description="Where both end, in 250ths from the end.")
    unit: Literal["250ths", "steps"] | None = Field(
        default=None, description="Of start, delta and stop: 250ths of a run, or steps."
    )
    strength: float | None = Field(default=None, description="How much is perturbed, 0 to 1.")
    blocks: list[int] | None = Field(default=None, description="Perturb these candidates in every step.")
    random_blocks: int | None = Field(
        default=None, description="Perturb so many candidates, drawn anew in every step."
    )
    blur_sigma: float | None = Field(
        default=None,
        description="How far the negative blur-query blurs, in image tokens; left out, it takes their mean.",
    )
    preview_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Stream a preview after every so many steps, in place of partial_images."
    )
    priority: Annotated[int, Field(ge=-100, le=100)] = Field(
        default=0, description="Larger comes first, where the server's policy looks at it."
    )
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Seconds after which what is not finished is given up."
    )


class GenerationBody(BaseModel):
    """Of ``POST /v1/images/generations``."""

    model_config = _STRICT

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: str = Field(default="auto", description="WIDTHxHEIGHT in pixels, or auto.")
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = Field(default="auto", description="Nothing is moderated here.")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    user: str | None = Field(default=None, description="Not looked at, and not logged.")
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] | None = Field(
        default=None, description="Of the first picture, the next ones count up; none draws one."
    )
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    emag: EmagOptions = EmagOptions()


class ImageData(BaseModel):
    """One finished picture."""

    b64_json: str
    seed: int


class Usage(BaseModel):
    """Text has no price here; the fields are what clients of the API expect."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class EmagFacts(BaseModel):
    """How pictures were made; each PNG says it in full."""

    request_id: str
    model: str
    variant: str
    guidance: str
    steps: int
    unseen: str | None = Field(
        default=None, description="What of the prompt was beyond the text encoders' limits, if anything."
    )


class ImagesResponse(BaseModel):
    """Finished pictures."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage = Usage()
    emag: EmagFacts


class _StreamedImage(BaseModel):
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    image_index: int
    seed: int


class PartialImage(_StreamedImage):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    step: int = Field(description="Steps that are done.")
    steps: int


class Completed(_StreamedImage):
    """A finished picture in a stream."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage = Usage()


class RequestState(BaseModel):
    """Of ``/v1/requests/{id}``."""

    id: str
    object: Literal["request"] = "request"
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    images: int
    finished: int
    step: int = Field(description="Steps that are done, of the image that is furthest behind.")
    steps: int
    created_at: int


class ModelAbilities(BaseModel):
    """What a bundle can do and what it does by itself."""

    variant: str
    precision: str
    height: int
    width: int
    steps: int
    guidance: str = Field(description="Kind of guidance where none is asked for.")
    guidance_scale: float
    embedded_guidance: float | None = Field(
        default=None, description="Scale that the model takes as an input; null where it has none."
    )
    emag_scale: float
    candidates: list[int] = Field(description="Blocks that can be perturbed.")
    guidances: dict[str, str] = Field(description="Kinds of guidance, each with what it does.")
    previews: bool
    max_images: int = Field(description="Of one request.")
    max_steps: int
    images_per_call: int = Field(description="Images that share an engine call, at most.")
    prompt: Literal["text", "class"] = Field(description="What a prompt is.")
    class_count: int | None = Field(default=None, description="Of models that are prompted by class.")
    classes: list[str] | None = Field(default=None, description="Names of the first classes.")


class ModelFacts(BaseModel):
    """A bundle that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    emag: ModelAbilities


class ModelList(BaseModel):
    """Of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelFacts]


class ErrorFacts(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorFacts
