"""`simulate`: what the autoscaler would do with a load, before anybody trusts it. Needs no daemon and starts nothing."""

from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import Json
from fleetctl.cli.terminal import emit_json, emit_lines, width
from fleetctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fleetctl.cli.render import Line
    from fleetctl.core.demand import Target
    from fleetctl.core.policy import Policy
    from fleetctl.core.simulation import Report, Scene
    from fleetctl.core.trace import Bin

OURS, KUBERNETES, FIXED = "fleetctl", "kubernetes", "fixed"
PLOT_COLUMNS, PLOT_ROWS = 72, 4
MOST_STEPS = 20_000_000


def simulate(
    trace: Annotated[str, typer.Argument(metavar="TRACE.csv", help="Load: lines `seconds,requests`; - reads standard input")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", metavar="NAME", help="fleetctl, kubernetes, fixed or fixed=N; may be repeated")
    ] = None,
    metric: Annotated[str, typer.Option(help="What both rules look at: occupancy or cpu")] = "occupancy",
    target: Annotated[float, typer.Option(help="Utilization aimed at, in percent")] = 70.0,
    least: Annotated[int, typer.Option("--min", help="Fewest replicas")] = 1,
    most: Annotated[int, typer.Option("--max", help="Most replicas")] = 100,
    start: Annotated[int | None, typer.Option(help="Replicas at the beginning (default: as many as the first load needs)")] = None,
    objective: Annotated[float, typer.Option(metavar="SECONDS", help="A request should not wait longer")] = 1.0,
    service: Annotated[float, typer.Option("--service-time", metavar="SECONDS", help="Work on one request")] = 1.0,
    slots: Annotated[int, typer.Option(help="Requests a replica works on at once")] = 1,
    cold: Annotated[float, typer.Option("--cold-start", metavar="SECONDS", help="Until a new replica is ready")] = 10.0,
    warm: Annotated[float, typer.Option("--warm-start", metavar="SECONDS", help="Until a warm instance is ready")] = 0.1,
    pool: Annotated[int, typer.Option("--warm", help="Warm instances kept; 0: no warm pool")] = 5,
    refill: Annotated[float | None, typer.Option(metavar="SECONDS", help="To refill the pool by one (default: a cold start)")] = None,
    cores: Annotated[float | None, typer.Option(help="Cores of the machine (default: plenty)")] = None,
    replica_cores: Annotated[float, typer.Option(help="Cores that a replica keeps busy at most")] = 1.0,
    cpu_limit: Annotated[float | None, typer.Option(help="Cores that a replica may use (default: what it keeps busy)")] = None,
    load: Annotated[float, typer.Option("--scale-load", metavar="FACTOR", help="Multiply the trace's requests")] = 1.0,
    up: Annotated[float, typer.Option("--up-stabilization", metavar="SECONDS", help="Least time between two growths")] = 60.0,
    down: Annotated[float, typer.Option("--down-stabilization", metavar="SECONDS", help="Calm needed before shrinking")] = 300.0,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Time between two scaling decisions")] = 30.0,
    sample: Annotated[float, typer.Option("--sample-interval", metavar="SECONDS", help="Time between two samples")] = 5.0,
    seed: Annotated[int | None, typer.Option(help="Let chance place the requests in each bin (default: evenly)")] = None,
    lost: Annotated[float, typer.Option("--lost-samples", metavar="SHARE", help="Share of the samples that fail, 0..1")] = 0.0,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the load and the replicas of each policy")] = False,
    json: Json = False,
) -> None:
    """Replay a load trace against a simulated fleet, with the real scaling rule, and with others to compare.

    Shows the time requests wait, the share over the objective, the cost in replica-hours (x: against somebody who knew the future),
    and how often the size changed and turned round.

    \b
    Examples:
      fleetctl simulate load.csv
      fleetctl simulate load.csv --scale-load 10 --service-time 0.2 --slots 4 --target 60 --plot
      fleetctl simulate load.csv --policy fleetctl --policy fixed=8 --json
    """
    from fleetctl.core import simulation
    from fleetctl.core.plant import PlantSpec
    from fleetctl.core.policy import Policy

    _check(
        {
            "--target": (target, 1, 90),
            "--min": (least, 1, 1e6),
            "--max": (most, least, 1e6),
            "--start": (start, 0, 1e6),
            "--objective": (objective, 0, 1e9),
            "--scale-load": (load, 1e-9, 1e9),
            "--up-stabilization": (up, 0, 1e6),
            "--down-stabilization": (down, 0, 1e6),
            "--interval": (interval, 0.1, 86400),
            "--sample-interval": (sample, 0.1, 3600),
            "--lost-samples": (lost, 0, 1),
        }
    )
    plant = PlantSpec(
        service_seconds=service,
        slots=slots,
        cold_seconds=cold,
        warm_seconds=warm,
        pool_size=pool,
        refill_seconds=refill if refill is not None else max(cold, 0.1),
        cores=cores,
        replica_cores=replica_cores,
        cpu_limit=replica_cores if cpu_limit is None else cpu_limit,
    )
    even, loads, chance = _loads(_read(trace), sample, load, seed)
    planned = simulation.plan(plant, even, sample, target, least, most)
    scene = simulation.Scene(
        plant=plant,
        loads=loads,
        step_seconds=sample,
        start=planned[0] if start is None else start,
        target=target,
        least=least,
        most=most,
        objective_seconds=objective,
        metric=metric,
        lost=lost,
        chance=chance,
    )
    rule = Policy(
        min_replicas=least,
        max_replicas=most,
        targets=(_goal(metric, target),),
        scale_up_stabilization_seconds=up,
        scale_down_stabilization_seconds=down,
        autoscaling_interval_seconds=interval,
        metrics_interval_seconds=sample,
    )
    reports = {name: _replay(name, scene, rule, max(planned)) for name in policy or [OURS, KUBERNETES, FIXED]}
    base = simulation.replica_hours(planned, sample)
    if json:
        emit_json(_object(trace, scene, reports, base))
        return
    emit_lines(_lines(scene, reports, base, width()))
    if plot:
        emit_lines(_plot(scene, reports, width() or PLOT_COLUMNS))


