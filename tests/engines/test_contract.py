"""What every engine must do: the same tests over processes of this machine and over a cluster."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fleetctl.cli import waiting
from fleetctl.daemon.wire import AgentStatus, Change, EventInfo, FleetStatus, HistoryEntry
from fleetctl.engines.kubernetes.api import Api
from fleetctl.engines.kubernetes.engine import KubernetesEngine
from fleetctl.engines.kubernetes.kubeconfig import Target
from fleetctl.engines.local import LocalEngine
from fleetctl.engines.protocol import ABILITIES, Engine, require
from fleetctl.errors import NotFound, Unsupported, UsageError
from fleetctl.models import FleetSpec, KubernetesSpec, ReadinessSpec
from tests.engines.fake_kubernetes import TOKEN, FakeKubernetes, running
from tests.real.harness import Place


class Subject:
    """An engine, and what differs between them for a test: how agents come to say "hello"."""

    def __init__(self, engine: Engine, cluster: FakeKubernetes | None) -> None:
        self.engine = engine
        self.cluster = cluster
        self._number = 0

    def spec(self, replicas: int = 2) -> FleetSpec:
        """Of a new fleet."""
        self._number += 1
        return FleetSpec(
            name=f"fleet-{self._number}",
            command=("echo hello; exec sleep 600",),
            shell=True,
            cwd=tempfile.gettempdir(),
            replicas=replicas,
            max_replicas=5,
            readiness=ReadinessSpec(settle_seconds=0),
            kubernetes=KubernetesSpec(image="example.com/web:1"),
        )

    def up(self, spec: FleetSpec) -> None:
        self.engine.prepare()
        self.engine.apply(spec, replicas_given=True, dry_run=False)
        self.settled(spec.name)

    def settled(self, name: str) -> FleetStatus:
        self.until(lambda: waiting.settled(waiting.find(self.engine.status(), name)))
        return self.fleet(name)

    def fleet(self, name: str) -> FleetStatus:
        found = waiting.find(self.engine.status(), name)
        assert found is not None
        return found

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline, "it did not come to be"
            time.sleep(0.01)

    def let_say_hello(self, name: str) -> None:
        """A process says it by itself; the pods of a made-up cluster run nothing."""
        for pod in [agent["id"] for agent in self.fleet(name)["agents"]] if self.cluster else []:
            assert self.cluster is not None
            self.cluster.write(pod, b"hello")


@pytest.fixture(scope="module")
def local() -> Iterator[Subject]:
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    with LocalEngine(str(folder)) as engine:
        yield Subject(engine, None)
    Place(folder).close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def kubernetes() -> Iterator[Subject]:
    with running() as cluster, KubernetesEngine() as engine:
        engine.open(Api(Target(context="test", namespace="default", server=cluster.url, token=TOKEN)))
        yield Subject(engine, cluster)


@pytest.fixture(params=["local", "kubernetes"])
def subject(request: pytest.FixtureRequest) -> Subject:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Subject)
    return found


def test_what_it_cannot_do_is_said_with_why(subject: Subject) -> None:
    cannot = subject.engine.capabilities()
    assert set(cannot) <= set(ABILITIES)
    assert all(reason.strip() for reason in cannot.values())
    for ability in ABILITIES:
        if ability in cannot:
            with pytest.raises(Unsupported, match="suspending: "):
                require(subject.engine, ability, "suspending")
        else:
            require(subject.engine, ability, "suspending")


def test_a_fleet_comes_to_be_and_goes(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    engine.prepare()
    change = engine.apply(spec, replicas_given=True, dry_run=False)
    assert (change["created"], change["changed"], change["dry_run"], change["desired_replicas"]) == (True, True, False, 2)
    assert set(change) >= set(Change.__required_keys__)
    fleet = subject.settled(spec.name)
    assert spec.name in engine.fleet_names()
    assert set(fleet) >= set(FleetStatus.__required_keys__)
    assert (fleet["ready_replicas"], len(fleet["agents"]), fleet["down"]) == (2, 2, False)
    assert all(set(agent) >= set(AgentStatus.__required_keys__) for agent in fleet["agents"])
    assert engine.drain_seconds(spec.name) >= 30
    assert engine.down(spec.name, False, False)["changed"]
    subject.until(lambda: waiting.drained(waiting.find(engine.status(), spec.name)))
    subject.until(lambda: spec.name not in engine.fleet_names())


def test_a_dry_run_changes_nothing(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    engine.prepare()
    change = engine.apply(spec, replicas_given=True, dry_run=True)
    assert change["dry_run"]
    assert change["actions"]
    assert spec.name not in engine.fleet_names()
    subject.up(spec)
    before = subject.fleet(spec.name)
    assert engine.scale(spec.name, 4, None, True)["desired_replicas"] == 4
    engine.restart(spec.name, None, False, True)
    engine.down(spec.name, True, True)
    after = subject.fleet(spec.name)
    assert [(agent["id"], agent["pid"]) for agent in after["agents"]] == [(agent["id"], agent["pid"]) for agent in before["agents"]]
    assert after["desired_replicas"] == 2


def test_the_same_again_changes_nothing(subject: Subject) -> None:
    spec = subject.spec()
    subject.up(spec)
    before = subject.fleet(spec.name)["agents"]
    assert not subject.engine.apply(spec, replicas_given=True, dry_run=False)["changed"]
    assert [agent["id"] for agent in subject.settled(spec.name)["agents"]] == [agent["id"] for agent in before]


def test_the_size_stays_where_none_is_given(subject: Subject) -> None:
    spec = subject.spec()
    subject.up(spec)
    subject.engine.scale(spec.name, 3, None, False)
    subject.settled(spec.name)
    subject.engine.apply(replace(spec, environment={"A": "b"}), replicas_given=False, dry_run=False)
    assert subject.settled(spec.name)["desired_replicas"] == 3


def test_a_changed_spec_replaces_every_process(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)
    old = {(agent["id"], agent["pid"]) for agent in subject.fleet(spec.name)["agents"]}
    new = replace(spec, environment={"GREETING": "hello"})
    leaving = engine.outdated(new) or old
    assert leaving == old
    engine.apply(new, replicas_given=True, dry_run=False)
    subject.until(lambda: waiting.replaced(waiting.find(engine.status(), spec.name), leaving))


def test_scale_takes_a_number_or_a_difference_and_keeps_to_the_bounds(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)
    assert engine.scale(spec.name, 4, None, False)["desired_replicas"] == 4
    assert subject.settled(spec.name)["ready_replicas"] == 4
    assert engine.scale(spec.name, None, -3, False)["desired_replicas"] == 1
    assert len(subject.settled(spec.name)["agents"]) == 1
    assert not engine.scale(spec.name, 1, None, False)["changed"]
    with pytest.raises(UsageError, match="more than max_replicas of fleet"):
        engine.scale(spec.name, 6, None, False)
    assert engine.scale(spec.name, 0, None, False)["desired_replicas"] == 0


def test_restart_replaces_the_processes_of_all_or_of_one(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)

    def processes() -> set[tuple[str, int | None]]:
        return {(agent["id"], agent["pid"]) for agent in subject.fleet(spec.name)["agents"]}

    old = processes()
    engine.restart(spec.name, None, False, False)
    subject.until(lambda: waiting.replaced(waiting.find(engine.status(), spec.name), old))
    new = processes()
    one = min(new)
    engine.restart(spec.name, [one[0]], True, False)
    subject.until(lambda: waiting.replaced(waiting.find(engine.status(), spec.name), {one}))
    assert len(processes() & new) == 1
    with pytest.raises(NotFound):
        engine.restart(spec.name, ["nobody-00000"], False, False)


def test_what_is_not_there_is_not_found(subject: Subject) -> None:
    engine = subject.engine
    engine.prepare()
    for ask in (
        lambda: engine.scale("nobody", 1, None, False),
        lambda: engine.restart("nobody", None, False, False),
        lambda: engine.down("nobody", False, False),
        lambda: engine.drain_seconds("nobody"),
        lambda: engine.log_sources(["nobody"]),
    ):
        with pytest.raises(NotFound):
            ask()


def test_a_watched_status_comes_at_once_and_after_a_change(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)
    with engine.watch_status(0.05) as stream:
        statuses = iter(stream)
        assert waiting.settled(waiting.find(next(statuses), spec.name))
        engine.scale(spec.name, 3, None, False)
        assert any((fleet := waiting.find(status, spec.name)) and fleet["ready_replicas"] == 3 for status in statuses)


def test_history_and_events_have_their_keys(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)
    engine.scale(spec.name, 3, None, False)
    if subject.cluster:
        subject.cluster.event("Deployment", spec.name, "ScalingReplicaSet", f"Scaled up replica set {spec.name}-abc to 3 from 2")
    entries, events = engine.history(spec.name, 5), engine.events(spec.name, 50)
    assert (entries[-1]["current_replicas"], entries[-1]["target_replicas"], entries[-1]["action"]) == (2, 3, "scale_up")
    assert all(set(entry) >= set(HistoryEntry.__required_keys__) for entry in entries)
    assert events
    assert all(set(event) >= set(EventInfo.__required_keys__) and event["fleet"] == spec.name for event in events)
    assert len(engine.events(spec.name, 1)) == 1


def test_output_is_read_and_followed(subject: Subject) -> None:
    spec, engine = subject.spec(), subject.engine
    subject.up(spec)
    subject.let_say_hello(spec.name)
    sources, left_out = engine.log_sources([spec.name])
    assert sorted(agent for _, agent in sources) == sorted(agent["id"] for agent in subject.fleet(spec.name)["agents"])
    assert left_out == 0
    fleet, agent = sources[0]
    assert engine.log_sources([agent])[0] == [(fleet, agent)]
    subject.until(lambda: list(engine.tail(fleet, agent, 10, None)) == [b"hello"])
    assert engine.last_output(fleet, agent) == ["hello"]
    follower = engine.follower(fleet, agent, 10, None)
    found: list[bytes] = []

    def has_said_hello() -> bool:
        found.extend(follower.read())
        return found == [b"hello"]

    subject.until(has_said_hello)
    follower.close()
