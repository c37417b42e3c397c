"""Agents that behave badly, and a machine that runs out of descriptors or processes: nobody else is harmed, nothing is left behind."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.real.harness import Place, eventually, spec

SLEEP = ["sleep", "1000"]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_an_agent_that_ignores_term_is_killed_when_its_time_is_up(place: Place) -> None:
    place.start()
    deaf = ["sh", "-c", 'trap "" TERM; echo deaf; while :; do sleep 1; done']
    place.client.apply("deaf", spec("deaf", deaf, 2, graceful_drain={"timeout_seconds": 0.3}))
    eventually(lambda: place.settled("deaf", 2), "the agents run")
    eventually(lambda: all(b"deaf" in place.log("deaf", agent_id) for agent_id in place.leaders()), "they have set their traps")
    began = time.monotonic()
    place.run("down", "deaf")
    assert not place.processes()
    assert 0.3 <= time.monotonic() - began < 5
    told = [event for event in place.client.events("deaf")["events"] if event["kind"] == "drain.timeout"]
    assert len(told) == 2
    assert "E2093" in told[0]["message"]


def test_a_stopped_agent_says_so_and_still_ends_at_once(place: Place) -> None:
    place.start()
    place.client.apply("still", spec("still", ["sh", "-c", "kill -STOP $$; sleep 1000"], 1))
    eventually(lambda: "stopped by a signal" in place.agents()[0]["note"], "status says that it is stopped", 15)
    began = time.monotonic()
    place.run("down", "still")
    assert not place.processes()
    assert time.monotonic() - began < 4, "it was killed after its timeout, instead of being continued to act on TERM"


# How a process gets away from its parent's session: by setsid after a double fork, and with an environment of its own as well.
ESCAPES = {
    "double fork": "(setsid sleep 1000 &) & sleep 1000",
    "double fork, no environment": "(env -i setsid sleep 1000 &) & sleep 1000",
    "ignores TERM too": """(trap "" TERM; setsid sh -c "sleep 1000; sleep 1000" &) & sleep 1000""",
}


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("crashed", [False, True], ids=["same daemon", "after a crash"])
def test_what_an_agent_double_forked_ends_with_it(place: Place, escape: str, crashed: bool) -> None:
    place.start()
    marked = ESCAPES[escape].replace("1000", str(100_000 + os.getpid()))  # so that the test finds what has no environment
    place.client.apply("fork", spec("fork", ["sh", "-c", marked], 1, graceful_drain={"timeout_seconds": 0.5}))
    seconds = f"\0{100_000 + os.getpid()}\0".encode()
    eventually(lambda: len(_with_argument(seconds)) == 2, "the agent and its escaped child run")
    eventually(lambda: place.settled("fork", 1), "the agent is ready")
    if crashed:
        place.kill()
        place.start()
        eventually(lambda: place.settled("fork", 1), "the agent is adopted")
    place.run("down")
    assert not _with_argument(seconds)
    assert not place.processes()


# Where a child can be while its agent is asked to stop: still its child, in a session of its own; or nobody's.
ELSEWHERE = {
    "child": """setsid sh -c "{heeds}" & exec sleep 1000""",
    "orphan": """(setsid sh -c "{heeds}" &) ; exec sleep 1000""",
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_each_process_of_an_agent_is_asked_to_stop_wherever_it_is(place: Place, where: str) -> None:
    place.start()
    heeds = "trap 'echo asked; exit' TERM; echo up; while :; do sleep 0.02; done"
    place.client.apply("tree", spec("tree", ["sh", "-c", ELSEWHERE[where].format(heeds=heeds)], 1))
    place.client.apply("calm", spec("calm", SLEEP, 1))
    eventually(lambda: place.settled("tree", 1) and b"up" in place.log("tree", place.agents("tree")[0]["id"]), "the tree stands")
    agent_id = place.agents("tree")[0]["id"]
    place.run("down", "tree")
    assert place.log("tree", agent_id).count(b"asked") == 1
    assert place.settled("calm", 1)


# What a daemon of the old school does, and an environment and descriptors shed as well: nothing of its agent's is left to see.
SHEDS_EVERYTHING = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 1024)
        os.execve("/bin/sleep", ["sleep", "{seconds}"], {{}})
    os._exit(0)
os.wait()
os.execv("/bin/sleep", ["sleep", "{seconds}"])
"""


class Shedding:
    """A fleet of one such agent, and its two processes, found by an argument of theirs."""

    def __init__(self, place: Place) -> None:
        seconds = 200_000 + os.getpid()
        self.place, self._argument = place, f"\0{seconds}\0".encode()
        command = python(SHEDS_EVERYTHING.format(seconds=seconds))
        place.client.apply("shed", spec("shed", command, 1, graceful_drain={"timeout_seconds": 0.5}))
        self.wait_up()

    def pids(self) -> set[int]:
        return set(_with_argument(self._argument))

    def wait_up(self) -> None:
        eventually(lambda: len(self.pids()) == 2 and self.place.settled("shed", 1), "the agent and what escaped from it run")