def _check(values: "Mapping[str, tuple[float | None, float, float]]") -> None:
    for name, (value, low, high) in values.items():
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name} {value:g}: it must lie in {low:g}..{high:g}")


def _read(path: str) -> "list[Bin]":
    """The trace in a file or on standard input. UsageError where there is none to read."""
    import sys

    from fleetctl.core.trace import parse

    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            return parse(sys.stdin, name)
        with open(path, encoding="utf-8", newline=None) as lines:
            return parse(lines, name)
    except UnicodeDecodeError:
        raise UsageError(f"{name}: this is not a text file", hint="a trace is CSV with two columns: seconds,requests") from None
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from None


def _loads(bins: "Sequence[Bin]", step: float, load: float, seed: int | None) -> tuple[list[float], list[float], list[float]]:
    """Requests of each step, spread evenly and as the seed places them, and a number by chance for each step."""
    from random import Random

    from fleetctl.core import trace

    if bins[-1].end / step > MOST_STEPS:
        raise UsageError(f"the trace has more than {MOST_STEPS:,} samples", hint="a longer --sample-interval makes fewer")
    even = trace.steps(bins, step, load)
    loads = even if seed is None else trace.steps(bins, step, load, iter(Random(seed).random, 2.0))
    failing = Random(0 if seed is None else seed)
    return even, loads, [failing.random() for _ in even]


def _goal(metric: str, target: float) -> "Target":
    from fleetctl.core import demand

    if metric == "occupancy":
        return demand.occupancy(target)
    if metric == "cpu":
        return demand.cpu(target)
    raise UsageError(f"no metric {metric!r} in a simulation", hint="--metric occupancy or --metric cpu")


