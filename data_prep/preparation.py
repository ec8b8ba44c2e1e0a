"""The steps of one preparation, from found files to a published generation."""

import dataclasses
import functools
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
    generation_tables,
    generations,
    heads,
    publish,
    reduce,
    report,
    summary,
    training_sample,
    unit_step,
)
from data_prep.cleaning.clean import Cleaner
from data_prep.config_file import ConfigError
from data_prep.cut import CutTask, Pieces, cut_shard, shard_pieces
from data_prep.engine import Engine
from data_prep.generations import Generation, Input
from data_prep.manifest import Manifest, ShardRecord
from data_prep.prepare_config import PrepareConfig
from data_prep.reading.corpus import InputFile, total_bytes
from data_prep.reading.documents import InputError, Unit, plan_units
from data_prep.reduce import Decided, Documents, FinishedUnit
from data_prep.shards import token_dtype
from data_prep.sources import Source, absolute
from data_prep.tokenizing.backends import TokenizerError
from data_prep.tokenizing.encoders import fastest_encoder
from data_prep.tokenizing.spelling import lost_characters
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from data_prep.tokenizing.train_tokenizer import train
from data_prep.unit_step import Recipe, UnitSummary, UnitTask, process_unit
from data_prep.work_area import WorkArea

MAX_LOST_FRACTION = 0.01
"""Of the input's characters, that a tokenizer may not know."""
SAMPLE_UNIT_BYTES = 8 * 1024 * 1024
PROOF_BYTES = 100_000
"""Of the input, on which a fast encoder must agree with the tokenizer's own."""
Task = TypeVar("Task")
Result = TypeVar("Result")
Finished = TypeVar("Finished")


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
        **{f"{generations.SOURCE}{source.name}": [repr(source.layout), source.config.kind] for source in found},
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
        self._folder = Path(config.output.folder).resolve()
        self._started_s = time.perf_counter()
        self._others = _generations_against(config)
        self._units = _plan(found, inputs, config.engine.range_bytes(total_bytes(inputs.values())))

    @property
    def num_units(self) -> int:
        """Tasks of the largest step."""
        return len(self._units)

    def run(self, tokenizer: Tokenizer | None, engine: Engine) -> Manifest:
        """Do all steps on an engine; the data folder is as it was until the last.

        Args:
            tokenizer: loaded from a file; None trains one.
        """
        self._engine = engine
        if tokenizer is None:
            tokenizer = self._trained_tokenizer()
        units = self._process_units(tokenizer)
        bad_lines.check(units, self._config.engine.max_bad_fraction)
        if not self._older:
            bad_lines.check_documents(units)
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
        publish.sync_files(generation)
        publish.sync_folder(generation.parent)
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
            trained = train(self._training_texts(), config.algorithm, config.vocab_size)
            temporary = publish.temporary_beside(folder)
            temporary.mkdir()
            trained.save(temporary)
            publish.publish_folder(temporary, folder)
            elapsed_s = time.perf_counter() - started_s
            print(f"trained a {config.algorithm} tokenizer of {trained.vocab_size:,} tokens in {elapsed_s:.1f} s")
        return load_tokenizer(folder)

    def _training_texts(self) -> Iterator[str]:
        num_bytes = self._config.tokenizer.training_bytes
        if next(self._sample(1), None) is not None:
            return self._sample(num_bytes)
        # All is held out, which is told when it is counted; or nothing can be used.
        if next(self._sample(1, with_held_out=True), None) is not None:
            return self._sample(num_bytes, with_held_out=True)
        raise InputError(f"the input has no documents; nothing was written{bad_lines.of_beginning(self._units)}")

    def _sample(self, num_bytes: int, *, with_held_out: bool = False) -> Iterator[str]:
        """Some of the input, but for what is held out."""
        return training_sample.texts(
            [(unit, source.config.kind) for source, unit in self._sample_units],
            num_bytes,
            0 if with_held_out else reduce.split_threshold(self._config.output.validation_fraction),
            Cleaner(self._config.clean),
            exact=self._config.dedup.exact,
        )

    @functools.cached_property
    def _sample_units(self) -> list[tuple[Source, Unit]]:
        return _plan(self._sources, self._inputs, SAMPLE_UNIT_BYTES)  # whatever engine.unit_bytes is

    def _process_units(self, tokenizer: Tokenizer) -> list[FinishedUnit]:
        sample = list(self._sample(PROOF_BYTES))
        _check_spelling(tokenizer, sample)
        encoder = fastest_encoder(tokenizer, sample)
        for reason in encoder.rejected:
            print(f"not encoding with {reason}")
        print(f"encoding with {encoder.name}; running on {self._engine.name}")
        file_ids = {file.path: item.file_id for item, file in self._inputs.items()}
        tasks: list[UnitTask] = []
        digests: dict[Recipe, str] = {}
        model = self._config.clean.perplexity_model
        # Workers may have another working directory.
        clean = dataclasses.replace(self._config.clean, perplexity_model=model and absolute(model))
        evaluation = self._config.decontaminate
        decontaminate = dataclasses.replace(evaluation, paths=tuple(map(absolute, evaluation.paths)))
        for source, unit in self._units:
            recipe = Recipe(
                tokenizer_file=str(Path(str(tokenizer.file)).resolve()),
                tokenizer_digest=tokenizer.digest,
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
                marks=unit_step.marks_of_turns(tokenizer),
                encoder=encoder.name,
                clean=clean,
                decontaminate=decontaminate,
                exact=self._config.dedup.exact,
                near=self._config.dedup.near,
                kind=source.config.kind,
            )
            if recipe not in digests:
                digests[recipe] = unit_step.recipe_digest(recipe)
            key = unit_step.unit_key(unit, [file_ids[path] for path in unit.paths], digests[recipe])
            tasks.append(UnitTask(unit, recipe, str(self._area.unit(key))))
        watch = bad_lines.Watch(self._config.engine.max_bad_fraction)

        def finished(index: int, found: UnitSummary) -> tuple[FinishedUnit, int]:
            unit = FinishedUnit(tasks[index].unit, self._units[index][0].name, Path(tasks[index].folder), found)
            watch.add(unit)  # an input that is misread must not cost hours
            return unit, found.num_documents

        sizes = [task.unit.size_bytes for task in tasks]
        return self._map("read, clean, encode", process_unit, tasks, sizes, finished)

    def _compared_with(self) -> list[Path]:
        """Generations whose documents are older: those of other data folders, then those of this one."""
        return [generation.folder for generation in (*self._others, *self._older)]

    def _decide(
        self, units: Sequence[FinishedUnit], documents: Documents
    ) -> tuple[Decided, dict[tuple[str, str], Pieces]]:
        fraction = self._config.output.validation_fraction
        verdicts = reduce.find_verdicts(units, documents, self._compared_with(), self._config.dedup)
        kept = verdicts.kind == 0
        held_out = reduce.hold_out(documents, kept, fraction, at_least_one=not self._older)
        if not self._older and held_out[kept].all():
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
        return self._map(
            "cut shards",
            cut_shard,
            tasks,
            sizes,
            lambda index, record: ((record, starts[index]), record.document_count),
        )

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
            publish.publish(added.folder, self._folder / generations.FOLDER / added.folder.name)
            heads.write(self._folder, self._config, made)
        else:
            tokenizer.save(stage)
            heads.write(stage, self._config, made)
            publish.publish_folder(stage, self._folder)
        return made

    def _map(
        self,
        name: str,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        sizes: Sequence[int],
        finished: Callable[[int, Result], tuple[Finished, int]],
    ) -> list[Finished]:
        """What `finished` makes of the tasks' results, in their order; it also tells how many documents each had."""
        made: list[Any] = [None] * len(tasks)
        num_documents = 0
        # In a log file a line every half minute is enough.
        interval_s = 0.2 if sys.stderr.isatty() else 30.0
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": interval_s, "disable": None}
        with tqdm(total=sum(sizes), desc=name, **options) as bar:
            for index, result in self._engine.run(function, tasks):
                made[index], num_more = finished(index, result)
                num_documents += num_more
                bar.set_postfix_str(f"{num_documents:,} documents", refresh=False)
                bar.update(sizes[index])
        return made


