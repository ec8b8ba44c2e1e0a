"""The text of one generated sample while its tokens arrive."""

from collections.abc import Sequence

from data_prep.tokenizing.tokenizer import Tokenizer


class TextSample:
    """Turns tokens into text that can be shown at once, and ends at EOS or before the first stop text.

    What might be the beginning of a stop text, or of a character, is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._eos_id = tokenizer.eos_id
        self._stop_texts = [text for text in stop_texts if text]
        self._held_back = ""
        self.has_ended = False

    def feed(self, token: int) -> str:
        """The text that token makes certain, often none; nothing after the end."""
        if self.has_ended:
            return ""
        if token == self._eos_id:
            return self.flush()
        text = self._held_back + self._decoder.feed(token)
        ends = [position for stop in self._stop_texts if (position := text.find(stop)) >= 0]
        if ends:
            self.has_ended, self._held_back = True, ""
            return text[: min(ends)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_texts), default=0)
        self._held_back = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back; the sample has ended."""
        if self.has_ended:
            return ""
        self.has_ended = True
        return self._held_back + self._decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text with which stop begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
