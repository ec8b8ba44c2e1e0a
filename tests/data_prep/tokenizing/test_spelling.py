import pytest
from tokenizers import AddedToken, decoders, models, normalizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import pre_tokenizers as split_by

from data_prep.tokenizing.backends import TokenizerError
from data_prep.tokenizing.encoders import SNIPPETS
from data_prep.tokenizing.spelling import lost_characters, num_vanished
from data_prep.tokenizing.tokenizer import Tokenizer
from tests.data_prep.tokenizing.test_encoders import CORPUS, KINDS, by, byte_level, tokenizer_of, wrapped

LATIN = ["The quick brown fox isn't lazy; the Café is naïve.\n\tx = 12345\n" * 5]
CHINESE = "今天天气很好，我们去公园散步吧。"
WITHOUT_BYTES = ["llama-2 without bytes", "unigram"]


def without_unknown() -> Tokenizer:
    """A vocabulary of Latin letters only, in which any other character is nothing."""
    made = LibraryTokenizer(models.BPE())
    made.pre_tokenizer = split_by.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(LATIN, trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False))
    return wrapped(made)


def word_piece(texts: list[str]) -> Tokenizer:
    """Lower-casing and without accents, as the uncased models of its kind."""
    made = LibraryTokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = split_by.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "</s>"], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return wrapped(made)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_BYTES])
def test_a_tokenizer_that_can_spell_anything_loses_nothing(kind: str):
    texts = [*CORPUS, CHINESE, "".join(SNIPPETS), "\u202e\u0301\ufe0f \u3000", ""]
    num_lost, num_characters, example = lost_characters(tokenizer_of(kind), texts)
    assert (num_lost, example) == (0, "")
    assert num_characters > 500


@pytest.mark.parametrize("kind", WITHOUT_BYTES)
def test_a_tokenizer_without_bytes_loses_what_is_not_in_its_vocabulary(kind: str):
    tokenizer = tokenizer_of(kind)
    spelled = [" ".join(tokenizer.decode([token_id]) for token_id in range(tokenizer.vocab_size))]
    assert lost_characters(tokenizer, spelled)[0] == 0
    assert lost_characters(tokenizer, [*spelled, "龘龘 龘"])[::2] == (3, "龘龘")


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()])
def test_another_form_of_a_character_is_no_loss(normalizer: normalizers.Normalizer):
    tokenizer = byte_level(by(r"\s+"), normalizer)
    assert lost_characters(tokenizer, ["e\u0301 ﬁ Å ガ カ\u3099 한국 ½ ＡＢ。 ß İ"])[0] == 0


def test_a_byte_level_tokenizer_that_cannot_decode_loses_nothing():
    tokenizer = byte_level(by(r"\s+"), change=lambda table: table.update(decoder=None))
    assert tokenizer.decode(tokenizer.encode("好")) != "好"
    assert lost_characters(tokenizer, CORPUS)[0] == 0


def test_characters_that_vanish_are_lost():
    tokenizer = without_unknown()
    assert lost_characters(tokenizer, LATIN) == (0, 240, "")
    assert lost_characters(tokenizer, ["the fox", CHINESE, "the 好 fox"]) == (17, 6 + 16 + 7, CHINESE)
    assert num_vanished(tokenizer, ["the fox", CHINESE, "the 好 fox"]) == 17


def test_of_a_word_with_an_unknown_token_only_what_does_not_come_back_is_lost():
    tokenizer = word_piece([*LATIN, "今天"])
    assert lost_characters(tokenizer, [*LATIN, "THE CAFE; ISN'T Nai\u0308ve? 今天"])[::2] == (1, "Nai\u0308ve?")
    assert lost_characters(tokenizer, ["今天天气 fox"]) == (1, 7, "今天天气")
    assert num_vanished(tokenizer, [CHINESE]) == 0
    with_rare = tokenizer_of("llama-2 without bytes")
    assert lost_characters(with_rare, ["a龘b a龘b return a"]) == (2, 13, "a龘b")


def test_a_tokenizer_that_fails_on_text_is_an_error():
    made = LibraryTokenizer(models.WordLevel({"</s>": 0, "fox": 1}, unk_token="[UNK]"))
    made.add_special_tokens([AddedToken("</s>")])
    with pytest.raises(TokenizerError, match="fails on ordinary text: .*UNK"):
        lost_characters(wrapped(made), ["the fox"])


def test_no_text_has_lost_nothing():
    assert lost_characters(tokenizer_of("trained here"), []) == (0, 0, "")
    assert num_vanished(tokenizer_of("trained here"), [" \n"]) == 0
