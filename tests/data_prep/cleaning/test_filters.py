import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import text_profile
from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.clean_config import DEFAULT_FILTERS, OTHER_FILTERS, CleanConfig
from data_prep.cleaning.filters import FILTERS
from data_prep.cleaning.text_profile import Profile

ENGLISH = """The lighthouse at the mouth of the river was built in the year of the great storm, when ten ships were lost
within sight of the harbour. For a long time nobody wanted to live there, because the wind never stopped and the road
to the village was under water for half of every month.

Anna came with her father when she was nine years old. He had been promised a house, a garden and a small salary, and
he found a damp tower with a broken stove. "We will stay until spring," he said, and they stayed for thirty years.
She learned to read the weather from the colour of the sea, and to mend nets, and to be alone.

When the lamp was made electric, the company no longer needed a keeper; it sent a letter, a medal and a man with a
van. Anna asked him to wait, climbed the 132 steps once more and looked at the ships. Not one of them had been lost.
"""
CHINESE = """清晨的码头总是最先醒来的地方。天还没有亮透，渔民们已经把一筐筐银色的鱼搬上岸，水珠顺着缝隙滴落在石板路上。
卖早点的老人支起炉子，热气从锅里升起来，和海上的薄雾混在一起，分不清哪里是人间的烟火，哪里是远处的云。

我第一次来到这座小城是在2008年的冬天。那时铁路还没有修通，从省城坐长途汽车要走七个多小时，山路弯弯曲曲，窗外只有
松林和偶尔闪过的村庄。同车的一位老师告诉我，这里的人喜欢说：“日子要慢慢过，鱼要慢慢煮。”后来我才明白这句话的意思。

如今高铁站就建在城东，游客越来越多，旧码头旁边开了书店和咖啡馆。可是每天清晨，那位老人依然推着车来到同一个位置，
为第一批上岸的渔民盛一碗热汤。有人问他为什么不搬到新街去，他笑着摇头，说自己已经习惯了海风的味道。
"""
PYTHON = '''"""A queue of jobs that survives restarts."""

import json
from pathlib import Path


class Queue:
    """Jobs in the order in which they came."""

    def __init__(self, folder: Path, limit: int = 128) -> None:
        self.folder = folder
        self.limit = limit
        self._jobs: list[dict] = []

    def push(self, job: dict) -> int:
        if len(self._jobs) >= self.limit:
            raise OverflowError(f"{self.folder}: {self.limit} jobs are waiting already")
        self._jobs.append(job)
        (self.folder / f"{len(self._jobs):06}.json").write_text(json.dumps(job))
        return len(self._jobs)

    def pop(self) -> dict | None:
        return self._jobs.pop(0) if self._jobs else None
'''
JAVA = """package org.example.queue;

import java.util.ArrayDeque;

/** 一个简单的任务队列 */
public final class Queue<T> {
    private final ArrayDeque<T> jobs = new ArrayDeque<>();

    public synchronized void push(T job) {
        if (job == null) {
            throw new IllegalArgumentException("job");
        }
        jobs.addLast(job);
        notifyAll();
    }

    public synchronized T pop() throws InterruptedException {
        while (jobs.isEmpty()) {
            wait();
        }
        return jobs.removeFirst();
    }
}
"""
README = """# Installing the queue

The queue needs Python 3.11 or newer. On most systems it is enough to run the following command in a fresh environment:

```
pip install jobqueue
```

## Options

- `--limit`: how many jobs may wait before `push` raises an error. The default is 128, which is right for most uses.
- `--folder`: where the jobs are written. It is created if it does not exist, and it may be shared by several machines.

Questions and patches are welcome; please open an issue before you start with a larger change, so that we can talk.
"""
POEM = """两个黄鹂鸣翠柳，
一行白鹭上青天。
窗含西岭千秋雪，
门泊东吴万里船。

朝辞白帝彩云间，
千里江陵一日还。
两岸猿声啼不住，
轻舟已过万重山。

故人西辞黄鹤楼，
烟花三月下扬州。
孤帆远影碧空尽，
唯见长江天际流。
"""
FINNISH = """Suomen tasavallan perustuslain mukaan lainsäädäntövaltaa käyttää eduskunta, joka päättää myös
valtiontaloudesta. Hallitusvaltaa käyttävät tasavallan presidentti sekä valtioneuvosto, jonka jäsenten tulee nauttia
eduskunnan luottamusta. Tuomiovaltaa käyttävät riippumattomat tuomioistuimet, ylimpinä tuomioistuimina korkein oikeus ja
korkein hallinto-oikeus. Kansalaisten perusoikeudet turvataan yhdenvertaisuusperiaatteen mukaisesti kaikissa
viranomaistoiminnoissa ja oikeudenkäynneissä. Ympäristönsuojelulainsäädäntö edellyttää kestävän kehityksen
huomioonottamista kaikissa rakennushankkeissa.
"""
GERMAN = """Die Krankenversicherungsbeiträge werden vom Rentenversicherungsträger einbehalten und an den
Gesundheitsfonds weitergeleitet. Arbeitnehmerinnen und Arbeitnehmer entrichten Sozialversicherungsbeiträge nach ihrer
Leistungsfähigkeit. Die Beitragsbemessungsgrenze begrenzt beitragspflichtige Einnahmen; was darüber liegt, bleibt
unberücksichtigt. Auch Beschäftigungsverhältnisse von kurzer Dauer begründen Leistungsansprüche gegenüber der
Bundesagentur, sofern die Anwartschaftszeiten erfüllt wurden und die übrigen Leistungsvoraussetzungen nachgewiesen
werden können.
"""
NAMES = [
    "birch",
    "maple",
    "cedar",
    "aspen",
    "larch",
    "hazel",
    "rowan",
    "alder",
    "beech",
    "olive",
    "lemon",
    "peach",
    "plum",
]
TABLE = """The runs of the machine, with what they took and what came out; read them with care.

| name | wood | side | good | time |
|------|------|------|------|------|
""" + "".join(f"| {name} | {name[::-1]} | {name[1:]} | {name[:3]} | {name[2:]} |\n" for name in NAMES)

