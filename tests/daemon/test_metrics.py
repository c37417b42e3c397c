"""What Prometheus is told: the text, the counting, and the port it may be asked on."""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fleetctl.core.orders import Wish
from fleetctl.daemon import metrics
from fleetctl.daemon.exporter import MetricsPort
from fleetctl.daemon.exposition import Family, Histogram, counter, gauge, render
from fleetctl.errors import UsageError
from fleetctl.fleet import Fleet
from fleetctl.models import Event, FleetSpec, Usage, WarmPoolSpec
from fleetctl.testing import FakeClock, FakeLifecycleManager, FakeMachine, FakeStateManager, run_in_fake_time, settled

MONITORING = Path(__file__).resolve().parents[2] / "examples" / "monitoring"

# -- the text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (True, "1"), (3.0, "3"), (0.5, "0.5"), (1e20, "1e+20"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (1e-7, "1e-07")],
)
def test_numbers_are_written_as_the_format_has_them(value: float, text: str) -> None:
    assert render([gauge("a", "b", ({}, value))]) == f"# HELP a b\n# TYPE a gauge\na {text}\n"


def test_labels_and_help_cannot_break_the_format() -> None:
    text = render([counter("a_total", 'x\n"y"\\', ({"l": 'q"\\\n\udcff', "m": "é"}, 1))])
    assert text == '# HELP a_total x\\n"y"\\\\\n# TYPE a_total counter\na_total{l="q\\"\\\\\\n?",m="é"} 1\n'


def test_what_is_not_known_is_not_told() -> None:
    assert render([gauge("a", "b", ({}, None)), gauge("c", "d")]) == ""


@pytest.mark.parametrize(
    ("observed", "buckets"),
    [([], [0, 0, 0]), ([0.001], [1, 1, 1]), ([0.0011], [0, 1, 1]), ([9.0], [0, 0, 1]), ([0.0, 0.01, 5.0], [1, 2, 3])],
    ids=str,
)
def test_a_histogram_counts_up_to_and_including_each_bound(observed: list[float], buckets: list[int]) -> None:
    histogram = Histogram((0.001, 0.01))
    for value in observed:
        histogram.observe(value)
    samples = histogram.samples({"a": "b"})
    assert [value for suffix, _, value in samples if suffix == "_bucket"] == buckets
    assert samples[-3][1] == {"a": "b", "le": "+Inf"}
    assert samples[-2:] == [("_sum", {"a": "b"}, sum(observed)), ("_count", {"a": "b"}, len(observed))]


def test_buckets_begin_at_half_a_millisecond() -> None:
    assert metrics.ACQUIRE_BOUNDS[0] == 0.0005
    assert list(metrics.ACQUIRE_BOUNDS) == sorted(set(metrics.ACQUIRE_BOUNDS))


# -- counting


def happened(kind: str, agent_id: str | None = None, fleet: str = "web", **data: object) -> Event:
    return Event(at=0.0, kind=kind, fleet=fleet, message="", agent_id=agent_id, data=data)


def test_a_start_counts_as_a_restart_from_the_second_on() -> None:
    tally = metrics.Tally()
    tally.know(["web-known"])
    for agent_id in ("web-aaaaa", "web-aaaaa", "web-known", "web-bbbbb", "web-aaaaa"):
        tally.count(happened("agent.started", agent_id))
    assert (tally.restarts["web"], tally.events["web", "agent.started"]) == (3, 5)


def test_decisions_are_counted_by_who_asked() -> None:
    tally = metrics.Tally()
    for cause in ("manual", "manual", "autoscaler"):
        tally.count(happened("fleet.scaled", action="scale_up", cause=cause))
    assert dict(tally.decisions) == {("web", "scale_up", "manual"): 2, ("web", "scale_up", "autoscaler"): 1}


