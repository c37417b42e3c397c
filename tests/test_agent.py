"""What a Python agent imports, in true processes: what it says, that it never waits, and that it hears its claim and its stop."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fleetctl.core.contract import Message, parse
from tests.helpers import wait_until

ROOT = Path(__file__).parent.parent
CLAIM = {"agent_id": "w-abcde", "fleet": "w", "slot": 3, "environment": {"TASK": "7"}, "tools": ["search"], "more": 1}
# In the place of the real times, so that no test waits for them.
HURRY = "from fleetctl import agent\nagent._REPEAT_SECONDS = 0.2\n"


class Ear:
    """Stands in for the daemon: a socket that reads when it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify.sock")
        self.started: list[subprocess.Popen[str]] = []
        self.socket: socket.socket | None = None

    def listen(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(10.0)

    def next(self) -> Message:
        assert self.socket is not None
        message = parse(self.socket.recv(65536))
        assert isinstance(message, Message), message
        assert not message.errors
        return message

    def until(self, **said: object) -> list[Message]:
        """All messages up to the first that says this."""
        heard = [self.next()]
        while any(getattr(heard[-1], name) != value for name, value in said.items()):
            heard.append(self.next())
        return heard

    def waiting(self, seconds: float = 0.0) -> bool:
        assert self.socket is not None
        return bool(select.select([self.socket], [], [], seconds)[0])

    def start(self, code: str, **environment: str) -> "subprocess.Popen[str]":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLEETCTL_")}
        environ = {**inherited, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": self.path, **environment}
        words = [sys.executable, "-c", textwrap.dedent(code)]
        child = subprocess.Popen(words, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started.append(child)
        return child

    def run(self, code: str, **environment: str) -> str:
        """To its end; what it wrote."""
        child = self.start(code, **environment)
        out, _ = child.communicate(timeout=30)
        assert child.returncode == 0
        return out

    def close(self) -> None:
        for child in self.started:
            child.kill()
            child.communicate()
        if self.socket is not None:
            self.socket.close()


@pytest.fixture
def ear() -> Iterator[Ear]:
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))  # not tmp_path: too long for a socket
    here = Ear(folder)
    here.listen()
    yield here
    here.close()
    shutil.rmtree(folder)


def line(child: "subprocess.Popen[str]") -> str:
    """The next one; waits for it."""
    assert child.stdout is not None
    return child.stdout.readline().rstrip("\n")


def go_on(child: "subprocess.Popen[str]") -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


# -- what it says


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("ready()", {"ready": True}),
        ("ready('serving')", {"ready": True, "status": "serving"}),
        ("status('two\\nlines')", {"status": "two lines"}),
        ("status('half a pair \\ud800')", {"status": "half a pair ?"}),
        ("stopping('bye')", {"stopping": True, "status": "bye"}),
        ("busy(active=2, slots=4, pending=9)", {"active": 2, "slots": 4, "pending": 9}),
        ("busy(pending=1)", {"active": 0, "pending": 1}),
        ("idle()", {"active": 0, "idle": True}),
        ("progress(12)", {"progress": 12}),
        ("metric('queue.depth', 1.5)", {"metrics": {"queue.depth": 1.5}}),
        ("tokens(1200, 34)", {"tokens": (1200, 34)}),
        ("cost(0.25)", {"cost": 0.25}),
        ("blocked('rate limit', 1790000000)", {"blocked": "rate limit", "blocked_until": 1790000000.0}),
        ("unblocked()", {"blocked": "", "blocked_until": 0.0}),
        ("resume_token('sess=1')", {"resume": "sess=1"}),
        ("recycle()", {"recycle": True}),
        ("checkpoint_done('/a/b c')", {"checkpoint": "/a/b c"}),
        ("extend_timeout(1.5)", {"extend_timeout_seconds": 1.5}),
    ],
)
def test_each_call_says_one_thing(ear: Ear, call: str, said: dict[str, Any]) -> None:  # Any: fields of many types
    child = ear.start(f"from fleetctl import agent\nagent.{call}\ninput()")
    message = ear.next()
    assert message == Message(**said, extension=message.extension)
    assert message.extension == bool(said.keys() - {"ready", "status", "stopping", "extend_timeout_seconds"})
    go_on(child)


