import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import read_manifest
from evaluation import perplexity
from evaluation.score import Score, score, shard_batches, text_batches, unigram_entropy
from kernels.cross_entropy import IGNORE
from resume.samples import SampleReader
from resume.verify import open_split
from tests.models import make_model
from tests.prepared import TEXTS, tokenizer, write_data
from tests.runs import TINY, tiny_run
from train import pretrain


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert pretrain.pretrain(tiny_run(data, folder)) == 0
    return folder


def test_a_score_is_the_loss_of_torch_over_every_token_and_the_bytes_of_the_text():
    model, made = make_model(TINY, dtype=torch.float64), tokenizer()
    text = TEXTS[3]
    tokens = made.encode(text)
    token_bytes = np.pad(made.token_bytes(), (0, TINY.vocab_size - made.vocab_size))
    batches = text_batches(tokens, sequence_length=len(tokens), batch_size=1, eos_id=made.eos_id)
    found = score(model, batches, token_bytes, torch.device("cpu"))
    stream = torch.tensor([[made.eos_id, *tokens]])
    expected = F.cross_entropy(model(stream[:, :-1])[0], stream[0, 1:], reduction="sum").item()
    assert found.loss_sum == pytest.approx(expected, rel=1e-12)
    assert (found.num_targets, found.num_bytes) == (len(tokens), len(text.encode()))
    assert found.perplexity == pytest.approx(math.exp(expected / len(tokens)))
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.encode()))


@given(length=st.integers(1, 40), batch_size=st.integers(1, 5), num_tokens=st.integers(0, 100))
def test_windows_over_a_text_predict_every_token_once(length: int, batch_size: int, num_tokens: int):
    tokens = list(range(1, num_tokens + 1))
    batches = list(text_batches(tokens, sequence_length=length, batch_size=batch_size, eos_id=0))
    targets = [rows.to(torch.device("cpu")).targets for rows in batches]
    assert [t for some in targets for t in some[some != IGNORE].tolist()] == tokens
    assert sum(batch.num_targets for batch in batches) == num_tokens


@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 4), num_sequences=st.integers(1, 40))
def test_ranks_share_held_out_samples_and_all_make_as_many_forwards(
    data: Path, world_size: int, batch_size: int, num_sequences: int
):
    files = open_split({data: read_manifest(data)}, "validation")
    reader = SampleReader(files, sequence_length=32, vocab_size=300, eos_id=0)
    options = {"num_sequences": num_sequences, "batch_size": batch_size}
    shares = [list(shard_batches(reader, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    alone = list(shard_batches(reader, **options))
    reader.close()
    assert len({len(share) for share in shares}) == 1
    assert {rows.tokens.shape for rows in [*alone, *sum(shares, [])]} == {(batch_size, 33)}  # noqa: RUF017
    targets = [sum(batch.num_targets for batch in batches) for batches in (sum(shares, []), alone)]  # noqa: RUF017
    assert targets[0] == targets[1] > 0


def test_scores_add_up():
    assert Score(1.0, 2, 3) + Score(4.0, 5, 6) == Score(5.0, 7, 9)
    assert math.isnan(Score().loss_mean)
    assert math.isnan(Score(1.0, 2, 0).bits_per_byte)


def test_a_model_is_left_in_the_mode_it_came_in():
    model = make_model(TINY).train()
    score(model, [], np.zeros(300, dtype=np.int32), torch.device("cpu"))
    assert model.training


def test_the_entropy_of_equally_frequent_tokens_is_the_logarithm_of_their_number():
    assert unigram_entropy(np.array([5, 5, 9, 9, 1, 1])) == pytest.approx(math.log(3))


def test_the_command_scores_a_run_on_its_own_held_out_shards(run: Path, capsys: pytest.CaptureFixture[str]):
    assert perplexity.main([str(run), "--sequence-length", "32", "--max-sequences", "5"]) == 0
    printed = capsys.readouterr().out
    from evaluation.report import read_metrics

    last = [record for record in read_metrics(run) if "validation_loss" in record][-1]
    assert f"loss {last['validation_loss']:.4f} nats/token" in printed
    assert f"bits/byte {last['validation_bits_per_byte']:.4f}" in printed


def test_the_command_scores_raw_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i in (1, 2):
        (tmp_path / f"{i}.txt").write_text(TEXTS[i])
    files = [str(tmp_path / "1.txt"), str(tmp_path / "2.txt")]
    assert perplexity.main([str(run), "--text", *files]) == 0
    assert f"{len((TEXTS[1] + TEXTS[2]).encode()):,} bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such data folder"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--split", "test"], "no shard of split 'test'"),
        (["--text", __file__[:-3] + ".nothing"], "test_score.nothing"),
    ],
)
def test_bad_input_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert perplexity.main([str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_text_without_tokens_or_in_another_encoding_is_refused(run: Path, tmp_path: Path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert perplexity.main([str(run), "--text", str(tmp_path / "empty.txt")]) == 2
    assert "no token to predict" in capsys.readouterr().err
    assert perplexity.main([str(run), "--text", str(tmp_path / "latin.txt")]) == 2
    assert "latin.txt: not UTF-8" in capsys.readouterr().err


def test_isolated_documents_are_scored_as_the_run_was_trained(data: Path, tmp_path: Path, capsys):
    assert pretrain.pretrain(tiny_run(data, tmp_path / "run", data={"isolate_documents": True})) == 0
    from evaluation.report import read_metrics

    last = [record for record in read_metrics(tmp_path / "run") if "validation_loss" in record][-1]
    capsys.readouterr()
    assert perplexity.main([str(tmp_path / "run"), "--max-sequences", "5"]) == 0
    assert f"loss {last['validation_loss']:.4f} nats/token" in capsys.readouterr().out


def test_shards_of_another_tokenizer_are_refused(run: Path, data: Path, tmp_path: Path, capsys):
    import dataclasses

    from data_prep.manifest import write_manifest

    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other", dataclasses.replace(read_manifest(data), tokenizer_digest="0" * 32))
    assert perplexity.main([str(run), "--data", str(tmp_path / "other")]) == 2
    assert "encoded with another tokenizer" in capsys.readouterr().err
