"""One measured figure with the floor that was measured beside it, and a table of them."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """`floor`: the same work without fleetctl, in the same run; `ratio` is what the target speaks of, where there is a floor."""

    name: str
    value: float
    unit: str
    target: float
    floor: float | None = None
    at_least: bool = False  # the target is a lower bound
    ratio_is_target: bool = True

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def judged(self) -> float:
        return self.ratio if self.ratio is not None and self.ratio_is_target else self.value

    @property
    def met(self) -> bool:
        return self.judged >= self.target if self.at_least else self.judged <= self.target

    def __str__(self) -> str:
        floor = "" if self.floor is None else f"{self.floor:.3g} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        word, unit = (">=" if self.at_least else "<="), ("x" if self.floor is not None and self.ratio_is_target else f" {self.unit}")
        target = f"{word} {self.target:g}{unit}"
        return f"{self.name:<44} {self.value:>8.3g} {self.unit:<6} {floor:>13} {ratio:>8}  {target:<10} {'met' if self.met else 'MISSED'}"


def table(figures: Iterable[Figure]) -> str:
    header = f"{'':<44} {'figure':>8} {'':<6} {'floor':>13} {'ratio':>8}  {'target':<10}"
    return "\n".join([header, *map(str, figures)])
