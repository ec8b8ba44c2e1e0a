"""The steps of one preparation, from found files to a published generation."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep import (
    bad_lines,
    config_file,
    generation_tables,
    generations,
    manifest,
    mixture_file,
    publish,
    reduce,
    report,
    summary,
    training_sample,
    unit_step,
)
from data_prep.cleaning.clean import Cleaner
from data_prep.cut import CutTask, Pieces, cut_shard, shard_pieces
from data_prep.engine import Engine
from data_prep.generations import Generation, Input
from data_prep.looking import report_html
from data_prep.manifest import Manifest, ShardRecord
from data_prep.prepare_config import PrepareConfig
from data_prep.reading.corpus import InputFile, total_bytes
from data_prep.reading.documents import InputError, Unit, plan_units
from data_prep.reduce import Decided, Documents, FinishedUnit
from data_prep.shards import token_dtype
from data_prep.sources import Source
from data_prep.tokenizing.encoders import fastest_encoder
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from data_prep.tokenizing.train_tokenizer import train
from data_prep.unit_step import Recipe, UnitTask, process_unit
from data_prep.work_area import WorkArea

SAMPLE_UNIT_BYTES = 8 * 1024 * 1024
PROOF_BYTES = 100_000
"""Of the input, on which a fast encoder must agree with the tokenizer's own."""
Task = TypeVar("Task")
Result = TypeVar("Result")


def settings_of(config: PrepareConfig, found: Sequence[Source], given: Tokenizer | None) -> dict[str, Any]:
    """What shapes the result besides the content of the input files. Not: paths, workers, places."""
    tokenizer = config.tokenizer
    trained = [tokenizer.algorithm, tokenizer.vocab_size, tokenizer.training_bytes]
    return {
        "step version": unit_step.STEP_VERSION,
        "tokenizer": trained if given is None else given.digest,
        "clean": Cleaner(config.clean).digest,
        "dedup": config.dedup.digest,
        "decontaminate": config.decontaminate.digest,
        "output.shard_tokens": config.output.shard_tokens,
        "output.sample_tokens": config.output.sample_tokens,
        "output.validation_fraction": config.output.validation_fraction,
        **{f"source {source.name}": [repr(source.layout), source.config.kind] for source in found},
    }


