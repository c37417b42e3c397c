"""What a Python agent imports to talk to fleetctl; outside fleetctl every call works and does nothing.

    from fleetctl import agent

    agent.ready("waiting for work")
    while not agent.stop_asked():
        job = next_job()
        with agent.work():
            do(job)

Standard library only, and a millisecond to import. No call waits: a message that cannot be sent at once is tried again by a thread in
the background, which also repeats every 15 seconds what holds (ready, status, work at hand, totals), so that a daemon that was restarted
knows it again. What can wait waits a tenth of a second, and is not said at all where it is as before by then: work that is shorter shows
as often as it is met. Where several processes of one agent report their work, the last word counts: let one of them do it.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SO_SNDTIMEO, SOCK_DGRAM, SOL_SOCKET
from _socket import socket as Socket  # the C half: `socket` itself takes 4 ms more for enums that are not needed here
from _thread import RLock, allocate_lock, start_new_thread
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Mapping
    from signal import Signals
    from types import FrameType, TracebackType

__all__ = [
    "Claim",
    "agent_id",
    "blocked",
    "busy",
    "checkpoint_directory",
    "checkpoint_done",
    "claim",
    "cost",
    "extend_timeout",
    "idle",
    "launch",
    "metric",
    "on_claim",
    "on_stop",
    "progress",
    "ready",
    "recycle",
    "restore_from",
    "resume_token",
    "start_watchdog",
    "state_directory",
    "status",
    "stop_asked",
    "stopping",
    "tokens",
    "unblocked",
    "watchdog",
    "work",
]

_X = "X_FLEETCTL_"
_MAX_BYTES = 4096
_REPEAT_SECONDS = 15.0
# Fifty messages a second is what an agent may send: so long is gathered what can wait, and so many a second is what cannot.
_GATHER_SECONDS, _MOST_AT_ONCE = 0.1, 20.0
_MOST_LATE = 64


# ---- what an agent says ----


def ready(text: str = "") -> None:
    """It does its work from now on."""
    _say({"READY": "1", **({"STATUS": text} if text else {})}, at_once=True)


def status(text: str) -> None:
    """What it is doing, in a few words; `fleetctl status` shows it."""
    _say({"STATUS": text})


def stopping(text: str = "") -> None:
    """It is about to end."""
    with _lock:
        _picture.pop("READY", None)
        _sent.pop("READY", None)
    _say({"STOPPING": "1", **({"STATUS": text} if text else {})}, at_once=True)


def busy(*, active: int | None = None, slots: int | None = None, pending: int | None = None) -> None:
    """How much is in work, how much could be at once, and how much waits; what is left out stays as it was."""
    with _lock:
        if active is not None:
            _working[0] = max(0, int(active))  # before it is kept: what is no number must not spoil what comes later
        _say_work(slots, pending)


def idle() -> None:
    """It may be suspended now: no lock held, nothing half written, no connection open. Taking up work ends that."""
    with _lock:
        _working[0] = 0
        _say({f"{_X}ACTIVE": "0", f"{_X}IDLE": "1"})


class work:
    """`with agent.work():` around a piece of work counts it as in work; in threads and in coroutines too."""

    def __enter__(self) -> None:
        with _lock:
            _working[0] += 1
            _say_work()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _lock:
            _working[0] = max(0, _working[0] - 1)
            _say_work()


def progress(number: int) -> None:
    """Any counter that grows as work is done: who works and does not get on is stuck."""
    _say({f"{_X}PROGRESS": str(int(number))})


def metric(name: str, value: float) -> None:
    """A gauge of its own, which the autoscaler may go by. Not below 0."""
    _say({f"{_X}METRIC={name}": _plain(value)})


def tokens(taken: int, given: int) -> None:
    """Tokens in and out, in all so far."""
    _say({f"{_X}TOKENS": f"{int(taken)},{int(given)}"})


def cost(usd: float) -> None:
    """What it cost in US dollars, in all so far."""
    _say({f"{_X}COST": _plain(usd)})


def blocked(reason: str, until: float) -> None:
    """It cannot work before `until`, a Unix time, as with a rate limit: no failure, and no capacity until then."""
    _say({f"{_X}BLOCKED": reason or "blocked", f"{_X}UNTIL": _plain(until)}, at_once=True)


def unblocked() -> None:
    """It can work again, sooner than it said."""
    _say({f"{_X}BLOCKED": "", f"{_X}UNTIL": "0"}, at_once=True)


def resume_token(token: str) -> None:
    """What whoever goes on in its place needs to know; kept on disk at once, and part of its checkpoints."""
    _say({f"{_X}RESUME": token}, at_once=True)


def recycle() -> None:
    """Replace me when convenient, after so many jobs, say."""
    _say({f"{_X}RECYCLE": "1"}, at_once=True)


def checkpoint_done(path: str) -> None:
    """A checkpoint is complete, in this file or folder."""
    _send_once(f"{_X}CHECKPOINT={_one_line(path)}")


def extend_timeout(seconds: float) -> None:
    """It needs so much more time, from now on, to become ready or to stop."""
    _send_once(f"EXTEND_TIMEOUT_USEC={max(0, round(seconds * 1e6))}")


def watchdog() -> None:
    """It is alive. For the main loop of a program with `watchdog_seconds`; as often as you like, and without effect elsewhere."""
    interval, now = _watchdog_seconds(), monotonic()
    if interval is not None and now - _last_ping[0] >= interval / 4:
        _last_ping[0] = now
        _send_once("WATCHDOG=1")


def start_watchdog(alive: Callable[[], bool] | None = None) -> bool:
    """Ping by itself from now on; whether that is wanted at all.

    In a running asyncio loop the loop does it, so that a loop that hangs is missed. Elsewhere a thread does, as long as `alive` says so.
    """
    interval = _watchdog_seconds()
    if interval is None:
        return False
    loop = _running_loop()
    if loop is not None and alive is None:

        def ping() -> None:
            watchdog()
            loop.call_later(interval / 2, ping)

        ping()
        return True
    if alive is None:
        raise ValueError("outside an asyncio loop: start_watchdog(alive=...), a function that tells whether the main loop is alive")
    asked = alive

    def beat() -> None:
        while True:
            if asked():
                watchdog()
            _pause(interval / 2)

    _start_thread(beat)
    return True


# ---- what an agent is told ----


class Claim:
    """Who this agent is now: for an agent of the warm pool nobody knew that when it started.

    `environment` and `tools` are what whoever acquired it asked for; `data` is all that the claim says.
    """

    __slots__ = ("agent_id", "data", "environment", "fleet", "slot", "tools")

    def __init__(self, data: Mapping[str, object]) -> None:
        variables, tools, slot = data.get("environment"), data.get("tools"), data.get("slot")
        self.data = data
        self.agent_id = str(data["agent_id"])
        self.fleet = str(data["fleet"])
        self.slot = slot if isinstance(slot, int) else 0
        self.environment = {str(name): str(value) for name, value in variables.items()} if isinstance(variables, dict) else {}
        self.tools = [str(tool) for tool in tools] if isinstance(tools, list) else []

    def __repr__(self) -> str:
        return f"Claim(agent_id={self.agent_id!r}, fleet={self.fleet!r}, slot={self.slot}, tools={self.tools!r})"


def claim() -> Claim | None:
    """The claim, read now; None outside fleetctl, and as long as this agent waits in the warm pool."""
    path = os.environ.get("FLEETCTL_CLAIM")
    if not path:
        return None
    import json  # later, because most agents start without reading one

    try:
        with open(path, encoding="utf-8") as file:
            return Claim(json.load(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none there; a claim is renamed into its place, so never half
        return None


def on_claim(callback: Callable[[Claim], object]) -> None:
    """Call this once with the claim: at once where there is one, else when the agent is taken out of the warm pool.

    From the asyncio loop that runs now; without one from a handler of SIGCONT, which only the main thread can set.
    """
    import signal

    _say({f"{_X}CLAIM": "1"}, at_once=True)  # so that fleetctl knows that this agent reads it
    waiting = [callback]

    def look() -> None:
        found = claim() if waiting else None
        # Asked once more: while it was read another signal may have come, whose handler has told it already.
        if found is not None and waiting:
            waiting.pop()(found)

    _on_signal(signal.SIGCONT, look)
    look()


def on_stop(callback: Callable[[], object] | None = None, *, signals: tuple[int, ...] | None = None) -> None:
    """Have SIGTERM and SIGINT, or these, set what `stop_asked` tells, and call this once, instead of ending the program.

    From the asyncio loop that runs now; without one from a signal handler, which only the main thread can set.
    """
    import signal

    def stop() -> None:
        if not _stop[0]:
            _stop[0] = True
            stopping()
            if callback is not None:
                callback()

    for number in signals or (signal.SIGTERM, signal.SIGINT):
        _on_signal(signal.Signals(number), stop, chain=False)
    _stop[1] = True


def stop_asked() -> bool:
    """Whether the agent was asked to stop. The first call starts to listen for that, as `on_stop` does."""
    if not _stop[1]:
        on_stop()
    return _stop[0]


def state_directory() -> str | None:
    """The folder that is this agent's own over all its restarts, and part of its checkpoints."""
    return os.environ.get("STATE_DIRECTORY", "").split(":")[0] or None


