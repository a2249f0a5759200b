"""The byte-pair vocabulary of tiny-sd3: learned from the caption words, so that each of them is one token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from emag_export.tiny_sd3.captions import vocabulary

MODEL_MAX_LENGTH = 20
"""Tokens per caption: 18 words with a start and an end. It keeps the joint sequence short."""

START, END = "<|startoftext|>", "<|endoftext|>"

Pair = tuple[str, str]


def make_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Build both tokenizers; as in SD3 the first fills up with the end token and the second with ``!``.

    Returns:
        The tokenizers of ``text_encoder`` and ``text_encoder_2``, equal but for what they fill up with.
    """
    merges = learn_merges(vocabulary())
    letters = list(bytes_to_unicode().values())
    names = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    vocab = {name: index for index, name in enumerate(names)}
    first, second = (
        CLIPTokenizer(vocab=vocab, merges=merges, pad_token=fill, model_max_length=MODEL_MAX_LENGTH)
        for fill in (END, "!")
    )
    return first, second


def learn_merges(words: tuple[str, ...]) -> list[Pair]:
    """Run byte-pair encoding until every word is a single token.

    Args:
        words: Lower-case ASCII words.

    Returns:
        Merges by rank. Encoding applies them in this order, so it ends as learning did: one token each.

    Source:
        arXiv:1508.07909, algorithm 1, with ties broken by the alphabet.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[Pair] = []
    while any(len(spelling) > 1 for spelling in spellings):
        counts: Counter[Pair] = Counter()
        for spelling in spellings:
            counts.update(pairwise(spelling))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = [_merge(spelling, best) for spelling in spellings]
    return merges


def _merge(spelling: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for piece in spelling:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
