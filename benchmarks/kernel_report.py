"""What the reader of a kernel benchmark sees: tables per operator, records for JSON, and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_goals import Ceilings, against, flops_per_s, of_copy, of_matmul, seconds
from benchmarks.kernel_operator import BACKWARD, BOTH, Case, label
from benchmarks.kernel_rows import OURS, OURS_AGAIN, OURS_BY_AUTOGRAD, OURS_COMPILED, Cell, Row
from benchmarks.table import Table
from benchmarks.timing import is_noisy

_MIB = 1 << 20
_NOTE_WIDTH = 28
_PICTURED_ROWS = 16_384
_OUR_COLOURS = {OURS: "#1f4e79", OURS_COMPILED: "#6f9bc8", OURS_BY_AUTOGRAD: "#a9c4e0"}
_COLOURS = ("#7f7f7f", "#c55a11", "#548235", "#bf9000", "#7030a0", "#a02c2c", "#2c8c8c", "#c08aa8", "#4d4d4d")

Value = str | float | None


def operator_tables(rows: Sequence[Row], ceilings: Ceilings) -> Iterable[Table]:
    """Two tables per operator: ours in figures, and everybody's times beside it."""
    for name in dict.fromkeys(row.case.operator.name for row in rows):
        of_one = [row for row in rows if row.case.operator.name == name]
        yield _ours_table(name, of_one, ceilings)
        yield _peers_table(name, of_one)


def _ours_table(name: str, rows: Sequence[Row], ceilings: Ceilings) -> Table:
    with_matmul = any(row.flops for row in rows)
    speed = ["TFLOP/s", "of matmul"] if with_matmul else ["GB/s", "of copy"]
    columns = ["shape", "phase", "us", "us launched", *speed, "extra MiB", "kept MiB", "launches", "by"]
    columns += ["error", "eager's", "of", "equal bits", "compiled", "itself"]
    noisy = any((itself := against(row, OURS_AGAIN)) is not None and is_noisy(itself) for row in rows)
    title = f"{name}: ours{'   NOISY: the same kernel differs from itself by more than 1%' if noisy else ''}"
    note = "compiled: time inside torch.compile(fullgraph=True) over time alone; itself: the same kernel once more"
    return Table(title, columns, [_ours_line(row, ceilings) for row in rows], note)


def _ours_line(row: Row, ceilings: Ceilings) -> list[Value]:
    cell = row.cells.get(OURS, Cell("error: no result"))
    duration_s = seconds(cell)
    verdict = cell.verdict
    errors: list[Value] = ["", "", ""] if verdict is None else [_small(verdict.error), _small(verdict.eager_error)]
    errors += [] if verdict is None else [verdict.worst]
    where: list[Value] = [label(row.case.sizes.shape), row.phase]
    bits = "" if cell.equal_bits is None else "yes" if cell.equal_bits else "NO"
    if duration_s is None:
        return [*where, _short(cell.note) or None, *[""] * 7, *errors, bits, "", ""]
    if row.flops is not None:
        speed: list[Value] = [row.flops / duration_s / 1e12, _percent(of_matmul(row, ceilings))]
    else:
        speed = [(row.moved_bytes or 0) / duration_s / 1e9, _percent(of_copy(row, ceilings))]
    launched_s = cell.seconds_with_launches
    extra = None if cell.peak_bytes is None else cell.peak_bytes / _MIB
    kept = "" if cell.kept_bytes is None else cell.kept_bytes / _MIB
    figures: list[Value] = [1e6 * duration_s, None if launched_s is None else 1e6 * launched_s, *speed, extra, kept]
    compiled, itself = against(row, OURS_COMPILED), against(row, OURS_AGAIN)
    in_compile = _short(row.cells.get(OURS_COMPILED, Cell()).note) if compiled is None else f"{compiled.median:.3f}"
    return [
        *where, *figures, cell.launches, cell.how or "", *errors, bits, in_compile or None,
        None if itself is None else f"{itself.median:.3f}",
    ]  # fmt: skip


def _peers_table(name: str, rows: Sequence[Row]) -> Table:
    shown = (OURS, OURS_AGAIN, OURS_COMPILED)
    peers = [p for p in dict.fromkeys(name for row in rows for name in row.cells) if p not in shown]
    lines = [
        [label(row.case.sizes.shape), row.phase, _time_or_note(row.cells.get(OURS)), *(_versus(row, p) for p in peers)]
        for row in rows
    ]
    note = "us, and times ours: median of the ratios of the rounds (20th to 80th percentile); * without CUDA graph"
    return Table(f"{name}: beside others", ["shape", "phase", OURS, *peers], lines, note)


def _versus(row: Row, peer: str) -> str:
    cell = row.cells.get(peer)
    found = against(row, peer)
    return _time_or_note(cell) + ("" if found is None else f" = {found}x")


def _time_or_note(cell: Cell | None) -> str:
    if cell is None:
        return ""
    duration_s = seconds(cell)
    if duration_s is None:
        return _short(cell.note) or "not measured"
    return f"{1e6 * duration_s:,.1f}{'*' if cell.how == 'events' else ''}"


def errors(rows: Sequence[Row]) -> list[str]:
    """Errors in full, for which a table has no room; one line for all phases."""
    found: dict[str, str] = {}
    for row in rows:
        for name, cell in row.cells.items():
            if cell.note.startswith("error"):
                found.setdefault(f"{row.case.name}, {name}", cell.note)
    return [f"{where}: {note}" for where, note in found.items()]


