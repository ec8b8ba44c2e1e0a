"""A tokenizer in an exported folder, with what transformers must know to use it as training did."""

import json
import sys
from pathlib import Path
from typing import Any

from data_prep.chat.chat_format import ChatFormat, ChatFormatError
from data_prep.tokenizing.tokenizer import Tokenizer

_PADS = ("<|pad|>", "<pad>", "[PAD]")
_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>")


def pad_id(tokenizer: Tokenizer) -> int | None:
    """The id of the token that is there to fill rows, if there is one."""
    return next((found for name in _PADS if (found := tokenizer.special_id(name)) is not None), None)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int, chat_format: ChatFormat | None) -> None:
    """Writes the tokenizer's file as it is, and beside it tokenizer_config.json, with the chat template."""
    name = tokenizer.save(folder)
    table: dict[str, Any] = {
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # answers are written behind prompts
    }
    if name == "tokenizer.json":
        table |= _hugging_face_settings(folder / name, tokenizer.eos_id)
    else:
        table |= _sentencepiece_settings(folder / name, tokenizer.eos_id)
    specials = [token for token in tokenizer.added_tokens if tokenizer.special_id(token) is not None]
    table["pad_token"] = next((token for token in specials if token in _PADS), table["eos_token"])
    if (begin := next((token for token in specials if token in _BEGINS), None)) is not None:
        table["bos_token"] = begin
    if chat_format is not None:
        table |= _template(chat_format, tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _template(chat_format: ChatFormat, tokenizer: Tokenizer) -> dict[str, str]:
    try:
        return {"chat_template": chat_format.jinja(tokenizer)}
    except ChatFormatError as error:
        print(f"warning: no chat template is written: {error}", file=sys.stderr)
        return {}


def _hugging_face_settings(file: Path, eos_id: int) -> dict[str, Any]:
    import tokenizers

    raw = json.loads(file.read_text(encoding="utf-8"))
    library_tokenizer = tokenizers.Tokenizer.from_file(str(file))
    if library_tokenizer.num_special_tokens_to_add(is_pair=False):
        # Training put no begin-of-text before a document; a post-processor that does would shift every prompt.
        raw["post_processor"] = None
        file.write_text(json.dumps(raw, ensure_ascii=False, indent=2), encoding="utf-8")
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": library_tokenizer.id_to_token(eos_id)}


def _sentencepiece_settings(file: Path, eos_id: int) -> dict[str, Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    keeps_text, has_prefix = _text_rules(processor)
    if not keeps_text:
        print(
            f"warning: {file.name} normalises text, which transformers' LlamaTokenizer does not; its ids will differ. "
            "Encode prompts for the exported model with sentencepiece itself",
            file=sys.stderr,
        )
    return {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": processor.id_to_piece(eos_id),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": has_prefix,
        "legacy": True,  # each stretch between special tokens gets a space, as ours does
    }


def _text_rules(processor: Any) -> tuple[bool, bool]:
    """Whether a sentencepiece model only makes spaces visible, as Llama's does, and whether it puts one in front."""
    has_prefix = processor.normalize("a") != "a"
    # A ligature, a line end and doubled spaces are what the usual normalisations change.
    text = "b  \ufb01\n b "
    visible = text.replace(" ", "\u2581")
    return processor.normalize(text) == ("\u2581" + visible if has_prefix else visible), has_prefix
