import pickle
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config_file import ConfigError
from data_prep.duplicates import dedup, minhash
from data_prep.duplicates.dedup import EXACT, KEPT, NEAR, SketchFiles, Verdicts, band_candidates, find_duplicates
from data_prep.duplicates.dedup_config import DedupConfig

THRESHOLD = 0.7


def judge(texts: list[str]) -> Verdicts:
    hashes = np.array([minhash.exact_hash(text) for text in texts], dtype=np.uint64).reshape(-1, 2)
    return find_duplicates(hashes, *minhash.sketch(texts), threshold=THRESHOLD, near=True)


# ---- the rule, against one that looks at all pairs ----

Kind = tuple[tuple[int, int], tuple[int, int, int], tuple[int, ...]]
"""What rows may be: exact hash, keys of three bands, ten bytes of sketch."""
SEEDS = st.integers(0, 2**32)


def rows_with_copies(seed: int, most: int = 30) -> list[Kind]:
    """Up to 30 documents that meet often and resemble each other sometimes, and exact copies of some."""
    draw = random.Random(seed)
    exact = [(high, low) for high in (7, 8, 1 << 40, 1 << 63) for low in range(9)]
    kinds = [
        (number, (draw.randrange(3), draw.randrange(3), draw.randrange(3)), tuple(draw.choices((0, 1), k=10)))
        for number in draw.sample(exact, draw.randint(0, most))
    ]
    rows = kinds + (draw.choices(kinds, k=draw.randrange(10)) if kinds else [])
    draw.shuffle(rows)
    return rows


def share_equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b).mean(axis=1)


def judge_kinds(rows: list[Kind], num_settled: int = 0, near: bool = True) -> Verdicts:
    hashes = np.array([kind[0] for kind in rows], dtype=np.uint64).reshape(-1, 2)
    bands = np.array([kind[1] for kind in rows], dtype=np.uint64).reshape(-1, 3).T << np.uint64(32)
    sketches = np.array([kind[2] for kind in rows], dtype=np.uint8).reshape(-1, 10)
    return find_duplicates(
        hashes, bands, sketches, threshold=THRESHOLD, near=near, num_settled=num_settled, similarity=share_equal
    )


def slow_verdicts(
    rows: list[Kind], num_settled: int, near: bool, oldest: int, previous: int
) -> list[tuple[set[int], int]]:
    """The kind of each row, and which older kept rows it repeats."""
    verdicts: list[tuple[set[int], int]] = []
    seen: dict[tuple[int, int], int] = {}
    runs: dict[tuple[int, int], list[int]] = {}
    for row, (exact, keys, bits) in enumerate(rows):
        if exact in seen and row >= num_settled:
            of, kind = verdicts[seen[exact]]
            verdicts.append(({seen[exact]}, EXACT) if kind == KEPT else (of, kind))
            continue
        compared: set[int] = set()
        for member in enumerate(keys):
            run = runs.setdefault(member, [])
            compared |= {*run[:oldest], *run[-previous:]}
            run.append(row)
        found = {
            other
            for other in compared
            if near and row >= num_settled and verdicts[other][1] == KEPT
            if sum(a == b for a, b in zip(bits, rows[other][2])) / len(bits) >= THRESHOLD
        }
        seen.setdefault(exact, row)
        verdicts.append((found, NEAR if found else KEPT))
    return verdicts


def assert_same(verdicts: Verdicts, expected: list[tuple[set[int], int]]) -> None:
    assert verdicts.kind.tolist() == [kind for _, kind in expected]
    for of, (options, kind) in zip(verdicts.duplicate_of.tolist(), expected):
        assert of in options if kind != KEPT else of == -1


@settings(max_examples=100)
@given(SEEDS, st.booleans(), st.integers(1, 3), st.integers(1, 3))
def test_verdicts_are_those_of_the_rule_applied_row_by_row(seed: int, near: bool, oldest: int, previous: int) -> None:
    rows = rows_with_copies(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "NUM_OLDEST", oldest)
        patch.setattr(dedup, "NUM_PREVIOUS", previous)
        patch.setattr(dedup, "_PAIRS_AT_ONCE", 3)
        verdicts = judge_kinds(rows, near=near)
    assert_same(verdicts, slow_verdicts(rows, 0, near, oldest, previous))


