"""Text encoders that several families share, as modules with named inputs and outputs."""

from typing import Any

from torch import Tensor, nn

from emag_export.families.half import keep_attention_in_float32

__all__ = ["ClipEncoder", "ClipPooler", "T5Encoder"]


class ClipEncoder(nn.Module):
    """CLIP text model with its projected pooled state and second to last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled and hidden states of token ids."""
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        return output.text_embeds, output.hidden_states[-2]


class ClipPooler(nn.Module):
    """CLIP text model, of which only the pooled state is used, without projection."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Pooled states of token ids."""
        pooled: Tensor = self.model(input_ids=input_ids).pooler_output
        return pooled


class T5Encoder(nn.Module):
    """The encoder half of T5."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states of token ids."""
        hidden: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden
