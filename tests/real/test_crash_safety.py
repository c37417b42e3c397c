"""The promise: kill the daemon with -9 at any moment, start it again, and no agent is lost, leaked or doubled.

60 kills with a fixed seed; FLEETCTL_KILLS=1000 and FLEETCTL_SEED=N on demand.
"""

import json
import os
import random
import sqlite3
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from fleetctl.errors import FleetctlError
from tests.real.harness import Place, eventually, spec

KILLS = int(os.environ.get("FLEETCTL_KILLS", "60"))
SEED = int(os.environ.get("FLEETCTL_SEED", "1502"))
RIGHT_STATUS_SECONDS = 2.0
MOST = 9
# Numbers its lines, so that a lost, torn or doubled one shows. A long sleep would be ended with the shell, and so would its line.
COUNTING = ["sh", "-c", 'n=0; while :; do n=$((n+1)); echo "$$ line $n"; sleep 0.1; done']


class Chaos:
    """One fleet that always is, one that comes and goes; changes to both, and a kill in the middle of each."""

    def __init__(self, place: Place, kills: int, seed: int) -> None:
        self.place, self.kills, self.random = place, kills, random.Random(seed)
        self.killed = 0
        self.times: list[float] = []  # from the start of each daemon to a status that is right
        self.wanted = {"main": 4, "guest": 0}

    def run(self) -> None:
        self.place.start()
        self.place.client.apply("main", spec("main", COUNTING, self.wanted["main"]))
        self.settle()
        rounds = [self.scale_up, self.scale_down, self.restart, self.restart_at_once, self.up, self.scale_up, self.scale_down, self.down]
        while self.killed < self.kills:
            for turn in rounds:
                if self.killed < self.kills:
                    turn()

    # -- the changes; each says what may be true afterwards

    def scale_up(self) -> None:
        before, more = self.place.leaders("main"), self.random.randint(1, 4)
        target = min(MOST, self.wanted["main"] + more)
        self.strike("main", target, lambda: self.place.client.scale("main", target), within=0.04)
        self.assert_untouched(before, self.place.leaders("main"))

    def scale_down(self) -> None:
        before = self.place.leaders("main")
        target = max(1, self.wanted["main"] - self.random.randint(1, 4))
        self.strike("main", target, lambda: self.place.client.scale("main", target), within=0.04)
        after = self.place.leaders("main")
        self.assert_untouched({agent_id: pid for agent_id, pid in before.items() if agent_id in after}, after)
        assert after.keys() <= before.keys(), f"scaling down started {after.keys() - before.keys()}"

    def restart(self) -> None:
        self._restart(all_at_once=False, within=0.5)

    def restart_at_once(self) -> None:
        self._restart(all_at_once=True, within=0.06)

    def _restart(self, *, all_at_once: bool, within: float) -> None:
        before = self.place.leaders("main")
        answered = self.strike(
            "main", self.wanted["main"], lambda: self.place.client.restart("main", all_at_once=all_at_once), within=within
        )
        after = self.place.leaders("main")
        assert after.keys() == before.keys(), f"{self}: a restart made {before} become {after}"
        replaced = {agent_id for agent_id in before if after[agent_id] != before[agent_id]}
        # What was answered is done, whatever comes; what was not may have been lost, but never by half.
        assert len(replaced) == len(before) or not (replaced or answered), f"{self}: restarted only {replaced} of {before}"

    def up(self) -> None:
        target = self.random.randint(1, 4)
        before = self.place.leaders("main")
        self.strike("guest", target, lambda: self.place.client.apply("guest", spec("guest", COUNTING, target)), within=0.06)
        self.assert_untouched(before, self.place.leaders("main"))

    def down(self) -> None:
        if self.wanted["guest"]:
            before = self.place.leaders("main")
            self.strike("guest", 0, lambda: self.place.client.down("guest"), within=0.06)
            self.assert_untouched(before, self.place.leaders("main"))

    # -- the kill

    def strike(self, fleet: str, target: int, change: Callable[[], object], *, within: float) -> bool:
        """Ask for the change, kill the daemon in the middle of it, start it again (and sometimes kill that one too), and look.

        Whether the change was answered before the kill.
        """
        answered: list[bool] = []

        def ask() -> None:
            try:
                change()
                answered.append(True)
            except FleetctlError:
                pass  # killed before it answered: then the change may or may not have been made

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(self.random.uniform(0, within))
        self.place.kill()
        asking.join()
        self.killed += 1
        while self.killed < self.kills and self.random.random() < 0.3:
            self.place.start(wait=False)
            time.sleep(self.random.uniform(0.0, 0.2))
            self.place.kill()
            self.killed += 1
        began = self.place.start()
        eventually(self.status_is_right, f"{self}: status shows what is", RIGHT_STATUS_SECONDS)
        self.times.append(time.monotonic() - began)
        if answered or self.wish(fleet) == target:
            self.wanted[fleet] = target
        self.settle()
        return bool(answered)

    def wish(self, fleet: str) -> int:
        return sum(one["desired_replicas"] for one in self.place.client.status()["fleets"] if one["name"] == fleet)

    def status_is_right(self) -> bool:
        """Whether every process it shows was there just before or is there just after, and every one that was there both times is shown."""
        before = self.place.leaders().items()
        shown = self.place.shown().items()
        after = self.place.leaders().items()
        assert shown <= before | after, f"shown {shown}, true {before} and then {after}"
        assert shown >= before & after, f"shown {shown}, true {before} and then {after}"
        return True

    def settle(self) -> None:
        eventually(self.is_settled, f"{self}: settled at {self.wanted}")

    def is_settled(self) -> bool:
        """As wished, all ready, no restart under way, and no process of ours that status does not show."""
        shown = self.place.shown()
        for fleet, count in self.wanted.items():
            if count:
                assert self.place.settled(fleet, count), self.place.agents(fleet)
            else:
                assert not self.place.leaders(fleet)
        leaked = [process for process in self.place.processes() if shown.get(process.agent_id) != process.sid]
        assert not leaked, f"leaked: {leaked}"
        return not self.restarts_to_come()

    def restarts_to_come(self) -> list[str]:
        """Agents that a roll has not reached yet. Status does not tell them from others, the database does."""
        with closing(sqlite3.connect(f"file:{self.place.root}/fleetctl.db?mode=ro", uri=True)) as db:
            agents = [json.loads(row[0]) for row in db.execute("SELECT data FROM agents")]
        return [agent["id"] for agent in agents if agent.get("replace", "no") != "no"]

    def assert_untouched(self, before: dict[str, int], after: dict[str, int]) -> None:
        changed = {agent_id: (pid, after.get(agent_id)) for agent_id, pid in before.items() if after.get(agent_id) != pid}
        assert not changed, f"{self}: agents that nobody asked to stop are lost or replaced: {changed}"

    def __str__(self) -> str:
        return f"kill {self.killed} of {self.kills}, FLEETCTL_SEED={SEED}"


