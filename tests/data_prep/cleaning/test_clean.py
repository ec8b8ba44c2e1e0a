import hashlib
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import config_file
from data_prep.cleaning import clean
from data_prep.cleaning.clean import Cleaner, kind_of
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.cleaning.ngram_model import NgramModel
from data_prep.cleaning.text_profile import Profile
from data_prep.config_file import ConfigError

DEFAULT = Cleaner(CleanConfig())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("cafe\u0301", "café"),
        ("１２３，全角！", "１２３，全角！"),  # not NFKC
        ("\ufeffStart\u200b of\u2060 text\x00\x07", "Start of text"),
        ("co\xadop\xaderate", "cooperate"),
        ("page one\x0cpage two\x0bline", "page one\npage two\nline"),
        ("a\u2028b\u2029c", "a\nb\nc"),
        ("10\xa0km\u202f/\u2009h", "10 km / h"),
        ("trailing  \t\nspaces \u3000\n", "trailing\nspaces"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("　　段落开头", "段落开头"),
        ("第一段\n　　第二段", "第一段\n　　第二段"),
        ("Tom &amp; Jerry&nbsp;&mdash; &#8220;hi&#x201D;", "Tom & Jerry — “hi”"),
        ("the &lt;b&gt; tag is closed by &lt;/b&gt;", "the <b> tag is closed by </b>"),
        ("twice &amp;lt;b&amp;gt; escaped", "twice &lt;b&gt; escaped"),
        ("line&#13;end, cafe&#769;, wide&#12288;\nspace", "line\nend, café, wide\nspace"),
        ("e<b></b>\u0301", "é"),
        ('one<br/>two<BR>\nthree</p><p class="a">four', "one\ntwo\nthree\n\nfour"),
        ("a <b>bold</b> <a href='http://x.cn/?a=1'>link</a><!-- note -->", "a bold link"),
        ("\u202eevil\u202c text", "evil text"),
        ("Mail me: a.b@c.org or 8.8.8.8", "Mail me: [EMAIL] or [IP]"),
    ],
)
def test_prose_is_normalised(raw: str, expected: str) -> None:
    assert DEFAULT.normalise(raw) == expected


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: a<b and b>a, a<b>c",
        "List<a> of std::vector<p> in Set<s>",
        "git config <section>, git show <code>",
        "x <- c(1, 2); List<String> items; #include <stdio.h>",
        "AT&T; R&D; ?a=1&copy=2&lt=3",
        "&unknown; &#xD800; & ;",
        "tabs\tinside and  double  spaces",
        "می‌خواهم",  # a zero-width non-joiner that Persian needs
        "👨‍👩‍👧 family, ❤️‍🔥",
        "क्‍ष",
        "- list\n  - nested\n\n    code",
    ],
)
def test_what_belongs_to_a_text_stays(text: str) -> None:
    assert DEFAULT.normalise(text) == text


MARKDOWN = """# How to use it

Put it into the page with `<br>` and `&amp;`, as in

```html
<div class="a">
    <p>Hello&nbsp;<b>World</b></p>
</div>
```

~~~
std::map<a> x; </a>
~~~

and then &mdash; <i>where</i> it is
    wanted<br> -

    template <p>&lt;</p>

Done."""


def test_code_in_markdown_keeps_its_markup() -> None:
    expected = MARKDOWN.replace("&mdash; <i>where</i>", "— where").replace("wanted<br> -", "wanted\n -")
    assert DEFAULT.normalise(MARKDOWN) == expected


def test_what_only_looks_like_markdown_protects_no_markup() -> None:
    assert DEFAULT.normalise("Spring <b>sale</b>\n\n    &ldquo;now&rdquo;") == "Spring sale\n\n    “now”"
    assert DEFAULT.normalise("```\na <b>bold</b> word and no second fence") == "```\na bold word and no second fence"
    assert DEFAULT.normalise("~~~~\na&amp;b\n~~~") == "~~~~\na&b\n~~~"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("std::vector<p> in and <b>out</b>", "std::vector<p> in and out"),
        ("</b> List<b>", " List<b>"),
        ("<a href=x>here", "here"),
        ("<P>One</P><S>two</S>", "One\n" + "two"),
        ("<li>one<li>two", "one\ntwo"),
    ],
)
def test_a_name_in_angle_brackets_is_a_tag_if_something_else_says_so(raw: str, expected: str) -> None:
    assert DEFAULT.normalise(raw) == expected.strip()


