"""The ordinary texts of conversations as ids, each as the tokenizer would encode it in its place."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from data_prep.chat.turns import Part

if TYPE_CHECKING:
    from data_prep.tokenizing.tokenizer import Tokenizer


def encode_texts(tokenizer: "Tokenizer", conversations: Iterable[list[Part]]) -> list[list[int]]:
    """Ids of all ordinary texts, in order.

    Tokenizers after sentencepiece put a space before a text. One that goes on a text must not get it, and one behind a
    special token only where the tokenizer gives it to every stretch: so does transformers.
    """
    marked = [
        (part.text, index > 0, parts[index - 1].is_special)
        for parts in conversations
        for index, part in enumerate(parts)
        if not part.is_special
    ]
    anchor, letter, both = tokenizer.encode_batch(["\n", "x", "\nx"])
    if anchor + letter == both:  # no space is put anywhere
        return tokenizer.encode_batch([text for text, _, _ in marked])
    first_only = re.search(rb'"prepend_scheme":\s*"first"', tokenizer.content) is not None
    goes_on = [has_before and (first_only or not behind_special) for _, has_before, behind_special in marked]
    ids = tokenizer.encode_batch(["\n" * on + text for (text, _, _), on in zip(marked, goes_on, strict=True)])
    return [own[len(anchor) :] if on and own[: len(anchor)] == anchor else own for own, on in zip(ids, goes_on)]
