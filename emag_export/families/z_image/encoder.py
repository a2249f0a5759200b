"""The text encoder of Z-Image as a module with named inputs and outputs."""

from typing import Any

from torch import Tensor, nn

from emag_export.families.half import keep_attention_in_float32

__all__ = ["Qwen3Encoder"]


class Qwen3Encoder(nn.Module):
    """Qwen3 without its last layer, its last norm and its head: what the denoiser takes is in front of them.

    It attends to the past alone, so tokens need no mask: whatever fills a text up stands behind it.

    Args:
        model: A ``Qwen3Model``. It is changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.layers = model.layers[:-1]
        model.norm = nn.Identity()
        self.model: Any = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Second to last hidden states of token ids."""
        hidden: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden
