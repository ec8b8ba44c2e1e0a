"""Text to ids and back: load a tokenizer.json or a sentencepiece model, or train a byte-level BPE."""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from data_prep import publish
from data_prep.backends import JSON_FILE, MODEL_FILE, Backend, TokenizerError, load_backend

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""Ids 0 to 3 of a tokenizer trained here; the chat marks are reserved for fine-tuning."""
EOS_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Tried in this order; the end of a chat turn comes last, because base models end documents with the others."""
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign before it
    r"|\p{N}"  # digits one by one: numbers are then read place by place
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space; the last space before a word belongs to the word
)
"""No merge crosses these pieces. Source: the split of Qwen2 (Yang et al. 2024), after that of cl100k."""


class Tokenizer:
    """A vocabulary with an end-of-document token; texts are always encoded as ordinary text."""

    def __init__(self, backend: Backend, raw: bytes, eos_id: int, file: Path | None = None) -> None:
        self._backend, self._raw = backend, raw
        self.file = file
        """Where it was loaded from; None for one just trained."""
        self.file_name = backend.file_name
        """The name `save` gives it."""
        self.eos_id = eos_id
        self.vocab_size = backend.vocab_size
        self.digest = xxhash.xxh3_128(raw + eos_id.to_bytes(4, "little")).hexdigest()
        """Stands for the tokenizer in shards and manifests: the content of its file, and the choice of EOS."""

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

    def stream_decoder(self) -> "StreamDecoder":
        """A fresh decoder for ids that arrive one at a time."""
        return StreamDecoder(self._backend.token_contents())

    def save(self, folder: Path) -> str:
        """Write the tokenizer's file into folder, byte for byte as it was loaded; return its name."""
        publish.write_bytes(folder / self.file_name, self._raw)
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


def load_tokenizer(path: str | Path, eos_token: str | None = None, *, eos_id: int | None = None) -> Tokenizer:
    """Load a tokenizer.json, a sentencepiece .model, or a folder with one of them (tokenizer.json first).

    The end-of-document token is eos_id or eos_token where given (a prepared data set records its eos_id), else the
    one a sentencepiece model declares, else the first of EOS_CANDIDATES in the vocabulary.

    Raises:
        TokenizerError: no such file, not a tokenizer, or no end-of-document token.
    """
    file = _tokenizer_file(Path(path))
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file}: cannot read the tokenizer ({error.strerror})") from error
    backend = load_backend(raw, str(file))
    return Tokenizer(backend, raw, _find_eos(file, backend, eos_token) if eos_id is None else eos_id, file)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded and comes back unchanged; equal texts give equal files.

    A small corpus may yield fewer tokens than asked for.

    Raises:
        TokenizerError: vocab_size leaves no room for the 256 bytes and the special tokens.
    Cost: about 0.2 CPU-seconds and 10 MB of memory per MB of text, for 32,000 tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size = {vocab_size}: a byte-level BPE needs at least {smallest}")
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    raw = tokenizer.to_str(pretty=True).encode("utf-8")
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
        raise TokenizerError(f"{path}: found neither tokenizer.json nor one .model file in the folder")
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
