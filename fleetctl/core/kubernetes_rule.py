"""The rule of the Kubernetes horizontal autoscaler with its defaults, to compare ours with in `simulate`.

Written from its documentation: desired = ceil(replicas * value / target), nothing within a tolerance of 10 %, asked every 15 s;
replicas that are not ready count as idle when growing, those without a value as idle when growing and as on target when shrinking;
at most the larger of 4 and 100 % more in 15 s; when shrinking, the largest recommendation of the last 5 minutes.
"""

from collections import deque
from dataclasses import dataclass
from math import ceil

SYNC_SECONDS = 15.0
TOLERANCE = 0.1
DOWN_WINDOW_SECONDS = 300.0
UP_PERIOD_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PodMetrics:
    """`mean`: of the `measured` pods, in percent; the others are `unready` or, ready but without a value, `missing`."""

    mean: float
    measured: int
    unready: int
    missing: int


def recommend(pods: PodMetrics, replicas: int, target: float) -> int:
    """The replicas that the metric asks for."""
    if not pods.measured:
        return replicas
    ratio = pods.mean / target
    if not pods.missing and not (pods.unready and ratio > 1):
        return replicas if abs(ratio - 1) <= TOLERANCE else _ceil(ratio * pods.measured)
    total, counted = pods.mean * pods.measured, pods.measured + pods.missing
    if ratio < 1:
        total += pods.missing * max(100.0, target)
    elif ratio > 1:
        counted += pods.unready
    filled = total / counted / target
    if abs(filled - 1) <= TOLERANCE or (ratio < 1) != (filled < 1):
        return replicas
    wanted = _ceil(filled * counted)
    return replicas if (filled < 1 and wanted > replicas) or (filled > 1 and wanted < replicas) else wanted


class KubernetesRule:
    """What the controller keeps between two syncs: its recommendations and its growths."""

    def __init__(self, *, target: float, least: int, most: int, now: float, replicas: int) -> None:
        self.target, self.least, self.most = target, least, most
        self._recommended: deque[tuple[float, int]] = deque([(now, replicas)])
        self._growths: deque[tuple[float, int]] = deque()

    def decide(self, now: float, pods: PodMetrics, replicas: int) -> int:
        """The size after this sync."""
        wanted = recommend(pods, replicas, self.target)
        while self._recommended and self._recommended[0][0] <= now - DOWN_WINDOW_SECONDS:
            self._recommended.popleft()
        self._recommended.append((now, wanted))
        if wanted < replicas:
            wanted = min(replicas, max(one for _, one in self._recommended))
        size = max(self.least, min(self.most, wanted))
        if size > replicas:
            size = max(replicas, min(size, self._fastest(now, replicas)))
            self._growths.append((now, size - replicas))
        return size

    def _fastest(self, now: float, replicas: int) -> int:
        while self._growths and self._growths[0][0] <= now - UP_PERIOD_SECONDS:
            self._growths.popleft()
        before = replicas - sum(delta for _, delta in self._growths)
        return max(before + 4, 2 * before)


def _ceil(replicas: float) -> int:
    return ceil(replicas - 1e-9)
