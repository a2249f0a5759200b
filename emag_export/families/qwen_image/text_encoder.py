"""The part of Qwen2.5-VL that reads text, as a module with a named input and output."""

from typing import Any

from torch import Tensor, nn

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """Embeddings and layers; what sees pictures and what predicts words is left out.

    Every token sees those before it alone, so what stands behind a prompt changes nothing in it: padding
    needs no mask as long as it is on the right.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        whole: Any = model
        self.model: Any = whole.model.language_model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states behind the last layer and its norm: [rows, tokens, width]."""
        hidden: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden
