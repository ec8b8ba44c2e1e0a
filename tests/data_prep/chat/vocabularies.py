"""Tokenizers with the special tokens of every chat format."""

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_prep.chat.chat_format import FORMATS
from data_prep.tokenizing import byte_pairs
from data_prep.tokenizing.backends import load_backend
from data_prep.tokenizing.tokenizer import Tokenizer

SPECIALS = ("<|endoftext|>", "</s>", *dict.fromkeys(name for made in FORMATS.values() for name in made.specials))
TEXT = (
    "system user assistant model ### Instruction: Response: [INST] [/INST] <<SYS>> the quick brown fox jumps over the "
    "lazy dog and says hello to who said nothing at all <|user|> <|assistant|> Below is an instruction"
)


@functools.cache
def byte_level(eos: str = "</s>") -> Tokenizer:
    """Trained here, on text like that of the tests."""
    raw = byte_pairs.learn(byte_pairs.count_words([TEXT] * 5), 700, SPECIALS)
    return Tokenizer(load_backend(raw, "tokenizer.json"), raw, SPECIALS.index(eos))


@functools.cache
def like_llama(scheme: str) -> Tokenizer:
    """Characters only, spaces made visible; a space before every stretch of text ("every"), or the first one."""
    pieces = ["<unk>", *SPECIALS, "\u2581", "\n", *sorted({c for c in TEXT + "0123456789!.?" if c != " "})]
    vocabulary: dict[str, Any] = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if scheme == "every":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(list(SPECIALS))
    raw = made.to_str().encode("utf-8")
    return Tokenizer(load_backend(raw, "tokenizer.json"), raw, vocabulary["</s>"])


def transformers_tokenizer(tokenizer: Tokenizer, folder: Path) -> Any:
    """The same tokenizer in transformers."""
    import transformers

    tokenizer.save(folder)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / tokenizer.file_name))


def json_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