ENDINGS = ["er", "el", "ing", "at"]
FRESH_WORDS = ["".join(parts) for parts in itertools.product("bdfgklmnprst", "aeiou", ["nd", "st", "r", "m"], ENDINGS)]


def words(count: int, start: int = 0) -> str:
    """English-looking words that do not repeat."""
    return " ".join(FRESH_WORDS[(start + i) * 77 % len(FRESH_WORDS)] for i in range(count))


REPEATED = [
    "internationalisation of extraordinary counterexamples",
    "incomprehensibilities and unconstitutional telecommunications",
    "disproportionately misinterpreted responsibilities with",
]


def repeated_pieces(separator: str) -> str:
    """A quarter of the characters in pieces that occurred before, each too short for the n-gram rules."""
    pieces = [f"{words(6, 20 * i)} the {words(5, 20 * i + 6)}" for i in range(12)]
    for i in range(9):
        pieces.insert(2 * i + 1, REPEATED[i % 3])
    return separator.join(pieces)


# For each filter a text that it refuses, and the settings that this takes beyond the defaults.
REFUSED: dict[str, tuple[str, str, dict[str, object]]] = {
    "text.length": ("Too short.", "chat", {}),
    "text.mojibake": (ENGLISH.replace("storm", "st\ufffdr\ufffdm"), "prose", {}),
    "language.kept": (ENGLISH, "prose", {"languages": ("zh",)}),
    "language.cjk_share": (ENGLISH + CHINESE[:60], "prose", {"min_cjk_share": 0.3}),
    "text.alphanumeric": (ENGLISH.replace(" ", "*=<>= "), "prose", {}),
    "text.digits": (ENGLISH.replace(" ", " a8675309 "), "prose", {}),
    "gopher.word_count": ("The lamp of the tower was made electric, and nobody had to climb up to it.", "prose", {}),
    "gopher.word_length": (
        " ".join(f"the {words(4, 8 * i)} and {words(4, 8 * i + 4)}".replace(" ", "-", 8) for i in range(30)),
        "prose",
        {},
    ),
    "gopher.symbol_ratio": (ENGLISH.replace(" a", " #a").replace(" s", " #s"), "prose", {}),
    "gopher.bullet_lines": ("- " + ENGLISH.strip().replace("\n\n", "\n").replace("\n", "\n- "), "prose", {}),
    "gopher.ellipsis_lines": (ENGLISH.replace("\n", "...\n", 4), "prose", {}),
    "gopher.stop_words": (words(150).replace(" ", " for "), "prose", {}),
    "gopher.alphabetic_words": (ENGLISH.replace(" a", " ------ a").replace(" t", " ====== t"), "prose", {}),
    "c4.lorem_ipsum": (ENGLISH + "Lorem Ipsum dolor sit amet.", "prose", {}),
    "code.generated": ("# Generated by protoc.  DO NOT EDIT!\n" + PYTHON, "code", {}),
    "code.line_length": (PYTHON + "x = [" + "one, " * 300 + "]\n", "code", {"max_mean_line_characters": 1000.0}),
    "code.mean_line_length": ("\n".join("value = compute(" + words(18, i) + ")" for i in range(9)), "code", {}),
    "code.alphanumeric": ("\n".join(f"{'(' * 9} {'=' * 9} {')' * 9} a{i}" for i in range(20)), "code", {}),
    "code.digits": ("\n".join(f"    {i * 7919}, {i * 104729}, {i * 1299709}," for i in range(60)), "code", {}),
    "code.data": (PYTHON + "\n".join(f'k{i} = "{"q7Yx" * 18}"' for i in range(15)), "code", {}),
    "chat.turns": ("帮我写一首关于春天的诗，要求每句七个字，一共写四句话。", "chat", {}),
    "text.distinct_lines": ("    return None\n" * 90 + PYTHON, "code", {}),
    "text.repeated_characters": (
        ENGLISH + "~" * 400,
        "prose",
        {"skip_filters": ("gopher.word_length", "text.alphanumeric")},
    ),
    "gopher.duplicate_lines": (
        "the and\n" + "\n".join(f"{words(12, 20 * i)}\nmore" for i in range(12)),
        "prose",
        {},
    ),
    "gopher.duplicate_line_characters": (repeated_pieces("\n"), "prose", {}),
    "gopher.duplicate_paragraphs": (
        "\n\n".join(f"{ENGLISH.split(chr(10) * 2)[i % 3]} {words(9, 9 * i)}\n\nof it" for i in range(3))
        + "\n\nof it" * 2,
        "prose",
        {"skip_filters": ("gopher.duplicate_lines",)},
    ),
    "gopher.duplicate_paragraph_characters": (
        repeated_pieces("\n\n"),
        "prose",
        {"skip_filters": ("gopher.duplicate_line_characters",)},
    ),
    "gopher.top_ngrams": (words(90).replace(" ", " lighthouse keeper "), "prose", {}),
    "gopher.duplicate_ngrams": (
        (ENGLISH + words(30) + " ").replace("\n", " ") + ENGLISH.replace("\n", " ")[:600],
        "prose",
        {},
    ),
    "c4.javascript": (ENGLISH + "Please enable JavaScript.", "prose", {"filters": ("default", "c4.javascript")}),
    "c4.curly_bracket": (ENGLISH + "{ }", "prose", {"filters": ("default", "c4.curly_bracket")}),
    "c4.sentences": (ENGLISH.replace(".", ",").replace("!", ","), "prose", {"filters": ("default", "c4.sentences")}),
    "fineweb.line_punctuation": (
        "\n".join(line.strip(".,;") + " and" for line in ENGLISH.split("\n") if line),
        "prose",
        {"filters": ("default", "fineweb.line_punctuation")},
    ),
    "fineweb.short_lines": (POEM, "prose", {"filters": ("default", "fineweb.short_lines")}),
    "fineweb.lists": (words(99).replace(" ", "\n"), "prose", {"filters": ("default", "fineweb.lists")}),
}
NOT_BY_TEXT_ALONE = {"language.perplexity"}  # needs a model; see test_clean.py