def test_kill_9_of_the_daemon_loses_leaks_and_doubles_no_agent_and_no_line(place: Place) -> None:
    chaos = Chaos(place, KILLS, SEED)
    chaos.run()
    lines = {(fleet, agent_id): _last_line(place, fleet, agent_id) for fleet in ("main", "guest") for agent_id in place.leaders(fleet)}
    for (fleet, agent_id), number in lines.items():
        eventually(lambda: _last_line(place, fleet, agent_id) > number, f"{agent_id} still writes")  # noqa: B023 - called at once
    for fleet in ("main", "guest"):
        for log in Path(f"{place.root}/logs/{fleet}").glob("*.log"):
            _assert_every_line_is_there_once(log.read_bytes())
    # The median: on a machine that is busy otherwise, a single start may take longer, and that says nothing.
    assert statistics.median(chaos.times) < RIGHT_STATUS_SECONDS
    print(f"{chaos.killed} kills; right status after {statistics.median(chaos.times):.2f} s (p50), {max(chaos.times):.2f} s (most)")


def _last_line(place: Place, fleet: str, agent_id: str) -> int:
    return int(place.log(fleet, agent_id).splitlines()[-1].split()[-1])


def _assert_every_line_is_there_once(log: bytes) -> None:
    """Each process of the agent wrote 1, 2, 3 ...; no number is missing, twice or torn."""
    numbers = defaultdict(list)
    for line in log.decode().splitlines():
        writer, _, number = line.split()
        numbers[writer].append(int(number))
    for pid, found in numbers.items():
        assert found == list(range(1, len(found) + 1)), f"process {pid} wrote {found}"


def test_a_restart_that_was_answered_is_carried_out_by_the_next_daemon(place: Place) -> None:
    place.start()
    place.client.apply("web", spec("web", ["sleep", "1000"], 4))
    for _ in range(3):
        eventually(lambda: place.settled("web", 4), "the fleet is ready")
        before = place.leaders()
        place.client.restart("web")
        place.kill()
        place.start()
        eventually(lambda: not before.items() & place.leaders().items(), "every process is another")  # noqa: B023 - called at once
