"""Makes chat data: read, drop duplicates, encode, pack, publish; the folder is as it was until the last of them."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep import generations, publish
from data_prep.chat.chat_folder import ChatFolder, write_chat_folder
from data_prep.chat.row_shards import RowShards
from data_prep.chat.units import Unit, UnitReader
from data_prep.generations import Generation, Input
from data_prep.looking.text_table import aligned
from data_prep.manifest import Manifest, read_manifest, with_shards, write_manifest
from data_prep.reading import storage
from data_prep.reading.corpus import InputFile
from data_prep.tokenizing.tokenizer import Tokenizer


class ChatDataError(ValueError):
    """Chat data cannot be made as asked for; the message has the remedy."""


@dataclass(kw_only=True)
class ChatPreparation:
    """What is to be made, and what has been counted so far."""

    folder: Path
    stage: Path
    """Where shards are put together."""
    chat: ChatFolder
    tokenizer: Tokenizer
    source: str
    validation_share: float
    max_bad_fraction: float
    shard_tokens: int

    def run(self, files: Sequence[InputFile]) -> str:
        """Add what of the files the folder does not hold yet; returns what was done, in words.

        Raises:
            ChatDataError, ChatFormatError, InputError: the data folder is as it was.
        """
        self.chat.chat_format.stop_ids(self.tokenizer)  # refuses a tokenizer that lacks the format's tokens
        older = self._older()
        held = {item.file_id for generation in older for item in generation.inputs}
        identified = {Input(self.source, file.name, storage.identity(file.path)): file for file in files}
        new = {item: file for item, file in identified.items() if item.file_id not in held}
        if not new:
            return f"{self.folder}: already holds all of this input; nothing was written"
        shutil.rmtree(self.stage, ignore_errors=True)  # of a killed run
        hashes = [np.load(generation.folder / generations.HASHES_FILE) for generation in older]
        seen = {digest.tobytes() for of_generation in hashes for digest in of_generation}
        reader = UnitReader(self.chat, self.tokenizer, self.max_bad_fraction, seen)
        splits = {name: self._shards(name, older) for name in ("train", "validation")}
        self._divide(reader.read(new.values()), splits, at_least_one=not older)
        for shards in splits.values():
            shards.flush()
        if not older:
            self._check_splits(splits, reader)
        if all(shards.num_units == 0 for shards in splits.values()):
            return f"{self.folder}: has every conversation of this input already; nothing was written"
        summary = self._summary(splits, reader)
        self._publish(older, list(new), splits, reader.digests, summary)
        return summary

    def _older(self) -> list[Generation]:
        """What the folder holds, its manifest brought up to date where a killed run left it behind."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return []
        found = generations.read_generations(self.folder) if self.folder.is_dir() else []
        if not found or "row_tokens" not in found[0].settings:
            raise ChatDataError(f"{self.folder}: exists and is not a chat data folder; choose another --output")
        if difference := generations.difference(found[-1].settings, self._settings()):
            raise ChatDataError(
                f"{self.folder}: already holds chat data, made otherwise: {difference}. "
                "Give the same options to add to it, or choose another --output"
            )
        manifest, records = read_manifest(self.folder), tuple(r for made in found for r, _ in made.shards)
        if manifest.shards != records:
            write_manifest(self.folder, with_shards(manifest, records))
        return found

    def _settings(self) -> dict[str, str | int | float]:
        made = self.chat.chat_format
        return {
            "kind": self.chat.kind,
            "row_tokens": self.chat.row_tokens,
            "format": made.name,
            "default_system": made.default_system,
            "format_digest": xxhash.xxh3_64_hexdigest(json.dumps(made.to_json()).encode()),
            "tokenizer_digest": self.tokenizer.digest,
            "validation_share": self.validation_share,
        }

    def _shards(self, split: str, older: Sequence[Generation]) -> RowShards:
        before = [record for generation in older for record, _ in generation.shards]
        number = sum(record.source == self.source and record.split == split for record in before)
        return RowShards(self.stage, split, self.source, number, self.chat, self.tokenizer, self.shard_tokens)

    def _divide(self, units: Iterable[Unit], splits: dict[str, RowShards], *, at_least_one: bool) -> None:
        """Units to their splits, by their digests; with at_least_one, if that is none, the smallest to validation."""
        threshold = int(self.validation_share * 2**64)
        spare: Unit | None = None
        for unit in units:
            if int.from_bytes(unit.digest[8:], "big") < threshold:
                splits["validation"].add(unit.documents, unit.line)
                continue
            if at_least_one and (spare is None or unit.digest < spare.digest):
                spare, unit = unit, spare
            if unit is not None:
                splits["train"].add(unit.documents, unit.line)
        if spare is not None:
            is_needed = threshold and not splits["validation"].num_units and splits["train"].num_units
            splits["validation" if is_needed else "train"].add(spare.documents, spare.line)

    def _check_splits(self, splits: dict[str, RowShards], reader: UnitReader) -> None:
        for name, shards in splits.items():
            if not shards.num_units and (name == "train" or self.validation_share):
                raise ChatDataError(
                    f"the {name} split is empty: the input has {splits['train'].num_units:,} conversations beside what "
                    f"is held out with --validation-share {self.validation_share:g}{reader.dropped_in_words()}. "
                    f"Add conversations, or hold out fewer{reader.bad.by_reason()}"
                )

    def _publish(
        self,
        older: Sequence[Generation],
        inputs: Sequence[Input],
        splits: dict[str, RowShards],
        digests: Sequence[bytes],
        summary: str,
    ) -> None:
        """The generation counts from the rename of its folder on; the manifest follows from it."""
        added = [record for shards in splits.values() for record in shards.records]
        generation = generations.folder_of(self.stage, len(older))
        generation.mkdir(parents=True)
        generations.write_inputs(generation, self._settings(), inputs)
        generations.write_shards(generation, [(record, 0) for record in added])
        hashes = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
        np.save(generation / generations.HASHES_FILE, hashes)
        (generation / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        publish.sync_files(generation)
        publish.sync_folder(generation.parent)
        made = Manifest(
            tokenizer_file=self.tokenizer.file_name,
            tokenizer_digest=self.tokenizer.digest,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            sample_tokens=self.chat.row_tokens,
            shards=(*(record for before in older for record, _ in before.shards), *added),
        )
        if not older:
            self.tokenizer.save(self.stage)
            write_chat_folder(self.stage, self.chat)
            write_manifest(self.stage, made)
            publish.publish_folder(self.stage, self.folder)
            return
        for record in added:
            place = self.folder / record.file
            publish.make_folder(place.parent)
            for path in (self.stage / record.file).parent.glob(f"{place.stem}.*"):
                publish.publish(path, place.with_name(path.name))
        publish.publish(generation, self.folder / generations.FOLDER / generation.name)
        write_manifest(self.folder, made)

    def _summary(self, splits: dict[str, RowShards], reader: UnitReader) -> str:
        what = {"chat": "conversations", "pairs": "pairs", "prompts": "prompts"}[self.chat.kind]
        heads = ("split", what, "tokens", "trained", "share", "rows", "utilisation", "shards")
        rows = [
            (
                name,
                f"{shards.num_units:,}",
                f"{shards.num_tokens:,}",
                f"{shards.num_trained:,}",
                f"{shards.num_trained / shards.num_tokens:.1%}",
                f"{shards.num_rows:,}",
                f"{shards.num_tokens / (shards.num_rows * self.chat.row_tokens):.2%}",
                f"{len(shards.records):,}",
            )
            for name, shards in splits.items()
            if shards.num_units
        ]
        told = f"{reader.num_turns:,} turns; cut at a row's end: {reader.num_cut:,}{reader.dropped_in_words()}"
        bad = reader.bad.by_reason()
        return "\n".join([*aligned(heads, rows), told, *([f"bad records were left out:{bad}"] if bad else [])])