def _replay(name: str, scene: "Scene", rule: "Policy", largest: int) -> "Report":
    """The report of the policy that has this name; `fixed` alone stands for the most replicas that the plan has."""
    from dataclasses import replace

    from fleetctl.core import simulation

    kind, given, number = name.partition("=")
    if name == OURS:
        return simulation.replay(scene, simulation.Ours(rule, scene))
    if name == KUBERNETES:
        return simulation.replay(scene, simulation.Kubernetes(scene))
    if kind == FIXED and (not given or (number.isdecimal() and len(number) < 7 and int(number) > 0)):
        size = int(number) if given else largest
        return simulation.replay(replace(scene, start=size), simulation.Fixed(size))
    raise UsageError(f"no policy {name!r}", hint="--policy fleetctl, kubernetes, fixed or fixed=N with N from 1")


def _object(name: str, scene: "Scene", reports: "Mapping[str, Report]", base: float) -> "Mapping[str, object]":
    """The reports as JSON; `fleetctl/simulation/v1` only ever gains keys."""
    from dataclasses import asdict

    return {
        "schema": "fleetctl/simulation/v1",
        "trace": name,
        "seconds": len(scene.loads) * scene.step_seconds,
        "step_seconds": scene.step_seconds,
        "requests": sum(scene.loads),
        "metric": scene.metric,
        "target": scene.target,
        "min_replicas": scene.least,
        "max_replicas": scene.most,
        "start_replicas": scene.start,
        "objective_seconds": scene.objective_seconds,
        "plant": asdict(scene.plant),
        "clairvoyant_replica_hours": base,
        "policies": [_result(policy, report, base) for policy, report in reports.items()],
    }


def _result(policy: str, report: "Report", base: float) -> dict[str, object]:
    return {
        "policy": policy,
        "wait_mean_seconds": report.wait_mean_seconds,
        "wait_p95_seconds": report.wait_p95_seconds,
        "over_objective": report.over_objective,
        "replica_hours": report.replica_hours,
        "replica_hours_ratio": report.replica_hours / base if base else None,
        "actions": report.actions,
        "reversals": report.reversals,
        "largest": report.largest,
    }


def _lines(scene: "Scene", reports: "Mapping[str, Report]", base: float, columns: int | None) -> "list[Line]":
    from fleetctl.cli.render import Column, duration, table

    def hours(row: "tuple[str, Report]") -> str:
        return f"{row[1].replica_hours:.1f}" + (f" (x{row[1].replica_hours / base:.2f})" if base else "")

    shown = table(
        [
            Column("POLICY", lambda row: row[0]),
            Column("WAIT", lambda row: f"{row[1].wait_mean_seconds:.3f} s", right=True),
            Column("P95", lambda row: f"{row[1].wait_p95_seconds:.2f} s", right=True, drop=1),
            Column(f"OVER {scene.objective_seconds:g} s", lambda row: f"{100 * row[1].over_objective:.3f}%", right=True),
            Column("REPLICA-HOURS", hours, right=True),
            Column("CHANGES", lambda row: row[1].actions, right=True),
            Column("REVERSALS", lambda row: row[1].reversals, right=True),
            Column("LARGEST", lambda row: row[1].largest, right=True, drop=2),
        ],
        list(reports.items()),
        columns,
    )
    total, length = sum(scene.loads), len(scene.loads) * scene.step_seconds
    about = f"{total:,.0f} requests in {duration(length)}, {scene.metric} aimed at {scene.target:g}%, {scene.start} replicas at first"
    return [[(about, "dim")], *shown]


def _plot(scene: "Scene", reports: "Mapping[str, Report]", columns: int) -> "list[Line]":
    """The load and the replicas of every policy over the same time; the replicas all to the same scale."""
    from fleetctl.cli.chart import chart

    rates = [load / scene.step_seconds for load in scene.loads]
    most = max(report.largest for report in reports.values())
    charts = [chart("requests/s", rates, columns=columns, height=PLOT_ROWS, top=float(f"{max(rates):.3g}"))]
    charts += [
        chart(f"replicas, {name}", report.sizes, columns=columns, height=PLOT_ROWS, top=float(most)) for name, report in reports.items()
    ]
    return [[(line, "")] for lines in charts for line in ["", *lines]]
