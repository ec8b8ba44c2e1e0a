"""The corpus of the data benchmarks: distinct documents of code, English and Chinese, made from what is installed.

    FOLDER/<key>/part-0.jsonl ...     all documents in the order of a hash, in files of equal size; more passes write
                                      them again, each in an order of its own, as no installation has gigabytes
                 part-0.ids.npy ...   their ids by the `tokenizers` library, an EOS behind each: what is right
                 code-0.jsonl, english-0.jsonl, chinese-0.jsonl   the same documents by kind, for the filters
                 code-1.jsonl, ...    copies of some of them, changed more or less
                 tokenizer/           a byte-level BPE trained on a third of the documents
                 corpus.json

Code is Python sources of this installation, English the docstrings of other sources, Chinese the texts of Debian
packages or a file of one's own. Texts are normalised as code is, so that no way has anything to normalise, and none
spells a special token, which some ways would take for the token.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.data_child import TOKENS, one_between
from benchmarks.data_child import digest as stream_digest
from data_prep import publish
from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.reading import corpus
from data_prep.reading.corpus import InputFile
from data_prep.tokenizing.backends import JSON_FILE, load_backend
from data_prep.tokenizing.tokenizer import SPECIAL_TOKENS, train_bpe

VERSION = 2
NUM_PARTS = 8
KINDS = ("code", "english", "chinese")
CHINESE_SHARE, ENGLISH_SHARE = 0.5, 0.2
"""At most so much of the bytes; code makes up for what there is not."""
VOCAB_SIZE = 32_000
NUM_ORIGINALS = 300
COPIES = ("exact", "white space", "1 %", "2 %", "4 %", "20 %")
"""What is planted of each original: as it is, with line ends doubled, with so many of its words replaced."""
_CHANGED_PER_MILLE = (0, 0, 10, 20, 40, 200)
_MIN_BYTES, _MAX_BYTES = 200, 200_000
_MARK = "<|"
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus on disk."""

    folder: Path
    text_bytes: tuple[int, ...]
    """UTF-8 of the texts of each part."""
    kind_bytes: dict[str, int]
    """The same by kind."""
    planted_bytes: int
    vocab_size: int
    num_passes: int
    remark: str
    """Why there is no Chinese, if there is none."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The files of all documents."""
        return tuple(str(self.folder / f"part-{part}.jsonl") for part in range(len(self.text_bytes)))

    @property
    def tokenizer(self) -> str:
        """The tokenizer.json."""
        return str(self.folder / "tokenizer" / JSON_FILE)

    def kind_files(self) -> dict[str, tuple[str, str]]:
        """By kind the file of documents and the file of copies."""
        return {
            kind: (str(self.folder / f"{kind}-0.jsonl"), str(self.folder / f"{kind}-1.jsonl"))
            for kind in KINDS
            if self.kind_bytes[kind]
        }

    def digest(self, order: Sequence[int]) -> str:
        """Of the tokens that parts have, one behind the other."""
        ids = [np.load(self.folder / f"part-{part}.ids.npy") for part in order]
        return stream_digest(one_between(np.concatenate(ids), EOS_ID))

    def describe(self) -> str:
        """Sizes and shares, in words."""
        total = sum(self.kind_bytes.values())
        shares = ", ".join(f"{kind} {size / total:.0%}" for kind, size in self.kind_bytes.items())
        passes = f", {self.num_passes} times in other orders" if self.num_passes > 1 else ""
        return f"{total / 1e6:.1f} MB of distinct texts{passes}: {shares}{self.remark and f' ({self.remark})'}"


EOS_ID = SPECIAL_TOKENS.index("<|endoftext|>")
PAD_ID = SPECIAL_TOKENS.index("<|pad|>")


