"""Numbers over time as blocks on a terminal. Pure: numbers in, lines out."""

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"


def squeeze(values: Sequence[float], columns: int) -> list[float]:
    """The largest value of each column, so that no peak is lost."""
    if len(values) <= columns:
        return list(values)
    edges = [len(values) * column // columns for column in range(columns + 1)]
    return [max(values[begin:end]) for begin, end in pairwise(edges)]


def bars(values: Sequence[float], *, columns: int, height: int, top: float) -> list[str]:
    """A line for each row of the chart, the highest first; `top`: the value that a full column stands for."""
    eighths = [round(8 * height * min(value, top) / top) if top > 0 else 0 for value in squeeze(values, columns)]
    # What is there at all is seen.
    eighths = [max(1, one) if value > 0 else 0 for one, value in zip(eighths, squeeze(values, columns), strict=True)]
    return ["".join(BLOCKS[max(0, min(8, one - 8 * row))] for one in eighths) for row in range(height - 1, -1, -1)]


def chart(title: str, values: Sequence[float], *, columns: int, height: int, top: float) -> list[str]:
    """The bars with a title before them and a scale at their left."""
    labels = [f"{top:g}" if row == 0 else "0" if row == height - 1 else "" for row in range(height)]
    width = max(len(label) for label in labels)
    rows = bars(values, columns=max(10, columns - width - 1), height=height, top=top)
    return [title, *(f"{label:>{width}} {row}".rstrip() for label, row in zip(labels, rows, strict=True))]
