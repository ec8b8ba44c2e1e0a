import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.beam import beam_search
from evaluation.engine import complete
from evaluation.sampling import GenerationError, Sampling
from model.convert import write_hugging_face
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

ALL = {**VARIANTS, **MOE_VARIANTS}
PROMPT = random_tokens(LLAMA, 1, 9)[0].tolist()
STOPS = [5, 17, 33, 60, 101]
PAD = 130


@torch.no_grad()
def log_probability(model, prompt: list[int], answer: list[int]) -> float:
    """By a forward of the whole text."""
    tokens = torch.tensor([prompt + answer])
    log_probs = model(tokens)[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "mixtral"])
def both_models(request, tmp_path_factory):
    """Ours and theirs of the same weights, in fp64."""
    folder = tmp_path_factory.mktemp("beam")
    model = make_model(ALL[request.param])
    write_hugging_face(folder, model.config, model.state_dict(), eos_id=None, dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    theirs.config._experts_implementation = "eager"  # the others take no fp64
    return model.double(), theirs


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "stop_ids"),
    [(1, 1.0, []), (3, 1.0, STOPS[:1]), (4, 0.0, STOPS), (5, 2.0, STOPS), (4, -1.0, STOPS[:2])],
)
def test_beams_are_those_of_transformers(both_models, num_beams, length_penalty, stop_ids):
    model, theirs = both_models
    found = beam_search(
        model, PROMPT, num_beams=num_beams, max_new_tokens=10, stop_ids=stop_ids, length_penalty=length_penalty
    )
    prompt = torch.tensor([PROMPT])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, num_beams=num_beams,
        num_return_sequences=num_beams, length_penalty=length_penalty, eos_token_id=stop_ids or None, pad_token_id=PAD,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert len(found) == num_beams
    for (tokens, _), row in zip(found, expected.sequences[:, len(PROMPT) :].tolist(), strict=True):
        assert tokens == row[: len(tokens)]
        assert set(row[len(tokens) :]) <= {PAD}
    if num_beams > 1:
        assert [score for _, score in found] == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("variant", ["alternating windows", "latent query", "chunk soft", "deepseek-v3"])
def test_scores_are_log_probabilities_of_the_full_forward(variant):
    model = make_model(ALL[variant], dtype=torch.float64)
    found = beam_search(model, PROMPT, num_beams=3, max_new_tokens=12, stop_ids=STOPS, length_penalty=0.7)
    for tokens, score in found:
        assert score == pytest.approx(log_probability(model, PROMPT, tokens) / len(tokens) ** 0.7, abs=1e-10)
    assert found == sorted(found, key=lambda beam: -beam[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(length_penalty):
    model = make_model(dataclasses.replace(LLAMA, vocab_size=4), dtype=torch.float64)
    every = [answer for n in (1, 2, 3) for answer in itertools.product(range(4), repeat=n)]
    # Answers end with the stop token 2, which stands nowhere else in them, or are as long as may be.
    complete_ones = [list(a) for a in every if 2 not in a[:-1] and (len(a) == 3 or a[-1] == 2)]
    scores = {tuple(a): log_probability(model, [0, 3], a) / len(a) ** length_penalty for a in complete_ones}
    found = beam_search(model, [0, 3], num_beams=40, max_new_tokens=3, stop_ids={2}, length_penalty=length_penalty)
    expected = sorted(scores, key=lambda a: -scores[a])
    assert [tuple(tokens) for tokens, _ in found] == expected[: len(found)]
    assert len(found) == len(expected)


@pytest.mark.parametrize("variant", ["llama", "mistral", "chunk soft"])
def test_one_beam_is_greedy(variant):
    model = make_model(ALL[variant], dtype=torch.float64)
    [(tokens, _)] = beam_search(model, PROMPT, num_beams=1, max_new_tokens=12)
    assert [tokens] == complete(model, PROMPT, max_new_tokens=12, sampling=Sampling())


def test_more_beams_find_no_worse_text():
    model = make_model(LLAMA, dtype=torch.float64)
    best = [beam_search(model, PROMPT, num_beams=n, max_new_tokens=8, length_penalty=0.0)[0][1] for n in (1, 4, 32)]
    assert best[0] < best[1] <= best[2]


def test_beams_end_at_the_end_of_the_context():
    model = make_model(dataclasses.replace(LLAMA, context_length=12))
    assert {len(tokens) for tokens, _ in beam_search(model, PROMPT, num_beams=3, max_new_tokens=50)} == {3}


@pytest.mark.parametrize(
    ("prompt", "settings", "complaint"),
    [([], {}, "the prompt is empty"), ([1], {"num_beams": 0}, "num_beams = 0: must be at least 1")],
)
def test_searches_that_cannot_be_made_are_refused(prompt, settings, complaint):
    with pytest.raises(GenerationError, match=complaint):
        beam_search(make_model(LLAMA), prompt, **{"num_beams": 2, "max_new_tokens": 5, **settings})


def test_broken_logits_are_refused():
    model = make_model(LLAMA)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerationError, match="logits are NaN"):
        beam_search(model, PROMPT, num_beams=2, max_new_tokens=5)