@pytest.mark.parametrize("kind", ["prose", "chat", "code"])
def test_joiners_go_where_no_script_needs_them(kind: str) -> None:
    assert DEFAULT.normalise("\u200dzero\u200c width中\u200d文", kind) == "zero width中文"
    assert DEFAULT.normalise("left\u200e to\u200f right", kind) == "left to right"
    assert DEFAULT.normalise("שלום\u200f!", kind) == "שלום\u200f!"


def test_code_keeps_its_white_space_and_its_markup() -> None:
    code = "    indented\n\n\n\tdef f():  \n        return '<br>&nbsp;' # a@b.org 8.8.8.8\xa0 \n  "
    assert DEFAULT.normalise(code, "code") == code
    assert DEFAULT.normalise("\ufeff\r\n" + code.replace("\n", "\r\n"), "code") == code
    assert DEFAULT.normalise("class A:\n\x0c\n    b\x00", "code") == "class A:\n\n    b"


def test_chat_keeps_markup_but_no_personal_data() -> None:
    turn = "What does `<br>` mean?\n\n\n    a &lt; b  \nwrite to a@b.org"
    assert DEFAULT.normalise(turn, "chat") == turn.replace("a@b.org", "[EMAIL]")


def test_masking_is_counted_and_can_be_switched() -> None:
    cleaner = Cleaner(CleanConfig(mask=("phone",), mask_code=True, placeholder="<removed {kind}>".strip("<>")))
    assert cleaner.normalise("tel = '13812345678'  # a@b.org", "code") == "tel = 'removed PHONE'  # a@b.org"
    assert cleaner.masked == {"phone": 1}
    assert Cleaner(CleanConfig(mask=())).normalise("a@b.org") == "a@b.org"


def test_options_of_normalisation() -> None:
    assert Cleaner(CleanConfig(remove_html=False)).normalise("a<br>&amp;") == "a<br>&amp;"
    assert Cleaner(CleanConfig(remove_private_use=True)).normalise("icon \ue001text") == "icon text"
    assert DEFAULT.normalise("icon \ue001text") == "icon \ue001text"
    half, full = Cleaner(CleanConfig(punctuation="halfwidth")), Cleaner(CleanConfig(punctuation="fullwidth"))
    assert half.normalise("ＡＢＣ（１２），好！。") == "ABC(12),好!。"
    assert full.normalise("你好,世界!真的?版本:3,a:b 3:1") == "你好，世界！真的？版本:3,a:b 3:1"


HOSTILE = "&amp;lt#38;<b>/ \u1100\u1161\u11a8\u1f71\ue001,\n\t\r\x0c\u0301\u200d\u200b\u037e\xa0\ud800＆；ａ中@.1:2x-é "


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from(HOSTILE), max_size=40) | st.text(max_size=60), st.sampled_from(["prose", "code", "chat"])
)
@example("&amp\u037e", "prose")
@example("&am&#112;;lt;br&gt\u037e", "prose")
@example("<b<b>>", "prose")
@example("\u1100\u200b\u1161\u200d", "chat")
@example("가\u200d\u11a8\u200d", "chat")
@example("a\ue001\u200d中", "prose")
@example("ａ\u0301", "prose")
def test_normalising_a_text_without_html_twice_changes_nothing_more(text: str, kind: str) -> None:
    has_html = not {*"<&＜＆"}.isdisjoint(text)
    for options in (
        {},
        {"punctuation": "halfwidth", "line_rules": ("c4.words_per_line",)},
        {"punctuation": "fullwidth"},
    ):
        for remove_private_use in (False, True):
            config = CleanConfig(mask=(), **options, remove_html=not has_html, remove_private_use=remove_private_use)  # pyright: ignore[reportArgumentType]
            cleaner = Cleaner(config)
            normal = cleaner.normalise(text, kind)
            assert cleaner.normalise(normal, kind) == normal
            html = DEFAULT.normalise(text, kind)
            for each in (normal, html):
                assert unicodedata.is_normalized("NFC", each)
                assert "\r" not in each


