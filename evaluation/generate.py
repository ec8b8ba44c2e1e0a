"""Continues prompts on the terminal, the first sample as it comes.

python -m evaluation.generate runs/demo --prompt "def main("
python -m evaluation.generate exported/ --file prompts.txt --num-samples 3 --temperature 0.7 --top-p 0.9
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from evaluation.engine import Sampling
    from evaluation.model_folder import LoadedModel

# torch and the model are imported where they are used, so that --help is instant.


def generate_text(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    /,
    *,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
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
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep only the likeliest tokens whose probabilities together reach p.
        num_samples: Continuations of each prompt.
        seed: Equal seeds give equal continuations.
        stop: Texts before which a continuation ends, besides the end of the document.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
    """
    from evaluation.engine import GenerationError, Sampling
    from evaluation.model_folder import load_model

    prompts = _prompts(prompt, file)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if num_samples > 1 and temperature == 0:
        raise GenerationError(f"num_samples = {num_samples} at temperature 0 are all the same; raise --temperature")
    loaded = load_model(model, device=device)
    num_tokens, started_s = 0, time.perf_counter()
    for number, text in enumerate(prompts, start=1):
        if len(prompts) > 1:
            print(f"=== prompt {number} ===")
        num_tokens += _continue_prompt(loaded, text, max_new_tokens, sampling, num_samples, stop)
    elapsed_s = time.perf_counter() - started_s
    print(f"{num_tokens} tokens in {elapsed_s:.2f} s: {num_tokens / elapsed_s:.1f} tokens/s", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        tyro.cli(generate_text, args=argv, prog="python -m evaluation.generate")
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


def _continue_prompt(
    loaded: "LoadedModel", prompt: str, max_new_tokens: int, sampling: "Sampling", num_samples: int, stop: Sequence[str]
) -> int:
    """Prints the first sample token by token and the others after it; returns the number of new tokens."""
    from evaluation.engine import generate
    from evaluation.text_sample import TextSample

    tokenizer = loaded.tokenizer
    # Training reads a document after the EOS of the one before.
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    samples = [TextSample(tokenizer, stop) for _ in range(num_samples)]
    texts = [""] * num_samples
    num_tokens = 0
    print(prompt, end="", flush=True)
    for tokens in generate(
        loaded.model, ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids={tokenizer.eos_id},
        num_samples=num_samples,
    ):  # fmt: skip
        for i, token in enumerate(tokens):
            if token is not None and not samples[i].has_ended:
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
