"""Tokens as text that shows which of them are trained, special tokens by name."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.looking.text_table import visible
from data_prep.tokenizing.tokenizer import Tokenizer

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class MaskText:
    """Writes documents of one tokenizer, with colours or with marks."""

    def __init__(self, tokenizer: Tokenizer, is_coloured: bool) -> None:
        self.tokenizer = tokenizer
        self._is_coloured = is_coloured
        names = {tokenizer.special_id(name): name for name in tokenizer.added_tokens}
        self._contents = [
            names[i].encode("utf-8") if i in names else content for i, content in enumerate(tokenizer.token_contents())
        ]

    def row(self, tokens: NDArray, trained: NDArray[np.bool_], starts: NDArray[np.bool_]) -> Iterator[str]:
        """The documents of a row, whose own tokens, the context left out, are given; padding is only counted.

        Shapes: (row_tokens,) each; `starts` is about inputs, of which the first is the context.
        """
        firsts = [0, *(first - 1 for first in np.flatnonzero(starts).tolist() if first > 1)]
        for number, (first, stop) in enumerate(itertools.pairwise([*firsts, len(tokens)]), start=1):
            ids, is_trained = tokens[first:stop].tolist(), trained[first:stop].tolist()
            if set(ids) == {self.tokenizer.eos_id} and not any(is_trained):
                yield f"--- padding: {len(ids):,} tokens ---"
            else:
                yield f"--- document {number}: {len(ids):,} tokens, {sum(is_trained):,} trained ---"
                yield from self.document(ids, is_trained)

    def document(self, ids: Sequence[int], is_trained: Sequence[bool]) -> Iterator[str]:
        """A document, stretch by stretch of what is trained or not."""
        text = ""
        for marked, pairs in itertools.groupby(zip(ids, is_trained), key=lambda pair: pair[1]):
            content = b"".join(self._contents[token_id] for token_id, _ in pairs)
            text += self._marked(visible(content.decode("utf-8", "replace")), marked)
        yield text

    def _marked(self, text: str, is_trained: bool) -> str:
        if not self._is_coloured:
            return f"{{+{text}+}}" if is_trained else text
        colour = _GREEN if is_trained else _DIM
        # Anew on every line: pagers forget a colour at the line's end.
        return "\n".join(f"{colour}{line}{_RESET}" if line else "" for line in text.split("\n"))
