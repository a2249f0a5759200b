"""Prompts to embeddings: limits, what is cut, and a cache that changes nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.engines.protocol import Engine
from emag_export.engines.registry import open_backend
from emag_export.errors import InputError
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.text.encode import Cut, PromptEncoder, load_tokenizers

PROMPTS = ["a large red circle on a blue background", "a small green square", ""]
CLIPS = ("text_encoder", "text_encoder_2")


class CountingEngine:
    """Another engine, and how often and with how many rows it was called."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.rows = engine, list[int]()
        self.name, self.spec, self.device = engine.name, engine.spec, engine.device

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        self.rows.append(len(feeds["input_ids"]))
        return self._engine.run(feeds, out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def encoder_of(
    bundle: Bundle, *, t5: bool = True, **options: Any
) -> tuple[PromptEncoder, dict[str, CountingEngine]]:
    opener, names = open_backend("onnxruntime"), [*CLIPS, *(["text_encoder_3"] if t5 else [])]
    engines = {name: CountingEngine(opener(bundle, name)) for name in names}
    options = {"max_sequence_length": bundle.defaults.max_sequence_length, **options}
    encoder = PromptEncoder(engines, load_tokenizers(bundle), text_dim=bundle.contract.text_dim, **options)
    return encoder, engines


def calls(engines: Mapping[str, CountingEngine]) -> set[int]:
    return {len(engine.rows) for engine in engines.values()}


def test_known_prompts_run_no_encoder_and_give_the_same_bits(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    encoder, engines = encoder_of(bundle)
    first = encoder.encode([*PROMPTS, PROMPTS[0], PROMPTS[0]])
    assert calls(engines) == {3}
    again = encoder.encode([PROMPTS[1], *PROMPTS])
    assert calls(engines) == {3}
    fresh, _ = encoder_of(bundle, cached=0)
    for i, prompt in enumerate(PROMPTS):
        alone = fresh.encode([prompt])
        for rows in (first.embeds[i], again.embeds[1 + i]):
            assert torch.equal(rows, alone.embeds[0])
        for rows in (first.pooled[i], again.pooled[1 + i]):
            assert torch.equal(rows, alone.pooled[0])
    assert torch.equal(again.embeds[0], again.embeds[2])


def test_company_does_not_change_a_prompt(tiny_bundle: Path) -> None:
    """Bit for bit; a prompt in a batch of three rounds differently than alone, so each has its own call."""
    bundle = Bundle(tiny_bundle)
    encoder, engines = encoder_of(bundle, cached=0)
    together = encoder.encode(PROMPTS)
    assert {rows for engine in engines.values() for rows in engine.rows} == {1}
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert torch.equal(together.embeds[i : i + 1], alone.embeds)
        assert torch.equal(together.pooled[i : i + 1], alone.pooled)


def test_least_recently_used_prompt_goes_first(tiny_bundle: Path) -> None:
    encoder, engines = encoder_of(Bundle(tiny_bundle), cached=2)
    encoder.encode(["red"])
    encoder.encode(["green"])
    encoder.encode(["red"])  # used again: green is now the older one
    encoder.encode(["blue"])
    assert calls(engines) == {3}
    encoder.encode(["red", "blue"])
    assert calls(engines) == {3}
    encoder.encode(["green"])
    assert calls(engines) == {4}


def test_batch_larger_than_the_cache(tiny_bundle: Path) -> None:
    encoder, _ = encoder_of(Bundle(tiny_bundle), cached=1)
    assert encoder.encode(PROMPTS).embeds.shape[0] == 3


def test_callers_cannot_change_the_cache(tiny_bundle: Path) -> None:
    encoder, _ = encoder_of(Bundle(tiny_bundle))
    encoded = encoder.encode(["red"])
    kept = encoded.embeds.clone()
    encoded.embeds.zero_()
    encoded.pooled.zero_()
    assert torch.equal(encoder.encode(["red"]).embeds, kept)
    assert bool(encoder.encode(["red"]).pooled.any())


@pytest.mark.parametrize("t5_tokens", [20, 8, None])
def test_cut_text_per_encoder(t5_tokens: int | None, tiny_bundle: Path) -> None:
    """Words are single tokens of tiny-sd3's vocabularies, so the limits less the end marks can be counted."""
    bundle = Bundle(tiny_bundle)
    tokenizers = load_tokenizers(bundle)
    words = ["red", "green", "blue"] * 30
    prompt = " ".join(words)
    for name, tokenizer in tokenizers.items():
        assert len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids) == 90, name
    clip_words = tokenizers["text_encoder"].model_max_length - 2  # start and end
    encoder, _ = encoder_of(bundle, t5=t5_tokens is not None, max_sequence_length=t5_tokens or 20)
    cut = encoder.encode(["red", prompt]).cut
    assert not cut[0]
    assert cut[1].clip == " ".join(words[clip_words:])
    if t5_tokens is None:
        assert cut[1].t5 is None
    else:
        special = tokenizers["text_encoder_3"].num_special_tokens_to_add()
        assert cut[1].t5 == " ".join(words[t5_tokens - special :])


def test_cut_says_which_encoder_did_not_see_what() -> None:
    assert not Cut()
    assert not Cut(t5="")
    assert Cut(clip="x").describe() == "CLIP did not see “x”"
    assert Cut(clip="x", t5="").describe() == "CLIP did not see “x”; T5 saw all of it"
    assert Cut(clip="x y", t5="y").describe() == "CLIP did not see “x y” and T5 did not see “y”"
    assert str(Cut(clip="x y", t5="y")) == "x y"
    assert str(Cut(clip="", t5="y")) == "y"


def test_without_t5_zeros_of_the_asked_length(small_bundle: Path) -> None:
    """As in diffusers without a ``text_encoder_3``, which test_pipeline compares as a whole."""
    bundle = Bundle(small_bundle)
    encoder, engines = encoder_of(bundle, t5=False, max_sequence_length=7)
    encoded = encoder.encode(PROMPTS)
    clip = engines["text_encoder"].spec.inputs[0].dims[1]
    assert encoded.embeds.shape == (3, int(clip) + 7, bundle.contract.text_dim)
    assert not bool(encoded.embeds[:, int(clip) :].any())
    assert bool(encoded.embeds[:, : int(clip)].any())


@pytest.mark.parametrize("tokens", [0, -1, 21, 512])
def test_more_tokens_than_the_bundle_was_made_for(tokens: int, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=rf"max_sequence_length is {tokens}, .* was made for 1 to 20 tokens"):
        Pipeline(Bundle(tiny_bundle), open_backend("onnxruntime"), max_sequence_length=tokens)
