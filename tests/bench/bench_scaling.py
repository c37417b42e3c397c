"""What a scaling decision and a simulated day cost, and how the rule does beside the Kubernetes rule on loads made by chance.

Run with `python -m tests.bench.bench_scaling [TRACE.csv ...]`; traces that are given are replayed too. Targets: a decision over 100
replicas within 100 us, a simulated day at 30 s ticks within 0.2 s, an hour well under a second.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fleetctl.core import simulation, trace
from fleetctl.core.demand import Sample, cpu, memory, occupancy, read
from fleetctl.core.memory import Memory, started
from fleetctl.core.plant import PlantSpec
from fleetctl.core.policy import Observation, Policy
from fleetctl.core.scaling import evaluate
from tests.core import loads
from tests.core.test_simulation import both, scene

REPLICAS, ROUNDS = 100, 2000


def best(work: Callable[[], object], times: int, rounds: int = 7) -> float:
    """Seconds of CPU a call, of the best round: other work on the machine only ever adds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began) / times)
    return min(found)


def decision() -> None:
    samples = [Sample(at=0.0, ready_at=-60.0, values={"cpu": 60.0 + n % 20, "memory": 50.0, "occupancy": 70.0}) for n in range(REPLICAS)]
    for name, targets in (("cpu", (cpu(),)), ("cpu, memory, occupancy", (cpu(), memory(), occupancy()))):
        policy, known = Policy(targets=targets), replace(started(-1000.0, REPLICAS), tick_at=-30.0, last_wish=REPLICAS)
        readings = read(policy.targets, samples, now=0.0, window_seconds=15.0)
        seen = Observation(now=0.0, replicas=REPLICAS, readings=readings)

        def whole(policy: Policy = policy, known: Memory = known) -> None:
            found = read(policy.targets, samples, now=0.0, window_seconds=15.0)
            evaluate(policy, Observation(now=0.0, replicas=REPLICAS, readings=found), known)

        def alone(policy: Policy = policy, known: Memory = known, seen: Observation = seen) -> None:
            evaluate(policy, seen, known)

        print(f"{name}: evaluate {1e6 * best(alone, ROUNDS):.0f} us, with reading {REPLICAS} samples {1e6 * best(whole, ROUNDS):.0f} us")


def day() -> None:
    bins = loads.trace(loads.waves(2.0, 20.0, 4 * 3600.0), hours=24.0)
    for step in (30.0, 5.0):
        made = simulation.Scene(
            plant=PlantSpec(),
            loads=trace.steps(bins, step),
            step_seconds=step,
            start=3,
            target=70.0,
            least=1,
            most=200,
            objective_seconds=1.0,
        )
        policy = Policy(max_replicas=200, targets=(occupancy(),), metrics_interval_seconds=step)

        def ours(made: simulation.Scene = made, policy: Policy = policy) -> None:
            simulation.replay(made, simulation.Ours(policy, made))

        print(f"a day, a sample every {step:g} s: {best(ours, 1, 3):.3f} s, an hour {best(ours, 1, 3) / 24:.4f} s")


def compare(name: str, traces: Sequence[Sequence[trace.Bin]], metric: str) -> None:
    found = [both(scene(bins, metric)) for bins in traces]
    ours, theirs = [one for one, _ in found], [one for _, one in found]

    def total(reports: Sequence[simulation.Report], key: str) -> float:
        return sum(float(getattr(one, key)) for one in reports)

    worse = sum(one.over_objective > other.over_objective + 1e-6 for one, other in found)
    print(
        f"{name:10} {metric:9} over {100 * total(ours, 'over_objective') / len(found):.3f}% against "
        f"{100 * total(theirs, 'over_objective') / len(found):.3f}%, worse on {worse} of {len(found)}, replica-hours "
        f"x{total(ours, 'replica_hours') / total(theirs, 'replica_hours'):.3f}, "
        f"reversals {total(ours, 'reversals'):.0f} against {total(theirs, 'reversals'):.0f}"
    )


def main() -> None:
    decision()
    day()
    families = [loads.family(seed) for seed in range(300, 306)]
    for metric in ("occupancy", "cpu"):
        for kind in families[0]:
            compare(kind, [family[kind] for family in families], metric)
        compare("all", [bins for family in families for bins in family.values()], metric)
        for path in sys.argv[1:]:
            bins = trace.parse(Path(path).read_text().splitlines(), path)
            for factor in (1.0, 10.0):
                scaled = [replace(one, requests=factor * one.requests) for one in bins]
                compare(f"{Path(path).stem[:6]} x{factor:g}", [scaled], metric)


if __name__ == "__main__":
    main()