def checkpoint_directory() -> str | None:
    """Where to write what is to be saved beside that."""
    return os.environ.get("FLEETCTL_CHECKPOINT_DIR") or None


def restore_from() -> str | None:
    """The checkpoint that this agent is to go on from; None on a fresh start."""
    return os.environ.get("FLEETCTL_RESTORE") or None


def launch() -> str | None:
    """How it was started: cold, warm (it may be suspended, and claimed later) or restore; None outside fleetctl."""
    return os.environ.get("FLEETCTL_LAUNCH") or None


def agent_id() -> str | None:
    return os.environ.get("FLEETCTL_AGENT_ID") or None


# ---- how it gets there ----

_lock = RLock()  # re-entrant, because a signal handler may speak while the main thread does
_picture: dict[str, str] = {}  # word -> value: all that holds
_sent: dict[str, str] = {}  # what of it was sent last
_late: list[str] = []  # said once, and still to be sent
_working = [0]
_last_ping = [0.0]
_at_once = [_MOST_AT_ONCE, 0.0]  # how many may be sent at once, as of then
_stop = [False, False]  # asked to; listening for that
_thread_runs = [False]
_wake = allocate_lock()
_wake.acquire()
_out: list[Socket] = []


def _reset() -> None:
    """In the child of a fork: what its parent said is the parent's, and so is the thread that would say it again."""
    global _lock, _wake
    _lock, _wake = RLock(), allocate_lock()
    _wake.acquire()
    _picture.clear()
    _sent.clear()
    _late.clear()
    _out.clear()
    _working[0], _thread_runs[0] = 0, False