@pytest.mark.parametrize(
    ("text", "kind", "expected_language"),
    [
        (ENGLISH, "prose", "en"),
        (CHINESE, "prose", "zh"),
        (README, "prose", "en"),
        (POEM, "prose", "zh"),
        (CHINESE + ENGLISH, "prose", "zh"),
        (FINNISH, "prose", "latin"),
        (GERMAN, "prose", "latin"),
        (TABLE, "prose", "latin"),
        (ENGLISH.replace("storm", "st\ufffdrm"), "prose", "en"),
        ("法国的首都是哪里？\n巴黎。", "chat", "zh"),
        (PYTHON, "code", "code"),
        (JAVA, "code", "code"),
        ("Wie spät ist es in Peking?\nEs ist dort jetzt Mitternacht.", "chat", "latin"),
    ],
)
def test_good_texts_pass_the_default_filters(text: str, kind: str, expected_language: str) -> None:
    cleaner = Cleaner(CleanConfig())
    assert cleaner.judge(text, kind) is None
    assert cleaner.language(text, kind) == expected_language


@pytest.mark.parametrize("name", REFUSED)
def test_each_filter_alone_refuses_its_example(name: str) -> None:
    text, kind, settings_ = REFUSED[name]
    num_turns = 1 if name == "chat.turns" else None
    config = CleanConfig(**settings_)  # pyright: ignore[reportArgumentType]
    assert Cleaner(config).judge(text, kind, num_turns=num_turns) == name
    without = CleanConfig(**(settings_ | {"skip_filters": (name, *settings_.get("skip_filters", ()))}))  # pyright: ignore
    refused_by = Cleaner(without).judge(text, kind, num_turns=num_turns)
    assert refused_by is None


