"""Makes pairs for DPO of a model's own answers.

    python -m evaluation.pairs runs/sft chat.jsonl --out pairs.jsonl
    python -m evaluation.pairs runs/sft prompts.jsonl --reward reward.py:reward --out pairs.jsonl

Chosen is the file's answer, and rejected are the model's that differ from it. With a reward function, these are the
best and the worst of the model's own answers. `python -m data_prep prepare-chat --kind pairs` reads the result.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from data_prep import command_line
from evaluation.own_answers import Answered, SamplingOptions, answer_prompts, in_words, read_prompts
from evaluation.rewards import load_reward

if TYPE_CHECKING:
    from evaluation.rewards import Reward

# torch and the model are imported where they are used, so that --help is instant.


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsCommand(SamplingOptions):
    """Makes pairs for DPO of a model's own answers."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Conversations, as prepare-chat reads them; with a reward, prompts are enough."""
    out: Path
    """File to write: a prompt, a chosen and a rejected answer per line."""
    reward: str | None = None
    """FILE.py:FUNCTION, called as function(prompt, text, row) -> float, that judges the answers."""


def make_pairs(command: PairsCommand) -> str:
    """Writes the pairs and returns what was done, in words.

    Raises:
        ValueError: whatever is wrong with the model, the file or the reward.
    """
    from evaluation.items import write_items
    from evaluation.model_folder import load_model

    reward = load_reward(command.reward) if command.reward is not None else None
    prompts = read_prompts(command.file, command.limit, with_answers=reward is None)
    loaded = load_model(command.model, device=command.device)
    counts: Counter[str] = Counter()
    pairs = [
        pair
        for answered in answer_prompts(loaded, prompts, command, counts)
        for pair in (_beside_given(answered, counts) if reward is None else _best_and_worst(answered, reward, counts))
    ]
    if not pairs:
        raise ValueError(f"{command.file}: not one pair of {len(prompts):,} prompts{in_words(counts)}")
    write_items(command.out, pairs)
    return f"{command.out}: {len(pairs):,} pairs of {len(prompts):,} prompts{in_words(counts)}"


def _beside_given(answered: Answered, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    given = answered.prompt.answer
    for answer in answered.answers:
        if answer.strip() == given.strip():
            counts["answers equal to the file's"] += 1
        else:
            yield {"prompt": answered.messages, "chosen": given, "rejected": answer}


def _best_and_worst(answered: Answered, reward: "Reward", counts: Counter[str]) -> Iterator[dict[str, Any]]:
    judged = sorted(zip(answered.rewards(reward), answered.answers, strict=True), key=lambda pair: -pair[0])
    if not judged or judged[0][0] == judged[-1][0]:
        counts["prompts whose answers are equally good"] += 1
        return
    (best, chosen), (worst, rejected) = judged[0], judged[-1]
    yield {"prompt": answered.messages, "chosen": chosen, "rejected": rejected, "rewards": [best, worst]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        print(make_pairs(command_line.read(PairsCommand, argv, prog="python -m evaluation.pairs", description=__doc__)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
