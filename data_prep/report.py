"""What the preparation tells its user at the end: a table, the bad lines, and the next command."""

from pathlib import Path

from data_prep.merge import BAD_LINES_FILE, Merged

_COLUMNS = ("split", "documents", "tokens", "shards", "MB text", "bytes/token")


def table(merged: Merged, elapsed_s: float) -> str:
    """Counts per split, and the speed of the whole."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for split, counts in merged.splits.items():
        rows.append(
            (
                split,
                f"{counts.num_documents:,}",
                f"{counts.num_tokens:,}",
                f"{len(merged.shards[split]):,}",
                f"{counts.text_bytes / 1e6:,.2f}",
                f"{counts.text_bytes / max(counts.num_tokens, 1):.2f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    text_megabytes = sum(counts.text_bytes for counts in merged.splits.values()) / 1e6
    return "\n".join([*lines, f"{elapsed_s:.1f} s, {text_megabytes / elapsed_s:.2f} MB/s"])


def bad_lines(merged: Merged, folder: Path) -> str:
    """Bad lines by reason; an empty string if there are none."""
    if not merged.bad_lines.counts:
        return ""
    total = merged.bad_lines.counts.total()
    heading = f"{total:,} bad lines were left out; all are listed in {folder / BAD_LINES_FILE}"
    return "\n  ".join([heading, *merged.bad_lines.by_reason()])


def next_command(folder: Path) -> str:
    """How to train on the result."""
    return f"next: torchrun --nproc_per_node=8 train/pretrain.py --data.paths {folder}"