def test_every_filter_is_listed_has_an_example_and_a_docstring() -> None:
    assert set(FILTERS) == {*DEFAULT_FILTERS, *OTHER_FILTERS}
    assert set(REFUSED) == set(FILTERS) - NOT_BY_TEXT_ALONE
    assert all(rule.refuses.__doc__ for rule in FILTERS.values())


@pytest.mark.parametrize("text", ["", " ", "\n", ".", "中", "😀", "\ud800 lone", "a" * 20, "的" * 300, "1 2 3 " * 99])
@pytest.mark.parametrize("kind", ["prose", "code", "chat"])
def test_odd_texts_are_judged_by_every_filter_without_an_error(text: str, kind: str) -> None:
    config = CleanConfig(filters=("default", "c4", "fineweb"), min_cjk_share=0.1)
    profile = Profile(text, kind)
    for name, rule in FILTERS.items():
        assert rule.refuses(profile, config) in (True, False), name


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab1-é 中文，。\n\t한ひ😀\U00020000"), max_size=60))
def test_words_are_those_of_a_slow_split(text: str) -> None:
    spaceless = [c for c in text if c in "中文ひ\U00020000"]
    spaced = text
    for separator in ["，", "。", *spaceless]:
        spaced = spaced.replace(separator, " ")
    # The second unit of an emoji separates: it is part of no word.
    runs = spaced.replace("😀", "😀 ").split()
    found = Profile(text, "prose").words
    assert found.num_spaceless == len(spaceless)
    assert found.starts.size == len(spaceless) + len(runs)
    assert found.num_words == len(runs) + 2 * len(spaceless) // 3


