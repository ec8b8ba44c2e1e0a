"""Draws docs/data-order.png: the generations of one source as bars, from a real order.

python docs/draw_data_order.py
"""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from data_prep.shards import HEADER_BYTES
from resume import state as states
from resume.order import Order
from resume.state import DataState

OUTPUT = Path(__file__).parent / "data-order.png"
COLOURS = {"old 1": "#1f4e79", "old 2": "#7fa7d1", "new": "#d9822b"}
SAMPLE_TOKENS, BATCH = 8, 20


def history() -> tuple[DataState, dict[str, str]]:
    """Two files; one is appended after 18 steps, one removed after 30; a skip; the end lies in the second epoch."""
    files = {
        f"{i:032x}-{i:032x}-{HEADER_BYTES + 2 * (n * SAMPLE_TOKENS + 1)}": n for i, n in ((1, 500), (2, 400), (3, 300))
    }
    names = dict(zip(files, COLOURS, strict=True))
    first, second, new = files
    state = states.start(
        {"all": [first, second]},
        seed=3407,
        sequence_length=SAMPLE_TOKENS,
        batch_sequences=BATCH,
        tokenizer_digest="",
        eos_id=0,
    )
    state = train(states.append(train(state, 18), {"all": [new]}), 12)
    state = states.skip(state, 3)
    state = train(states.remove(train(state, 6), [second]), 25)
    return state, names


def train(state: DataState, num_steps: int) -> DataState:
    """The state some steps later."""
    for _ in range(num_steps):
        state = state.advance(BATCH, BATCH * SAMPLE_TOKENS)
    return state


def draw(state: DataState, names: dict[str, str], output: Path) -> None:
    """One bar for each generation: what it draws in full colour, what it hands on to the next one pale."""
    order = Order(state)
    order.extend(state.position + 150)
    generations = order.chain("all").generations
    labels = ["start: two files", "append: what is left of both + the new file", "remove: what is left, without a file"]
    labels += [f"epoch {generation.epoch + 1}: all live files" for generation in generations[len(labels) :]]
    figure = Figure(figsize=(10, 0.95 * len(generations) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, (generation, label) in enumerate(zip(generations, labels, strict=True)):
        positions = np.arange(generation.n)
        files, _ = resolve_in(order, row, positions)
        pixels = np.array([to_rgb(COLOURS[names[order.file_ids[file]]]) for file in files])
        passed = (positions < generation.cursor) & (generation.first_draw + positions < state.position)
        for low, high in generation.skipped:
            passed[low:high] = False
        pixels[~passed] = 0.72 + 0.28 * pixels[~passed]
        extent = (generation.first_draw, generation.first_draw + generation.n, row + 0.36, row - 0.36)
        axes.imshow(pixels[None], aspect="auto", interpolation="nearest", extent=extent)
        axes.text(generation.first_draw + 4, row - 0.41, label, va="bottom", fontsize=9)
        for low, high in generation.skipped:
            middle = generation.first_draw + (low + high) / 2
            axes.annotate("skipped", (middle, row + 0.36), (middle, row + 0.62), ha="center", va="top", fontsize=8,
                          arrowprops={"arrowstyle": "-", "linewidth": 0.6})  # fmt: skip
    axes.axvline(state.position, color="#c0504d", linewidth=1.5)
    axes.text(state.position + 5, len(generations) - 0.42, "cursor", color="#c0504d", fontsize=9, va="bottom")
    for name, colour in COLOURS.items():
        axes.plot([], [], "s", color=colour, label=f"{name} file" if name == "new" else name.replace("old ", "file "))
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    axes.set_xlim(0, max(g.first_draw + g.n for g in generations) + 10)
    axes.set_ylim(len(generations) - 0.3, -0.75)
    axes.set_yticks([])
    axes.set_xlabel("position in the order, samples")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.savefig(output, dpi=110)


def resolve_in(order: Order, index: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Files and groups of all positions of one generation, drawn there or not."""
    generation = order.chain("all").generations[index]
    elements = generation.elements(positions)
    is_new = elements >= generation.num_rest
    files, groups = np.empty_like(positions), np.empty_like(positions)
    files[is_new], groups[is_new] = generation.file_groups(elements[is_new])
    if not is_new.all():
        files[~is_new], groups[~is_new] = resolve_in(order, index - 1, generation.rest_positions(elements[~is_new]))
    return files, groups


if __name__ == "__main__":
    draw(*history(), OUTPUT)
    print(OUTPUT)