def _check_spelling(tokenizer: Tokenizer, sample: Sequence[str]) -> None:
    lost, total, example = lost_characters(tokenizer, sample)
    if lost > MAX_LOST_FRACTION * total:
        raise TokenizerError(
            f"{tokenizer.file}: cannot spell {lost / total:.0%} of the input's characters, for example "
            f"{example[:16]!r}; use a tokenizer that knows this language, or one of bytes"
        )


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


def _generations_against(config: PrepareConfig) -> list[Generation]:
    """Those of the data folders that the input is compared with.

    Raises:
        ConfigError: there are none, or they cannot be compared with.
    """
    found: list[Generation] = []
    for folder in config.dedup.against:
        others = generations.read_generations(Path(folder))
        if not others:
            raise ConfigError(f"dedup.against: {folder} is not a data folder of `python -m data_prep prepare`")
        for other in others:
            if other.settings.get("dedup") != config.dedup.digest:
                raise ConfigError(
                    f"dedup.against: {folder} was prepared with other [dedup] settings ({other.settings.get('dedup')}, "
                    f"here {config.dedup.digest}); use the same, or leave it out"
                )
        found += others
    return found


def _stage_key(units: Iterable[FinishedUnit], decided: Decided, settings: Mapping[str, Any], generation: int) -> str:
    """Names what is cut: of the same documents the shards of a killed run can stay."""
    digest = xxhash.xxh3_128(json.dumps([settings, generation, [unit.folder.name for unit in units]]).encode("utf-8"))
    digest.update(decided.place.tobytes())
    digest.update(decided.held_out.tobytes())
    return digest.hexdigest()