def slow_ngrams(text: str, num_words: int) -> list[tuple[tuple[str, ...], int, int]]:
    """N-grams of words with their start and end, the white space behind included."""
    starts = [i for i in range(len(text)) if not text[i].isspace() and (i == 0 or text[i - 1].isspace())]
    bounds = [*starts, len(text)]
    tokens = text.split()
    return [
        (tuple(tokens[i : i + num_words]), bounds[i], bounds[i + num_words]) for i in range(len(tokens) - num_words + 1)
    ]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "c\n", "the"]), max_size=40), st.integers(1, 10))
def test_ngram_shares_are_those_of_a_slow_count(tokens: list[str], num_words: int) -> None:
    text = " " + " ".join(tokens)
    grams = slow_ngrams(text, num_words)
    counts = Counter(gram for gram, _, _ in grams)
    top = max((sum(b - a for g, a, b in grams if g == gram) for gram in counts if counts[gram] > 1), default=0)
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for gram, start, end in grams:
        if gram in seen:
            covered.update(range(start, end))
        seen.add(gram)
    found = Profile(text, "prose").ngrams
    assert found.top_share(num_words, 0.0) == pytest.approx(top / len(text))
    assert found.top_share(num_words, 0.3) in (0.0, found.top_share(num_words, 0.0))
    assert top <= 0.3 * len(text) or found.top_share(num_words, 0.3) == found.top_share(num_words, 0.0)
    assert found.duplicate_share(num_words) == pytest.approx(len(covered) / len(text))


def test_chinese_ngrams_span_one_and_a_half_characters_per_word() -> None:
    profile = Profile("甲乙丙丁戊己庚辛壬癸" + "子丑寅卯" + "甲乙丙丁戊己庚", "prose")
    assert profile.ngrams.duplicate_share(5) == pytest.approx(7 / 21)  # seven characters are five words
    assert profile.ngrams.duplicate_share(6) == 0  # nine characters


def test_an_ngram_rule_looks_at_the_first_part_of_a_huge_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_profile, "_MAX_NGRAM_UNITS", 1000)
    text = words(120) + " " + "again and " * 200
    assert Profile(text[:1000], "prose").ngrams.top_share(2, 0.0) == Profile(text, "prose").ngrams.top_share(2, 0.0)


@given(st.text("ab \n中", max_size=30), st.integers(0, 30), st.sampled_from("-é中"))
def test_runs_of_a_character_are_never_missed(text: str, length: int, character: str) -> None:
    profile = Profile(text + character * length, "prose")
    expected = length >= 16 and length > 0.2 * len(profile.text)
    config = CleanConfig()
    assert FILTERS["text.repeated_characters"].refuses(profile, config) == expected or "中" * 16 in profile.text


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("c4.terminal_punctuation", ["He came back.", "真的吗？", "“好。”"], ["Home", "更多内容", "Share this,"]),
        ("c4.words_per_line", ["One two three four five", "我们今天去公园里玩"], ["Read more", "点击这里"]),
        ("c4.javascript", ["Enable cookies."], ["Please enable Javascript."]),
        ("c4.policy", ["The policy of the king."], ["See our Privacy Policy.", "This site uses cookies"]),
        ("refinedweb.numbers", ["3 likes", "第3页"], ["12:30", "4.5 / 5", "* * *"]),
    ],
)
def test_line_rules_remove_single_lines(rule: str, kept: list[str], dropped: list[str]) -> None:
    cleaner = Cleaner(CleanConfig(line_rules=(rule,)))
    lines = [*dropped, *kept, *dropped]
    assert cleaner.normalise("\n".join(lines)) == "\n".join(kept)
    assert cleaner.normalise("\n".join(lines), "code") == "\n".join(lines)


def test_the_tables_of_powers_are_inverse() -> None:
    powers, inverses = text_profile._powers(5000)
    assert np.all(powers * inverses == 1)