os.register_at_fork(after_in_child=_reset)


def _say_work(slots: int | None = None, pending: int | None = None) -> None:
    words = {f"{_X}ACTIVE": _working[0], f"{_X}SLOTS": slots, f"{_X}PENDING": pending}
    said = {word: str(max(0, int(number))) for word, number in words.items() if number is not None}
    if _working[0] and f"{_X}IDLE" in _picture:
        said[f"{_X}IDLE"] = "0"
    _say(said)


def _say(words: dict[str, str], *, at_once: bool = False) -> None:
    """Something that holds until it is said anew."""
    if not _address():
        return
    with _lock:
        clean = {word: _one_line(value) for word, value in words.items()}
        if clean.items() <= _picture.items():
            return
        _picture.update(clean)
        if not (at_once and _may_send() and _flush()):
            _wake_thread()
        _ensure_thread()


def _may_send() -> bool:
    now = monotonic()
    allowed = min(_MOST_AT_ONCE, _at_once[0] + (now - _at_once[1]) * _MOST_AT_ONCE)
    if allowed < 1.0:
        return False
    _at_once[:] = [allowed - 1.0, now]
    return True


def _send_once(line: str) -> None:
    """Something that is true this moment."""
    if not _address():
        return
    if not _send(line):
        with _lock:
            del _late[: len(_late) - _MOST_LATE + 1]
            _late.append(line)
            _wake_thread()


