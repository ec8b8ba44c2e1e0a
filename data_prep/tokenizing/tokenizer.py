"""Text to ids and back: load a tokenizer.json or a sentencepiece model, or train a byte-level BPE."""

import codecs
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_prep import publish
from data_prep.tokenizing import byte_pairs
from data_prep.tokenizing.backends import JSON_FILE, MODEL_FILE, AddedToken, Backend, TokenizerError, load_backend

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""Ids 0 to 3 of a tokenizer trained here; the chat marks are reserved for fine-tuning."""
EOS_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Tried in this order; the end of a chat turn comes last, because base models end documents with the others."""

NO_TEXT = "no text to train on: the input is empty, or the filters and bad lines left nothing of it"


class Tokenizer:
    """A vocabulary with an end-of-document token; texts are always encoded as ordinary text."""

    def __init__(self, backend: Backend, raw: bytes, eos_id: int, file: Path | None = None) -> None:
        self._backend = backend
        self.content = raw
        """The bytes of its file."""
        self.file = file
        """Where it was loaded from; None for one just trained."""
        self.file_name = backend.file_name
        """The name `save` gives it."""
        self.eos_id = eos_id
        self.digest = xxhash.xxh3_128(raw + eos_id.to_bytes(4, "little")).hexdigest()
        """Stands for the tokenizer in shards and manifests: the content of its file, and the choice of EOS."""

    @property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return self._backend.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end tokens; "<|endoftext|>" inside it is text like any other."""
        return self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster than one by one."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(token_id) for token_id in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, 0 for special tokens: what bits per byte divides by.

        Sentencepiece puts a space before a text, so its sum over an encoded text may be one byte too many.

        Shapes: (vocab_size,). Dtypes: int32.
        Raises:
            TokenizerError: the kind of tokenizer does not tell.
        """
        return np.array([len(content) for content in self._backend.token_contents()], dtype=np.int32)

    def token_contents(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for, none for special tokens; single bytes may be part of a character.

        Raises:
            TokenizerError: the kind of tokenizer does not tell.
        """
        return self._backend.token_contents()

    def special_id(self, token: str) -> int | None:
        """The id of a mark beside the learned tokens, such as "<|im_start|>"; None if there is none of that name."""
        return self._added[token].token_id if token in self._added else None

    def is_special(self, token_id: int) -> bool:
        """Whether an id never comes from text."""
        return token_id in self._special_ids

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary cannot express; None where it can express everything."""
        return self._backend.unknown_id()

    @property
    def added_tokens(self) -> list[str]:
        """The spelling of every token beside the learned ones."""
        return list(self._added)

    @functools.cached_property
    def _added(self) -> dict[str, AddedToken]:
        return self._backend.added_tokens()

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(added.token_id for added in self._added.values() if added.is_special)

    def stream_decoder(self) -> "StreamDecoder":
        """A fresh decoder for ids that arrive one at a time."""
        return StreamDecoder(self._backend.token_contents())

    def save(self, folder: Path) -> str:
        """Write the tokenizer's file into folder, byte for byte as it was loaded; return its name."""
        publish.write_bytes(folder / self.file_name, self.content)
        return self.file_name


class StreamDecoder:
    """Text of ids as they arrive, holding back bytes that do not yet make a character.

    It continues a text, so that a sentencepiece word keeps the space before it.
    """

    def __init__(self, token_contents: list[bytes]) -> None:
        self._contents = token_contents
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that token_id completes, often none."""
        # Models pad their vocabulary: an id past the tokenizer's last stands for nothing.
        return self._utf8.decode(self._contents[token_id] if token_id < len(self._contents) else b"")

    def flush(self) -> str:
        """U+FFFD for a character left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(
    path: str | Path, eos_token: str | None = None, *, eos_id: int | None = None, is_known: bool = False
) -> Tokenizer:
    """Load a tokenizer.json, a sentencepiece .model, or a folder with one of them (tokenizer.json first).

    The end-of-document token is eos_id or eos_token where given (a prepared data set records its eos_id), else the
    one a sentencepiece model declares, else the first of EOS_CANDIDATES in the vocabulary.

    is_known: the file was loaded before, and is parsed when that is first needed; see `load_backend`.

    Raises:
        TokenizerError: no such file, not a tokenizer, or no end-of-document token.
    """
    file = _tokenizer_file(Path(path))
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot read the tokenizer ({error.strerror})") from error
    backend = load_backend(raw, str(file), is_known=is_known)
    return Tokenizer(backend, raw, _find_eos(file, backend, eos_token) if eos_id is None else eos_id, file)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded and comes back unchanged; equal texts give equal files.

    A small corpus may yield fewer tokens than asked for. Up to 65,536 tokens, ids take two bytes each.

    Raises:
        TokenizerError: vocab_size leaves no room for the 256 bytes and the special tokens, or there is no text.
    Cost: 0.1 s per MB of text for counting its words, then about 1 s for 32,000 tokens.
    """
    return train_bpe_from_counts(byte_pairs.count_words(texts), vocab_size)


def train_bpe_from_counts(counts: Mapping[str, int], vocab_size: int) -> Tokenizer:
    """`train_bpe` from what `byte_pairs.count_words` has counted, perhaps in several processes."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size = {vocab_size}: a byte-level BPE needs at least {smallest}")
    if not counts:
        raise TokenizerError(NO_TEXT)
    raw = byte_pairs.learn(counts, vocab_size, SPECIAL_TOKENS)
    return Tokenizer(load_backend(raw, JSON_FILE), raw, eos_id=SPECIAL_TOKENS.index("<|endoftext|>"))


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise TokenizerError(f"{path}: no such tokenizer file or folder")
    for name in (JSON_FILE, MODEL_FILE):
        if (path / name).is_file():
            return path / name
    models_found = sorted(path.glob("*.model"))
    if len(models_found) != 1:
        raise TokenizerError(
            f"{path}: found neither tokenizer.json nor one .model file in the folder; name the folder of a model or of "
            "prepared data, or the file itself"
        )
    return models_found[0]


def _find_eos(file: Path, backend: Backend, eos_token: str | None) -> int:
    candidates = EOS_CANDIDATES if eos_token is None else (eos_token,)
    if eos_token is None and (declared := backend.declared_eos_id()) is not None:
        return declared
    for candidate in candidates:
        if (found := backend.token_id(candidate)) is not None:
            return found
    raise TokenizerError(
        f"{file}: no end-of-document token, looked for {', '.join(candidates)}. "
        "Name the one to use with --tokenizer.eos-token"
    )
