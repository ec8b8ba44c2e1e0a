"""Run folders and tokenizers as training leaves them, made in a blink."""

import dataclasses
from pathlib import Path

import sentencepiece
import torch

from data_prep.config_file import to_toml
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe
from model.config import ModelConfig
from tests.models import LLAMA, make_model
from tests.records import save
from train.config import DataSection, RunConfig

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # naïve café, {i} → {i + 1}\n" for i in range(200)]


def byte_level_tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=320)


def sentencepiece_file(folder: Path, **options) -> Path:
    """A sentencepiece BPE as Llama's: byte fallback, text as it is but for visible spaces and one in front."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(TEXTS))
    like_llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, minloglevel=5, **(like_llama | options),
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def model_config(tokenizer: Tokenizer, **changes) -> ModelConfig:
    """A shape with some embeddings more than the tokenizer has tokens, as padded vocabularies have."""
    return dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size + 12, **changes)


def save_step(run: Path, step: int, config: ModelConfig, record: dict | None = None) -> torch.nn.Module:
    """Publishes a checkpoint of a random model, drawn from the step, and returns the model."""
    model = make_model(config, seed=step)
    tensors = {f"model.{name}": value for name, value in (*model.named_parameters(), *model.named_buffers())}
    tensors |= {f"optim.{name}.m": torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    save(
        run, step, tensors, record or {}, to_toml(RunConfig(data=DataSection(sequence_length=32), model=config)), keep=5
    )
    return model


def make_run(run: Path, tokenizer: Tokenizer, **changes) -> torch.nn.Module:
    """A run folder with the checkpoints 90 and 100, whose newest model is returned."""
    run.mkdir(parents=True)
    tokenizer.save(run)
    config = model_config(tokenizer, **changes)
    save_step(run, 90, config)
    return save_step(run, 100, config)