def test_html_is_removed_in_one_round_however_deep_it_is_nested() -> None:
    num = 300_000
    assert DEFAULT.normalise("&" + "amp;" * num) == "&" + "amp;" * (num - 1)
    assert DEFAULT.normalise("<b" * num + ">" * num + "</b>") == "<b" * (num - 1) + ">" * (num - 1)
    assert DEFAULT.normalise("<br" * num + ">" * num) == "<br" * (num - 1) + "\n" + ">" * (num - 1)


@pytest.mark.parametrize(
    "text",
    [
        "<" * 200_000,
        "&" * 200_000,
        "`" * 200_000,
        "#" + " `" * 99_999,
        "```\n<b>" * 30_000,
        "    <\n\n# " * 20_000,
        "<p " * 70_000,
        "<a b=" * 40_000,
        " \n" * 100_000,
        " " * 200_000,
        "<!--" * 50_000,
    ],
)
@pytest.mark.timeout(60)  # what is quadratic takes many minutes
def test_hostile_texts_take_linear_time(text: str) -> None:
    normal = DEFAULT.normalise(text + "x")
    assert len(normal) <= len(text) + 1
    assert DEFAULT.judge(normal, "prose") is not None


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.py", "code"),
        ("src/Main.JAVA", "code"),
        ("x.cpp.gz", "code"),
        ("s3://bucket/x.rs.zst", "code"),
        ("x.jsonl", "prose"),
        ("x.jsonl.gz", "prose"),
        ("README.md", "prose"),
        ("Makefile", "prose"),
        ("data.json", "prose"),
    ],
)
def test_the_kind_of_a_file_follows_from_its_suffix(path: str, kind: str) -> None:
    assert kind_of(path, "prose") == kind


def test_language_looks_at_the_text_it_is_given() -> None:
    assert DEFAULT.judge("这是一个很短的句子。", "prose") == "gopher.word_count"
    assert DEFAULT.language("这是一个很短的句子。") == "zh"
    assert DEFAULT.language("This is the end of the line.") == "en"
    assert DEFAULT.language("This is the end of the line.", "code") == "code"


def test_a_number_of_turns_is_not_remembered() -> None:
    text = "a dialogue that is long enough to be kept"
    assert DEFAULT.judge(text, "chat", num_turns=1) == "chat.turns"
    assert DEFAULT.judge(text, "chat") is None
    assert DEFAULT.judge(text, "chat", num_turns=2) is None


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.npz"
    NgramModel.train(["The keeper of the tower looked at the ships. " * 200], order=4, table_bits=14).save(path)
    return path


def test_perplexity_refuses_noise_and_boilerplate(model_file: Path) -> None:
    like = "The ships looked at the keeper of the tower. " * 3
    noise = "Qzx vjk wpf the and mrtq bgh lll zzyk. " * 3
    config = CleanConfig(
        filters=("language.perplexity",), perplexity_model=str(model_file), max_perplexity=50.0, min_perplexity=1.2
    )
    cleaner = Cleaner(config)
    assert cleaner.judge(like, "prose") is None
    assert cleaner.judge(noise, "prose") == "language.perplexity"
    assert cleaner.judge("The keeper of the tower looked at the ships. " * 3, "prose") == "language.perplexity"
    assert cleaner.judge(noise, "code") is None


def test_a_cleaner_survives_pickling(model_file: Path) -> None:
    cleaner = Cleaner(CleanConfig(perplexity_model=str(model_file), max_perplexity=9.0))
    content = pickle.dumps(cleaner)
    assert len(content) < 5000
    copy = pickle.loads(content)
    assert copy.digest == cleaner.digest
    assert copy.normalise("a&amp;b") == "a&b"