def test_every_word_of_the_contract_can_be_said() -> None:
    """What Python agents have no use for: systemd's words for other kinds of programs, and what only the reader adds."""
    mark = next(mark for mark in test_each_call_says_one_thing.pytestmark if mark.name == "parametrize")
    tried = {name for _, said in mark.args[1] for name in said} | {"watchdog"}
    assert {field.name for field in fields(Message)} - tried == {"reloading", "barrier", "extension", "errors"}


def test_outside_fleetctl_everything_works_and_does_nothing(ear: Ear) -> None:
    code = """
    import os
    from fleetctl import agent
    agent.ready("x"); agent.status("x"); agent.busy(active=1); agent.idle(); agent.progress(1); agent.metric("a", 1); agent.tokens(1, 2)
    agent.cost(1); agent.blocked("x", 1); agent.unblocked(); agent.resume_token("x"); agent.recycle(); agent.checkpoint_done("/x")
    agent.extend_timeout(1); agent.watchdog(); agent.stopping(); agent.on_stop(); agent.on_claim(print)
    with agent.work():
        pass
    print(agent.start_watchdog(), agent.claim(), agent.state_directory(), agent.checkpoint_directory(), agent.restore_from())
    print(agent.launch(), agent.agent_id(), agent.stop_asked(), len(os.listdir("/proc/self/task")))
    """
    assert ear.run(code, NOTIFY_SOCKET="") == "False None None None None\nNone None False 1\n"


def test_it_imports_next_to_nothing(ear: Ear) -> None:
    code = "import sys; before = set(sys.modules); import fleetctl.agent; print(*set(sys.modules) - before)"
    loaded = set(ear.run(code).split())
    assert {name for name in loaded if name.startswith("fleetctl")} == {"fleetctl", "fleetctl.agent"}
    assert not {"asyncio", "dataclasses", "enum", "json", "logging", "signal", "socket", "threading", "typing"} & loaded


def test_work_is_counted_over_threads_and_coroutines_and_drawn_together(ear: Ear) -> None:
    child = ear.start(
        """
        import asyncio, threading, time
        from fleetctl import agent
        began = time.monotonic()
        def works():
            for _ in range(500):
                with agent.work():
                    pass
        async def serves():
            with agent.work():
                await asyncio.sleep(0)
        async def main():
            await asyncio.gather(*(serves() for _ in range(100)))
        threads = [threading.Thread(target=works) for _ in range(8)]
        for thread in threads: thread.start()
        asyncio.run(main())
        for thread in threads: thread.join()
        with agent.work():
            with agent.work():
                agent.status("two in work")
                input()
        agent.status("done")
        print(time.monotonic() - began)
        input()
        """
    )
    first = ear.until(status="two in work")
    go_on(child)
    heard = [*first, *ear.until(status="done")]
    while heard[-1].active != 0:
        heard.append(ear.next())
    seconds = float(line(child))
    assert max(message.active or 0 for message in first) >= 1
    assert 2 in [message.active for message in first]
    assert len(heard) < 10 * (seconds + 1.0) + 5
    go_on(child)


def test_work_that_is_over_at_once_costs_no_message(ear: Ear) -> None:
    child = ear.start(
        """
        import time
        from fleetctl import agent
        agent.busy(active=0, slots=1)
        agent.ready()
        for _ in range(20):
            with agent.work():
                pass
            time.sleep(0.01)
        time.sleep(0.3)
        agent.extend_timeout(1)
        input()
        """
    )
    assert ear.next() == Message(ready=True, active=0, slots=1, extension=True)
    assert len(ear.until(extend_timeout_seconds=1.0)) <= 2  # one that met it at the wrong moment
    go_on(child)


