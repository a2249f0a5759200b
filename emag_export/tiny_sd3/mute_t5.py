"""The third text encoder of tiny-sd3: a T5 that always answers zero.

SD3 works without its T5, on rows of zeros in its place, and tiny-sd3 has never heard one. But diffusers 0.42
refuses ``StableDiffusion3Pipeline.from_pretrained(folder)`` when ``model_index.json`` names no
``text_encoder_3``, unless the caller passes ``text_encoder_3=None, tokenizer_3=None``. With this encoder the
plain call works, and passing None still does; both give the same pictures, because the zeros are exact.
"""

from __future__ import annotations

import string

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from emag_export.tiny_sd3.captions import vocabulary
from emag_export.tiny_sd3.networks import JOINT_WIDTH


def make_mute_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Build the smallest T5 encoder, the gain of its last normalisation set to zero, and its tokenizer.

    Returns:
        Tokenizer over the caption words and printable characters; encoder whose states are all exactly zero.
    """
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -5.0}
    scores |= {f"▁{word}": -2.0 for word in vocabulary()}
    scores |= dict.fromkeys(string.printable.strip(), -10.0)
    tokenizer = T5Tokenizer(vocab=list(scores.items()), extra_ids=0, model_max_length=256)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=JOINT_WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=1,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return tokenizer, encoder
