"""What `python -m resume` shows: a run's data as plain values, and those values as tables."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resume import requests
from resume.audit import FileAudit, audit_file, epochs_of_file
from resume.chain import Fate, Ints
from resume.ledger import Ledger
from resume.mixture import BLOCK
from resume.order import Order
from resume.runs import Run
from resume.state import Append, Batch, Cut, DataState, Event, Remove, Requeue, Reweight, Skip

_MOST_ROWS = 40
_NUMBER = re.compile(r"[\d,.]+( ?(%|s|min|h|d))?")
_FATES = {
    Fate.DRAWN: "waits",
    Fate.SKIPPED: "was skipped, and waits",
    Fate.DROPPED: "was skipped for good",
    Fate.REMOVED: "was removed with its file",
    Fate.ABSENT: "is not part of this epoch",
}


def status(run: Run) -> dict[str, Any]:
    """Where a run stands in its data."""
    state, order = run.state, run.order
    return {
        "run": str(run.folder),
        "checkpoint": run.checkpoint.name,
        "step": state.step,
        "num_steps": run.config["run"]["num_steps"],
        "sample": state.first_sample,
        "sequence_length": state.sequence_length,
        "batch_sequences": state.batch.batch_sequences,
        "group_tokens": state.group_tokens,
        "tokens_seen": state.tokens_seen,
        "skipped_samples": state.num_skipped * state.samples_per_group,
        "sources": _sources(order, state.position),
        "events": [
            {
                "kind": type(e).__name__.lower(),
                "what": describe(e),
                "tokens": e.at * state.group_tokens,
                **dataclasses.asdict(e),
            }
            for e in state.events
        ],
        "pending": [{"number": number, "what": requests.describe(request)} for number, request in run.pending],
        "quarantined": [dataclasses.asdict(entry) for entry in run.ledger.quarantined],
    }


def status_tables(values: dict[str, Any]) -> str:
    """`status` for people."""
    skipped = f", {values['skipped_samples']:,} before it were skipped" if values["skipped_samples"] else ""
    lines = [
        f"{values['run']}: step {values['step']:,} of {values['num_steps']:,}, {values['tokens_seen']:,} tokens "
        f"trained; next is sample {values['sample']:,} ({values['batch_sequences']:,} samples of "
        f"{values['sequence_length']:,} tokens a step){skipped}",
        "",
        *_source_table(values["sources"], _unit(values)),
        "",
        *columns(
            ["event", "at step", "at tokens", "what"],
            [(e["kind"], f"{e['step']:,}", f"{e['tokens']:,}", e["what"]) for e in values["events"]],
        ),
    ]
    if values["quarantined"] or values["pending"]:
        lines.append("")
    lines += [_quarantined(entry) for entry in values["quarantined"]]
    for entry in values["pending"]:
        lines.append(f"request {entry['number']} waits for the run: {entry['what']}")
    return "\n".join(lines)


def plan(state: DataState, num_steps: int, step_s: float | None = None) -> dict[str, Any]:
    """What the order brings up to step `num_steps`, and when each source runs out, if not before then."""
    order = Order(state)
    groups_per_step = state.batch.batch_sequences // state.samples_per_group
    last = state.position + (num_steps - state.step) * groups_per_step
    end = order.extend(last)
    sources = _sources(order, end)
    order.extend(_horizon(order, end))

    def place(position: int, source: str, what: str) -> dict[str, Any]:
        steps_before = (position - state.position) // groups_per_step
        return {
            "source": source,
            "what": what,
            "step": state.step + steps_before + 1,
            "tokens": position * state.group_tokens,
            "in_s": None if step_s is None else steps_before * step_s,
            "is_within_run": position < end or position == end < last,  # what ends the data is part of the run
        }

    coming: list[tuple[int, str, str]] = []
    is_shown = dict.fromkeys(order.sources, True)
    exhausted_after: dict[str, int] = {}
    for happening in sorted(order.happenings, key=lambda happening: happening.position):
        if happening.position >= state.position and is_shown[happening.source]:
            what = f"begins epoch {happening.epoch}"
            if happening.kind == "exhausted":
                what, drawn = "is exhausted", order.drawn_before(happening.position)[happening.source]
                if exhausted_after.get(happening.source) == drawn:
                    continue  # other weights only had it asked once more
                exhausted_after[happening.source] = drawn
            coming.append((happening.position, happening.source, what))
            is_shown[happening.source] = happening.position < end  # of what lies behind the run, the first
    for event in state.events:
        if isinstance(event, Reweight) and event.at > state.position:
            coming.append((event.at, "", f"weights become {describe(event)}"))
    return {
        "from_step": state.step,
        "num_steps": num_steps,
        "step_s": step_s,
        "sequence_length": state.sequence_length,
        "group_tokens": state.group_tokens,
        "data_ends_after_step": state.step + -(-(end - state.position) // groups_per_step) if end < last else None,
        "sources_at_end": sources,
        "coming": [place(*what) for what in sorted(coming, key=lambda c: c[0])],
    }


def plan_tables(values: dict[str, Any]) -> str:
    """`plan` for people."""
    step_s, num_left = values["step_s"], values["num_steps"] - values["from_step"]
    speed = f", {duration(num_left * step_s)} at {step_s:.3g} s a step" if step_s is not None and num_left else ""
    lines = [f"from step {values['from_step']:,} to {values['num_steps']:,}{speed}; at the end:", ""]
    lines += _source_table(values["sources_at_end"], _unit(values))
    if values["data_ends_after_step"] is not None:
        lines += ["", f"THE DATA ENDS after step {values['data_ends_after_step']:,}, before the run does"]
    rows = [
        (
            f"{c['step']:,}",
            f"{c['tokens']:,}",
            "" if c["in_s"] is None else duration(c["in_s"]),
            c["source"],
            c["what"] if c["is_within_run"] else f"{c['what']}, after the run",
        )
        for c in values["coming"]
    ]
    if len(rows) > _MOST_ROWS:
        half = _MOST_ROWS // 2
        rows = [*rows[:half], ("", "", "", "", f"... {len(rows) - 2 * half:,} more: --json ..."), *rows[-half:]]
    table = columns(["at step", "at tokens", "in", "source", "what"], rows) if rows else ["nothing is to come"]
    return "\n".join([*lines, "", *table])


def audit_tables(audits: Sequence[FileAudit], paths: Mapping[str, Path]) -> str:
    """The books of files beside what the order says, and whether they agree."""
    rows = [
        (
            _short_name(audit.file_id, paths),
            audit.source,
            f"{audit.num_samples:,}",
            f"{audit.booked:,}",
            f"{audit.computed:,}",
            f"{audit.quarantined:,}",
            "yes" if audit.agrees else "NO",
        )
        for audit in sorted(audits, key=lambda audit: (audit.source, str(paths.get(audit.file_id, audit.file_id))))
    ]
    heads = ["file", "source", "samples", "trained, by the books", "by the order", "quarantined", "agree"]
    total = sum(audit.booked for audit in audits)
    wrong = sum(not audit.agrees for audit in audits)
    verdict = "the books and the order agree, file by file"
    if wrong:
        verdict = f"in {wrong:,} of {len(audits):,} files the books and the order differ"
    return "\n".join([*columns(heads, rows), "", f"{total:,} samples trained; {verdict}"])


def file_history(order: Order, ledger: Ledger, file_id: str, path: Path | None) -> dict[str, Any]:
    """Which samples of a file were trained, in which epoch, at which step, and whether the books agree."""
    epochs = []
    for epoch in epochs_of_file(order, ledger, file_id):
        lengths, steps = epoch.lengths[epoch.is_applied], epoch.steps[epoch.is_applied]
        first_tokens = epoch.first_tokens[epoch.is_applied]
        epochs.append(
            {
                "epoch": epoch.epoch,
                "trained": [
                    {
                        "sequence_length": length,
                        "samples": (first_tokens[lengths == length] // length).tolist(),
                        "steps": steps[lengths == length].tolist(),
                    }
                    for length in np.unique(lengths).tolist()
                ],
                "not_applied_samples": int((~epoch.is_applied).sum()),
                "waiting_groups": epoch.num_waiting,
                "skipped_groups": epoch.num_skipped,
                "dropped_groups": epoch.num_dropped,
                "removed_groups": epoch.num_removed,
            }
        )
    return {
        **_heading(order, ledger, file_id, path),
        "epochs": epochs,
        "quarantined": [dataclasses.asdict(entry) for entry in ledger.quarantined if entry.file_id == file_id],
    }


def history_tables(values: dict[str, Any]) -> str:
    """`file_history` for people."""
    lines = _heading_lines(values)
    for epoch in values["epochs"]:
        before = len(lines)
        for trained in epoch["trained"]:
            samples, steps = np.array(trained["samples"]), np.array(trained["steps"])
            lines.append(
                f"epoch {epoch['epoch']}: {len(samples):,} samples of {trained['sequence_length']:,} tokens "
                f"trained at steps {steps.min():,} to {steps.max():,}: {ranges(samples)}"
            )
        left = [
            f"{epoch[f'{kind}_groups']:,} {kind}"
            for kind in ("waiting", "skipped", "dropped", "removed")
            if epoch[f"{kind}_groups"]
        ]
        if epoch["not_applied_samples"]:
            lines.append(
                f"epoch {epoch['epoch']}: {epoch['not_applied_samples']:,} samples in steps that were not applied"
            )
        if left:
            lines.append(f"epoch {epoch['epoch']}: of its {_unit(values)} {', '.join(left)}")
        if len(lines) == before:
            lines.append(f"epoch {epoch['epoch']}: not part of it")
    return "\n".join([*lines, *(_quarantined(entry) for entry in values["quarantined"])])


def sample_history(order: Order, ledger: Ledger, file_id: str, path: Path | None, sample: int) -> dict[str, Any]:
    """What became of one sample of the present length in each epoch, whatever length it was trained at."""
    first = sample * order.sequence_length
    last = min(first + order.sequence_length, order.state.num_targets(file_id))
    group = np.array([first // order.state.group_tokens])
    bad = {(e.first_token, e.sequence_length, e.step) for e in ledger.quarantined if e.file_id == file_id}
    epochs = []
    for epoch in epochs_of_file(order, ledger, file_id):
        overlaps = (epoch.first_tokens < last) & (epoch.first_tokens + epoch.lengths > first)
        columns_of = (column[overlaps] for column in (epoch.first_tokens, epoch.lengths, epoch.steps, epoch.is_applied))
        trained = list(zip(*(column.tolist() for column in columns_of), strict=True))
        fate = Fate(int(order.locate(file_id, group, epoch.epoch).fates[0]))
        epochs.append(
            {
                "epoch": epoch.epoch,
                "trained": [
                    {
                        "sample": start // length,
                        "sequence_length": length,
                        "step": step,
                        "is_quarantined": (start, length, step) in bad,
                        "is_applied": is_applied,
                    }
                    for start, length, step, is_applied in trained
                ],
                "otherwise": None if trained else _FATES[fate],
            }
        )
    heading = _heading(order, ledger, file_id, path)
    return {**heading, "sample": sample, "first_token": first, "last_token": last, "epochs": epochs}


def sample_tables(values: dict[str, Any]) -> str:
    """`sample_history` for people."""
    length = values["sequence_length"]
    lines = _heading_lines(values)
    lines.append(f"sample {values['sample']:,}: tokens {values['first_token']:,} to {values['last_token']:,}")
    for epoch in values["epochs"]:
        for trained in epoch["trained"]:
            other = f" as sample {trained['sample']:,} of {trained['sequence_length']:,} tokens"
            applied = "trained" if trained["is_applied"] else "read, NOT APPLIED,"
            lines.append(
                f"epoch {epoch['epoch']}: {'QUARANTINED' if trained['is_quarantined'] else applied} at step "
                f"{trained['step']:,}{other if trained['sequence_length'] != length else ''}"
            )
        if epoch["otherwise"]:
            lines.append(f"epoch {epoch['epoch']}: {epoch['otherwise']}")
    return "\n".join(lines)


def describe(event: Event) -> str:
    """An event in a few words."""
    match event:
        case Append(files=files):
            return ", ".join(f"{len(ids):,} files of {source}" for source, ids in files.items())
        case Remove(file_ids=file_ids):
            return f"{len(file_ids):,} files"
        case Skip(num_groups=num_groups, for_good=for_good):
            return f"{num_groups:,} groups" + (" for good" if for_good else ", to return within the epoch")
        case Requeue():
            return "what was skipped returns"
        case Reweight(weights=weights):
            return " ".join(f"{source}={weight:g}" for source, weight in weights.items())
        case Batch(batch_sequences=sequences, sequence_length=length):
            return f"{sequences:,} samples of {length:,} tokens a step"
        case Cut():
            return "the data ended inside a window"


def duration(seconds: float) -> str:
    """A length of time, as two digits that matter."""
    for unit, unit_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{seconds:.0f} s"


def ranges(numbers: Ints, most: int = 8) -> str:
    """Sorted numbers as ranges, the first few of them: 0-3 7 9-12 ..."""
    if not len(numbers):
        return "none"
    breaks = np.flatnonzero(np.diff(numbers) > 1)
    firsts, lasts = numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, len(numbers) - 1]]
    parts = [
        f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts[:most].tolist(), lasts[:most].tolist(), strict=True)
    ]
    return " ".join(parts) + (f" ... ({len(firsts):,} ranges)" if len(firsts) > most else "")


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of text as aligned lines, numbers set to the right; a column in which no row says anything is left out."""
    by_column = [cells for cells in zip(heads, *rows, strict=True) if len(cells) == 1 or any(cells[1:])]
    aligned = []
    for cells in by_column:
        width = max(map(len, cells))
        is_number = all(_NUMBER.fullmatch(cell) for cell in cells[1:] if cell)
        aligned.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def _sources(order: Order, position: int) -> list[dict[str, Any]]:
    state = order.state
    removed = state.removed
    files, shares, epochs = state.sources, order.shares_at(position), order.progress(position)
    drawn, live = order.drawn_before(position), order.live_groups()
    return [
        {
            "source": source,
            "files": len(files[source]),
            "removed_files": len(removed & set(files[source])),
            "tokens": sum(order.state.num_targets(file_id) for file_id in files[source] if file_id not in removed),
            "groups": live[source],
            "share": shares[source],
            "drawn_groups": drawn[source],
            "epochs": epochs[source],
        }
        for source in order.sources
    ]


