import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import language

TEXTS = {
    "zh": "上海是中国的经济中心，也是世界上最大的港口城市之一。这里有 Python 和 GPU 等英文词。",
    "en": "The history of the city is long, and most of it was written for those who came after.",
    "ja": "これは日本語の文章です。東京は日本の首都で、人口が多い都市です。",
    "ko": "서울은 대한민국의 수도이며 가장 큰 도시이다.",
    "ru": "Москва является столицей России и крупнейшим её городом.",
    "ar": "القاهرة هي عاصمة مصر وأكبر مدنها من حيث عدد السكان.",
    "latin": "La ville est la capitale du pays et le centre de la vie économique.",
    "other": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
}


def classify(text: str) -> str:
    return language.language_of(text, language.count_classes(language.units(text)))


@pytest.mark.parametrize(("expected", "text"), TEXTS.items())
def test_a_sentence_is_of_its_language(expected: str, text: str) -> None:
    assert classify(text) == expected


@pytest.mark.parametrize("text", ["", "1234 5678", "!!! ???", "😀😀"])
def test_a_text_without_letters_is_of_another_language(text: str) -> None:
    assert classify(text) == "other"


@pytest.mark.parametrize(
    "text",
    [
        "De stad is de hoofdstad van het land en het centrum van de economie, en was dat ook in de tijd van de oorlog.",
        "Die Stadt ist die Hauptstadt des Landes und war in der Zeit vor dem Krieg das Zentrum der Wirtschaft.",
        "Kota ini adalah ibu kota negara dan pusat ekonomi yang besar di bagian utara pulau.",
    ],
)
def test_neighbours_of_english_are_latin(text: str) -> None:
    assert classify(text) == "latin"


def test_a_chinese_text_with_many_english_terms_is_chinese() -> None:
    assert classify("使用 tokenizers 库训练 byte-level BPE 分词器，然后写入 shard 文件，再开始预训练。") == "zh"


def test_a_chinese_text_with_a_japanese_name_is_chinese() -> None:
    assert classify("日本的歌手浜崎あゆみ在上海举行了演唱会，吸引了来自全国各地的数万名歌迷到场观看。") == "zh"


def test_navigation_at_the_top_does_not_hide_english() -> None:
    prose = "It was the first of the two bridges that were built with stone for the people of the valley. " * 20
    assert classify("Home | Products | Contact | About " * 20 + prose) == "en"


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_each_character_is_counted_once(text: str) -> None:
    expected = [0] * language.NUM_CLASSES
    for character in text:
        code = ord(character)
        if code < 0x10000:
            expected[language.CLASS_OF_UNIT[code]] += 1
        else:
            expected[language.HAN if 0x20000 <= code < 0x33800 else language.SYMBOL] += 1
    found = language.count_classes(language.units(text))
    # Of a character outside the first plane the second unit counts as nothing.
    num_outside = sum(ord(character) > 0xFFFF for character in text)
    expected[language.NONE] += num_outside
    assert found == expected


@given(st.text(st.characters(max_codepoint=127), max_size=300))
def test_ascii_is_counted_as_the_table_says(text: str) -> None:
    by_table = np.bincount(language.CLASS_OF_UNIT[[ord(c) for c in text]] if text else [], minlength=13).tolist()
    assert language.count_classes(language.units(text)) == by_table