def test_who_never_stops_talking_repeats_what_holds_all_the_same(ear: Ear) -> None:
    child = ear.start(f"{HURRY}agent.ready('up')\nnumber = 0\nwhile True:\n    number += 1\n    agent.progress(number)")
    assert ear.next().ready
    assert ear.until(ready=True)[-1].status == "up"
    child.kill()


def test_taking_up_work_ends_being_idle(ear: Ear) -> None:
    child = ear.start("from fleetctl import agent\nagent.idle()\ninput()\nwith agent.work():\n    input()")
    assert ear.next().idle
    go_on(child)
    last = ear.until(active=1)[-1]
    assert (last.active, last.idle) == (1, False)
    go_on(child)


def test_a_number_that_is_none_is_refused_and_spoils_nothing_that_comes_later(ear: Ear) -> None:
    code = """
    from fleetctl import agent
    try:
        agent.busy(active="many")
    except ValueError:
        print("refused")
    agent.busy(active=-3)
    with agent.work():
        input()
    """
    child = ear.start(code)
    assert line(child) == "refused"
    assert ear.until(active=1)[-1].active == 1
    go_on(child)


# -- it never waits, and what it said is not forgotten


def test_what_holds_is_said_again_for_a_daemon_that_was_restarted(ear: Ear) -> None:
    assert ear.socket is not None
    ear.socket.close()
    os.unlink(ear.path)
    child = ear.start(
        f"{HURRY}agent.ready('up')\nagent.busy(active=1, slots=2)\nagent.extend_timeout(5)\nprint('said', flush=True)\ninput()"
    )
    assert line(child) == "said"
    ear.listen()
    # The first one may be what was drawn together, and not all that holds.
    assert ear.until(ready=True)[-1] == Message(ready=True, status="up", active=1, slots=2, extension=True)
    assert ear.next() == Message(ready=True, status="up", active=1, slots=2, extension=True)
    go_on(child)


def test_a_full_queue_delays_the_message_and_never_the_agent(ear: Ear) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                flood.sendto(b"STATUS=flood", ear.path)
    code = """
    import time
    from fleetctl import agent
    began = time.monotonic()
    agent.extend_timeout(9)
    agent.ready()
    agent.resume_token("r")
    print(time.monotonic() - began, flush=True)
    input()
    """
    child = ear.start(code)
    assert float(line(child)) < 1.0
    while (message := ear.next()).status == "flood":
        pass
    assert message == Message(extend_timeout_seconds=9.0)
    assert ear.next() == Message(ready=True, resume="r", extension=True)
    go_on(child)


def test_a_flood_of_words_keeps_within_what_is_heard(ear: Ear) -> None:
    child = ear.start(
        """
        import time
        from fleetctl import agent
        began = time.monotonic()
        for number in range(2000):
            agent.resume_token(f"r{number}")
            agent.progress(number)
        print(time.monotonic() - began, flush=True)
        input()
        """
    )
    heard = ear.until(resume="r1999")
    seconds = float(line(child))
    assert len(heard) <= 25 + 40 * seconds
    go_on(child)


def test_a_child_of_a_fork_does_not_repeat_its_parent(ear: Ear) -> None:
    child = ear.start(
        f"""{HURRY}
import os, sys
agent.ready("parent")
if os.fork() == 0:
    agent.progress(5)
    input()
    os._exit(0)
os.wait()
"""
    )
    heard = ear.until(progress=5)
    assert heard[-1] == Message(progress=5, extension=True)
    while (message := ear.next()).progress is None:  # of the parent, which goes on repeating
        assert message == Message(ready=True, status="parent")
    assert message == Message(progress=5, extension=True)
    go_on(child)


