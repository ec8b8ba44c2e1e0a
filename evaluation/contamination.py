"""How many items of evaluation sets stand in our own shards: runs of 13 successive words that an item and a document
share.

An item is contaminated if one of its texts shares such a run. What a word is, and that runs of more than ten items are
ignored, is as in the preparation's decontamination. Items without a text so long cannot be checked, and are counted.

Source: Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C.

    python -m evaluation.contamination data/demo gsm8k/test.jsonl ceval/val/ --out contaminated.jsonl
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from data_prep import command_line, publish
from data_prep.engine import WorkerDiedError
from data_prep.looking.text_table import aligned
from evaluation.set_items import Item, read_items
from evaluation.shared_runs import Place, find, runs_of_items

_MAX_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ContaminationCommand:
    """Looks for the items of evaluation sets in the shards of a data folder."""

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """Prepared data folder."""
    sets: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SET...")]
    """Files of evaluation sets, or folders of such files; each is a task."""
    split: str = "train"
    """Split of the data folder to look in."""
    ngram: int = 13
    """Words that an item and a document must share in a row."""
    out: Path | None = None
    """File for the contaminated items, a JSON object per line."""
    num_workers: int | None = None
    """Processes that read shards; by default one per core."""

    def __post_init__(self) -> None:
        """Refuses runs that every text shares."""
        if self.ngram < 5:
            raise ValueError(f"--ngram {self.ngram}: must be at least 5, as all texts share shorter runs; 13 is usual")
        if not self.sets:
            raise ValueError("no evaluation set; name files or folders of them behind the data folder")


class Finding(NamedTuple):
    """What was found of an item: of so many runs so many, the first of them in the document at a place."""

    num_runs: int
    num_found: int
    place: Place | None


def check(data: Path, items: Sequence[Item], *, split: str, ngram: int, num_workers: int | None) -> list[Finding]:
    """The finding of each item.

    Raises:
        ValueError: no item has a run; no such data folder or split.
    """
    runs = runs_of_items(items, ngram)
    if not len(runs.hashes):
        raise ValueError(f"no item has a text of {ngram} words that few items share; try a smaller --ngram")
    places = find(data, split, runs.hashes, ngram, num_workers)
    found = [Finding(0, 0, None)] * len(items)
    for run, item in zip(runs.run_of_pair.tolist(), runs.item_of_pair.tolist(), strict=True):
        num_runs, num_found, place = found[item]
        found[item] = Finding(num_runs + 1, num_found + (run in places), place or places.get(run))
    return found


def table(items: Sequence[Item], findings: Sequence[Finding]) -> list[str]:
    """The share of contaminated items of each task, as lines of text."""
    rows = []
    for task in dict.fromkeys(item.task for item in items):
        of_task = [finding for item, finding in zip(items, findings, strict=True) if item.task == task]
        num_checked = sum(finding.num_runs > 0 for finding in of_task)
        num_found = sum(finding.num_found > 0 for finding in of_task)
        share = f"{num_found / num_checked:.2%}" if num_checked else ""
        rows.append([task, f"{len(of_task):,}", f"{num_checked:,}", f"{num_found:,}", share])
    return aligned(["task", "items", "checked", "contaminated", "of checked"], rows)


def _lines(items: Sequence[Item], findings: Sequence[Finding]) -> Iterator[str]:
    for item, finding in zip(items, findings, strict=True):
        if finding.place is not None:
            text = max(item.texts, key=len)[:_MAX_SHOWN]
            record = {"task": item.task, "id": item.id, "runs": finding.num_runs, "found": finding.num_found}
            yield json.dumps({**record, **finding.place._asdict(), "text": text}, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(
            ContaminationCommand, argv, prog="python -m evaluation.contamination", description=__doc__
        )
        items = read_items(command.sets)
        findings = check(command.data, items, split=command.split, ngram=command.ngram, num_workers=command.num_workers)
        if command.out is not None:
            publish.write_text(command.out, "".join(_lines(items, findings)))
    except (OSError, ValueError, WorkerDiedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(items, findings)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