@given(SEEDS)
def test_with_few_rows_every_older_one_that_is_kept_is_looked_at(seed: int) -> None:
    rows = rows_with_copies(seed, dedup.NUM_OLDEST + dedup.NUM_PREVIOUS + 1)
    assert_same(judge_kinds(rows), slow_verdicts(rows, 0, True, 10**6, 10**6))


@given(SEEDS, st.integers(0, 40))
def test_rows_that_are_added_change_no_verdict(seed: int, cut: int) -> None:
    rows = rows_with_copies(seed)
    alone, together = judge_kinds(rows[:cut]), judge_kinds(rows)
    assert np.array_equal(together.duplicate_of[:cut], alone.duplicate_of)
    assert np.array_equal(together.kind[:cut], alone.kind)


@given(SEEDS, st.integers(0, 40))
def test_rows_that_were_judged_before_stay_and_count(seed: int, num_settled: int) -> None:
    rows = rows_with_copies(seed)
    num_settled = min(num_settled, len(rows))
    expected = slow_verdicts(rows, num_settled, True, dedup.NUM_OLDEST, dedup.NUM_PREVIOUS)
    assert_same(judge_kinds(rows, num_settled), expected)


def test_a_chain_keeps_its_end_and_a_bridge_drops_only_itself() -> None:
    def kind(number: int, bits: str) -> Kind:
        return (number, 0), (1, number, number), tuple(map(int, bits))

    a, b, c = kind(1, "0000000000"), kind(2, "0000000111"), kind(3, "0001110111")
    assert judge_kinds([a, b, c]).duplicate_of.tolist() == [-1, 0, -1]
    assert judge_kinds([b, a, c]).duplicate_of.tolist() == [-1, 0, 0]
    assert judge_kinds([a, c, b]).duplicate_of.tolist() == [-1, -1, 0]


def test_of_several_older_rows_the_oldest_is_named() -> None:
    a, b = ((1, 0), (1, 1, 1), (0, 0, 0, 0, 1, 1) + (0,) * 4), ((2, 0), (2, 2, 2), (1, 1) + (0,) * 8)
    c = (3, 0), (2, 1, 3), (1,) + (0,) * 9
    assert judge_kinds([a, b, c]).duplicate_of.tolist() == [-1, -1, 0]
    assert judge_kinds([b, a, c]).duplicate_of.tolist() == [-1, -1, 0]


def test_a_copy_of_a_near_duplicate_is_a_near_duplicate_of_the_same() -> None:
    a = (1, 0), (1, 1, 1), (0,) * 10
    b = (2, 0), (1, 2, 2), (0,) * 9 + (1,)
    verdicts = judge_kinds([a, b, b, a])
    assert verdicts.duplicate_of.tolist() == [-1, 0, 0, 0]
    assert verdicts.kind.tolist() == [KEPT, NEAR, NEAR, EXACT]


def test_no_rows_have_no_verdicts() -> None:
    assert judge([]).kind.tolist() == []
    assert judge(["one"]).kind.tolist() == [KEPT]
    assert Verdicts.all_kept(2).duplicate_of.tolist() == [-1, -1]


def test_a_run_of_any_length_costs_a_few_comparisons_a_row() -> None:
    pairs = band_candidates(np.full(100_000, 5 << 32, dtype=np.uint64))
    assert len(pairs) <= 100_000 * (dedup.NUM_OLDEST + dedup.NUM_PREVIOUS)
    compared_with_last = pairs[pairs >> np.uint64(32) == 99_999] & np.uint64(0xFFFFFFFF)
    assert compared_with_last.tolist() == [*range(8), *range(99_995, 99_999)]


def test_a_boilerplate_band_does_not_hide_copies_within_it() -> None:
    draw = random.Random(1)
    licence = "".join(draw.choice("abcdefgh ") for _ in range(6_000))
    bodies = ["".join(draw.choice("abcdefgh ") for _ in range(8_000)) for _ in range(300)]
    copies = [f"{body[:4_000]}!{body[4_000:]}" for body in bodies]
    kind = judge([licence + body for body in [*bodies, *copies]]).kind
    assert not kind[:300].any()
    assert (kind[300:] == NEAR).mean() > 0.97