def test_signals_are_for_the_main_thread(ear: Ear) -> None:
    child = ear.start(
        """
        import signal
        from fleetctl import agent
        agent.ready()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        print("blocked", flush=True)
        print(signal.sigwait({signal.SIGTERM}).name, flush=True)
        """
    )
    assert line(child) == "blocked"
    child.terminate()
    assert line(child) == "SIGTERM"
    assert child.wait(10) == 0


def test_a_signal_handler_may_speak_in_the_middle_of_a_word(ear: Ear) -> None:
    out = ear.run(
        """
        import signal, time
        from fleetctl import agent
        count = 0
        def handler(*_):
            global count
            count += 1
            agent.metric(f"m{count}", count)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        while count < 200:
            agent.metric(f"n{count}", 1)
            with agent.work():
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("done")
        """
    )
    assert out == "done\n"


# -- the watchdog


def test_a_loop_that_hangs_pings_no_more(ear: Ear) -> None:
    code = """
    import asyncio, sys
    from fleetctl import agent
    async def main():
        print(agent.start_watchdog(), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print("hangs", flush=True)
        sys.stdin.readline()
    asyncio.run(main())
    """
    child = ear.start(code, WATCHDOG_USEC="100000")
    assert line(child) == "True"
    for _ in range(4):
        assert ear.next() == Message(watchdog="ping")
    go_on(child)
    assert line(child) == "hangs"
    while ear.waiting():
        ear.next()
    assert not ear.waiting(0.4)
    go_on(child)


def test_a_thread_pings_for_as_long_as_the_main_loop_is_alive(ear: Ear) -> None:
    code = """
    from fleetctl import agent
    alive = True
    agent.start_watchdog(lambda: alive)
    input()
    alive = False
    print("dead", flush=True)
    input()
    """
    child = ear.start(code, WATCHDOG_USEC="100000")
    for _ in range(4):
        assert ear.next() == Message(watchdog="ping")
    go_on(child)
    assert line(child) == "dead"
    while ear.waiting(0.1):  # one that was on its way
        ear.next()
    assert not ear.waiting(0.3)
    go_on(child)


def test_pings_of_a_busy_loop_are_drawn_together(ear: Ear) -> None:
    child = ear.start(
        "from fleetctl import agent\nfor _ in range(20000): agent.watchdog()\nprint('x', flush=True)", WATCHDOG_USEC="60000000"
    )
    assert ear.next() == Message(watchdog="ping")
    assert line(child) == "x"
    assert not ear.waiting()


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}])
def test_where_nobody_waits_for_pings_there_are_none(ear: Ear, environment: dict[str, str]) -> None:
    out = ear.run("from fleetctl import agent\nagent.watchdog()\nprint(agent.start_watchdog(lambda: True))", **environment)
    assert out == "False\n"
    assert not ear.waiting()


# -- what it is told

WAITS = """
import sys
from fleetctl import agent
def tell(claim):
    print(claim.agent_id, claim.fleet, claim.slot, claim.environment, claim.tools, claim.data["more"], flush=True)
agent.on_claim(tell)
print("waits", agent.claim(), flush=True)
for _ in sys.stdin:
    print("alive", flush=True)
"""
WAITS_IN_A_LOOP = """
import asyncio, sys
from fleetctl import agent
def tell(claim):
    print(claim.agent_id, claim.fleet, claim.slot, claim.environment, claim.tools, claim.data["more"], flush=True)
async def main():
    agent.on_claim(tell)
    print("waits", agent.claim(), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print("alive", flush=True)
asyncio.run(main())
"""
TOLD = "w-abcde w 3 {'TASK': '7'} ['search'] 1"