def test_the_digest_follows_settings_and_model_but_not_the_path(model_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.npz"
    moved.write_bytes(model_file.read_bytes())
    other = tmp_path / "other.npz"
    NgramModel.train(["Another text. "], order=4, table_bits=14).save(other)
    digests = [
        Cleaner(config).digest
        for config in (
            CleanConfig(),
            CleanConfig(min_words=51),
            CleanConfig(skip_filters=("gopher",)),
            CleanConfig(perplexity_model=str(model_file), max_perplexity=9.0),
            CleanConfig(perplexity_model=str(other), max_perplexity=9.0),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert Cleaner(CleanConfig(perplexity_model=str(moved), max_perplexity=9.0)).digest == digests[3]
    assert Cleaner(CleanConfig()).digest == digests[0]


def test_filters_are_chosen_by_name_family_or_default() -> None:
    assert CleanConfig(filters=()).active_filters == ()
    assert CleanConfig(filters=("fineweb", "text.length")).active_filters == (
        "text.length",
        "fineweb.line_punctuation",
        "fineweb.short_lines",
        "fineweb.lists",
    )
    left = CleanConfig(skip_filters=("gopher", "text.length")).active_filters
    assert "text.digits" in left
    assert not any(name.startswith("gopher") or name == "text.length" for name in left)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"filters": ("gopher.words",)}, "clean.filters: 'gopher.words' is not known; known are .*gopher.word_count"),
        ({"skip_filters": ("default",)}, "clean.skip_filters: 'default' is not known"),
        ({"line_rules": ("c4",)}, "clean.line_rules: 'c4' is not known"),
        ({"mask": ("name",)}, "clean.mask: 'name' is not known; known are email, ip"),
        ({"languages": ("code",)}, "clean.languages: 'code' is not known"),
        ({"placeholder": "a@b"}, "clean.placeholder = 'a@b': must be"),
        ({"max_digit_share": 1.5}, "clean.max_digit_share = 1.5: must be in"),
        ({"max_words": 3}, "clean.max_words = 3: must not be below clean.min_words = 50"),
        ({"min_characters": -1}, "clean.min_characters = -1: must be finite and not negative"),
        ({"max_perplexity": 9.0}, "need clean.perplexity_model; make one with"),
        ({"perplexity_model": "m", "max_perplexity": 0.5}, "clean.max_perplexity = 0.5: a perplexity is 1 or more"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CleanConfig(**settings_)  # pyright: ignore[reportArgumentType]


def test_a_missing_model_is_an_error_of_configuration(tmp_path: Path) -> None:
    config = CleanConfig(perplexity_model=str(tmp_path / "no.npz"), max_perplexity=9.0)
    with pytest.raises(ConfigError, match=r"clean.perplexity_model = .*no.npz: cannot read the n-gram model"):
        Cleaner(config)


def test_the_configuration_survives_its_file(tmp_path: Path) -> None:
    config = CleanConfig(filters=("default", "fineweb"), languages=("zh", "en"), max_characters=9000)
    (tmp_path / "c.toml").write_text(config_file.to_toml(config), encoding="utf-8")
    assert config_file.load(tmp_path / "c.toml", CleanConfig) == config


def test_the_results_of_this_version_are_frozen() -> None:
    """Raise clean.VERSION and replace the digest whenever this fails on purpose."""
    state = hashlib.sha256()
    for text in (
        "&amp;lt;p&gt;one<br>two\x0c\u200d8.8.8.8\xa0",
        "中文，\u3000全角！\r\n\r\n\r\nx",
        "the a b the a b " * 9,
    ):
        for kind in ("prose", "code", "chat"):
            normal = DEFAULT.normalise(text, kind)
            found = (normal, DEFAULT.judge(normal, kind), DEFAULT.language(normal, kind))
            state.update(repr(found).encode())
        ngrams = Profile(text, "prose").ngrams
        state.update(
            repr(
                [(ngrams.top_share(n, 0.0), ngrams.duplicate_share(n), int(ngrams.hashes.sum())) for n in (2, 5)]
            ).encode()
        )
    assert (clean.VERSION, state.hexdigest()[:16]) == (2, "c8fa166b3b1ef4e4")
