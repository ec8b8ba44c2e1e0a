"""Is an exported folder the model that it was made of? It is read back, and both compute the same prompt."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaluation.model_folder import ModelFolderError, read_weights
from model.config import ModelConfig
from model.convert import to_hugging_face
from model.hugging_face_configs import DTYPES, is_known_to_them
from model.hugging_face_layouts import is_router_bias
from model.transformer import Transformer

_NUM_TOKENS = 16
TOLERANCE = 1e-5
"""Of the largest logit: another order of sums, and no more."""


def check_with_ours(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: str) -> None:
    """Reads the folder with our own reader: every tensor must be equal bit for bit, and so must what it computes.

    Raises:
        ModelFolderError: it is not.
    """
    read_config, read_state = read_weights(folder)
    written = {name: _rounded(name, tensor, dtype) for name, tensor in _in_their_form(config, state).items()}
    read = _in_their_form(read_config, read_state)
    differing = [name for name in {**written, **read} if not _is_equal(written.get(name), read.get(name))]
    if differing:
        raise ModelFolderError(
            f"{folder}: {differing[0]} came back changed ({len(differing)} tensors differ): the disk or the writer is "
            "broken; nothing was exported"
        )
    rounded = {name: _rounded(name, tensor, dtype) for name, tensor in state.items()}
    _compare("our reader", _logits(config, rounded), _logits(read_config, read_state))


def check_with_theirs(folder: Path) -> None:
    """Loads the folder with transformers, and compares what it computes with what ours does.

    Raises:
        ModelFolderError: transformers is not installed, or computes something else.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelFolderError("--check transformers: it is not installed; pip install transformers") from error
    config, state = read_weights(folder)
    kind = "AutoModelForCausalLM" if config.head == "tokens" else "AutoModelForSequenceClassification"
    trusts = not is_known_to_them(config)  # the code is ours
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, trust_remote_code=trusts)
    with torch.no_grad():
        logits = theirs.eval()(input_ids=_prompt(config)).logits
    ours = _logits(config, state)
    _compare("transformers", ours[:, -1] if config.head == "score" else ours, logits)


def _in_their_form(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if is_known_to_them(config):
        return to_hugging_face(config, state)
    return {name: tensor for name, tensor in state.items() if not name.endswith(".load")}


def _rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    return tensor.float() if is_router_bias(name) else tensor.to(getattr(torch, DTYPES[dtype]))


def _is_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _prompt(config: ModelConfig) -> Tensor:
    num_tokens = min(_NUM_TOKENS, config.context_length)
    return torch.randint(config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(config: ModelConfig, state: Mapping[str, Tensor]) -> Tensor:
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    model.tie()
    return model.eval()(_prompt(config))


def _compare(reader: str, ours: Tensor, theirs: Tensor) -> None:
    difference, scale = (theirs - ours).abs().max().item(), max(1.0, ours.abs().max().item())
    if not difference <= TOLERANCE * scale:  # NaN is no reason to pass
        raise ModelFolderError(
            f"the exported model computes something else in {reader}: logits up to {scale:.3g} differ by "
            f"{difference:.3g}; nothing was exported"
        )