class Preparation:
    """One preparation: new input becomes a generation of a data folder, which is made if it is not there."""

    def __init__(
        self,
        config: PrepareConfig,
        settings: dict[str, Any],
        inputs: Mapping[Input, InputFile],
        found: Sequence[Source],
        older: Sequence[Generation],
        area: WorkArea,
    ) -> None:
        self._config, self._settings, self._inputs, self._older = config, settings, inputs, older
        self._area, self._sources = area, found
        self._folder = Path(config.output.folder)
        self._started_s = time.perf_counter()
        self._units = _plan(found, inputs, config.engine.range_bytes(total_bytes(inputs.values())))

    @property
    def num_units(self) -> int:
        """Tasks of the largest step."""
        return len(self._units)

    def run(self, tokenizer: Tokenizer | None, engine: Engine) -> Manifest:
        """Do all steps on an engine; the data folder is as it was until the last."""
        self._engine = engine
        if tokenizer is None or tokenizer.file is None:
            tokenizer = self._trained_tokenizer()
        units = self._process_units(tokenizer)
        bad_lines.check(units, self._config.engine.max_bad_fraction)
        documents = reduce.load_documents(units)
        decided, pieces = self._decide(units, documents)
        stage = self._area.stage(_stage_key(units, decided, self._settings, len(self._older)))
        generation = generations.folder_of(stage, len(self._older))
        generation.mkdir(parents=True, exist_ok=True)
        generations.write_inputs(generation, self._settings, self._inputs)
        near = self._config.dedup.near != "off"
        with ThreadPoolExecutor(1) as beside:  # while the workers cut
            tables = beside.submit(
                generation_tables.write, generation, units, documents, decided, self._compared_with(), near
            )
            generations.write_shards(generation, self._cut(stage, pieces, tokenizer))
            tables.result()
        content = summary.summarise(self._sources, units, documents, decided)
        publish.write_text(
            generation / generations.SUMMARY_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        made = self._publish(stage, tokenizer)
        print(report.table(content, time.perf_counter() - self._started_s))
        if reasons := bad_lines.by_reason(units):
            place = generations.folder_of(self._folder, len(self._older)) / generations.BAD_LINES_FILE
            print(f"bad lines were left out; all are listed in {place}:{reasons}")
        return made

    def _trained_tokenizer(self) -> Tokenizer:
        """A tokenizer trained on the input, or the one that a killed run has trained."""
        config = self._config.tokenizer
        content = [self._settings, [item.file_id for item in self._inputs]]
        folder = self._area.tokenizer(xxhash.xxh3_128_hexdigest(json.dumps(content).encode("utf-8")))
        if not folder.is_dir():
            started_s = time.perf_counter()
            trained = train(self._sample(config.training_bytes), config.algorithm, config.vocab_size)
            temporary = publish.temporary_beside(folder)
            temporary.mkdir()
            trained.save(temporary)
            publish.publish_folder(temporary, folder)
            elapsed_s = time.perf_counter() - started_s
            print(f"trained a {config.algorithm} tokenizer of {trained.vocab_size:,} tokens in {elapsed_s:.1f} s")
        return load_tokenizer(folder)

    def _sample(self, num_bytes: int) -> Iterator[str]:
        """Some of the input, but for what is held out."""
        return training_sample.texts(
            [
                unit for _, unit in _plan(self._sources, self._inputs, SAMPLE_UNIT_BYTES)
            ],  # whatever engine.unit_bytes is
            num_bytes,
            reduce.split_threshold(self._config.output.validation_fraction),
            Cleaner(self._config.clean),
        )

    def _process_units(self, tokenizer: Tokenizer) -> list[FinishedUnit]:
        encoder = fastest_encoder(tokenizer, list(self._sample(PROOF_BYTES)))
        for reason in encoder.rejected:
            print(f"not encoding with {reason}")
        print(f"encoding with {encoder.name}; running on {self._engine.name}")
        file_ids = {file.path: item.file_id for item, file in self._inputs.items()}
        tasks: list[UnitTask] = []
        digests: dict[Recipe, str] = {}
        for source, unit in self._units:
            recipe = Recipe(
                tokenizer_file=str(tokenizer.file),
                tokenizer_digest=tokenizer.digest,
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
                marks=unit_step.marks_of_turns(tokenizer),
                encoder=encoder.name,
                clean=self._config.clean,
                decontaminate=self._config.decontaminate,
                exact=self._config.dedup.exact,
                near=self._config.dedup.near,
                kind=source.config.kind,
            )
            if recipe not in digests:
                digests[recipe] = unit_step.recipe_digest(recipe)
            key = unit_step.unit_key(unit, [file_ids[path] for path in unit.paths], digests[recipe])
            tasks.append(UnitTask(unit, recipe, str(self._area.unit(key))))
        sizes = [task.unit.size_bytes for task in tasks]
        summaries = self._map("read, clean, encode", process_unit, tasks, sizes, count=lambda unit: unit.num_documents)
        return [
            FinishedUnit(task.unit, source.name, Path(task.folder), found)
            for (source, _), task, found in zip(self._units, tasks, summaries, strict=True)
        ]

    def _compared_with(self) -> list[Path]:
        """Generations whose documents are older: those of other data folders, then those of this one."""
        others = [Path(folder) for folder in self._config.dedup.against]
        return [g.folder for folder in others for g in generations.read_generations(folder)] + [
            generation.folder for generation in self._older
        ]

    def _decide(
        self, units: Sequence[FinishedUnit], documents: Documents
    ) -> tuple[Decided, dict[tuple[str, str], Pieces]]:
        fraction = self._config.output.validation_fraction
        verdicts = reduce.find_verdicts(units, documents, self._compared_with(), self._config.dedup)
        kept = verdicts.kind == 0
        if not kept.any():
            raise InputError(
                f"all {kept.size:,} documents repeat older ones; there is nothing to add. "
                "Leave these files out, or keep duplicates with --dedup.exact False --dedup.near off"
            )
        held_out = reduce.hold_out(documents, kept, fraction, at_least_one=not self._older)
        if held_out[kept].all():
            raise InputError(
                f"the training split is empty: all {np.count_nonzero(kept):,} documents were held out. "
                f"Add documents, or lower output.validation_fraction = {fraction:g}"
            )
        if fraction and not held_out.any() and not self._older:
            raise InputError(
                "the validation split is empty: the input has only one distinct text, which training needs. "
                "Add documents, or hold out none with --output.validation-fraction 0"
            )
        pieces, place = reduce.streams(units, documents, kept, held_out)
        return Decided(verdicts, held_out, place), pieces

    def _cut(
        self, stage: Path, pieces: Mapping[tuple[str, str], Pieces], tokenizer: Tokenizer
    ) -> list[tuple[ShardRecord, int]]:
        tasks: list[CutTask] = []
        starts: list[int] = []
        before = [record for generation in self._older for record, _ in generation.shards]
        for (source, split), stream in pieces.items():
            number = sum(record.source == source and record.split == split for record in before)
            for index, (content, context) in enumerate(shard_pieces(stream, self._config.output.shard_tokens)):
                starts.append(index * self._config.output.shard_tokens)
                tasks.append(
                    CutTask(
                        folder=str(stage),
                        file=f"{split}/{source}-{number + index:05d}.bin",
                        source=source,
                        pieces=content,
                        context=context,
                        vocab_size=tokenizer.vocab_size,
                        tokenizer_digest=tokenizer.digest,
                        eos_id=tokenizer.eos_id,
                        sample_tokens=self._config.output.sample_tokens,
                    )
                )
        token_bytes = np.dtype(token_dtype(tokenizer.vocab_size)).itemsize
        sizes = [task.pieces.num_tokens * token_bytes for task in tasks]
        records = self._map("cut shards", cut_shard, tasks, sizes, count=lambda record: record.document_count)
        return list(zip(records, starts, strict=True))

    def _publish(self, stage: Path, tokenizer: Tokenizer) -> Manifest:
        """The generation counts from the rename of its folder on; what is written after that follows from it."""
        (added,) = generations.read_generations(stage)
        made = Manifest(
            tokenizer_file=tokenizer.file_name,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            sample_tokens=self._config.output.sample_tokens,
            shards=tuple(record for generation in (*self._older, added) for record, _ in generation.shards),
        )
        if self._older:
            for record, _ in added.shards:
                place = self._folder / record.file
                place.parent.mkdir(exist_ok=True)
                for path in (stage / record.file).parent.glob(f"{place.stem}.*"):
                    publish.publish(path, place.with_name(path.name))
            publish.sync_folder(added.folder)
            publish.publish(added.folder, self._folder / generations.FOLDER / added.folder.name)
            self._write_heads(self._folder, made)
        else:
            tokenizer.save(stage)
            self._write_heads(stage, made)
            publish.publish_folder(stage, self._folder.resolve())
        return made

    def _write_heads(self, folder: Path, made: Manifest) -> None:
        """The files at the top of a data folder; the manifest last, because readers begin with it."""
        publish.write_text(folder / "prepare.toml", config_file.to_toml(self._config))
        mixture_file.write(folder, self._folder, made, self._config)
        report_html.write(folder)
        manifest.write_manifest(folder, made)

    def _map(
        self,
        name: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        sizes: Sequence[int],
        *,
        count: Callable[[Result], int],
    ) -> list[Result]:
        """Results of the tasks, in their order, under a progress bar of bytes that counts documents, too."""
        results: list[Any] = [None] * len(tasks)
        num_documents = 0
        # In a log file a line every half minute is enough.
        interval_s = 0.2 if sys.stderr.isatty() else 30.0
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": interval_s, "disable": None}
        with tqdm(total=sum(sizes), desc=name, **options) as bar:
            for index, result in self._engine.run(function, tasks):
                results[index] = result
                num_documents += count(result)
                bar.set_postfix_str(f"{num_documents:,} documents", refresh=False)
                bar.update(sizes[index])
        return results


def _plan(found: Sequence[Source], inputs: Mapping[Input, InputFile], unit_bytes: int) -> list[tuple[Source, Unit]]:
    """The units of the input, in its order, each with its source."""
    return [
        (source, unit)
        for source in found
        for unit in plan_units(
            [file for item, file in inputs.items() if item.source == source.name],
            source.layout,
            range_bytes=unit_bytes,
            group_bytes=unit_bytes,
        )
    ]


def _stage_key(units: Iterable[FinishedUnit], decided: Decided, settings: Mapping[str, Any], generation: int) -> str:
    """Names what is cut: of the same documents the shards of a killed run can stay."""
    digest = xxhash.xxh3_128(json.dumps([settings, generation, [unit.folder.name for unit in units]]).encode("utf-8"))
    digest.update(decided.place.tobytes())
    digest.update(decided.held_out.tobytes())
    return digest.hexdigest()
