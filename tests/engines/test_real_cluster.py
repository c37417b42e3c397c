"""The same life of a fleet in a true cluster: opt in with FLEETCTL_TEST_CLUSTER=1, and KUBECONFIG for whichever cluster is meant.

Makes a namespace of its own, and takes it away again. Needs an image with a shell: FLEETCTL_TEST_IMAGE, default busybox.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fleetctl.cli import waiting
from fleetctl.daemon.wire import FleetStatus
from fleetctl.engines.kubernetes.api import APPLY
from fleetctl.engines.kubernetes.engine import KubernetesEngine
from fleetctl.errors import ClusterConflict, NotFound
from fleetctl.models import AutoscalingSpec, FleetSpec, KubernetesSpec, WarmPoolSpec
from tests.engines.specs import SPECS

pytestmark = pytest.mark.skipif(not os.environ.get("FLEETCTL_TEST_CLUSTER"), reason="FLEETCTL_TEST_CLUSTER is not set")
IMAGE = os.environ.get("FLEETCTL_TEST_IMAGE", "docker.io/library/busybox:stable")
SECONDS = 180.0


@pytest.fixture(scope="module")
def engine() -> Iterator[KubernetesEngine]:
    """In a namespace that is there for these tests alone."""
    name = f"fleetctl-test-{secrets.token_hex(4)}"
    with KubernetesEngine(namespace=name) as found:
        wanted = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        found.api.patch(f"/api/v1/namespaces/{name}", wanted, APPLY, manager="fleetctl-test")
        try:
            yield found
        finally:
            found.api.delete(f"/api/v1/namespaces/{name}")


def spec(name: str, replicas: int = 2) -> FleetSpec:
    cluster = KubernetesSpec(image=IMAGE, cpu_request=0.01)
    command = ("trap 'exit 0' TERM; echo hello; while :; do sleep 1; done",)
    return FleetSpec(name=name, command=command, shell=True, replicas=replicas, max_replicas=5, kubernetes=cluster)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.5)


def settled(engine: KubernetesEngine, name: str) -> FleetStatus:
    until(lambda: waiting.settled(waiting.find(engine.status(), name)))
    found = waiting.find(engine.status(), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", SPECS)
def test_the_server_takes_every_manifest(engine: KubernetesEngine, name: str) -> None:
    wanted = replace(SPECS[name], kubernetes=replace(SPECS[name].kubernetes, namespace=None))
    assert engine.apply(wanted, replicas_given=True, dry_run=True)["actions"]


def test_a_fleet_lives(engine: KubernetesEngine) -> None:
    wanted = spec("life")
    assert engine.apply(wanted, replicas_given=True, dry_run=False)["created"]
    first = {agent["id"] for agent in settled(engine, "life")["agents"]}
    assert not engine.apply(wanted, replicas_given=True, dry_run=False)["changed"]
    engine.scale("life", 3, None, False)
    assert len(settled(engine, "life")["agents"]) == 3
    engine.restart("life", None, False, False)
    assert first.isdisjoint(agent["id"] for agent in settled(engine, "life")["agents"])
    agent = settled(engine, "life")["agents"][0]["id"]
    until(lambda: list(engine.tail("life", agent, 5, None)) == [b"hello"])
    follower = engine.follower("life", agent, 5, None)
    until(lambda: follower.read() == [b"hello"])
    follower.close()
    assert {entry["target_replicas"] for entry in engine.history("life", 50)} >= {2, 3}
    assert any(event["agent_id"] == agent for event in engine.events("life", 500))
    engine.down("life", False, False)
    until(lambda: waiting.find(engine.status(), "life") is None)


def test_the_size_changes_hands_without_a_dip(engine: KubernetesEngine) -> None:
    wanted = spec("hands", 3)
    engine.apply(wanted, replicas_given=True, dry_run=False)
    before = {agent["id"] for agent in settled(engine, "hands")["agents"]}
    scaled = replace(wanted, min_replicas=3, autoscaling=AutoscalingSpec(enabled=True))
    engine.apply(scaled, replicas_given=True, dry_run=False)
    fleet = settled(engine, "hands")
    assert (fleet["desired_replicas"], {agent["id"] for agent in fleet["agents"]}) == (3, before)
    with pytest.raises(ClusterConflict, match="autoscaler decides"):
        engine.scale("hands", 4, None, False)
    engine.apply(replace(wanted, replicas=2), replicas_given=True, dry_run=False)
    assert settled(engine, "hands")["desired_replicas"] == 2
    engine.down("hands", True, False)


def test_a_standby_pool_comes_and_goes(engine: KubernetesEngine) -> None:
    wanted = spec("pool", 1)
    engine.apply(replace(wanted, warm_pool=WarmPoolSpec(enabled=True, size=1)), replicas_given=True, dry_run=False)
    until(lambda: (fleet := waiting.find(engine.status(), "pool")) and fleet["warm_pool"]["current_size"] == 1)
    engine.apply(wanted, replicas_given=True, dry_run=False)
    until(lambda: len(settled(engine, "pool")["agents"]) == 1)
    engine.down("pool", True, False)


def test_what_is_not_there_is_not_found(engine: KubernetesEngine) -> None:
    with pytest.raises(NotFound):
        engine.down("nobody", False, False)
    with KubernetesEngine(namespace="fleetctl-no-such-namespace") as elsewhere, pytest.raises(NotFound, match="there is no namespace"):
        elsewhere.apply(spec("x"), replicas_given=True, dry_run=False)