def _source_table(sources: Sequence[dict[str, Any]], unit: str) -> list[str]:
    rows = [
        (
            s["source"],
            f"{s['files']:,}",
            f"{s['removed_files']:,}",
            f"{s['tokens']:,}",
            f"{s['groups']:,}",
            f"{s['share']:.2%}",
            f"{s['drawn_groups']:,}",
            f"{s['epochs']:.3f}",
        )
        for s in sources
    ]
    heads = ["source", "files", "removed", "tokens", f"{unit} per epoch", "share", f"{unit} drawn", "epochs"]
    return columns(heads, rows)


def _unit(values: Mapping[str, Any]) -> str:
    """What the order deals out: samples, unless several make a group."""
    return "samples" if values["group_tokens"] == values["sequence_length"] else "groups"


def _heading(order: Order, ledger: Ledger, file_id: str, path: Path | None) -> dict[str, Any]:
    audit = audit_file(order, ledger, file_id)
    return {
        "file_id": file_id,
        "path": None if path is None else str(path),
        "source": audit.source,
        "targets": order.state.num_targets(file_id),
        "groups": order.state.num_groups(file_id),
        "group_tokens": order.state.group_tokens,
        "sequence_length": order.sequence_length,
        "booked": audit.booked,
        "computed": audit.computed,
        "agrees": audit.agrees,
    }


