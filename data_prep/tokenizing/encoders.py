"""The fastest library that gives exactly a tokenizer's ids; each is proven on a sample before it is chosen.

One vocabulary runs in several libraries, up to a hundred times faster in one than in another. Right is what the
tokenizer itself gives (tokenizers 0.23, or sentencepiece); the others must give the same.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from data_prep.tokenizing.backends import TokenizerError
from data_prep.tokenizing.encoder_libraries import Reference, Tiktoken, Version1
from data_prep.tokenizing.tokenizer import Tokenizer

SAMPLE_CHARACTERS = 256 * 1024
"""At most this much of a given sample is compared: the slowest library takes 0.1 s for it."""
NUM_SPELLED_TOKENS = 4096
"""At most so many of the vocabulary's tokens are compared as texts of their own, spread over the vocabulary."""
SNIPPETS = (
    *("", " ", "   ", "\n", "\r\n", "\n\n ", "\t", "\x00", "\x1f", "\x85", "\u00a0", "\u200b", "\u2028", "\u3000"),
    *("a", "Hello", "isn't", "WE'LL", "'S", "def f(x):", "x_1", "__init__", "a.b", "=>", "...", "/*", "-1.5e3", "123"),
    *("é", "e\u0301", "ß", "ſ", "İ", "ﬁ", "ή", "Привет", "你好", "，", "日本語", "カ\u3099", "한국", "\u1100\u1161"),
    *("ไทย", "नि", "م", "\u05d0\u05b8\u0323", "½", "²", "Ⅷ", "٣", "\u212b", "\ufeff", "\ue000", "\U0010ffff"),
    *("🚀", "👩\u200d👩\u200d👧", "✌\U0001f3fd", "▁", "Ġ", "<0x41>"),
    *("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "[INST]", "<think>"),
)
"""What tokenizers differ about; all pairs of them are compared."""
LONG_TEXTS = tuple(unit * 2000 for unit in ("a", " ", "\n", "ab", "你好", "-", "1", "é", " \n", "e\u0301", "\u3000x"))


class Encoder(Protocol):
    """Texts to ids by one library."""

    name: str
    """Library and version: what has been proven is proven for that version."""
    rejected: list[str]
    """Why faster libraries were passed over, a line each."""

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as ordinary text, exactly those of `Tokenizer.encode`. Dtypes: uint32."""
        ...


CANDIDATES: tuple[type[Version1 | Tiktoken], ...] = (Version1, Tiktoken)
"""Fastest first."""


def fastest_encoder(tokenizer: Tokenizer, sample: Sequence[str] | None = None) -> Encoder:
    """The first faster library that proves identical on hard texts and on the sample, else the tokenizer's own.

    Cost: below a second, most of it in the slow library that the others are compared to.
    """
    texts = [*proof_texts(tokenizer), *_beginning(sample or ())]
    rejected: list[str] = []
    expected: list[list[int]] | None = None
    for candidate in CANDIDATES:
        try:
            encoder = candidate(tokenizer)
            expected = expected or tokenizer.encode_batch(texts)
            difference = _first_difference(texts, expected, encoder.encode_arrays(texts))
        except Exception as error:  # whatever a library cannot do, another one can
            rejected.append(f"{candidate.__name__}: {error}")
            continue
        if difference is None:
            encoder.rejected = rejected
            return encoder
        rejected.append(f"{encoder.name}: {difference}")
    encoder = Reference(tokenizer)
    encoder.rejected = rejected
    return encoder


def encoder_named(tokenizer: Tokenizer, name: str) -> Encoder:
    """The encoder that `fastest_encoder` has chosen, perhaps in another process, without proving it again.

    Raises:
        TokenizerError: this installation lacks it, or has another version of it.
    """
    found: list[str] = []
    for build in (*CANDIDATES, Reference):
        try:
            encoder = build(tokenizer)
        except Exception as error:
            found.append(f"{build.__name__}: {error}")
            continue
        if encoder.name == name:
            return encoder
        found.append(encoder.name)
    raise TokenizerError(
        f"encoder {name!r} is not here ({'; '.join(found)}): install the same requirements on every machine"
    )


def proof_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts on which libraries differ if they differ at all, among them the tokenizer's own tokens."""
    added = tokenizer.added_tokens
    hard = [*SNIPPETS, *added[:16]]
    stride = -(-tokenizer.vocab_size // NUM_SPELLED_TOKENS)
    spelled = [tokenizer.decode([token_id]) for token_id in range(0, tokenizer.vocab_size, stride)]
    pairs = [first + second for first, second in itertools.product(hard, hard)]
    inside = [f"x{token}x {token} \n{token}{token.upper()}" for token in added]
    return [*pairs, *inside, *spelled, *LONG_TEXTS, "".join(pairs)]


def _beginning(texts: Iterable[str]) -> Iterable[str]:
    rest = SAMPLE_CHARACTERS
    for text in texts:
        if rest <= 0:
            return
        yield text[:rest]
        rest -= len(text)


def _first_difference(texts: Sequence[str], expected: Sequence[list[int]], found: Sequence[np.ndarray]) -> str | None:
    for text, want, got in zip(texts, expected, found, strict=True):
        if not np.array_equal(want, got):
            at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
            return (
                f"{text[:40]!r} gives ids {got[at : at + 4].tolist()} instead of {want[at : at + 4]} from place {at} on"
            )
    return None
