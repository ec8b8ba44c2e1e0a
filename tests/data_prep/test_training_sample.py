from pathlib import Path

import pytest

from data_prep import training_sample
from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.duplicates.minhash import exact_hash
from data_prep.reading.corpus import find_inputs
from data_prep.reading.documents import Unit, plan_units
from data_prep.reading.templates import Layout
from data_prep.reduce import split_threshold

CLEANER = Cleaner(CleanConfig(filters=()))
NUM_FILES, TEXTS_PER_FILE = 20, 30


@pytest.fixture
def units(tmp_path: Path) -> list[tuple[Unit, str]]:
    for i in range(NUM_FILES):
        lines = [f'{{"text": "file {i:02d} text {j:02d}"}}\n' for j in range(TEXTS_PER_FILE)]
        (tmp_path / f"{i:02d}.jsonl").write_text("".join(lines) + "a bad line\n")
    units = plan_units(find_inputs([f"{tmp_path}/*.jsonl"]), Layout.named("text"))
    return [(unit, "auto") for unit in units]


def test_a_sample_as_large_as_the_input_has_every_text_once(units: list[tuple[Unit, str]]):
    sample = list(training_sample.texts(units, 10**6, threshold=0, cleaner=CLEANER, exact=True))
    assert len(sample) == len(set(sample)) == NUM_FILES * TEXTS_PER_FILE


def test_a_small_sample_has_its_size_and_comes_from_many_files(units: list[tuple[Unit, str]]):
    sample = list(training_sample.texts(units, 1000, threshold=0, cleaner=CLEANER, exact=True))
    assert 1000 <= sum(len(text) for text in sample) < 1020
    assert len({text[:7] for text in sample}) >= NUM_FILES // 2
    assert sample == list(training_sample.texts(units, 1000, threshold=0, cleaner=CLEANER, exact=True))


def test_held_out_texts_are_never_in_the_sample(units: list[tuple[Unit, str]]):
    threshold = split_threshold(0.5)
    everything = set(training_sample.texts(units, 10**6, threshold=0, cleaner=CLEANER, exact=True))
    held_out = {text for text in everything if exact_hash(text)[1] < threshold}
    assert 200 < len(held_out) < 400
    assert set(training_sample.texts(units, 10**6, threshold, CLEANER, exact=True)) == everything - held_out


def test_code_in_records_is_taken_as_code(tmp_path: Path):
    line = '{"text": "def f():\\n    return a < b, \\"<b>x</b>\\""}\n'
    (tmp_path / "code.jsonl").write_text(line)
    (unit,) = plan_units(find_inputs([f"{tmp_path}/*.jsonl"]), Layout.named("text"))
    (sample,) = training_sample.texts([(unit, "code")], 1000, 0, CLEANER, exact=True)
    assert sample == 'def f():\n    return a < b, "<b>x</b>"'