def test_fleets_that_are_gone_are_forgotten() -> None:
    tally = metrics.Tally()
    for fleet in ("web", "api"):
        tally.count(happened("agent.started", f"{fleet}-aaaaa", fleet))
        tally.count(happened("agent.started", f"{fleet}-aaaaa", fleet))
        tally.count(happened("fleet.scaled", None, fleet, action="scale_up", cause="up"))
        tally.acquisition(fleet, 0.001, warm=True)
    tally.keep(["web"], ["web-aaaaa"])
    assert {fleet for fleet, _ in [*tally.events, *tally.acquired]} | set(tally.restarts) | {key[0] for key in tally.decisions} == {"web"}


# -- a fleet


def told(story: Callable[[Fleet, metrics.Tally], Awaitable[None]], **settings: object) -> tuple[str, dict[str, float]]:
    """The text after the story, and its samples."""
    clock = FakeClock()
    texts: list[str] = []

    async def tell() -> None:
        tally = metrics.Tally()
        spec = FleetSpec(name="web", command=("agent",), replicas=2, max_replicas=10, **settings)  # type: ignore[arg-type]  # as given
        fleet = Fleet(
            Wish(spec=spec),
            lifecycle_manager=FakeLifecycleManager(FakeMachine(clock)),
            state_manager=FakeStateManager(),
            clock=clock,
            on_event=tally.count,
        )
        fleet.start()
        await asyncio.sleep(5.0)
        await settled()
        await story(fleet, tally)
        usage = {agent.id: Usage(cpu_percent=50.0, memory_bytes=1000, processes=2) for agent in fleet.agents}
        usage["web-alien"] = Usage(cpu_percent=50.0, memory_bytes=1000, processes=2)
        texts.append(metrics.tell({"web": fleet}, usage, tally, uptime=7.5, lag=0.25, write_failures=3, followers=1))
        await fleet.close()

    run_in_fake_time(clock, tell())
    samples = dict(line.rsplit(" ", 1) for line in texts[0].splitlines() if not line.startswith("#"))
    return texts[0], {name: float(value) for name, value in samples.items()}


async def nothing(fleet: Fleet, tally: metrics.Tally) -> None:
    pass


def test_sizes_states_and_use_of_a_fleet_are_told() -> None:
    _, samples = told(nothing)
    assert samples['fleetctl_fleet_desired_replicas{fleet="web"}'] == samples['fleetctl_fleet_ready_replicas{fleet="web"}'] == 2
    assert samples['fleetctl_fleet_agents{fleet="web",state="running"}'] == 2
    assert samples['fleetctl_fleet_agents{fleet="web",state="failed"}'] == 0
    assert samples['fleetctl_fleet_cpu_cores{fleet="web"}'] == 1.0
    assert samples['fleetctl_fleet_memory_bytes{fleet="web"}'] == 2000
    assert samples['fleetctl_fleet_processes{fleet="web"}'] == 4
    assert samples['fleetctl_events_total{fleet="web",kind="agent.started"}'] == 2
    assert samples['fleetctl_events_total{fleet="web",kind="agent.failed"}'] == 0
    assert samples["fleetctl_fleets"] == 1
    assert samples["fleetctl_daemon_write_failures_total"] == 3
    assert samples["fleetctl_daemon_uptime_seconds"] == 7.5
    assert samples["process_open_fds"] > 3
    assert samples["process_resident_memory_bytes"] > 1 << 20


def test_the_warm_pool_and_how_long_it_took_are_told() -> None:
    async def story(fleet: Fleet, tally: metrics.Tally) -> None:
        await fleet.acquire({}, require_warm=True, timeout_seconds=1)
        tally.acquisition("web", 0.0004, warm=True)
        tally.acquisition("web", 1.5, warm=False)

    _, samples = told(story, warm_pool=WarmPoolSpec(enabled=True, size=2))
    assert samples['fleetctl_warm_pool_target_size{fleet="web"}'] == 2
    assert samples['fleetctl_warm_pool_hits_total{fleet="web"}'] == 1
    assert samples['fleetctl_warm_pool_misses_total{fleet="web"}'] == 0
    assert samples['fleetctl_acquire_duration_seconds_bucket{fleet="web",start="warm",le="0.0005"}'] == 1
    assert samples['fleetctl_acquire_duration_seconds_bucket{fleet="web",start="cold",le="1"}'] == 0
    assert samples['fleetctl_acquire_duration_seconds_count{fleet="web",start="cold"}'] == 1