def make_corpus(folder: Path, megabytes: float, chinese: str = "debian", num_passes: int = 1) -> Corpus:
    """The corpus of a size, from the disk if it is there.

    chinese: "debian", "none", or a file of JSON lines with a "text".
    """
    folder.mkdir(parents=True, exist_ok=True)
    chinese_file, remark = _chinese_file(folder, chinese)
    sources = corpus.installed_python()
    listing = [[source.name, source.size_bytes] for source in sources]
    content = [VERSION, megabytes, num_passes, str(chinese_file), sys.version, listing]
    place = folder / xxhash.xxh3_64_hexdigest(json.dumps(content).encode("utf-8", "surrogateescape"))
    if not place.is_dir():
        print(f"making the corpus in {place}; later runs find it there", flush=True)
        temporary = publish.temporary_beside(place)
        temporary.mkdir()
        try:
            documents = _documents(sources, chinese_file, int(megabytes * 1e6))
            _write(temporary, documents, num_passes, remark)
            publish.publish_folder(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    table = json.loads((place / "corpus.json").read_text(encoding="utf-8"))
    return Corpus(place, tuple(table.pop("text_bytes")), **table)


def _chinese_file(folder: Path, chinese: str) -> tuple[Path | None, str]:
    if chinese != "debian":
        return (None, "no Chinese was asked for") if chinese == "none" else (Path(chinese), "")
    place = folder / "debian-chinese"
    if not list(place.glob("*.jsonl")):
        command = [sys.executable, "-m", "data_prep", "debian-chinese", str(place)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            shutil.rmtree(place, ignore_errors=True)
            said = (result.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"no Chinese: python -m data_prep debian-chinese says {said}"
    return min(place.glob("*.jsonl")), ""


def _write(folder: Path, documents: list[tuple[str, str]], num_passes: int, remark: str) -> None:
    documents.sort(key=lambda item: _hash(item[1]))
    tokenizer = train_bpe((text for _, text in documents[::3]), VOCAB_SIZE)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    text_bytes: list[int] = []
    texts = [text for _, text in documents]
    for pass_ in range(num_passes):
        if pass_:
            texts.sort(key=lambda text: _hash(f"{pass_} {text}"))
        for share in _equal_shares(texts):
            part = len(text_bytes)
            _write_lines(folder / f"part-{part}.jsonl", share)
            np.save(folder / f"part-{part}.ids.npy", _right_ids(folder / "tokenizer" / JSON_FILE, share))
            text_bytes.append(sum(_size(text) for text in share))
    for kind in KINDS:
        _write_lines(folder / f"{kind}-0.jsonl", (text for k, text in documents if k == kind))
    table = {
        "text_bytes": text_bytes,
        "kind_bytes": {kind: sum(_size(text) for k, text in documents if k == kind) for kind in KINDS},
        "planted_bytes": _plant(folder, documents),
        "vocab_size": tokenizer.vocab_size,
        "num_passes": num_passes,
        "remark": remark,
    }
    publish.write_text(folder / "corpus.json", json.dumps(table, indent=1) + "\n")


def _equal_shares(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in NUM_PARTS shares of about equal size."""
    ends = np.cumsum([_size(text) for text in texts])
    part_of = np.minimum(ends * NUM_PARTS // (ends[-1] + 1), NUM_PARTS - 1)
    for part in range(NUM_PARTS):
        yield [texts[i] for i in np.flatnonzero(part_of == part).tolist()]


def _documents(sources: Sequence[InputFile], chinese: Path | None, total_bytes: int) -> list[tuple[str, str]]:
    """Kind and text of documents, no two of them equal."""
    cleaner = Cleaner(CleanConfig(filters=(), mask=(), remove_html=False))
    seen: set[int] = set()

    def distinct(kind: str, texts: Iterable[str], most_bytes: float) -> Iterator[tuple[str, str]]:
        for text in texts:
            if most_bytes <= 0:
                return
            text = cleaner.normalise(text, "code")
            size_bytes = _size(text)
            if _MIN_BYTES <= size_bytes <= _MAX_BYTES and _MARK not in text and (key := _hash(text)) not in seen:
                seen.add(key)
                most_bytes -= size_bytes
                yield kind, text

    shuffled = sorted(sources, key=lambda source: _hash(source.name))
    halves = [[source for source in shuffled if _hash(source.name) % 2 == half] for half in (0, 1)]
    chinese_texts = _texts(chinese) if chinese is not None else iter(())
    found = list(distinct("chinese", chinese_texts, CHINESE_SHARE * total_bytes))
    # From other sources than the code: no text comes twice.
    found += distinct("english", (_docstrings(source.path) for source in halves[1]), ENGLISH_SHARE * total_bytes)
    left_bytes = total_bytes - sum(_size(text) for _, text in found)
    return [*found, *distinct("code", (_source(source.path) for source in halves[0]), left_bytes)]


def _source(path: str | Path) -> str:
    """A source, or nothing if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _docstrings(path: str | Path) -> str:
    """What a source says in English, as one text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in other people's strings
        try:
            tree = ast.parse(_source(path))
        except (SyntaxError, ValueError, RecursionError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def _right_ids(tokenizer_file: Path, texts: Sequence[str]) -> np.ndarray:
    backend = load_backend(tokenizer_file.read_bytes(), JSON_FILE)
    return np.array([i for ids in backend.encode_batch(texts) for i in (*ids, EOS_ID)], dtype=TOKENS)


def _plant(folder: Path, documents: Sequence[tuple[str, str]]) -> int:
    """Writes the copies, kind by kind; line i of a file is of the sort COPIES[i % 6]. Returns their size."""
    usable = [item for item in documents if 500 <= len(item[1]) <= 20_000]
    step = max(len(usable) // NUM_ORIGINALS, 1)
    originals = usable[::step][:NUM_ORIGINALS]
    for kind in KINDS:
        copies = (copy for k, text in originals if k == kind for copy in planted(text))
        _write_lines(folder / f"{kind}-1.jsonl", copies)
    return sum(_size(copy) for _, text in originals for copy in planted(text))


def planted(text: str) -> list[str]:
    """The copies of a text, one of each sort."""
    changed = [_change_words(text, per_mille) for per_mille in _CHANGED_PER_MILLE[2:]]
    return [text, text.replace("\n", "\n\n"), *changed]


def _change_words(text: str, per_mille: int) -> str:
    """Some words replaced by other words of the text, Chinese characters by Chinese characters."""
    words, salt = _WORD.findall(text), _hash(f"{per_mille} {text}")
    sorts = [[word for word in words if _is_chinese(word) == chinese] for chinese in (False, True)]
    places = iter(range(len(words)))

    def replace(found: re.Match[str]) -> str:
        drawn, others = _hash(f"{salt} {next(places)}"), sorts[_is_chinese(found[0])]
        return others[drawn // 1_000 % len(others)] if drawn % 1_000 < per_mille else found[0]

    return _WORD.sub(replace, text)


def _is_chinese(word: str) -> bool:
    return "\u3400" <= word[0] <= "\u9fff"


def _texts(path: str | Path) -> Iterator[str]:
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _write_lines(path: Path, texts: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def _size(text: str) -> int:
    return len(text.encode("utf-8"))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))