# ---- files ----


def test_sketches_in_many_files_give_the_verdicts_of_arrays(tmp_path: Path) -> None:
    texts = [f"{text} {number % 3}" for number, text in enumerate([*pieces_of_chinese(0, 40)] * 5)]
    hashes = np.array([minhash.exact_hash(text) for text in texts], dtype=np.uint64)
    bands, sketches = minhash.sketch(texts)
    parts = []
    for start, stop in ((0, 70), (70, 70), (70, 71), (71, 150), (150, 200)):
        parts.append((tmp_path / f"{start}-{stop}-bands.npy", tmp_path / f"{start}-{stop}-sketch.npy", stop - start))
        np.save(parts[-1][0], bands[:, start:stop])
        np.save(parts[-1][1], np.asfortranarray(sketches[start:stop]) if start == 71 else sketches[start:stop])
    files = SketchFiles(parts)
    rows = np.array([199, 0, 70, 70, 5])
    assert np.array_equal(files.sketches[rows], sketches[rows])
    assert np.array_equal(np.stack([files.bands[band] for band in range(len(files.bands))]), bands)

    def elsewhere(function: Callable, numbers: range) -> Iterator:
        return (pickle.loads(pickle.dumps(function))(number) for number in numbers)

    found = find_duplicates(hashes, files.bands, files.sketches, threshold=THRESHOLD, near=True, map_bands=elsewhere)
    expected = find_duplicates(hashes, bands, sketches, threshold=THRESHOLD, near=True)
    assert np.array_equal(found.duplicate_of, expected.duplicate_of)
    assert (expected.kind == NEAR).any()


def test_no_files_have_no_verdicts() -> None:
    files = SketchFiles([(Path("absent"), Path("absent"), 0)])
    empty = np.empty((0, 2), dtype=np.uint64)
    assert len(find_duplicates(empty, files.bands, files.sketches, threshold=THRESHOLD, near=True).kind) == 0


# ---- texts ----

_WORDS = """\
昨天早上 去年冬天 三年以前 每到周末 下班以后 在那个时候 战争结束后 刚刚 不久之前 春节期间 半夜里 直到今天
我们 老师 这位医生 村里的老人 那家工厂 科学家 几个孩子 新来的经理 许多读者 船上的水手 邻居 研究人员 一名记者
在图书馆 在河边 在山脚下的小镇 在北京 在实验室里 在火车站 在旧城区 在院子中间 在会议上 在遥远的海岛 在市场上
发现了 修好了 讨论过 写下了 卖掉了 重新设计了 反复检查 悄悄带走了 认真研究过 忽略了 错过了 终于完成了 画出了
一台旧机器 那本厚厚的词典 两封没有寄出的信 许多奇怪的石头 新的计算方法 全部的账目 一座木桥 古代的地图 那条消息
大家都很惊讶 没有人相信 事情就这样过去了 结果完全出乎意料 他什么也没说 后来才知道原因 天已经黑了 问题仍然存在
"""
*PHRASES, ENDINGS = (line.split() for line in _WORDS.splitlines())


def pieces_of_chinese(seed: int, num: int, num_sentences: tuple[int, int] = (8, 40)) -> Iterator[str]:
    draw = random.Random(seed)
    for _ in range(num):
        sentences = (
            f"{''.join(draw.choice(words) for words in PHRASES)}，第{draw.randrange(999)}次{draw.choice(ENDINGS)}。"
            for _ in range(draw.randint(*num_sentences))
        )
        yield "".join(sentences)


