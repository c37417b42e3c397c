"""Load, size, bounds and decisions over time: as a terminal chart and as a picture. Pure: samples and decisions in, lines out."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from xml.sax.saxutils import escape

from fleetctl.cli.chart import chart
from fleetctl.cli.render import clean, moment

Object = Mapping[str, Any]  # Any: an object of the control API

ROWS = 6
WIDTH, HEIGHT, LEFT, TOP, GAP = 900, 170, 60, 30, 40


def chart_lines(fleet: str, samples: Sequence[Object], decisions: Sequence[Object], columns: int) -> list[str]:
    """The load per agent, the agents, and below them where decisions were made: ^ growth, v shrinkage."""
    sizes = [float(one["replicas"]) for one in samples]
    most = max([*sizes, *(float(one["target_replicas"]) for one in samples)])
    last = samples[-1]
    values = [float(one["value"] or 0.0) for one in samples]
    metric = next((str(one["metric"]) for one in reversed(samples) if one["metric"]), "load")
    target = next((one["target"] for one in reversed(samples) if one["target"] is not None), None)
    aimed = "" if target is None else f", aimed at {target:g}"
    lines = [f"{clean(fleet)}, {moment(samples[0]['at'])} to {moment(last['at'])}", ""]
    lines += chart(f"{clean(metric)} per agent{aimed}", values, columns=columns, height=ROWS, top=float(f"{max(*values, 1e-9):.3g}"))
    bounds = f"agents, between {last['min_replicas']} and {last['max_replicas']}"
    lines += ["", *chart(bounds, sizes, columns=columns, height=ROWS, top=most or 1.0)]
    return [*lines, _marks(samples, decisions, f"{most:g}", columns)]


def _marks(samples: Sequence[Object], decisions: Sequence[Object], label: str, columns: int) -> str:
    """A mark below the column in which a decision falls; as wide as the bars above it."""
    indent = len(label) + 1
    width = min(len(samples), max(10, columns - indent))
    times, marks = [_seconds(one["at"]) for one in samples], [" "] * width
    for one in decisions:
        at = _seconds(one["at"])
        if times[0] <= at <= times[-1]:
            index = sum(time <= at for time in times) - 1
            marks[min(width - 1, index * width // len(times))] = "^" if one["action"] == "scale_up" else "v"
    return (" " * indent + "".join(marks)).rstrip()


def svg(fleet: str, samples: Sequence[Object], decisions: Sequence[Object]) -> str:
    """A picture of the same; a decision's reason shows where the pointer rests on its mark."""
    times = [_seconds(one["at"]) for one in samples]
    begin, length = times[0], max(1e-9, times[-1] - times[0])

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (at - begin) / length

    values = [float(one["value"] or 0.0) for one in samples]
    sizes = [float(one["replicas"]) for one in samples]
    highest = max(*values, 1e-9) * 1.1
    most = max([*sizes, float(samples[-1]["target_replicas"]), 1.0]) * 1.1
    metric = next((str(one["metric"]) for one in reversed(samples) if one["metric"]), "load")
    lower = TOP + HEIGHT + GAP

    def y(value: float, top: float, base: int) -> float:
        return base + HEIGHT - HEIGHT * min(value, top) / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{lower + HEIGHT + GAP}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 18, f"{fleet}: {metric} per agent"),
        _text(
            LEFT,
            lower - 12,
            f"agents, {samples[-1]['min_replicas']} to {samples[-1]['max_replicas']}",
        ),
        _text(LEFT, lower + HEIGHT + 18, f"{moment(samples[0]['at'])} to {moment(samples[-1]['at'])}"),
        *_axis(TOP, highest),
        *_axis(lower, most),
    ]
    target = next((one["target"] for one in reversed(samples) if one["target"] is not None), None)
    if target is not None:
        parts.append(_line([(LEFT, y(target, highest, TOP)), (WIDTH - 10, y(target, highest, TOP))], "#c33", dash="4 4"))
    parts.append(_line([(x(at), y(value, highest, TOP)) for at, value in zip(times, values, strict=True)], "#357"))
    steps = []
    for index, (at, size) in enumerate(zip(times, sizes, strict=True)):
        if index:
            steps.append((x(at), y(sizes[index - 1], most, lower)))
        steps.append((x(at), y(size, most, lower)))
    parts.append(_line(steps, "#292"))
    for one in decisions:
        at = _seconds(one["at"])
        if begin <= at <= times[-1]:
            where = y(float(one["target_replicas"]), most, lower)
            told = escape(f"{one['current_replicas']} -> {one['target_replicas']}: {clean(one['reason'])}")
            parts.append(f'<circle cx="{x(at):.1f}" cy="{where:.1f}" r="4" fill="#d80"><title>{told}</title></circle>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(base: int, top: float) -> list[str]:
    frame = f'<rect x="{LEFT}" y="{base}" width="{WIDTH - LEFT - 10}" height="{HEIGHT}" fill="none" stroke="#ccc"/>'
    return [frame, _text(4, base + 10, f"{top:.3g}"), _text(4, base + HEIGHT, "0")]


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(clean(text))}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline fill="none" stroke="{colour}"{dashed} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _seconds(at: object) -> float:
    return datetime.fromisoformat(str(at)).timestamp()