def _heading_lines(values: Mapping[str, Any]) -> list[str]:
    trained = f"{values['booked']:,} samples trained by the books"
    verdict = "as the order says" if values["agrees"] else f"BUT THE ORDER DIFFERS, with {values['computed']:,}"
    return [
        f"{values['path'] or 'place unknown'} ({values['file_id']})",
        f"source {values['source']}: {values['targets']:,} tokens in {values['groups']:,} {_unit(values)}; "
        f"{trained}, {verdict}",
    ]


def _quarantined(entry: Mapping[str, Any]) -> str:
    first, length = entry["first_token"], entry["sequence_length"]
    return (
        f"quarantined: tokens {first:,} to {first + length:,} (sample {first // length:,}) of {entry['file_id']}, at "
        f"step {entry['step']:,}"
    )


def _short_name(file_id: str, paths: Mapping[str, Path]) -> str:
    return "/".join(paths[file_id].parts[-3:]) if file_id in paths else file_id


def _horizon(order: Order, position: int) -> int:
    """A position by which each source that is drawn from has come to the end of its present epoch."""
    shares, epochs, live = order.shares_at(position), order.progress(position), order.live_groups()
    left = [live[s] * (1 - epochs[s] % 1.0) / share for s, share in shares.items() if share]
    return position + int(1.05 * max(left, default=0)) + BLOCK
