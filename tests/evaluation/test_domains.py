import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import Manifest, record_shard, write_manifest
from data_prep.shards import ShardWriter
from evaluation import domains
from evaluation.domains import DomainSettings, evaluate_domains, score_documents, windows
from evaluation.model_folder import LoadedModel
from tests.evaluation.stored import make_run
from tests.models import make_model
from tests.prepared import TEXTS, tokenizer
from tests.runs import TINY

OTHER_TEXTS = [f"class C{i}:\n    size = {i}\n" for i in range(9)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(make_model(TINY, dtype=torch.float64).eval(), tokenizer(), Path("nowhere"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two domains: a folder of two kinds of files, one below it compressed, and a file."""
    folder = tmp_path / "texts"
    (folder / "defs" / "deep").mkdir(parents=True)
    (folder / "defs" / "1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    with gzip.open(folder / "defs" / "deep" / "2.py.gz", "wt") as file:
        file.write(TEXTS[4])
    (folder / "defs" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "classes.v1.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in OTHER_TEXTS))
    (folder / ".hidden.txt").write_text("not a domain")
    return folder


def write_two_sources(folder: Path) -> Path:
    made = tokenizer()
    folder.mkdir()
    records = []
    for source, chosen in (("defs", TEXTS[:5]), ("classes.v1", OTHER_TEXTS)):
        options = {"vocab_size": made.vocab_size, "tokenizer_digest": made.digest, "eos_id": made.eos_id}
        with ShardWriter(folder / "validation", source, shard_tokens=50, **options) as writer:
            for text in chosen:
                writer.add(np.array(made.encode(text)))
        records += [record_shard(folder, path, h, source=source, sample_tokens=32) for path, h in writer.close()]
    write_manifest(
        folder,
        Manifest(
            tokenizer_file=made.save(folder),
            tokenizer_digest=made.digest,
            vocab_size=made.vocab_size,
            eos_id=made.eos_id,
            sample_tokens=32,
            shards=tuple(records),
        ),
    )
    return folder


@given(num_tokens=st.integers(0, 60), window=st.integers(1, 20), stride=st.integers(1, 20))
def test_windows_count_every_token_once_and_leave_it_context(num_tokens: int, window: int, stride: int):
    stride = min(stride, window)
    stream = np.arange(num_tokens + 1)
    counted = []
    for piece, num_counted in windows(stream, window, stride):
        assert len(piece) <= window + 1
        assert (np.diff(piece) == 1).all()
        new = piece[1 + num_counted :].tolist()
        assert new
        context = np.array(new) - piece[0]
        assert (context >= np.minimum(new, window - stride + 1)).all()
        counted += new
    assert counted == list(range(1, num_tokens + 1))


def loss_of(loaded: LoadedModel, tokens: list[int], window: int, stride: int) -> float:
    """One forward per token, with the context that its window gives it."""
    stream = [loaded.tokenizer.eos_id, *tokens]
    total = 0.0
    for place in range(1, len(stream)):
        if place <= window:
            begin = 0
        else:
            end = min(window + stride * math.ceil((place - window) / stride), len(tokens))
            begin = end - window
        logits = loaded.model(torch.tensor([stream[begin:place]]))[0, -1]
        total += F.cross_entropy(logits, torch.tensor(stream[place])).item()
    return total


@pytest.mark.parametrize(("window", "stride"), [(200, 100), (16, 8), (16, 5), (16, 16)])
def test_the_loss_is_that_of_each_token_in_its_window(loaded: LoadedModel, window: int, stride: int):
    documents = [loaded.tokenizer.encode(text)[:length] for text, length in zip(TEXTS, (41, 1, 16, 17, 33))]
    expected = sum(loss_of(loaded, tokens, window, stride) for tokens in documents)
    for batch_size in (1, 3):
        found = score_documents(loaded, documents, window=window, stride=stride, batch_size=batch_size)
        assert found.loss_sum == pytest.approx(expected, rel=1e-12)
        assert found.num_targets == sum(map(len, documents))


def test_raw_texts_and_a_data_folder_of_them_have_the_same_figures(loaded: LoadedModel, texts: Path, tmp_path: Path):
    settings = DomainSettings(window=24)
    raw = evaluate_domains(loaded, texts, settings)
    stored = evaluate_domains(loaded, write_two_sources(tmp_path / "data"), settings)
    assert set(raw) == {"defs", "classes.v1", "all"}
    for name in raw:
        assert stored[name] == pytest.approx(raw[name], rel=1e-12)


def test_figures_are_sums_divided_once(loaded: LoadedModel, texts: Path):
    figures = evaluate_domains(loaded, texts, DomainSettings(window=24))
    defs = figures["defs"]
    tokens = [loaded.tokenizer.encode(text) for text in TEXTS[:5]]
    assert (defs["documents"], defs["tokens"]) == (5, sum(map(len, tokens)))
    assert defs["bytes"] == sum(len(text.encode()) for text in TEXTS[:5])
    assert defs["loss"] == pytest.approx(defs["loss_sum"] / defs["tokens"])
    assert defs["perplexity"] == pytest.approx(math.exp(defs["loss"]))
    assert defs["bits_per_byte"] == pytest.approx(defs["loss_sum"] / math.log(2) / defs["bytes"])
    both = figures["all"]
    for key in ("documents", "tokens", "bytes", "loss_sum"):
        assert both[key] == pytest.approx(defs[key] + figures["classes.v1"][key])
    assert both["loss"] == pytest.approx(both["loss_sum"] / both["tokens"])


def test_normalised_perplexity_is_per_token_of_the_reference(loaded: LoadedModel, texts: Path, tmp_path: Path):
    own, bytes_alone = tmp_path / "own", tmp_path / "bytes"
    for folder, made in ((own, loaded.tokenizer), (bytes_alone, tokenizer(260))):
        folder.mkdir()
        made.save(folder)
    same = evaluate_domains(loaded, texts, DomainSettings(window=24, reference=str(own)))
    for row in same.values():
        assert row["normalised_perplexity"] == pytest.approx(row["perplexity"])
    per_byte = evaluate_domains(loaded, texts, DomainSettings(window=24, reference=str(bytes_alone)))
    for row in per_byte.values():
        assert row["reference_tokens"] == row["bytes"]
        assert row["normalised_perplexity"] == pytest.approx(2 ** row["bits_per_byte"])


def test_no_more_documents_are_scored_than_asked_for(loaded: LoadedModel, texts: Path):
    figures = evaluate_domains(loaded, texts, DomainSettings(window=24, max_documents=2))
    assert [row["documents"] for row in figures.values()] == [2, 2, 4]


def test_lines_that_cannot_be_read_are_told(loaded: LoadedModel, texts: Path, capsys: pytest.CaptureFixture[str]):
    with (texts / "classes.v1.jsonl").open("a") as file:
        file.write("{broken\n")
    figures = evaluate_domains(loaded, texts, DomainSettings(window=24))
    assert figures["classes.v1"]["documents"] == len(OTHER_TEXTS)
    assert "note: 1 lines of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains") / "run"
    make_run(folder, tokenizer())
    return folder


def test_the_command_prints_a_table_and_writes_json(run: Path, texts: Path, capsys: pytest.CaptureFixture[str]):
    file = texts.parent / "domains.json"
    assert domains.main([str(run), str(texts), "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["domain", "documents", "tokens", "loss", "perplexity", "bits", "per", "byte"]
    figures = json.loads(file.read_text())
    assert [line.split()[0] for line in lines[1:]] == list(figures) == ["classes.v1", "defs", "all"]
    assert lines[2].split()[3] == f"{figures['defs']['loss']:.4f}"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["RUN", "nowhere"], "nowhere: no such folder"),
        (["RUN", "EMPTY"], "no file of a known kind in it"),
        (["RUN", "TEXTS", "--stride", "40"], "--stride 40: longer than the window of 32"),
        (["RUN", "TEXTS", "--reference", "nowhere"], "nowhere: no such tokenizer"),
        (["nowhere", "TEXTS"], "nowhere: does not exist"),
        (["RUN", "BLANK"], "domain 'blank' has no document that can be read"),
        (["RUN", "DATA"], "encoded with another tokenizer"),
    ],
)
def test_bad_input_is_one_line(run: Path, texts: Path, arguments, complaint, capsys: pytest.CaptureFixture[str]):
    places = {"RUN": run, "TEXTS": texts, "EMPTY": texts.parent / "empty", "BLANK": texts.parent / "blank"}
    places["EMPTY"].mkdir()
    places["BLANK"].mkdir()
    (places["BLANK"] / "blank.txt").write_text(" \n")
    if "DATA" in arguments:
        places["DATA"] = write_two_sources(texts.parent / "data")
        manifest = places["DATA"] / "manifest.json"
        manifest.write_text(manifest.read_text().replace(tokenizer().digest, "0" * 32))
    assert domains.main([str(places.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def test_sizes_that_score_nothing_are_refused():
    with pytest.raises(ValueError, match="--batch-size 0: must be at least 1"):
        DomainSettings(batch_size=0)


@pytest.mark.parametrize("command", ["domains", "contamination", "generated_answers", "sweep"])
def test_help_does_not_wait_for_torch(command: str):
    code = f"import sys; from evaluation.{command} import main\n"
    code += "try: main(['--help'])\nfinally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("False\n"), result.stderr
