"""One vocabulary in three libraries: tokenizers 1.0 beside the installed 0.23, tiktoken, and the tokenizer's own."""

import functools
import importlib.util
import json
import sys
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from data_prep.tokenizing.backends import JSON_FILE, byte_level_bytes
from data_prep.tokenizing.stable_unicode import has_later_letters
from data_prep.tokenizing.tokenizer import Tokenizer

ENCODER_FOLDER = Path(sys.prefix) / "encoder"
"""Where `make setup` puts requirements-encoder.txt: tokenizers 1.0 encodes, 0.23 trains, and both have one name."""
_PACKAGE = "tokenizers_version_1"
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by unless told otherwise. Source: Radford et al. 2019 (GPT-2)."""


class UnfitError(ValueError):
    """A library is not installed, or cannot run this kind of tokenizer."""


class Reference:
    """The tokenizer's own library: right by definition."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = tokenizers if tokenizer.file_name == JSON_FILE else sentencepiece
        self.name = f"{library.__name__} {library.__version__}"
        self.rejected: list[str] = []
        self._tokenizer = tokenizer

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text."""
        return [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch(texts)]


class _Faster(ABC):
    """A library whose tables of Unicode are not those of the reference: disputed texts go to the reference."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.rejected: list[str] = []
        self._reference = Reference(tokenizer)

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text."""
        is_disputed = [has_later_letters(text) for text in texts]
        arrays = iter(self._encode([text for text, disputed in zip(texts, is_disputed, strict=True) if not disputed]))
        return [self._by_reference(text) if is_disputed[i] else next(arrays) for i, text in enumerate(texts)]

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[np.ndarray]: ...

    def _by_reference(self, text: str) -> np.ndarray:
        return self._reference.encode_arrays([text])[0]


class Version1(_Faster):
    """tokenizers 1.0, loaded under another name, because 0.23 is the one that trains and that transformers needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.file_name != JSON_FILE:
            raise UnfitError("reads only tokenizer.json")
        library = _load_version_1(ENCODER_FOLDER)
        super().__init__(f"tokenizers {library.__version__}", tokenizer)
        self._library_tokenizer = _version_1_tokenizer(tokenizer.content)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._library_tokenizer.encode_batch(
            texts, add_special_tokens=False, encode_special_tokens=True, padding=None, truncation=None
        )
        return [encoding.ids_array for encoding in encodings]


class Tiktoken(_Faster):
    """tiktoken with the vocabulary of a byte-level BPE."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.file_name != JSON_FILE:
            raise UnfitError("runs only byte-level BPE")
        try:
            import tiktoken
        except ImportError as error:
            raise UnfitError("tiktoken is not installed") from error
        super().__init__(f"tiktoken {tiktoken.__version__}", tokenizer)
        table = json.loads(tokenizer.content)
        self._composes = _composes(table["normalizer"])
        self._encoding = tiktoken.Encoding(
            tokenizer.digest,
            pat_str=_split_pattern(table["pre_tokenizer"]),
            mergeable_ranks=_ranks(table),
            special_tokens={},
        )

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> np.ndarray:
        composed = unicodedata.normalize("NFC", text) if self._composes else text
        try:
            return self._encoding.encode_to_numpy(composed, disallowed_special=())
        except ValueError:  # its regex engine gives up, for example, on a million spaces in a row
            return self._by_reference(text)


@functools.lru_cache(maxsize=2)
def _version_1_tokenizer(content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / JSON_FILE
        file.write_bytes(content)
        return _load_version_1(ENCODER_FOLDER).Tokenizer.from_file(file)


@functools.cache
def _load_version_1(folder: Path) -> Any:
    init = folder / "tokenizers" / "__init__.py"
    if not init.is_file():
        raise UnfitError(f"not installed in {folder}")
    spec = importlib.util.spec_from_file_location(_PACKAGE, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module  # its own imports are relative to this name
    spec.loader.exec_module(module)
    return module


def _composes(normalizer: dict[str, Any] | None) -> bool:
    if normalizer not in (None, {"type": "NFC"}):
        raise UnfitError(f"does not know the normalizer {normalizer['type']}")
    return normalizer is not None


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The one regular expression that a pre-tokenizer amounts to."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step and step["type"] for step in steps]
    if kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise UnfitError("runs only byte-level BPE without a space put before the text")
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return _GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern, rule = steps[0]["pattern"].get("Regex"), (steps[0]["behavior"], steps[0]["invert"])
        if pattern is not None and rule == ("Isolated", False):
            return pattern
    raise UnfitError(f"does not know the way of splitting {kinds}")


def _ranks(table: dict[str, Any]) -> dict[bytes, int]:
    """Bytes of each token with their id: tiktoken merges what has the lowest id, so ids must follow the merges."""
    model = table["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise UnfitError("runs only byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnfitError("does not know prefixes and suffixes of tokens")
    added = {token["content"]: token["special"] for token in table["added_tokens"]}
    if not all(added.values()):
        raise UnfitError("does not know added tokens that are found in ordinary text")
    ranks = {byte_level_bytes(piece): token_id for piece, token_id in model["vocab"].items() if piece not in added}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    merged = [byte_level_bytes(left + right) for left, right in merges]
    ids = [ranks[token] for token in merged]
    if ids != sorted(ids) or {token for token in ranks if len(token) > 1} != set(merged):
        raise UnfitError("the vocabulary is not in the order of its merges")
    if sum(len(token) == 1 for token in ranks) != 256:
        raise UnfitError("the vocabulary lacks some of the 256 bytes")
    return ranks