def pieces_of_python(num: int, *, docstrings: bool) -> list[str]:
    """Parts of the standard library: English docstrings, or the definitions between them."""
    pieces: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        parts = text.split('"""')[1::2] if docstrings else text.split("\n\n\n")
        pieces |= {part: None for part in parts if 400 <= len(part) <= 8_000}
        if len(pieces) >= num:
            break
    return list(pieces)[:num]


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a share of its words, or of Chinese characters, replaced, and sometimes a line left out."""
    is_chinese = "\u4e00" <= text[0] <= "\u9fff"
    parts = list(text) if is_chinese else text.split(" ")
    for _ in range(max(round(len(parts) * share), 1)):
        parts[draw.randrange(len(parts))] = draw.choice("变换改动" if is_chinese else ["changed", "x", "0"])
    lines = ("" if is_chinese else " ").join(parts).split("\n")
    if len(lines) > 10 and draw.random() < 0.3:
        del lines[draw.randrange(len(lines))]
    return "\n".join(lines)


def jaccard(a: str, b: str) -> float:
    sets = []
    for text in (a, b):
        squeezed = "".join(text.lower().split())
        sets.append({squeezed[start : start + 8] for start in range(len(squeezed) - 7)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def check_quality(originals: list[str], shares: tuple[float, ...], least_pairs: int) -> None:
    draw = random.Random(2)
    above: dict[float, list[bool]] = {0.9: [], 0.8: []}
    removed: list[float] = []
    for share in shares:
        texts = originals + [edited(text, share, draw) for text in originals]
        verdicts = judge(texts)
        for row in range(len(originals), len(texts)):
            truth = jaccard(texts[row], texts[row - len(originals)])
            for border, found in above.items():
                if truth >= border:
                    found.append(verdicts.kind[row] != KEPT)
        removed += [jaccard(texts[row], texts[verdicts.duplicate_of[row]]) for row in np.flatnonzero(verdicts.kind)]
    assert min(map(len, above.values())) >= least_pairs
    assert np.mean(above[0.9]) >= 0.95
    assert np.mean(above[0.8]) >= 0.85
    assert np.mean(np.array(removed) < 0.5) <= 0.01


SHARES = {
    "zh": (0.003, 0.006, 0.009, 0.013, 0.03, 0.05),
    "en": (0.005, 0.01, 0.015, 0.03, 0.06, 0.1),
    "code": (0.003, 0.006, 0.01, 0.02, 0.04, 0.08),
}


def originals_of(language: str, num: int) -> list[str]:
    if language == "zh":
        return list(pieces_of_chinese(3, num))
    return pieces_of_python(num, docstrings=language == "en")


@pytest.mark.parametrize("language", ["zh", "en", "code"])
def test_planted_near_duplicates_are_found_and_little_else(language: str) -> None:
    check_quality(originals_of(language, 200), SHARES[language], 300)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["zh", "en", "code"])
def test_thousands_of_planted_near_duplicates_are_found_and_little_else(language: str) -> None:
    shares = tuple(share * factor for share in SHARES[language] for factor in (0.5, 0.7, 0.9, 1, 1.2, 1.5))
    check_quality(originals_of(language, 600), shares, 3_000)


def test_no_distinct_short_chinese_text_is_lost() -> None:
    draw = random.Random(5)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3_000)]
    texts = {"".join(draw.choices(characters, k=draw.randint(1, 60))) for _ in range(5_000)}
    texts |= {*pieces_of_chinese(4, 5_000, (1, 1)), *pieces_of_chinese(5, 2_000, (2, 3))}
    assert len(texts) > 11_900
    assert not judge(sorted(texts)).kind.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 0.0}, "dedup.threshold = 0.0: must be above 0"),
        ({"threshold": 1.5}, "dedup.threshold = 1.5: must be above 0"),
        ({"max_distance": 4}, "dedup.max_distance = 4: must be 0 to 3"),
        ({"exact": False}, "dedup.exact = false: dedup.near = .minhash. drops copies as well"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DedupConfig(**values)


def test_the_digest_of_the_settings_tells_what_changes_the_result_and_nothing_else() -> None:
    configs = [DedupConfig(), DedupConfig(threshold=0.8), DedupConfig(near="off"), DedupConfig(near="off", exact=False)]
    configs += [DedupConfig(near="simhash"), DedupConfig(near="simhash", max_distance=2)]
    assert len({config.digest for config in configs}) == len(configs)
    assert DedupConfig(max_distance=1).digest == DedupConfig().digest
    assert DedupConfig(near="simhash").min_similarity == 1 - 3 / 64