@pytest.mark.parametrize("crashed", [False, True], ids=["same daemon", "after a crash"])
@pytest.mark.parametrize("words", [("down",), ("scale", "shed=0")], ids=["down", "scale"])
def test_what_shed_everything_of_its_agent_ends_with_it(place: Place, words: tuple[str, ...], crashed: bool) -> None:
    place.start()
    shedding = Shedding(place)
    if crashed:
        place.kill()
        place.start()
        eventually(lambda: place.settled("shed", 1), "the agent is adopted")
    place.run(*words)
    eventually(lambda: not place.agents(), "nothing of the fleet is left")
    assert not shedding.pids()


@pytest.mark.parametrize("remembered", [True, False], ids=["recorded", "database lost"])
def test_what_shed_everything_ends_though_agent_and_daemon_are_dead(place: Place, remembered: bool) -> None:
    place.start()
    shedding = Shedding(place)
    before, (leader,) = shedding.pids(), place.leaders().values()
    place.kill()
    os.kill(leader, signal.SIGKILL)
    if not remembered:
        for name in ("fleetctl.db", "fleetctl.db-wal", "fleetctl.db-shm"):
            Path(place.root, name).unlink(missing_ok=True)
    place.start()
    eventually(lambda: not before & shedding.pids(), "what was left over is ended")
    shedding.wait_up()
    place.run("down")
    assert not shedding.pids()


def test_what_shed_everything_ends_before_its_agent_is_replaced(place: Place) -> None:
    place.start()
    shedding = Shedding(place)
    before, (leader,) = shedding.pids(), place.leaders().values()
    os.kill(leader, signal.SIGKILL)
    eventually(lambda: not before & shedding.pids(), "what was left over is ended")
    shedding.wait_up()
    place.run("down", "--now")
    assert not shedding.pids()


def test_an_agent_that_starts_the_next_daemon_takes_nobody_with_it(place: Place) -> None:
    place.start()
    start = f"{sys.executable} -m fleetctl --state-dir {place.root} daemon start"
    script = f"until [ -e {place.root}/now ]; do sleep 0.05; done; {start}; exec sleep 1000"
    place.client.apply("odd", spec("odd", ["sh", "-c", script], 1, environment={"PYTHONPATH": place.environ()["PYTHONPATH"]}))
    place.client.apply("calm", spec("calm", SLEEP, 1))
    eventually(lambda: place.settled("odd", 1) and place.settled("calm", 1), "both run")
    place.kill()
    Path(place.root, "now").touch()
    eventually(lambda: place.client.scale("calm", 2), "the agent has started a daemon", 20)
    eventually(lambda: place.settled("calm", 2), "it has started an agent")
    calm = place.leaders("calm")
    place.run("down", "odd")
    assert place.leaders("calm") == calm
    assert place.settled("calm", 2)


def _with_argument(argument: bytes) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if (
                name.isdigit()
                and argument in Path(f"/proc/{name}/cmdline").read_bytes()
                and b"sleep\0" in Path(f"/proc/{name}/cmdline").read_bytes()
            ):
                found.append(int(name))
        except OSError:
            continue
    return found


def test_a_leader_that_dies_takes_its_tree_along_before_it_is_replaced(place: Place) -> None:
    place.start()
    place.client.apply("tree", spec("tree", ["sh", "-c", "sleep 1000 & (setsid sleep 1000 &) ; wait"], 1))
    eventually(lambda: place.settled("tree", 1) and len(place.processes()) == 3, "the tree stands")
    old = {process.pid for process in place.processes()}
    os.kill(place.leaders().popitem()[1], signal.SIGKILL)
    eventually(lambda: place.settled("tree", 1) and len(place.processes()) == 3, "another tree stands")
    assert not old & {process.pid for process in place.processes()}


def test_a_bounded_fork_bomb_is_ended_whole(place: Place) -> None:
    place.start()
    bomb = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor _ in range(6): os.fork()\ntime.sleep(1000)"
    place.client.apply("bomb", spec("bomb", python(bomb), 1))
    place.client.apply("calm", spec("calm", SLEEP, 1))
    eventually(lambda: len(place.processes()) == 65, "64 processes and one calm agent run", 20)
    calm = place.leaders("calm")
    place.run("down", "bomb", "--now")
    assert [process.fleet for process in place.processes()] == ["calm"]
    assert place.leaders("calm") == calm