def test_a_fleet_without_a_pool_says_nothing_of_one() -> None:
    assert "warm_pool" not in told(nothing)[0]


def test_scaling_is_counted_with_its_cause() -> None:
    async def story(fleet: Fleet, tally: metrics.Tally) -> None:
        await fleet.scale(5)
        await fleet.scale(3)

    _, samples = told(story)
    assert samples['fleetctl_scaling_decisions_total{fleet="web",action="scale_up",cause="manual"}'] == 1
    assert samples['fleetctl_scaling_decisions_total{fleet="web",action="scale_down",cause="manual"}'] == 1


def test_every_name_follows_the_conventions() -> None:
    text, _ = told(nothing, warm_pool=WarmPoolSpec(enabled=True, size=1))
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        assert re.fullmatch(r"(fleetctl|process)_[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter"), name


def known_names() -> set[str]:
    source = Path(metrics.__file__).read_text()
    plain = set(re.findall(r'"((?:fleetctl|process)_[a-z_]+)"', source))
    return (
        plain
        | {f"fleetctl_fleet_{word}_requests" for word in ("active", "slots", "pending")}
        | {
            *(f"fleetctl_warm_pool_{word}" for word in ("size", "target_size", "hits_total", "misses_total")),
            *(f"fleetctl_acquire_duration_seconds_{part}" for part in ("bucket", "sum", "count")),
        }
    )


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yml"])
def test_the_example_asks_for_nothing_that_is_not_told(file: str) -> None:
    asked = set(re.findall(r"\b(?:fleetctl|process)_[a-z_]+", (MONITORING / file).read_text()))
    assert len(asked) > 3
    assert asked <= known_names()


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# -- the port


async def asked(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def serve(*requests: bytes) -> list[bytes]:
    async def story() -> list[bytes]:
        async def tell() -> str:
            return "up 1\n"

        port = MetricsPort(tell, 0)
        await port.open()
        try:
            return [await asked(port.port, request) for request in requests]
        finally:
            await port.close()

    return asyncio.run(story())


@pytest.mark.parametrize(
    ("request_line", "host", "status"),
    [
        ("GET /metrics HTTP/1.1", "127.0.0.1:1", 200),
        ("GET /metrics?x=1 HTTP/1.0", "LOCALHOST", 200),
        ("HEAD /metrics HTTP/1.1", "localhost:80", 200),
        ("GET / HTTP/1.1", "localhost", 404),
        ("GET /v1/status HTTP/1.1", "localhost", 404),
        ("POST /metrics HTTP/1.1", "localhost", 405),
        ("GET /metrics HTTP/1.1", "evil.example", 403),
        ("GET /metrics HTTP/1.1", "", 403),
        ("nonsense", "localhost", 400),
    ],
)
def test_the_port_answers_only_who_asks_for_metrics_on_this_machine(request_line: str, host: str, status: int) -> None:
    (answer,) = serve(f"{request_line}\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.endswith(b"up 1\n") == (status == 200 and not request_line.startswith("HEAD"))


@pytest.mark.parametrize("noise", [b"\xff\x00\r\n\r\n", b"GET " + b"x" * 20000, b"\r\n\r\n"])
def test_nonsense_does_not_keep_the_port_from_the_next(noise: bytes) -> None:
    assert serve(noise, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")[1].startswith(b"HTTP/1.1 200 ")


def test_a_port_that_is_taken_is_told() -> None:
    async def story() -> None:
        async def tell() -> str:
            return ""

        first = MetricsPort(tell, 0)
        await first.open()
        try:
            with pytest.raises(UsageError, match="metrics-port"):
                await MetricsPort(tell, first.port).open()
        finally:
            await first.close()

    asyncio.run(story())


def test_a_family_is_never_told_twice() -> None:
    text, _ = told(nothing)
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    assert Family(name="a", kind="gauge", help="b", samples=[("", {}, 1.0)]) in [gauge("a", "b", ({}, 1.0))]
