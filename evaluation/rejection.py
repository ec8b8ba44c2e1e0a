"""Rejection sampling: keeps those of a model's own answers that a reward function finds good, to fine-tune on them.

    python -m evaluation.rejection runs/sft prompts.jsonl --reward reward.py:reward --keep "reward>0" --out chat.jsonl

`python -m data_prep prepare-chat` reads the result.
"""

import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import command_line
from evaluation.own_answers import SamplingOptions, answer_prompts, in_words, read_prompts
from evaluation.rewards import load_reward

# torch and the model are imported where they are used, so that --help is instant.

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectionCommand(SamplingOptions):
    """Keeps those of a model's own answers that a reward function finds good."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Prompts or conversations, as prepare-chat reads them; their last answers are not looked at."""
    reward: str
    """FILE.py:FUNCTION, called as function(prompt, text, row) -> float."""
    out: Path
    """File to write: a conversation and the reward of its answer per line."""
    keep: str = "best"
    """best: of each prompt's answers the first of the best; or all that pass a test such as "reward>0"."""


def sample(command: RejectionCommand) -> str:
    """Writes the conversations that are kept and returns what was done, in words.

    Raises:
        ValueError: whatever is wrong with the model, the file, the reward or the test.
    """
    from evaluation.items import write_items
    from evaluation.model_folder import load_model

    chosen, reward = _choice(command.keep), load_reward(command.reward)
    prompts = read_prompts(command.file, command.limit, with_answers=False)
    loaded = load_model(command.model, device=command.device)
    counts: Counter[str] = Counter()
    kept = []
    for answered in answer_prompts(loaded, prompts, command, counts):
        rewards = answered.rewards(reward)
        places = chosen(rewards)
        counts["answers not kept"] += len(rewards) - len(places)
        for place in places:
            turns = [*answered.messages, {"role": "assistant", "content": answered.answers[place]}]
            kept.append({"messages": turns, "reward": rewards[place]})
    if not kept:
        raise ValueError(f"--keep {command.keep!r}: no answer of {len(prompts):,} prompts passed{in_words(counts)}")
    write_items(command.out, kept)
    return f"{command.out}: {len(kept):,} answers to {len(prompts):,} prompts kept{in_words(counts)}"


def _choice(keep: str) -> Callable[[Sequence[float]], list[int]]:
    """Which of some rewards' answers are kept."""
    if keep == "best":
        return lambda rewards: [rewards.index(max(rewards))] if rewards else []
    test = re.fullmatch(r"reward\s*(>=|<=|>|<)\s*(-?\d*\.?\d+)", keep.strip())
    if test is None:
        raise ValueError(f'--keep {keep!r}: expected best, or a test such as "reward>0"')
    compare, limit = _COMPARISONS[test[1]], float(test[2])
    return lambda rewards: [place for place, value in enumerate(rewards) if compare(value, limit)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        print(
            sample(
                command_line.read(RejectionCommand, argv, prog="python -m evaluation.rejection", description=__doc__)
            )
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
