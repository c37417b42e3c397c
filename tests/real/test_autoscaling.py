"""Autoscaling with real daemons, processes and signals: what a kill must not forget, and what a size asked for by hand becomes."""

import sys

from tests.real.harness import Json, Place, eventually, spec

IDLE = [sys.executable, "-S", "-c", "import time\nwhile True: time.sleep(1)"]
SPIN = [sys.executable, "-S", "-c", "while True: pass"]
QUICK = {"metrics_interval_seconds": 0.2, "window_seconds": 0.4}


def autoscaled(command: list[str], replicas: int, **settings: object) -> Json:
    times = {"scale_up_stabilization_seconds": 0, "scale_down_stabilization_seconds": 600, "autoscaling_interval_seconds": 0.4}
    return spec("demo", command, replicas, min_replicas=1, max_replicas=2, autoscaling=QUICK, **{**times, **settings})


def scaling(place: Place) -> Json:
    return dict(place.client.autoscaling("demo"))


def test_a_busy_fleet_grows_and_a_killed_daemon_forgets_nothing(place: Place) -> None:
    place.start()
    place.client.apply("demo", autoscaled(SPIN, 1))
    eventually(lambda: place.settled("demo", 2), "the fleet has grown")
    eventually(lambda: scaling(place)["scale_up_count"] == 1, "the growth is counted")
    (entry,) = [one for one in place.client.history("demo")["entries"] if one["cause"] == "autoscaler"]
    assert entry["reason"].startswith("CPU utilization")
    assert entry["details"]["winner"] == "cpu"
    before = place.leaders("demo")
    place.kill()
    place.start()
    eventually(lambda: scaling(place)["last_decision"] is not None, "the new daemon has decided")
    assert scaling(place)["scale_up_count"] == 1
    assert place.leaders("demo") == before
    place.client.down("demo")


def test_who_is_protected_stays_after_a_kill_of_the_daemon_too(place: Place) -> None:
    place.start()
    place.client.apply("demo", spec("demo", IDLE, 3))
    eventually(lambda: place.settled("demo", 3), "it runs")
    first, second, _ = (agent["id"] for agent in place.client.fleet("demo")["agents"])  # the oldest first
    assert place.client.protect(first)["changed"]
    assert place.client.protect(second, dry_run=True)["changed"] is False
    place.kill()
    place.start()
    assert place.client.agent(first)["protected"]
    assert place.client.scale("demo", 1)["desired_replicas"] == 1
    eventually(lambda: place.settled("demo", 1), "the others are gone")
    assert [agent["id"] for agent in place.client.fleet("demo")["agents"]] == [first]
    place.client.down("demo")


def test_a_size_in_the_file_is_ignored_until_the_fleet_is_at_none(place: Place) -> None:
    place.start()
    place.client.apply("demo", autoscaled(IDLE, 1))
    eventually(lambda: place.settled("demo", 1), "it runs")
    told = place.client.apply("demo", autoscaled(IDLE, 2))
    assert (told["desired_replicas"], "replicas = 2 is ignored while autoscaling is on" in told["message"]) == (1, True)
    assert "lower it after 600 s of calm" in place.client.scale("demo", 2)["message"]
    assert "autoscaling rests until it is scaled up again" in place.client.scale("demo", 0)["message"]
    eventually(lambda: scaling(place)["reason"] == "it rests, because the fleet is scaled to 0", "it rests")
    assert place.client.apply("demo", autoscaled(IDLE, 2))["desired_replicas"] == 2
    place.client.set_autoscaling("demo", False)
    assert place.client.apply("demo", autoscaled(IDLE, 1) | {"autoscaling": {"enabled": False}})["desired_replicas"] == 1
    place.client.down("demo")