def test_an_agent_that_exits_at_once_is_a_crash_loop_with_its_last_words(place: Place) -> None:
    place.start()
    restart = {"crash_loop_failures": 4, "backoff_seconds": 0.01, "backoff_cap_seconds": 0.02}
    place.client.apply("loop", spec("loop", ["sh", "-c", "echo no luck today; exit 3"], 1, restart=restart))
    place.client.apply("calm", spec("calm", SLEEP, 1))
    eventually(lambda: place.agents("loop")[0]["state"] == "failed", "the crash loop is called one")
    agent = place.agents("loop")[0]
    assert agent["last_exit"]["code"] == 3
    assert "crash loop: 4 exits" in agent["note"]
    assert "no luck today" in agent["note"]
    assert place.log("loop", agent["id"]).count(b"no luck today") == 4
    assert place.settled("calm", 1)


def test_200_mb_of_output_delay_nobody_and_are_cut_to_what_was_allowed(place: Place) -> None:
    place.start()
    code = "import os, time\nfor _ in range(200_000): os.write(1, b'x' * 1023 + b'\\n')\nos.write(1, b'last\\n')\ntime.sleep(1000)"
    limits = {"max_bytes": 10_000_000, "keep": 2, "total_bytes": 40_000_000}
    place.client.apply("loud", spec("loud", python(code), 1, logs=limits))
    place.client.apply("calm", spec("calm", SLEEP, 2))
    eventually(lambda: place.settled("calm", 2), "the others are not held up", 2)
    slowest = 0.0
    agent_id = place.leaders("loud").popitem()[0]
    while not _ends_with(f"{place.root}/logs/loud/{agent_id}.log", b"last\n"):
        began = time.monotonic()
        place.client.status()
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    assert slowest < 1, f"status took {slowest:.2f} s beside an agent that writes a lot"
    eventually(lambda: _blocks(f"{place.root}/logs/loud") <= 40_000_000, "the log is as small as it should be", 15)
    assert place.run("logs", agent_id, "-n", "1").stdout == "last\n"


def _ends_with(path: str, end: bytes) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(end)))
        return file.read() == end


def _blocks(folder: str) -> int:
    """Bytes on the disk: a log that is cut from the front has a hole there."""
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))


def test_a_machine_out_of_descriptors_is_told_and_waited_for(place: Place) -> None:
    """EMFILE: the daemon may open 64 files, and holds one for each agent."""
    if not (prlimit := shutil.which("prlimit")):
        pytest.skip("prlimit is not installed (util-linux)")
    place.start(before=[prlimit, "--nofile=64:64"])
    place.client.apply("many", spec("many", SLEEP, 60, restart={"backoff_cap_seconds": 0.5}))
    eventually(lambda: any("Too many open files" in agent["note"] for agent in place.agents()), "status says why")
    assert place.daemon is not None
    assert place.daemon.poll() is None
    some = place.leaders()
    assert 5 <= len(some) < 64
    place.client.scale("many", 5)
    eventually(lambda: place.settled("many", 5), "five agents are possible, and ready")
    assert place.leaders().items() <= some.items()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run the daemon under a uid that has no other processes")
def test_a_machine_out_of_processes_is_told_and_waited_for(place: Place) -> None:
    """EAGAIN: the limit counts the real uid's processes, and root's are free; so a real uid of its own, with root's effective one."""
    if not (setpriv := shutil.which("setpriv")) or not (prlimit := shutil.which("prlimit")):
        pytest.skip("setpriv and prlimit are not installed (util-linux)")
    unprivileged = [setpriv, "--ruid=61234", "--bounding-set=-sys_resource,-sys_admin"]
    place.start(before=[*unprivileged, prlimit, "--nproc=16:16"])
    place.client.apply("many", spec("many", SLEEP, 30, restart={"backoff_cap_seconds": 0.5}))
    eventually(lambda: any("Resource temporarily unavailable" in agent["note"] for agent in place.agents()), "status says why")
    assert place.daemon is not None
    assert place.daemon.poll() is None
    some = place.leaders()
    assert 3 < len(some) < 16
    place.client.scale("many", 3)
    eventually(lambda: place.settled("many", 3), "three agents are possible, and ready")
    assert place.leaders().items() <= some.items()


def test_agents_hear_signals_that_whoever_started_the_daemon_ignored(place: Place) -> None:
    """nohup ignores HUP, a shell's job in the background INT and QUIT; an agent that stops on one of them must not inherit that."""
    place.start(before=["sh", "-c", 'trap "" HUP INT QUIT USR1; exec "$@"', "sh"])
    place.client.apply("web", spec("web", SLEEP, 1, stop_signal="QUIT"))
    eventually(lambda: place.settled("web", 1), "the agent is ready")
    pid = place.leaders().popitem()[1]
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert [number for number in signal.valid_signals() if ignored >> (number - 1) & 1] == []