def correctness_table(cells: Sequence[tuple[Case, str, Cell]]) -> Table:
    """Errors of ours alone, for a machine whose speeds are not measured."""
    lines: list[list[Value]] = []
    for case, dtype, cell in cells:
        verdict = cell.verdict
        errors: list[Value] = ["", "", ""]
        if verdict is not None:
            errors = [_small(verdict.error), _small(verdict.eager_error), verdict.worst]
        bits = "" if cell.equal_bits is None else "yes" if cell.equal_bits else "NO"
        lines.append([case.operator.name, label(case.sizes.shape), dtype, *errors, bits, cell.note or "right"])
    columns = ["operator", "shape", "dtype", "error", "eager's", "of", "equal bits", "verdict"]
    note = "largest error over the largest true value, of the result that comes nearest to its budget"
    return Table("Errors against fp64", columns, lines, note)


def records(rows: Sequence[Row], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Everything that was measured, for JSON."""
    return [
        {
            "operator": row.case.operator.name,
            "shape": dict(row.case.sizes.shape),
            "phase": row.phase,
            "bytes": row.moved_bytes,
            "flops": row.flops,
            "copy_bytes_per_s": None if row.moved_bytes is None else ceilings.copy.at(row.moved_bytes),
            "is_noisy": None if (itself := against(row, OURS_AGAIN)) is None else is_noisy(itself),
            "providers": {name: _record(row, name, cell, ceilings) for name, cell in row.cells.items()},
        }
        for row in rows
    ]


def _record(row: Row, name: str, cell: Cell, ceilings: Ceilings) -> dict[str, Any]:
    verdict, duration_s, versus = cell.verdict, seconds(cell), against(row, name)
    launched_s = cell.seconds_with_launches
    return {
        "note": cell.note,
        "us": None if duration_s is None else 1e6 * duration_s,
        "us_with_launches": None if launched_s is None else 1e6 * launched_s,
        "timed_by": cell.how,
        "of_copy": of_copy(row, ceilings, name),
        "of_matmul": of_matmul(row, ceilings, name),
        "times_ours": None if versus is None else [versus.p20, versus.median, versus.p80],
        "peak_extra_bytes": cell.peak_bytes,
        "kept_bytes": cell.kept_bytes,
        "launches": cell.launches,
        "recompilations": cell.recompiles,
        "equal_bits": cell.equal_bits,
        "errors": None if verdict is None else dict(verdict.errors),
        "errors_of_eager": None if verdict is None else dict(verdict.eager),
    }


def draw(rows: Sequence[Row], ceilings: Ceilings, title: str, path: Path) -> None:
    """A bar per implementation at the first shape of every operator and phase, the ceiling as a line above them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictured = _pictured(rows)
    by_bytes = [row for row in pictured if row.moved_bytes is not None]
    by_flops = [row for row in pictured if row.flops is not None]
    panels = {unit: of_one for unit, of_one in (("GB/s", by_bytes), ("TFLOP/s", by_flops)) if of_one}
    if not panels:
        return
    figure = Figure(figsize=(4 + 1.1 * len(pictured), 5), layout="constrained")
    FigureCanvasAgg(figure)
    widths = [len(of_one) + 0.5 for of_one in panels.values()]
    colours = _colours(pictured)
    all_axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, (unit, of_one) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, unit, of_one, ceilings, colours)
    entries = {text: h for axes in all_axes for h, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=8, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Any, unit: str, rows: Sequence[Row], ceilings: Ceilings, colours: Mapping[str, str]) -> None:
    for place, row in enumerate(rows):
        ceiling = ceilings.matmul_flops / 1e12 if unit == "TFLOP/s" else ceilings.copy.at(row.moved_bytes or 0) / 1e9
        speeds = {name: value for name in row.cells if (value := _speed(row, name, unit)) is not None}
        speeds.pop(OURS_AGAIN, None)
        width = 0.8 / max(1, len(speeds))
        for number, (name, speed) in enumerate(speeds.items()):
            axes.bar(place - 0.4 + (number + 0.5) * width, speed, width, color=colours[name], label=name)
        axes.hlines(ceiling, place - 0.45, place + 0.45, color="black", linewidth=1.5, label="measured ceiling")
    names = [f"{row.case.operator.name}\n{row.phase}\n{label(row.case.sizes.shape)}".replace(" ", "\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylabel(f"{unit}, of what is needed at least")
    axes.set_ylim(bottom=0)


def _pictured(rows: Sequence[Row]) -> list[Row]:
    """Forward and backward apart where they were measured apart."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.phase == BOTH and BACKWARD in row.case.sizes.phases:
            continue
        if row.case.sizes.shape["M"] >= _PICTURED_ROWS and seconds(row.cells.get(OURS)) is not None:
            first.setdefault((row.case.operator.name, row.phase), row)
    return list(first.values())


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    others = dict.fromkeys(name for row in rows for name in row.cells if name not in _OUR_COLOURS)
    return _OUR_COLOURS | {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(others)}


def _speed(row: Row, name: str, unit: str) -> float | None:
    flops, duration_s = flops_per_s(row, name), seconds(row.cells.get(name))
    if unit == "TFLOP/s":
        return None if flops is None else flops / 1e12
    return None if duration_s is None else (row.moved_bytes or 0) / duration_s / 1e9


def _short(note: str) -> str:
    return note if len(note) <= _NOTE_WIDTH else f"{note[: _NOTE_WIDTH - 3]}..."


def _small(error: float) -> str:
    return f"{error:.1e}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
