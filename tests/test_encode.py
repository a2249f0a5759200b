"""Prompts to embeddings: limits, what is cut, and a cache that changes nothing."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from emag_export.bundle import Bundle
from emag_export.engines.observed import ObservedEngine
from emag_export.errors import InputError
from emag_export.families.texts import Cut
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.text.prompts import PromptEncoder, load_tokenizers
from tests.bundles import opener
from tests.sd3 import EMBEDS, POOLED

PROMPTS = ["a large red circle on a blue background", "a small green square", ""]
CLIPS = ("text_encoder", "text_encoder_2")


Calls = dict[str, list[int]]
"""Text encoder to the number of rows in each of its calls."""


def note(rows: list[int], feeds: Mapping[str, torch.Tensor]) -> None:
    rows.append(len(feeds["input_ids"]))


def encoder_of(bundle: Bundle, *, t5: bool = True, **options: Any) -> tuple[PromptEncoder, Calls]:
    calls: Calls = {name: [] for name in (*CLIPS, *(["text_encoder_3"] if t5 else []))}
    engines = {
        name: ObservedEngine(opener()(bundle, name), before=partial(note, rows))
        for name, rows in calls.items()
    }
    options = {"max_sequence_length": bundle.defaults.max_sequence_length, **options}
    encoder = PromptEncoder(engines, load_tokenizers(bundle), contract=bundle.contract, **options)
    return encoder, calls


def counts(calls: Calls) -> set[int]:
    return {len(rows) for rows in calls.values()}


def test_known_prompts_run_no_encoder_and_give_the_same_bits(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    encoder, calls = encoder_of(bundle)
    first = encoder.encode([*PROMPTS, PROMPTS[0], PROMPTS[0]])
    assert counts(calls) == {3}
    again = encoder.encode([PROMPTS[1], *PROMPTS])
    assert counts(calls) == {3}
    fresh, _ = encoder_of(bundle, cached=0)
    for i, prompt in enumerate(PROMPTS):
        alone = fresh.encode([prompt])
        for rows in (first.tensors[EMBEDS][i], again.tensors[EMBEDS][1 + i]):
            assert torch.equal(rows, alone.tensors[EMBEDS][0])
        for rows in (first.tensors[POOLED][i], again.tensors[POOLED][1 + i]):
            assert torch.equal(rows, alone.tensors[POOLED][0])
    assert torch.equal(again.tensors[EMBEDS][0], again.tensors[EMBEDS][2])


def test_company_does_not_change_a_prompt(tiny_bundle: Path) -> None:
    """Bit for bit; a prompt in a batch of three rounds differently than alone, so each has its own call."""
    bundle = Bundle(tiny_bundle)
    encoder, calls = encoder_of(bundle, cached=0)
    together = encoder.encode(PROMPTS)
    assert {rows for each in calls.values() for rows in each} == {1}
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert torch.equal(together.tensors[EMBEDS][i : i + 1], alone.tensors[EMBEDS])
        assert torch.equal(together.tensors[POOLED][i : i + 1], alone.tensors[POOLED])


def test_least_recently_used_prompt_goes_first(tiny_bundle: Path) -> None:
    encoder, calls = encoder_of(Bundle(tiny_bundle), cached=2)
    encoder.encode(["red"])
    encoder.encode(["green"])
    encoder.encode(["red"])  # used again: green is now the older one
    encoder.encode(["blue"])
    assert counts(calls) == {3}
    encoder.encode(["red", "blue"])
    assert counts(calls) == {3}
    encoder.encode(["green"])
    assert counts(calls) == {4}


def test_batch_larger_than_the_cache(tiny_bundle: Path) -> None:
    encoder, _ = encoder_of(Bundle(tiny_bundle), cached=1)
    assert encoder.encode(PROMPTS).tensors[EMBEDS].shape[0] == 3


def test_callers_cannot_change_the_cache(tiny_bundle: Path) -> None:
    encoder, _ = encoder_of(Bundle(tiny_bundle))
    encoded = encoder.encode(["red"])
    kept = encoded.tensors[EMBEDS].clone()
    encoded.tensors[EMBEDS].zero_()
    encoded.tensors[POOLED].zero_()
    assert torch.equal(encoder.encode(["red"]).tensors[EMBEDS], kept)
    assert bool(encoder.encode(["red"]).tensors[POOLED].any())


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
    assert cut[1].unseen["CLIP"] == " ".join(words[clip_words:])
    if t5_tokens is None:
        assert cut[1].unseen.keys() == {"CLIP"}
    else:
        special = tokenizers["text_encoder_3"].num_special_tokens_to_add()
        assert cut[1].unseen["T5"] == " ".join(words[t5_tokens - special :])


def test_cut_says_which_encoder_did_not_see_what() -> None:
    assert not Cut()
    assert not Cut(unseen={"CLIP": "", "T5": ""})
    assert Cut(unseen={"CLIP": "x"}).describe() == "CLIP did not see “x”"
    assert Cut(unseen={"CLIP": "x", "T5": ""}).describe() == "CLIP did not see “x”; T5 saw all of it"
    both = Cut(unseen={"CLIP": "x y", "T5": "y"})
    assert both
    assert both.describe() == "CLIP did not see “x y” and T5 did not see “y”"
    assert str(both) == "x y"
    assert str(Cut(unseen={"CLIP": "", "T5": "y"})) == "y"


def test_without_t5_zeros_of_the_asked_length(small_bundle: Path) -> None:
    """As in diffusers without a ``text_encoder_3``, which test_pipeline compares as a whole."""
    bundle = Bundle(small_bundle)
    encoder, _ = encoder_of(bundle, t5=False, max_sequence_length=7)
    embeds = encoder.encode(PROMPTS).tensors[EMBEDS]
    clip = int(bundle.spec("text_encoder").inputs[0].dims[1])
    width = bundle.contract.conditioning[0].dims[-1]
    assert embeds.shape == (3, clip + 7, width)
    assert not bool(embeds[:, clip:].any())
    assert bool(embeds[:, :clip].any())


@pytest.mark.parametrize("tokens", [0, -1, 21, 512])
def test_more_tokens_than_the_bundle_was_made_for(tokens: int, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=rf"max_sequence_length is {tokens}, .* was made for 1 to 20 tokens"):
        Pipeline(Bundle(tiny_bundle), opener(), max_sequence_length=tokens)
