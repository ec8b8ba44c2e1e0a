"""Writes a trained model as a Hugging Face folder that transformers, vLLM and the like load.

python -m evaluation.export runs/sft exported/ --dtype bf16
python -m evaluation.export runs/lora adapter/ --adapter exported/base
"""

import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from data_prep import command_line, publish

if TYPE_CHECKING:
    from data_prep.chat.chat_format import ChatFormat
    from evaluation.model_folder import StoredModel

# torch and the model are imported where they are used, so that --help is instant.


def export_model(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    /,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    adapter: str | None = None,
    check: Literal["ours", "transformers"] = "ours",
) -> None:
    """Writes weights, config, tokenizer and chat template as a Hugging Face folder, which appears whole or not at all.

    Args:
        model: Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder.
        out: Folder to make; it must not exist, or be empty.
        dtype: Of the weights; fp32 is what training holds, bf16 is half the size and what it computes with on CUDA.
        adapter: Of a LoRA run, write the adapters alone, as peft does, for the exported model at this path or of this
            name on the hub. By default they are merged into the weights.
        check: Before it appears the folder is read back and compared, by our own reader, or by transformers as well.
    """
    from evaluation.model_folder import ModelFolderError, read_model

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelFolderError(f"{out}: already there and not an empty folder; delete it or export to another name")
    stored = read_model(model)
    chat_format = _chat_format(stored)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    publish.remove_leftovers(out.parent, out.name)
    temporary = publish.temporary_beside(out)
    try:
        if adapter is None:
            _write_weights(temporary, stored, chat_format, dtype)
        else:
            _write_adapter(temporary, stored, adapter)
        _write_tokenizer(temporary, stored, chat_format)
        if adapter is None:
            _check(temporary, stored, dtype, check)
        publish.sync_files(temporary)
        publish.publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{stored.path} -> {out} ({dtype if adapter is None else 'adapters alone'})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command_line.read(export_model, argv, prog="python -m evaluation.export")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _chat_format(stored: "StoredModel") -> "ChatFormat | None":
    """The chat format that a model was fine-tuned in; None of a base model."""
    from data_prep.chat.chat_format import CHAT_FILE, chat_format_of

    return chat_format_of(stored.path) if (_place(stored) / CHAT_FILE).is_file() else None


def _place(stored: "StoredModel") -> Path:
    """Where a model's files lie beside its weights: of a checkpoint, in the run."""
    return stored.path.absolute().parent if (stored.path / "record.json").is_file() else stored.path


def _write_weights(folder: Path, stored: "StoredModel", chat_format: "ChatFormat | None", dtype: str) -> None:
    from evaluation.exported_tokenizer import pad_id
    from model.convert import write_hugging_face, write_own_form
    from model.hugging_face_configs import OWN_MODULE, refuse_what_is_foreign_to_them
    from model.hugging_face_keys import ConvertError

    tokenizer, write = stored.tokenizer, write_hugging_face
    try:
        refuse_what_is_foreign_to_them(stored.config)
    except ConvertError as error:
        if stored.config.head == "score":
            raise
        print(f"note: {error}. {OWN_MODULE}.py is put beside it: load it with trust_remote_code=True", file=sys.stderr)
        write = write_own_form
    stop_ids = chat_format.stop_ids(tokenizer) if chat_format is not None else []
    write(
        folder, stored.config, stored.state, eos_id=tokenizer.eos_id, dtype=dtype, stop_ids=stop_ids,
        pad_id=pad_id(tokenizer),
    )  # fmt: skip
    if write is write_own_form:
        shutil.copyfile(Path(__file__).with_name(f"{OWN_MODULE}.py"), folder / f"{OWN_MODULE}.py")


def _write_adapter(folder: Path, stored: "StoredModel", base: str) -> None:
    from data_prep.config_file import from_table
    from evaluation.model_folder import ModelFolderError
    from model.lora_config import LoraConfig
    from model.peft_files import write_adapter
    from resume.checkpoint import open_checkpoint, read_config

    refusal = ModelFolderError(f"{stored.path}: --adapter {base}: not of a LoRA run (lora.rank); leave --adapter out")
    if not (stored.path / "record.json").is_file():
        raise refusal
    checkpoint = open_checkpoint(stored.path)
    table = tomllib.loads(read_config(stored.path, checkpoint.record))
    lora = from_table(table.get("lora", {}), LoraConfig, "lora")
    if not lora.rank:
        raise refusal
    write_adapter(folder, stored.config, lora, checkpoint.read_tensors("model."), base)


def _write_tokenizer(folder: Path, stored: "StoredModel", chat_format: "ChatFormat | None") -> None:
    from data_prep.chat.chat_format import CHAT_FILE
    from evaluation.exported_tokenizer import write_tokenizer

    write_tokenizer(folder, stored.tokenizer, stored.config.context_length, chat_format)
    if chat_format is not None:  # our own chat goes by it
        shutil.copyfile(_place(stored) / CHAT_FILE, folder / CHAT_FILE)


def _check(folder: Path, stored: "StoredModel", dtype: str, check: str) -> None:
    from evaluation.export_check import check_with_ours, check_with_theirs

    check_with_ours(folder, stored.config, stored.state, dtype)
    if check == "transformers":
        check_with_theirs(folder)


if __name__ == "__main__":
    sys.exit(main())
