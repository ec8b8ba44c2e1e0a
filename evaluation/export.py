"""Writes a trained model as a Hugging Face folder that transformers, vLLM and the like load.

python -m evaluation.export runs/demo exported/ --dtype bf16
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from data_prep import publish

if TYPE_CHECKING:
    from data_prep.tokenizing.tokenizer import Tokenizer

# torch and the model are imported where they are used, so that --help is instant.


def export_model(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    /,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> None:
    """Writes weights, config and tokenizer of a model as a Hugging Face folder, which appears whole or not at all.

    Args:
        model: Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder.
        out: Folder to make; it must not exist, or be empty.
        dtype: Of the weights; fp32 is what training holds, bf16 is half the size and what it computes with on CUDA.
    """
    from evaluation.model_folder import ModelFolderError, read_model
    from model.convert import write_hugging_face

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelFolderError(f"{out}: already there and not an empty folder; delete it or export to another name")
    stored = read_model(model)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    publish.remove_leftovers(out.parent, out.name)
    temporary = publish.temporary_beside(out)
    try:
        write_hugging_face(temporary, stored.config, stored.state, eos_id=stored.tokenizer.eos_id, dtype=dtype)
        _write_tokenizer(temporary, stored.tokenizer, stored.config.context_length)
        for file in temporary.iterdir():
            _flush(file)
        publish.publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{stored.path} -> {out} ({dtype})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        tyro.cli(export_model, args=argv, prog="python -m evaluation.export")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write_tokenizer(folder: Path, tokenizer: "Tokenizer", context_length: int) -> None:
    """The tokenizer's file as it is, and beside it what transformers must know to use it as training did."""
    name = tokenizer.save(folder)
    table: dict[str, Any] = {"model_max_length": context_length, "clean_up_tokenization_spaces": False}
    if name == "tokenizer.json":
        table |= _hugging_face_settings(folder / name, tokenizer.eos_id)
    else:
        table |= _sentencepiece_settings(folder / name, tokenizer.eos_id)
    (folder / "tokenizer_config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


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
        "legacy": False,
    }


def _text_rules(processor: Any) -> tuple[bool, bool]:
    """Whether a sentencepiece model only makes spaces visible, as Llama's does, and whether it puts one in front."""
    has_prefix = processor.normalize("a") != "a"
    # A ligature, a line end and doubled spaces are what the usual normalisations change.
    text = "b  \ufb01\n b "
    visible = text.replace(" ", "\u2581")
    return processor.normalize(text) == ("\u2581" + visible if has_prefix else visible), has_prefix


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


if __name__ == "__main__":
    sys.exit(main())
