"""Loads to try the autoscaler with, made from a shape and a seeded stream of chance: requests a second over time, as a trace."""

from collections.abc import Callable
from math import exp, pi, sin
from random import Random

from fleetctl.core.trace import Bin

Shape = Callable[[float], float]


def flat(level: float) -> Shape:
    return lambda at: level


def step(low: float, high: float, begin: float, end: float) -> Shape:
    return lambda at: high if begin <= at < end else low


def spike(low: float, high: float, every: float, lasting: float) -> Shape:
    return lambda at: high if at % every > every - lasting else low


def sawtooth(low: float, high: float, period: float) -> Shape:
    return lambda at: low + (high - low) * (at % period) / period


def waves(low: float, high: float, period: float) -> Shape:
    return lambda at: low + (high - low) * (1 - sin(2 * pi * at / period + pi / 2)) / 2


def surge(low: float, high: float, begin: float, rise: float) -> Shape:
    """From nearly nothing to `high`, for good, within `rise` seconds."""
    return lambda at: low + (high - low) * min(1.0, max(0.0, (at - begin) / rise))


def wander(level: float, chance: Random, hours: float, spread: float) -> Shape:
    """A random walk in the logarithm of the load, drawn back to its level: one move a minute."""
    steps, value = [0.0], 0.0
    for _ in range(int(hours * 60) + 2):
        value = 0.98 * value + chance.gauss(0.0, spread)
        steps.append(value)
    return lambda at: level * exp(steps[int(at / 60)])


def trace(shape: Shape, *, hours: float, bin_seconds: float = 60.0, chance: Random | None = None) -> list[Bin]:
    """The shape as counts of requests, with the spread of independent requests where there is chance."""
    bins = []
    for number in range(int(hours * 3600 / bin_seconds)):
        begin = number * bin_seconds
        count = shape(begin + bin_seconds / 2) * bin_seconds
        if chance is not None:
            count = float(max(0, round(chance.gauss(count, count**0.5))))
        bins.append(Bin(begin, begin + bin_seconds, count))
    return bins


def family(seed: int, hours: float = 4.0) -> dict[str, list[Bin]]:
    """One load of every kind, its size, speed and noise drawn by chance."""
    chance = Random(seed)

    def level() -> float:
        return float(10.0 ** chance.uniform(0.0, 1.6))

    def times() -> float:
        return chance.uniform(1.5, 6.0)

    def period() -> float:
        return chance.uniform(900.0, 5400.0)

    low = level()
    shapes = {
        "flat": flat(level()),
        "step": step(low, low * times(), hours * 1000, hours * 2500),
        "spike": spike(low, low * times(), period(), chance.uniform(60.0, 300.0)),
        "sawtooth": sawtooth(low, low * times(), period()),
        "waves": waves(low, low * times(), period()),
        "surge": surge(0.3, level(), 900.0, chance.uniform(60.0, 900.0)),
        "wander": wander(level(), chance, hours, chance.uniform(0.03, 0.2)),
    }
    return {name: trace(shape, hours=hours, bin_seconds=chance.choice([10.0, 30.0, 60.0]), chance=chance) for name, shape in shapes.items()}
