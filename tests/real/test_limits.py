"""An agent that wants too much memory, under a real daemon that is killed meanwhile: told as what it is, and no group is left."""

import os
import sys
from collections.abc import Iterator

import pytest

from fleetctl.host.limits import LocalLimits
from fleetctl.models import ResourceLimitsSpec
from tests.real.harness import Place, eventually, spec

HELD = LocalLimits("/nowhere").mechanisms(ResourceLimitsSpec(memory_limit_mb=1, cpu_limit=1))
pytestmark = pytest.mark.skipif(not all(by.startswith("cgroup") for by in HELD.values()), reason="no control group may be made here")


@pytest.fixture
def place(place: Place) -> Iterator[Place]:
    """Without a group left, whatever becomes of the test."""
    yield place
    place.close()
    LocalLimits(place.root).sweep()


# Behaves until somebody asks it to eat.
GREEDY = "import os, time\nx = []\nwhile True:\n    time.sleep(0.01)\n    while os.path.exists('eat'): x.append(bytearray(1 << 20))"


def test_a_greedy_agent_is_told_as_that_also_by_the_next_daemon(place: Place) -> None:
    place.start()
    limits = {"memory_limit_mb": 48.0, "cpu_limit": 0.5}
    wish = {**spec("greedy", (sys.executable, "-I", "-S", "-c", GREEDY), 1), "cwd": place.root, "resource_limits": limits}
    place.client.apply("greedy", wish)
    eventually(lambda: place.settled("greedy", 1), "it is ready")
    ((agent_id, pid),) = place.leaders().items()
    held = {one["name"]: one["held_by"] for one in place.client.agent(agent_id)["limits"]}
    assert held == {"cpu_limit": HELD["cpu_limit"], "memory_limit_mb": HELD["memory_limit_mb"]}
    assert "memory_limit_mb 48 (cgroup v" in place.run("inspect", agent_id).stdout
    place.kill()
    place.start()
    eventually(lambda: place.settled("greedy", 1), "it is adopted")
    assert place.leaders() == {agent_id: pid}
    open(f"{place.root}/eat", "w").close()
    eventually(lambda: place.agents()[0]["restarts"], "it is killed and started again")
    os.unlink(f"{place.root}/eat")
    assert place.agents()[0]["last_exit"]["text"] == "killed by SIGKILL, out of memory"
    place.client.apply("greedy", {**wish, "resource_limits": {"memory_limit_mb": 64.0}})
    eventually(lambda: place.settled("greedy", 1), "it runs")
    place.run("down", "greedy")
    place.stop()
    assert not LocalLimits(place.root)._ours()


def test_a_limit_that_has_to_be_held_and_cannot_is_refused(place: Place) -> None:
    place.start()
    wish = {**spec("greedy", ("sleep", "600"), 1), "resource_limits": {"nofile": 1 << 30, "enforce": "require"}}
    if LocalLimits(place.root).mechanisms(ResourceLimitsSpec(nofile=1 << 30)) == {"nofile": "rlimit"}:
        pytest.skip("this user may have any number of files")
    with pytest.raises(Exception, match=r"resource_limits\.nofile = .* cannot be held here: this user may have at most"):
        place.client.apply("greedy", wish)
    assert not place.client.status()["fleets"]