@pytest.mark.parametrize("code", [WAITS, WAITS_IN_A_LOOP])
def test_an_agent_of_the_warm_pool_is_told_its_claim_when_it_goes_on(ear: Ear, tmp_path: Path, code: str) -> None:
    path = tmp_path / "claim.json"
    child = ear.start(code, FLEETCTL_CLAIM=str(path))
    assert line(child) == "waits None"
    assert ear.next().extension  # it tells that it will read it
    child.send_signal(signal.SIGCONT)  # somebody's, and no claim
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    path.write_text(json.dumps(CLAIM))
    child.send_signal(signal.SIGCONT)
    assert line(child) == TOLD
    child.send_signal(signal.SIGCONT)
    go_on(child)
    assert line(child) == "alive"  # and is told once


def test_a_signal_in_the_middle_of_reading_the_claim_does_not_tell_it_twice(ear: Ear, tmp_path: Path) -> None:
    (tmp_path / "claim.json").write_text(json.dumps(CLAIM))
    code = """
    import signal
    from fleetctl import agent
    read, told, left = agent.claim, [], [signal.SIGCONT]
    def interrupted():
        found = read()
        if left:
            signal.raise_signal(left.pop())
        return found
    agent.claim = interrupted
    agent.on_claim(told.append)
    print(len(told))
    """
    assert ear.run(code, FLEETCTL_CLAIM=str(tmp_path / "claim.json")) == "1\n"


def test_a_claim_that_is_there_is_told_at_once(ear: Ear, tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    path.write_text(json.dumps(CLAIM))
    child = ear.start(WAITS, FLEETCTL_CLAIM=str(path))
    assert line(child) == TOLD
    assert line(child).startswith("waits Claim(agent_id='w-abcde', fleet='w', slot=3")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"agent_id": "a"}', "\udcff"])
def test_what_is_no_claim_is_none(ear: Ear, tmp_path: Path, text: str) -> None:
    path = tmp_path / "claim.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert ear.run("from fleetctl import agent\nprint(agent.claim())", FLEETCTL_CLAIM=str(path)) == "None\n"


@pytest.mark.parametrize(
    "code",
    [
        """
        from fleetctl import agent
        import time
        agent.stop_asked()
        print("works", flush=True)
        while not agent.stop_asked():
            time.sleep(0.01)
        print("stopped")
        """,
        """
        from fleetctl import agent
        import asyncio
        async def main():
            done = asyncio.Event()
            agent.on_stop(done.set)
            print("works", flush=True)
            await done.wait()
            print("stopped")
        asyncio.run(main())
        """,
    ],
)
def test_a_stop_is_heard_and_answered(ear: Ear, code: str) -> None:
    child = ear.start(code)
    assert line(child) == "works"
    child.terminate()
    assert line(child) == "stopped"
    assert child.wait(10) == 0
    assert ear.next() == Message(stopping=True)


def test_it_knows_where_its_things_are(ear: Ear) -> None:
    places = {
        "STATE_DIRECTORY": "/s:/t",
        "FLEETCTL_CHECKPOINT_DIR": "/c",
        "FLEETCTL_RESTORE": "/r",
        "FLEETCTL_LAUNCH": "restore",
        "FLEETCTL_AGENT_ID": "w-abcde",
    }
    names = ("state_directory", "checkpoint_directory", "restore_from", "launch", "agent_id")
    out = ear.run(f"from fleetctl import agent\nprint(*(getattr(agent, name)() for name in {names}))", **places)
    assert out == "/s /c /r restore w-abcde\n"


def test_a_message_that_fits_into_no_datagram_takes_no_other_with_it(ear: Ear) -> None:
    child = ear.start(
        f"{HURRY}agent.resume_token('x' * 5000)\n"
        "for number in range(200): agent.metric(f'name_of_a_gauge_{number}', number)\nagent.progress(1)\ninput()"
    )
    seen: dict[str, float] = {}
    deadline = time.monotonic() + 10
    while len(seen) < 200:
        seen |= ear.next().metrics
        assert time.monotonic() < deadline
    wait_until(lambda: ear.next().progress == 1)
    go_on(child)