def _flush() -> bool:
    """Send what is new, the lock held; whether that is done."""
    new = _new()
    _sent.update(new)  # before it is: a signal handler may speak in the middle of this, and what it says is newer
    done = all(_send(text) for text in _datagrams(new))
    if not done:
        _forget_sent(new)
    return done


def _new() -> dict[str, str]:
    return {word: value for word, value in list(_picture.items()) if _sent.get(word) != value}


def _forget_sent(words: dict[str, str]) -> None:
    for word in words:
        _sent.pop(word, None)


def _ensure_thread() -> None:
    if not _thread_runs[0]:
        _thread_runs[0] = True
        _start_thread(_repeat)


def _wake_thread() -> None:
    _ensure_thread()
    if _wake.locked():
        _wake.release()


def _repeat() -> None:
    """The thread: sends what could not be sent or came too fast, and every now and then all that holds."""
    from struct import pack

    out = Socket(AF_UNIX, SOCK_DGRAM)
    # A timeout of Python's own would try again and again: such a socket counts as writable however full the other end is.
    out.setsockopt(SOL_SOCKET, SO_SNDTIMEO, pack("ll", 1, 0))
    due = monotonic() + _REPEAT_SECONDS
    while True:
        if _wake.acquire(timeout=max(0.0, due - monotonic())):
            _pause(_GATHER_SECONDS)
        with _lock:
            if monotonic() >= due:
                due = monotonic() + _REPEAT_SECONDS
                _sent.clear()
            late, _late[:] = list(_late), []
            new = _new()
            _sent.update(new)
        while late and _send(late[0], out):
            del late[0]
        if late or not all(_send(text, out) for text in _datagrams(new)):
            with _lock:
                _late[:0] = late
                _forget_sent(new)
                _wake_thread()


def _pause(seconds: float) -> None:
    if seconds > 0:
        never = allocate_lock()
        never.acquire()
        never.acquire(timeout=seconds)


def _send(text: str, out: Socket | None = None) -> bool:
    """Whether that is done: nobody there to hear it, or it is too long, is done too."""
    address = _address()
    if not address:
        return True
    try:
        if out is None:
            if not _out:
                _out.append(Socket(AF_UNIX, SOCK_DGRAM))
                _out[0].setblocking(False)
            out = _out[0]
        out.sendto(text.encode(errors="replace"), address)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _address() -> str:
    path = os.environ.get("NOTIFY_SOCKET", "")
    return f"\0{path[1:]}" if path.startswith("@") else path


def _datagrams(words: dict[str, str]) -> list[str]:
    """As few as hold all words; one that is too long for any is left out."""
    texts: list[str] = []
    size = _MAX_BYTES
    for line in (f"{word}={value}" for word, value in words.items()):
        length = len(line.encode(errors="replace")) + 1
        if length > _MAX_BYTES:
            continue
        if size + length > _MAX_BYTES:
            texts.append(line)
            size = length
        else:
            texts[-1] += f"\n{line}"
            size += length
    return texts


def _one_line(value: str) -> str:
    return " ".join(str(value).split("\n")).replace("\0", " ")


def _plain(number: float) -> str:
    return repr(float(number))


def _watchdog_seconds() -> float | None:
    """The longest pause between two pings; None where nobody waits for any, or for those of another process."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    if not wanted.isdigit() or int(wanted) == 0 or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(wanted) / 1e6


def _start_thread(run: Callable[[], None]) -> None:
    """One that gets no signal: those are for the main thread, and would end a program that waits for them with all of them blocked."""
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        start_new_thread(run, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _running_loop() -> AbstractEventLoop | None:
    import sys

    asyncio = sys.modules.get("asyncio")  # a program without it has no loop, and need not load it
    if asyncio is None:
        return None
    try:
        loop: AbstractEventLoop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    return loop


def _on_signal(number: Signals, callback: Callable[[], None], *, chain: bool = True) -> None:
    """Call this at each such signal, and with `chain` whatever was called before."""
    import signal

    loop = _running_loop()
    if loop is not None:
        loop.add_signal_handler(number, callback)
        return
    before = signal.getsignal(number)

    def handle(got: int, frame: FrameType | None) -> None:
        callback()
        if chain and callable(before):
            before(got, frame)

    signal.signal(number, handle)
