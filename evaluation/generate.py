"""Continues prompts on the terminal, a single one as it comes.

python -m evaluation.generate runs/demo --prompt "def main("
python -m evaluation.generate exported/ --file prompts.txt --num-samples 3 --temperature 0.7 --top-p 0.9
python -m evaluation.generate runs/1b --prompt "def main(" --draft runs/100m
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_prep import command_line

if TYPE_CHECKING:
    from data_prep.tokenizing.tokenizer import Tokenizer
    from evaluation.chat_session import Draft
    from evaluation.model_folder import LoadedModel
    from evaluation.sampling import Sampling

# torch and the model are imported where they are used, so that --help is instant.

Steps = Iterable[Sequence[Sequence[int]]]
"""The new tokens of every sample of a prompt, step by step."""


def generate_text(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    /,
    *,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    draft: str | None = None,
    num_samples: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    device: str = "auto",
) -> None:
    """Continues one prompt, or each line of a file, and prints the texts.

    Args:
        model: Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder.
        prompt: Text to continue; an empty one starts a new document.
        file: File with one prompt per line.
        max_new_tokens: Longest continuation, in tokens.
        temperature: Divides the logits; 0 always takes the likeliest token. By default 0.8.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep only the likeliest tokens whose probabilities together reach p.
        min_p: Keep only tokens at least p times as likely as the likeliest.
        repetition_penalty: Above 1, makes tokens that the text has less likely.
        num_beams: Above 1, searches for the continuation of highest probability with that many beams.
        length_penalty: A beam's score is its log-probability divided by its length to this power.
        draft: Smaller model whose guesses the model checks, several at once, or "lookup": guess what the text repeats.
        num_samples: Continuations of each prompt; of beams, the best.
        batch_size: Samples of a file's prompts that are computed together.
        seed: Equal seeds give equal continuations.
        stop: Texts before which a continuation ends, besides the end of the document.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
    """
    from evaluation.chat_session import load_draft
    from evaluation.model_folder import load_model
    from evaluation.sampling import Sampling

    prompts = _prompts(prompt, file)
    if temperature is None:
        temperature = 0.8 if num_beams == 1 else 0.0
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    _check(sampling, num_samples, num_beams, draft, batch_size)
    loaded = load_model(model, device=device)
    # Training reads a document after the EOS of the one before.
    rows = [loaded.tokenizer.encode(text) or [loaded.tokenizer.eos_id] for text in prompts]
    if num_beams > 1:
        continued = _by_beams(loaded, rows, max_new_tokens, num_beams, length_penalty, num_samples)
    elif draft is not None:
        continued = _by_draft(loaded, load_draft(draft, loaded, device), rows, max_new_tokens, sampling)
    else:
        continued = _by_sampling(loaded, rows, max_new_tokens, sampling, num_samples, batch_size)
    num_tokens, started_s = 0, time.perf_counter()
    for number, (text, steps) in enumerate(zip(prompts, continued, strict=True), start=1):
        if len(prompts) > 1:
            print(f"=== prompt {number} ===")
        num_tokens += _print_samples(loaded.tokenizer, text, steps, num_samples, stop)
    elapsed_s = time.perf_counter() - started_s
    print(f"{num_tokens} tokens in {elapsed_s:.2f} s: {num_tokens / elapsed_s:.1f} tokens/s", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command_line.read(generate_text, argv, prog="python -m evaluation.generate")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ValueError("give either --prompt TEXT or --file FILE")
    if prompt is not None:
        return [prompt]
    assert file is not None
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    if not prompts:
        raise ValueError(f"{file}: has no prompts; expected one per line")
    return prompts


def _check(sampling: "Sampling", num_samples: int, num_beams: int, draft: str | None, batch_size: int) -> None:
    """Refuses settings that contradict each other."""
    from evaluation.sampling import GenerationError, Sampling

    for name, count in (("batch_size", batch_size), ("num_samples", num_samples), ("num_beams", num_beams)):
        if count < 1:
            raise GenerationError(f"{name} = {count}: must be at least 1")
    if num_beams == 1 and num_samples > 1 and sampling.temperature == 0:
        raise GenerationError(f"num_samples = {num_samples} at temperature 0 are all the same; raise --temperature")
    if num_beams > 1 and sampling != Sampling(seed=sampling.seed):
        raise GenerationError(
            f"num_beams = {num_beams} searches for the likeliest text and draws nothing; leave out --num-beams, or "
            "--temperature, --top-k, --top-p, --min-p and --repetition-penalty"
        )
    if num_samples > num_beams > 1:
        raise GenerationError(f"num_samples = {num_samples} of num_beams = {num_beams}; raise --num-beams")
    if draft is not None and (num_beams > 1 or num_samples > 1):
        raise GenerationError("--draft is for one sample at a time; leave out --num-samples and --num-beams")


def _by_sampling(
    loaded: "LoadedModel", rows: list[list[int]], max_new_tokens: int, sampling: "Sampling", num_samples: int,
    batch_size: int,
) -> Iterator[Steps]:  # fmt: skip
    """A single prompt token by token, more of them in batches."""
    from evaluation.engine import complete_batch, generate

    stop_ids = {loaded.tokenizer.eos_id}
    if len(rows) == 1:
        steps = generate(
            loaded.model, rows[0], max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids,
            num_samples=num_samples,
        )  # fmt: skip
        yield ([[token] if token is not None else [] for token in tokens] for tokens in steps)
        return
    num_together = max(1, batch_size // num_samples)
    for start in range(0, len(rows), num_together):
        answers = complete_batch(
            loaded.model, rows[start : start + num_together], max_new_tokens=max_new_tokens, sampling=sampling,
            stop_ids=stop_ids, num_samples=num_samples,
        )  # fmt: skip
        yield from ([samples] for samples in answers)


def _by_beams(
    loaded: "LoadedModel", rows: list[list[int]], max_new_tokens: int, num_beams: int, length_penalty: float,
    num_samples: int,
) -> Iterator[Steps]:  # fmt: skip
    from evaluation.beam import beam_search

    for row in rows:
        answers = beam_search(
            loaded.model, row, num_beams=num_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty,
            stop_ids={loaded.tokenizer.eos_id},
        )  # fmt: skip
        yield [[tokens for tokens, _ in answers[:num_samples]]]


def _by_draft(
    loaded: "LoadedModel", draft: "Draft", rows: list[list[int]], max_new_tokens: int,
    sampling: "Sampling",
) -> Iterator[Steps]:  # fmt: skip
    """One prompt after the other; says at the end how many guesses were right."""
    from evaluation.speculative import generate_speculative

    num_accepted = num_guessed = 0

    def counted(row: list[int]) -> Steps:
        nonlocal num_accepted, num_guessed
        for one in generate_speculative(
            loaded.model, draft.model, row, max_new_tokens=max_new_tokens,
            sampling=sampling, stop_ids={loaded.tokenizer.eos_id},
        ):  # fmt: skip
            num_accepted, num_guessed = num_accepted + one.num_accepted, num_guessed + one.num_guessed
            yield [one.tokens]

    yield from map(counted, rows)
    print(f"{num_accepted} of {num_guessed} guesses kept", file=sys.stderr)


def _print_samples(tokenizer: "Tokenizer", prompt: str, steps: Steps, num_samples: int, stop: Sequence[str]) -> int:
    """Prints the first sample as it comes and the others after it; returns the number of new tokens."""
    from evaluation.text_sample import TextSample

    samples = [TextSample(tokenizer, stop) for _ in range(num_samples)]
    texts = [""] * num_samples
    num_tokens = 0
    print(prompt, end="", flush=True)
    for new in steps:
        for i, token in ((i, token) for i, tokens in enumerate(new) for token in tokens):
            if not samples[i].has_ended:
                num_tokens += 1
                new_text = samples[i].feed(token)
                texts[i] += new_text
                if i == 0:
                    print(new_text, end="", flush=True)
        if all(sample.has_ended for sample in samples):
            break
    print(samples[0].flush())
    for i in range(1, num_samples):
        print(f"--- sample {i + 1} ---\n{prompt}{texts[i]}{samples[i].flush()}")
    return num_tokens


if __name__ == "__main__":
    sys.exit(main())
