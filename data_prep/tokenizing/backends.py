"""The two tokenizer libraries behind one face: ids of texts, text of ids, and the bytes that each id stands for."""

import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tokenizers

JSON_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
_WORD_START = "\u2581"  # ▁, the visible space of sentencepiece


class TokenizerError(ValueError):
    """A tokenizer file is missing, unreadable, or lacks what training needs."""


class AddedToken(NamedTuple):
    """A token beside those that were learned from text: a mark of a chat, the end of a document."""

    token_id: int
    is_special: bool
    """Never made from text; the others are, wherever they are spelled."""


class Backend(Protocol):
    """What a tokenizer library must offer."""

    file_name: str

    @property
    def vocab_size(self) -> int:
        """The largest id and one."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token, None if the vocabulary lacks it."""
        ...

    def declared_eos_id(self) -> int | None:
        """The end-of-document id that the file itself names, if it can."""
        ...

    def unknown_id(self) -> int | None:
        """The id of what the vocabulary cannot express, if there is one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as ordinary text: no begin or end tokens, no special tokens recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        ...

    def token_contents(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for; empty for special tokens."""
        ...

    def added_tokens(self) -> dict[str, "AddedToken"]:
        """The tokens beside those that were learned from text, by their spelling."""
        ...


def load_backend(raw: bytes, file_name: str, *, is_known: bool = False) -> Backend:
    """Read the content of a tokenizer file: sentencepiece if its name ends in .model, else tokenizer.json.

    is_known: the content was read before; a tokenizer.json, which takes 0.1 s, is then read when it is first used.

    Raises:
        TokenizerError: the content is not what the name says.
    """
    backend_type = _SentencePiece if file_name.endswith(".model") else _HuggingFace
    try:
        backend = backend_type(raw)
        if not is_known:
            _ = backend.vocab_size
        return backend
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{file_name}: not a {backend_type.file_name}: {error}") from error


class _HuggingFace:
    """A `tokenizer.json` of the `tokenizers` library."""

    file_name = JSON_FILE

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    @property
    def vocab_size(self) -> int:
        return self._num_ids

    @functools.cached_property
    def _num_ids(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_buffer(self._raw)
        # Published files may carry a truncation length (often 512) and a padding: both would corrupt documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A text that contains "<|endoftext|>" talks about the token; it is not the token. The flag is not part of
        # the file, so it is set on every load.
        tokenizer.encode_special_tokens = True
        return tokenizer

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def declared_eos_id(self) -> int | None:
        return None

    def unknown_id(self) -> int | None:
        model = json.loads(self._tokenizer.to_str())["model"]
        # Unigram models name the id, the others the token.
        return model["unk_id"] if "unk_id" in model else self.token_id(model.get("unk_token") or "")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_contents(self) -> list[bytes]:
        piece_bytes = byte_level_bytes if self._decoder_kinds() & {"ByteLevel"} else _visible_space_bytes
        contents = [b""] * self.vocab_size
        for piece, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            contents[token_id] = piece_bytes(piece)
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            contents[token_id] = b"" if token.special else token.content.encode("utf-8")
        return contents

    def added_tokens(self) -> dict[str, AddedToken]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: AddedToken(token_id, token.special) for token_id, token in added}

    def _decoder_kinds(self) -> set[str]:
        decoder: dict[str, Any] = json.loads(self._tokenizer.to_str())["decoder"] or {"type": "none"}
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback", "Replace"}:
            raise TokenizerError(
                f"a tokenizer with the decoder {sorted(kinds)} does not say which bytes its tokens stand for; "
                "use a byte-level or sentencepiece tokenizer"
            )
        return kinds


class _SentencePiece:
    """A sentencepiece `.model`."""

    file_name = MODEL_FILE

    def __init__(self, raw: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
        self.vocab_size = self._processor.get_piece_size()

    def token_id(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None  # an unknown piece gets the id of <unk>

    def declared_eos_id(self) -> int | None:
        eos_id = self._processor.eos_id()
        return eos_id if eos_id >= 0 else None

    def unknown_id(self) -> int | None:
        return self._processor.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def token_contents(self) -> list[bytes]:
        processor = self._processor
        return [
            b""
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
            else _visible_space_bytes(processor.id_to_piece(i))
            for i in range(self.vocab_size)
        ]

    def added_tokens(self) -> dict[str, AddedToken]:
        processor = self._processor
        marks = [i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
        return {processor.id_to_piece(i): AddedToken(i, is_special=True) for i in marks}


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 on.

    Source: Radford et al. 2019 (GPT-2), its byte-level BPE.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def byte_level_bytes(piece: str) -> bytes:
    """The bytes that a token spelled in the byte-level alphabet stands for."""
    if any(character not in _BYTE_OF_CHARACTER for character in piece):
        return piece.encode("utf-8")  # a token added by hand, not by the byte-level alphabet
    return bytes(_BYTE_OF_CHARACTER[character] for character in piece)


def _visible_space_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])  # byte fallback
    return piece.replace(_WORD_START, " ").encode("utf-8")
