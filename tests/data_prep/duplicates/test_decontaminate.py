import gzip
import json
import pickle
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config_file import ConfigError
from data_prep.duplicates import decontaminate
from data_prep.duplicates.decontaminate import BOILERPLATE_ITEMS, Decontaminator
from data_prep.duplicates.dedup_config import DecontaminateConfig

ENGLISH = "A train leaves Boston at noon and travels west at sixty miles per hour; when does it reach Albany?"
CHINESE = "下列关于光合作用的说法中，正确的一项是（ ）。"
PROSE = "The committee met twice a year, and nothing that it decided was ever carried out by anybody. " * 5
ZH_PROSE = "委员会每年开两次会，会上作出的各项决定从来没有被任何人真正执行过，这一点大家心里都清楚。" * 5
PIECES = st.lists(st.sampled_from([*"的是不了", "red ", "Green, ", "blue\n", "sky. ", "。"]), max_size=40).map("".join)


def write_items(path: Path, *items: str) -> Path:
    path.write_text("".join(json.dumps({"question": item, "label": 3}) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def both(tmp_path: Path) -> Decontaminator:
    english = write_items(tmp_path / "mmlu.jsonl", ENGLISH, "What is two plus two?")
    chinese = tmp_path / "ceval.txt"
    chinese.write_text(f"{CHINESE}\n\n下列说法错误的是\n", encoding="utf-8")
    return Decontaminator([english, chinese])


@pytest.mark.parametrize(
    "quoted",
    [
        ENGLISH,
        ENGLISH.upper().replace(" ", "\n"),
        ENGLISH.replace(";", " --").replace("?", "").replace("at noon", "« at noon »"),
        ENGLISH[20:],
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in ENGLISH),
    ],
)
def test_an_english_question_is_found_across_case_line_breaks_and_punctuation(
    both: Decontaminator, quoted: str
) -> None:
    assert both.overlap(PROSE + quoted + PROSE) == "contaminated:mmlu.jsonl"
    assert both.overlap(ZH_PROSE + quoted) == "contaminated:mmlu.jsonl"


@pytest.mark.parametrize(
    "quoted",
    [
        CHINESE,
        CHINESE.replace("，", ",").replace("（ ）。", "(B)."),
        "\n".join(CHINESE),
        CHINESE.replace("光合作用", "“光合作用”"),
        CHINESE[2:],
    ],
)
def test_a_chinese_question_is_found_across_line_breaks_and_punctuation(both: Decontaminator, quoted: str) -> None:
    assert both.overlap(ZH_PROSE + quoted + ZH_PROSE) == "contaminated:ceval.txt"
    assert both.overlap(PROSE + quoted) == "contaminated:ceval.txt"


def test_other_texts_and_shorter_quotations_pass(both: Decontaminator) -> None:
    twelve = " ".join(re.findall(r"\w+", ENGLISH)[:12])
    texts = [
        PROSE,
        ZH_PROSE,
        "",
        "?!",
        f"{PROSE}{twelve} {PROSE}",
        CHINESE[:12],
        "下列说法错误的是",
        ENGLISH.replace("e", "ee"),
    ]
    assert both.overlaps(texts) == [None] * len(texts)


def test_runs_do_not_reach_from_one_text_into_the_next(both: Decontaminator) -> None:
    assert both.overlaps([ENGLISH[:50], ENGLISH[50:], CHINESE[:9], CHINESE[9:]]) == [None] * 4
    assert both.overlap(ENGLISH[:50] + ENGLISH[50:]) is not None


def slow_tokens(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[\u4e00-\u9fff]", text.lower())


def slow_runs(text: str, length: int) -> set[tuple[str, ...]]:
    tokens = slow_tokens(text)
    return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}


@given(st.lists(PIECES, min_size=1, max_size=4), st.lists(PIECES, max_size=5), st.integers(2, 8), st.integers(2, 8))
def test_hits_are_those_of_sets_of_tuples_of_words(
    tmp_path_factory: pytest.TempPathFactory, items: list[str], texts: list[str], ngram: int, shortest: int
) -> None:
    items = [*items, "one two three four five six seven eight"]
    path = write_items(tmp_path_factory.mktemp("sets") / "items.jsonl", *items)
    runs = set().union(*(slow_runs(item, ngram) for item in items))
    runs |= {tuple(slow_tokens(item)) for item in items if shortest <= len(slow_tokens(item)) < ngram}
    lengths = {ngram, *range(shortest, ngram)}
    expected = [any(slow_runs(text, length) & runs for length in lengths) for text in texts]
    decontaminator = Decontaminator([path], ngram, shortest)
    assert [hit is not None for hit in decontaminator.overlaps(texts)] == expected
    assert [decontaminator.overlap(text) is not None for text in texts] == expected


def test_short_items_are_found_whole_if_that_is_asked_for(tmp_path: Path) -> None:
    path = write_items(
        tmp_path / "short.jsonl", "Who wrote the play that opens in Elsinore?", "中国的首都在哪里", "太短了", ENGLISH
    )
    found = Decontaminator([path], min_item_tokens=8)
    asked = [
        "So who wrote the play that opens in Elsinore",
        "请问，中国的首都\n在哪里？",
        "太短了",
        "wrote the play that opens in",
        ENGLISH[:45],
    ]
    assert [found.overlap(text) is not None for text in asked] == [True, True, False, False, False]
    assert Decontaminator([path]).overlaps(asked) == [None] * 5


def test_a_quotation_is_found_anywhere_in_a_long_text(both: Decontaminator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "_BATCH_UNITS", 700)
    monkeypatch.setattr(decontaminate, "_OVERLAP_UNITS", 200)
    words = [f"w{random.Random(i).randrange(10**6)}" for i in range(600)]
    texts = [" ".join([*words[:at], ENGLISH, *words[at:]]) for at in range(0, 600, 13)]
    texts += [" ".join([*words[:num], ENGLISH]) for num in range(400, 600, 7)]
    assert both.overlaps([*texts, " ".join(words)]) == ["contaminated:mmlu.jsonl"] * len(texts) + [None]


def test_runs_that_many_items_have_are_ignored(tmp_path: Path) -> None:
    instruction = "The following are multiple choice questions with answers about the subject that is named here:"
    few = [f"{instruction} {word}" for word in "abcdefghij"]
    assert len(few) == BOILERPLATE_ITEMS
    assert Decontaminator([write_items(tmp_path / "few.jsonl", *few)]).overlap(instruction) is not None
    many = Decontaminator([write_items(tmp_path / "many.jsonl", *few, f"{instruction} k", ENGLISH)])
    assert many.overlaps([instruction, ENGLISH]) == [None, "contaminated:many.jsonl"]
    repeats = "row row row your boat gently down the stream merrily merrily merrily merrily " * 30
    assert Decontaminator([write_items(tmp_path / "song.jsonl", repeats)]).overlap(repeats[:90]) is not None


def test_every_string_of_a_record_is_an_item_and_the_first_file_is_named(tmp_path: Path) -> None:
    record = {"meta": {"n": 1, "notes": [{"deep": ENGLISH}, None, 2.5]}, "question": CHINESE}
    (tmp_path / "nested.jsonl").write_text(f"\n{json.dumps(record)}\n", encoding="utf-8")
    again = write_items(tmp_path / "again.jsonl", ENGLISH)
    decontaminator = Decontaminator([tmp_path / "nested.jsonl", again])
    assert decontaminator.overlaps([ENGLISH, CHINESE]) == ["contaminated:nested.jsonl"] * 2


ESCAPED = json.dumps({"question": CHINESE, "choices": [ENGLISH]}, indent=1)
ITEMS = {
    "one.json": ESCAPED,
    "list.json": f"[{ESCAPED}, {{}}]",
    "lines.json": json.dumps({"q": CHINESE}) + "\n" + json.dumps(ENGLISH) + "\n",
    "a.ndjson": json.dumps([CHINESE, {"deep": ENGLISH}]),
    "a.md": f"# Questions\n{CHINESE}\n\n{ENGLISH}",
    "a.csv": f'id,question,note\r\n1,"{CHINESE}\n",""\r\n2,"{ENGLISH}",x\r\n',
    "a.tsv": f"1\t{CHINESE}\t{ENGLISH}\n",
}


def assert_finds_both(path: Path) -> None:
    assert Decontaminator([path]).overlaps([CHINESE, ENGLISH, PROSE]) == [f"contaminated:{path.name}"] * 2 + [None]


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_items_are_found_in_files_of_the_usual_kinds(tmp_path: Path, name: str, suffix: str) -> None:
    raw = ITEMS[name].encode("utf-8-sig")
    packed = {"": raw, ".gz": gzip.compress(raw), ".zst": zstandard.compress(raw)}[suffix]
    (tmp_path / f"{name}{suffix}").write_bytes(packed)
    assert_finds_both(tmp_path / f"{name}{suffix}")


def test_every_column_of_strings_of_a_parquet_file_has_items(tmp_path: Path) -> None:
    choices = [{"label": ["A"], "text": ["short", ENGLISH]}, None]
    table = pa.table({"n": [1, 2], "choices": choices, "q": pa.array([CHINESE, None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert_finds_both(tmp_path / "a.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"decontaminate.paths: .*bad.parquet: cannot be read as parquet"):
        Decontaminator([tmp_path / "bad.parquet"])


def test_a_pattern_stands_for_its_files_each_of_them_read_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_items(tmp_path / "deep" / "zh.jsonl", CHINESE)
    write_items(tmp_path / "en.jsonl", ENGLISH)
    write_items(tmp_path / "en-short.jsonl", "too short")
    found = Decontaminator([f"{tmp_path}/**/*.jsonl", tmp_path / "en.jsonl"])
    assert found.overlaps([CHINESE, ENGLISH]) == ["contaminated:zh.jsonl", "contaminated:en.jsonl"]
    assert sorted(found.names) == ["en-short.jsonl", "en.jsonl", "zh.jsonl"]
    with pytest.raises(ConfigError, match=r"decontaminate.paths: .*: a folder; name its files with a pattern such as"):
        Decontaminator([tmp_path])


def test_a_file_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("a.docx", "a", "a.parquet.gz"):
        (tmp_path / name).write_text(ENGLISH)
        with pytest.raises(
            ConfigError, match=rf"decontaminate.paths: .*{name}: unknown kind .* known are \.json \.jsonl"
        ):
            Decontaminator([tmp_path / name])


def test_the_digest_tells_content_and_settings_but_not_folders(tmp_path: Path) -> None:
    path = write_items(tmp_path / "a.jsonl", ENGLISH, "Who wrote the play that opens in Elsinore?")
    (tmp_path / "else").mkdir()
    moved = write_items(tmp_path / "else" / "a.jsonl", ENGLISH, "Who wrote the play that opens in Elsinore?")
    changed = write_items(tmp_path / "else" / "b.jsonl", ENGLISH)
    digest = Decontaminator([path]).digest
    assert Decontaminator([moved]).digest == digest == pickle.loads(pickle.dumps(Decontaminator([path]))).digest
    others = [Decontaminator([changed]), Decontaminator([path], 12), Decontaminator([path], 13, 8)]
    assert len({digest, *(other.digest for other in others)}) == 4
    assert DecontaminateConfig(paths=(str(path),)).digest == digest
    assert DecontaminateConfig().load() is None
    assert DecontaminateConfig().digest == ""


def test_a_useless_evaluation_set_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decontaminate.paths: .*absent.txt: no file matches"):
        Decontaminator([tmp_path / "absent.txt"])
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="bad.txt: cannot be read as UTF-8 text"):
        Decontaminator([tmp_path / "bad.txt"])
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ConfigError, match=r"bad.jsonl:2: not JSON .*; mend the line"):
        Decontaminator([tmp_path / "bad.jsonl"])
    (tmp_path / "bad.json").write_text('{"a": 1}\n{"a": [\n1,\n')
    with pytest.raises(ConfigError, match=r"bad.json:4: not JSON"):
        Decontaminator([tmp_path / "bad.json"])
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(ENGLISH.encode())[:-9])
    with pytest.raises(ConfigError, match=r"bad.txt.gz: cannot be read as UTF-8 text \(truncated"):
        Decontaminator([tmp_path / "bad.txt.gz"])
    with pytest.raises(
        ConfigError, match=r"short.jsonl: no item of 13 tokens or more.*lower decontaminate.min_item_tokens"
    ):
        Decontaminator([write_items(tmp_path / "short.jsonl", "too short")])


@pytest.mark.parametrize(("key", "value"), [("ngram", 1), ("ngram", 65), ("min_item_tokens", 1)])
def test_settings_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"decontaminate.{key} = {value}: must be 2"):
        DecontaminateConfig(**{key: value})
