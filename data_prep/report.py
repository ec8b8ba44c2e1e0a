"""What the preparation tells its user at the end: a table, and the next command."""

from pathlib import Path
from typing import Any

from data_prep import mixture_file
from data_prep.looking.text_table import aligned

_COLUMNS = ("source", "split", "documents", "tokens", "MB text", "bytes/token", "dropped", "duplicates", "bad")


def table(summary: dict[str, Any], elapsed_s: float) -> str:
    """Counts per source and split, and the speed of the whole."""
    rows: list[tuple[str, ...]] = []
    read_bytes = 0
    for name, source in summary["sources"].items():
        read_bytes += source["read_bytes"]
        duplicates = source["exact_duplicates"]["documents"] + source["near_duplicates"]["documents"]
        lost = (f"{sum(source['dropped'].values()):,}", f"{duplicates:,}", f"{sum(source['bad'].values()):,}")
        for split, counts in source["splits"].items():
            rows.append(
                (
                    name,
                    split,
                    f"{counts['documents']:,}",
                    f"{counts['tokens']:,}",
                    f"{counts['text_bytes'] / 1e6:,.2f}",
                    f"{counts['text_bytes'] / max(counts['tokens'], 1):.2f}",
                    *lost,
                )
            )
            name, lost = "", ("", "", "")
    return "\n".join([*aligned(_COLUMNS, rows), f"{elapsed_s:.1f} s, {read_bytes / 1e6 / elapsed_s:.2f} MB/s"])


def next_command(folder: Path) -> str:
    """How to train on the result."""
    command = f"next: torchrun --nproc_per_node=8 train/pretrain.py --data.paths {folder}"
    if (folder / mixture_file.MIXTURE_FILE).is_file():
        command += f"\nwith the proposed mixture: put {folder / mixture_file.MIXTURE_FILE} into the run's TOML file"
    return f"{command}\nlook: {folder / 'report.html'}, python -m data_prep inspect {folder}"
