"""Text encoders of SD3 as modules with named inputs and outputs."""

from torch import Tensor, nn

from emag_export.families.half import keep_attention_in_float32

__all__ = ["ClipEncoder", "T5Encoder"]


class ClipEncoder(nn.Module):
    """CLIP text model; SD3 uses the second to last hidden states and the projected pooled state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled and hidden states of token ids."""
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        return output.text_embeds, output.hidden_states[-2]


class T5Encoder(nn.Module):
    """The encoder half of T5."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_attention_in_float32(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states of token ids."""
        hidden: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return hidden
