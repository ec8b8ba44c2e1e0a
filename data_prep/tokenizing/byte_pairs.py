"""A byte-level BPE learned from counted words, as a tokenizer.json.

Words are the pieces that SPLIT_PATTERN cuts a text into. Counting them takes most of the time, and can be done in many
processes; learning the merges from the counts is quick. Sentencepiece's BPE trainer learns them, from words spelled in
the byte-level alphabet; it is the fastest that takes counts, and the vocabulary compresses like that of tokenizers'.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data_prep.tokenizing.backends import CHARACTER_OF_BYTE

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the space or sign before it
    r"|\p{N}"  # digits one by one: numbers are then read place by place
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line ends after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space; the last space before a word belongs to the word
)
"""No merge crosses these pieces. Source: the split of Qwen2 (Yang et al. 2024), after that of cl100k."""
ASCII_SPLIT_PATTERN = (
    SPLIT_PATTERN.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
)
"""The same for ASCII text: the standard library's engine is twice as fast, but knows no classes of letters."""
MAX_WORD_CHARACTERS = 1024
"""Longer words (runs of one sign, encoded images) are left out: the trainer takes none that are much longer."""
MAX_LEARNED_BYTES = 8_000_000
"""The trainer needs 80 bytes of memory for each byte of a distinct word; what is beyond this are the rarest words."""
MAX_TOKEN_BYTES = 128
"""The trainer's own limit of 16 is shorter than indentation and ruled lines."""


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs; counts of parts of a corpus can be added."""
    import regex  # here, not above: only training needs it

    split, split_ascii = regex.compile(SPLIT_PATTERN), re.compile(ASCII_SPLIT_PATTERN, re.ASCII)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update((split_ascii if text.isascii() else split).findall(text))
    return counts


def learn(counts: Mapping[str, int], vocab_size: int, special_tokens: Sequence[str]) -> bytes:
    """A tokenizer.json with special_tokens first, then the 256 bytes, then what was merged, most frequent first.

    Equal counts give equal bytes. A small corpus may yield fewer tokens than asked for.

    Cost: about 1 s and 200 MB for 32,000 tokens from the words of 32 MB of code.
    """
    num_merges = vocab_size - 256 - len(special_tokens)
    words = _spelled(counts)
    merges = _merges(_learned_pieces(words, num_merges))[:num_merges]
    if len(words) <= num_merges:
        # A small corpus may be used up: every word is a token, and the trainer goes on with pairs that are gone.
        merges = _performed(words, merges)
    learned = (left + right for left, right in merges)
    vocabulary = [*special_tokens, *sorted(CHARACTER_OF_BYTE.values()), *learned]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer.to_str(pretty=True).encode("utf-8")


def _spelled(counts: Mapping[str, int]) -> dict[str, int]:
    """The words in the byte-level alphabet, most frequent first, up to MAX_LEARNED_BYTES."""
    words: dict[str, int] = {}
    rest_bytes = MAX_LEARNED_BYTES
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(word) > MAX_WORD_CHARACTERS:
            continue
        content = word.encode("utf-8")
        rest_bytes -= len(content)
        if rest_bytes < 0:
            break
        words["".join(map(CHARACTER_OF_BYTE.__getitem__, content))] = count
    return words


def _learned_pieces(words: Mapping[str, int], num_merges: int) -> list[str]:
    """Pieces of two characters and more in the order in which they were learned; some more than num_merges."""
    if num_merges == 0 or not words:
        return []
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"{word}\t{count}" for word, count in words.items()),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        # One place is for the unknown piece, 256 for the bytes. The rest is for merges that cannot be reached.
        vocab_size=1 + 256 + num_merges + num_merges // 100,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=MAX_TOKEN_BYTES,
        max_sentence_length=16 * MAX_WORD_CHARACTERS,  # in bytes: four of UTF-8, each spelled by up to two
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [piece for i in range(1, processor.get_piece_size()) if len(piece := processor.id_to_piece(i)) > 1]


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """The pair that each piece was merged from: the two parts that the merges before it leave of it."""
    ranks: dict[tuple[str, str], int] = {}
    for piece in pieces:
        *_, parts = _steps(piece, ranks)
        # A piece that ends up in more parts was learned over another way of spelling one of its parts.
        if len(parts) == 2:
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _performed(words: Iterable[str], merges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that happen in one of the words."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    made = {part for word in words for parts in _steps(word, ranks) for part in parts}
    return [pair for pair in merges if pair[0] + pair[1] in made]


def _steps(word: str, ranks: Mapping[tuple[str, str], int]) -> Iterator[list[str]]:
    """The parts of a word before the first merge and after each."""
    parts = list(word)
    yield parts
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts
