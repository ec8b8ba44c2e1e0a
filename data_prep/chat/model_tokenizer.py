"""The tokenizer of a model or a data folder, with the end of document that belongs to it."""

import json
from pathlib import Path

from data_prep.manifest import MANIFEST_FILE, read_manifest
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer


def load_tokenizer_of(path: Path, eos_token: str | None) -> Tokenizer:
    """A model's or data folder's tokenizer with the end of document that belongs to it, unless another is asked for.

    Raises:
        TokenizerError: there is none.
        ManifestError: the data folder's manifest cannot be read.
    """
    if (path / "record.json").is_file():  # of a checkpoint it is the run's
        path = path.absolute().parent
    eos_id: object = None
    if eos_token is None and (path / MANIFEST_FILE).is_file():
        eos_id = read_manifest(path).eos_id
    elif eos_token is None and (path / "config.json").is_file():  # of Hugging Face
        declared = json.loads((path / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
        eos_id = declared[0] if isinstance(declared, list) and declared else declared
    return load_tokenizer(path, eos_token, eos_id=eos_id if isinstance(eos_id, int) else None)
