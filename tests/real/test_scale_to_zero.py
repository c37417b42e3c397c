"""Fleets that go to zero without work, and come back with the first connection: real daemons, processes, sockets and signals."""

from pathlib import Path

from tests.real.harness import Json, Place, eventually, spec
from tests.real.test_sockets import COMMAND, address, ask, sockets

POOL = {"enabled": True, "size": 1, "refresh_interval_seconds": 3600.0}
SCALING = {"idle_seconds": 0.2, "metrics_interval_seconds": 0.2, "window_seconds": 0.4}


def sleepy(**settings: object) -> Json:
    """A fleet that keeps nobody; decided at its samples, not at its ticks."""
    calm = {"autoscaling_interval_seconds": 600, "scale_down_stabilization_seconds": 600}
    bounds = {"min_replicas": 0, "max_replicas": 3}
    return {**spec("web", COMMAND, 1), "sockets": {"http": "127.0.0.1:0"}, "autoscaling": SCALING, **bounds, **calm, **settings}


def at_zero(place: Place, *, pooled: int = 0) -> bool:
    found = place.client.fleet("web")
    states = [agent["state"] for agent in found["agents"]]
    return (
        found["desired_replicas"] == 0
        and states == ["suspended"] * pooled
        and found["autoscaling"]["reason"] == "at zero, waiting for a request"
    )


def decisions(place: Place) -> list[tuple[int, int, str]]:
    entries = [one for one in place.client.history("web")["entries"] if one["cause"] == "autoscaler"]
    return [(one["current_replicas"], one["target_replicas"], one["reason"]) for one in entries]


def test_the_first_request_wakes_a_suspended_instance_which_holds_the_socket_over_the_death_of_the_daemon(place: Place) -> None:
    place.start()
    place.client.apply("web", sleepy(warm_pool=POOL))
    eventually(lambda: at_zero(place, pooled=1), "it is at zero, with an instance in the pool")
    assert decisions(place) == [(1, 0, "no work for 0.2 s")]
    assert "at zero, waiting for a request" in place.run("explain", "web").stdout
    (pooled,) = place.agents("web")
    where = address(place)
    assert ask(where) == pooled["id"], "not a new one"
    eventually(lambda: decisions(place)[1:] == [(0, 1, "1 request is pending and no replica is there")], "it is in the history")
    eventually(lambda: at_zero(place, pooled=1), "it is at zero again, with another instance in the pool")
    (pooled,) = place.agents("web")
    place.kill()
    place.start()
    assert sockets(place)["http"]["address"] == f"{where[0]}:{where[1]}"
    assert ask(where) == pooled["id"], "the one that kept the socket meanwhile"


def test_a_cold_start_serves_what_waits_and_nothing_is_lost_while_the_fleet_comes_and_goes(place: Place) -> None:
    place.start()
    place.client.apply("web", sleepy(autoscaling={**SCALING, "idle_seconds": 0.05}))
    eventually(lambda: at_zero(place), "it is at zero")
    where = address(place)
    for _ in range(2):  # as soon as it is decided: the agent may be on its way out, and take the request, or leave it to the next
        eventually(lambda: place.client.fleet("web")["desired_replicas"] == 0, "it goes to zero")
        assert ask(where).startswith("web-")
    assert ask(where, "/slow").startswith("web-"), "work takes longer than idle_seconds"
    assert [move[:2] for move in decisions(place)][:4] == [(1, 0), (0, 1), (1, 0), (0, 1)]


def test_a_queue_that_fills_brings_agents_back(place: Place) -> None:
    place.start()
    queue = Path(place.root, "jobs")
    queue.write_text("0")
    jobs = {"file": str(queue), "target": 5, "interval_seconds": 0.2}
    scaling = {**SCALING, "metrics": {"jobs": jobs}}
    place.client.apply("web", sleepy(command=["sleep", "600"], sockets={}, autoscaling=scaling))
    eventually(lambda: at_zero(place), "it is at zero")
    queue.write_text("8")
    eventually(lambda: place.settled("web", 2), "enough for the queue")
    assert decisions(place)[-1] == (0, 2, "jobs is 8 and no replica is there")
    queue.write_text("0")
    eventually(lambda: at_zero(place), "it is at zero again")
    assert "work brings an agent back" in place.client.scale("web", 0)["message"]
