"""The caller's side of the control socket: the shapes of all replies, and a small blocking HTTP/1.1 client over a Unix socket.

Every command pays for importing this module, so it takes the standard library only, and little of it: `_socket`, the C half of
`socket`, loads in 0.5 ms, while `socket` itself spends 4 ms on building enums that are not needed here.
"""

import json
import os
from _socket import AF_UNIX, MSG_PEEK, SHUT_RDWR, SOCK_STREAM
from _socket import socket as Socket
from _thread import allocate_lock
from collections.abc import Iterator, Mapping
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from fleetctl.errors import DaemonUnreachable, FleetctlError, StateDirectoryError, TimedOut, from_json

MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_HEAD_BYTES = 64 * 1024
CONNECT_RETRY_SECONDS = 0.01


class ExitInfo(TypedDict):
    """How a process ended. `at`: RFC 3339 UTC."""

    code: int | None
    signal: int | None
    at: str | None
    text: str


class AgentStatus(TypedDict):
    """One agent. `cpu_percent`: 100 is one core busy; `memory_bytes`: resident set of its whole tree; null where unknown.

    `next_try_seconds`: until an agent in backoff or failed is started again; null where it is not. `replacing`: its process is to be
    replaced by a new one.
    `pooled`: in the warm pool, and no replica; `from_warm_pool`: a replica that was there. `protected`: spared where its fleet shrinks.
    `unsaved`: why no checkpoint of it can be taken, for which its end waits; null where it does not.
    `status_text`, `active`, `slots` and `pending` are what it last said of itself; null: never said. `dropped_messages`: how many of its
    messages were bad or too many.
    """

    id: str
    slot: int
    pid: int | None
    state: str
    ready: bool
    cpu_percent: float | None
    memory_bytes: int | None
    uptime_seconds: float | None
    restarts: int
    last_exit: ExitInfo | None
    from_warm_pool: bool
    next_try_seconds: float | None
    replacing: bool
    pooled: bool
    protected: bool
    unsaved: str | None
    note: str | None
    status_text: str
    active: int | None
    slots: int | None
    pending: int | None
    dropped_messages: int


class Autoscaling(TypedDict):
    """`mode`: act or recommend, null while it is off; `reason`: of the last decision, or why there is none."""

    enabled: bool
    mode: str | None
    min_replicas: int
    max_replicas: int
    scale_up_count: int
    scale_down_count: int
    next_decision_seconds: float | None
    reason: str | None


class AutoscalingDetail(Autoscaling):
    """The autoscaler of one fleet. `last_decision`: every proposal, what limited the move, and until when."""

    schema: Literal["fleetctl/autoscaling/v1"]
    fleet: str
    current_replicas: int
    last_decision: dict[str, Any] | None  # Any: JSON values


class WarmPool(TypedDict):
    """`current_size`: suspended instances; `hits`, `misses`: how often it had what was asked for since the daemon started, or not."""

    enabled: bool
    current_size: int
    target_size: int
    hits: int | None
    misses: int | None
    hit_rate_percent: float | None


class ListeningSocket(TypedDict):
    """A listening socket that all agents of a fleet share. `backlog`: connections that wait; null where the kernel does not tell."""

    name: str
    address: str
    backlog: int | None


class FleetMetrics(TypedDict):
    """Size and load of a fleet. Utilizations in percent of `resource_limits`, without them of one core and of the machine's memory."""

    current_replicas: int
    avg_cpu_utilization: float | None
    avg_memory_utilization: float | None
    pending_requests: int


class Budget(TypedDict):
    """What a fleet's agents have spent in this period, by what they say, and may at most. `renewed_at`: when the next one begins."""

    period: str
    tokens: int
    tokens_in: int
    tokens_out: int
    cost_usd: float
    tokens_limit: int | None
    cost_usd_limit: float | None
    renewed_at: str | None


class FleetStatus(TypedDict):
    """One fleet and its agents. `down`: it is being taken down; `updating`: agents of an older spec are still to be replaced.

    `paused`: why none of it runs for now, such as a budget that is used up.
    `problems`: what is not as it should be; `healthy`: nothing.
    """

    name: str
    desired_replicas: int
    ready_replicas: int
    autoscaling: Autoscaling
    warm_pool: WarmPool
    command: list[str]
    down: bool
    notes: list[str]
    agents: list[AgentStatus]
    updating: NotRequired[bool]
    sockets: NotRequired[list[ListeningSocket]]
    paused: NotRequired[str | None]
    budget: NotRequired[Budget]
    healthy: NotRequired[bool]
    problems: NotRequired[list[str]]
    metrics: NotRequired[FleetMetrics]


class DaemonStatus(TypedDict):
    alive: bool
    pid: int | None
    version: str | None
    uptime_seconds: float | None
    state_dir: str
    note: str | None


class Status(TypedDict):
    """Everything at a glance. `generated_at`: RFC 3339 UTC."""

    schema: Literal["fleetctl/status/v1"]
    generated_at: str
    daemon: DaemonStatus
    fleets: list[FleetStatus]


class FleetDetail(FleetStatus):
    """One fleet with its settings; values of environment variables are replaced by `***`."""

    schema: Literal["fleetctl/fleet/v1"]
    spec: dict[str, Any]  # Any: the settings of fleet.toml, whose schema `fleetctl config schema` prints
    spec_hash: str


class TreeProcess(TypedDict):
    """A process of an agent's tree. `state`: R, S, D, T (stopped), Z (zombie) ..."""

    pid: int
    ppid: int
    state: str
    command: str


class Limit(TypedDict):
    """A limit of `resource_limits`. `held_by`: "cgroup v2", "cgroup v1", "rlimit", "watch": a look now and then; empty: nothing."""

    name: str
    value: float
    held_by: str


class Trust(TypedDict):
    """How far an agent is trusted. `held_by`: what keeps it from more, such as "no new privileges"; empty where nothing does."""

    level: str
    held_by: list[str]


class AgentDetail(AgentStatus):
    """One agent in full. `environment`: names only. `tokens` (in, out) and `cost` (US dollars) are totals, as the agent gave them."""

    schema: Literal["fleetctl/agent/v1"]
    fleet: str
    created_at: str | None
    started_at: str | None
    command: list[str]
    cwd: str
    log_path: str
    state_directory: str
    processes: list[TreeProcess]
    environment: list[str]
    limits: NotRequired[list[Limit]]
    trust: NotRequired[Trust]
    idle: bool | None
    progress: int | None
    metrics: dict[str, float]
    tokens: dict[str, int] | None
    cost: float | None
    dropped_by_reason: dict[str, int]


class Difference(TypedDict):
    """A setting. `change`: added, changed or removed; `how`: live, or rollout: by new processes. Values of variables are `***`."""

    key: str
    change: str
    how: str
    old: Any  # Any: JSON values, null where it is not set
    new: Any


class Change(TypedDict):
    """What a command changed, or would change with `dry_run`. `notes`: what of the spec the engine does differently, or not at all."""

    schema: Literal["fleetctl/change/v1"]
    fleet: str
    changed: bool
    created: bool
    dry_run: bool
    desired_replicas: int
    actions: list[str]
    message: str
    notes: NotRequired[list[str]]
    differences: NotRequired[list[Difference]]


class Acquired(TypedDict):
    """An agent that was handed out; `from_warm_pool` false: by a cold start. `seconds`: what it took; `claim_path`: what it was told."""

    schema: Literal["fleetctl/acquired/v1"]
    fleet: str
    agent_id: str
    state: str
    from_warm_pool: bool
    pid: int | None
    seconds: float
    claim_path: str


class CheckpointInfo(TypedDict):
    """One checkpoint. `kind`: files, token or command; `files`, `bytes`: what is in it; `path`: its folder. The token is not told."""

    id: str
    fleet: str
    agent: str
    created_at: str
    reason: str
    kind: str
    has_token: bool
    files: int
    bytes: int
    notes: list[str]
    path: str


class Checkpoints(TypedDict):
    """Checkpoints, oldest first. `problems`: why others cannot be read."""

    schema: Literal["fleetctl/checkpoints/v1"]
    checkpoints: list[CheckpointInfo]
    problems: list[str]


class CheckpointFile(TypedDict):
    """A file of a checkpoint, checked; `path` is below the checkpoint's folder."""

    path: str
    size: int
    sha256: str
    mode: int


class CheckpointDetail(CheckpointInfo):
    """One checkpoint in full; every byte of it was checked."""

    schema: Literal["fleetctl/checkpoint/v1"]
    slot: int
    spec_hash: str
    contents: list[CheckpointFile]
    links: list[dict[str, Any]]


class Checkpointed(TypedDict):
    """A checkpoint that was taken; null where the agent keeps nothing. `problem`: what of it is not in it, and why."""

    schema: Literal["fleetctl/checkpointed/v1"]
    fleet: str
    agent: str
    dry_run: bool
    checkpoint: CheckpointInfo | None
    problem: str
    message: str


class Drained(TypedDict):
    """An agent that is on its way out, with or without a checkpoint of what it keeps."""

    schema: Literal["fleetctl/drained/v1"]
    fleet: str
    agent: str
    now: bool
    dry_run: bool
    changed: bool
    desired_replicas: int
    message: str


class Protected(TypedDict):
    """Whether a fleet that shrinks spares this agent from now on."""

    schema: Literal["fleetctl/protected/v1"]
    fleet: str
    agent: str
    protected: bool
    dry_run: bool
    changed: bool
    message: str


class Restored(TypedDict):
    """An agent that goes on from a checkpoint; without id and pid in a dry run."""

    schema: Literal["fleetctl/restored/v1"]
    fleet: str
    checkpoint: str
    agent_id: str | None
    state: str | None
    pid: int | None
    seconds: float
    dry_run: bool
    message: str


class CheckpointRemoved(TypedDict):
    schema: Literal["fleetctl/checkpoint-removed/v1"]
    checkpoint: str
    dry_run: bool
    message: str


class HistoryEntry(TypedDict):
    """One scaling decision. `at`: RFC 3339 UTC; `details`: of the autoscaler's, how it came to it; empty for others."""

    at: str
    fleet: str
    action: str
    current_replicas: int
    target_replicas: int
    reason: str
    cause: str
    details: dict[str, Any]  # Any: JSON values


class History(TypedDict):
    """Scaling decisions, oldest first."""

    schema: Literal["fleetctl/history/v1"]
    entries: list[HistoryEntry]


class Sample(TypedDict):
    """Load and size of an autoscaled fleet at one moment. `metric`: the one that decided; `value`: of it per agent, null where unknown."""

    at: str
    fleet: str
    replicas: int
    target_replicas: int
    ready: int
    min_replicas: int
    max_replicas: int
    metric: str | None
    value: float | None
    load: float | None
    target: float | None


class Samples(TypedDict):
    """Samples of load and size, oldest first."""

    schema: Literal["fleetctl/samples/v1"]
    samples: list[Sample]


class EventInfo(TypedDict):
    """Something that happened. `at`: RFC 3339 UTC; `id`: no other event's, and the same in every sink."""

    id: str
    at: str
    kind: str
    fleet: str
    agent_id: str | None
    message: str
    data: dict[str, Any]  # Any: JSON values that depend on the kind


class Events(TypedDict):
    """What happened, oldest first."""

    schema: Literal["fleetctl/events/v1"]
    events: list[EventInfo]


class DaemonInfo(TypedDict):
    """The daemon and the names of its fleets."""

    schema: Literal["fleetctl/daemon/v1"]
    alive: bool
    pid: int
    version: str
    uptime_seconds: float
    state_dir: str
    note: str | None
    fleets: list[str]


class Shutdown(TypedDict):
    """The daemon heard it and will exit."""

    schema: Literal["fleetctl/shutdown/v1"]
    mode: Literal["keep", "drain"]


class ErrorInfo(TypedDict):
    """`FleetctlError.to_json`: `exit_status` is that of the command which meets the error."""

    code: str
    message: str
    hint: str
    exit_status: int


class ErrorReply(TypedDict):
    error: ErrorInfo


Reply = TypeVar("Reply")


class _Lost(Exception):
    """The connection broke. `unprocessed`: the daemon surely did not act on the request."""

    def __init__(self, unprocessed: bool) -> None:
        super().__init__()
        self.unprocessed = unprocessed


class _NotHttp(Exception):
    """The answer is not what an HTTP server says."""


class _Head:
    """The status line and the few header fields that say where the body ends."""

    def __init__(self, lines: list[bytes]) -> None:
        version, _, rest = lines[0].partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise _NotHttp(f"it begins with {lines[0][:40]!r}")
        fields = {name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(b":") for line in lines[1:])}
        self.status = int(rest[:3])
        self.chunked = fields.get(b"transfer-encoding") == b"chunked"
        self.length = int(fields[b"content-length"]) if b"content-length" in fields else None
        self.reusable = fields.get(b"connection") != b"close" and (self.chunked or self.length is not None)


class _Channel:
    """One connected socket and what was received ahead of need. `deadline`: of the boot's clock; None waits for ever."""

    def __init__(self, path: str, deadline: float | None) -> None:
        self.deadline = deadline
        self._ahead = bytearray()
        self.socket = _connect(path, deadline)

    def send(self, data: bytes) -> None:
        self._arm()
        self.socket.sendall(data)

    def _arm(self) -> None:
        # 0 would mean "do not block", so an expired deadline becomes the shortest wait.
        self.socket.settimeout(None if self.deadline is None else max(self.deadline - monotonic(), 0.0001))

    def fill(self) -> bool:
        """Receive some more; False at the end."""
        self._arm()
        data = self.socket.recv(65536)
        self._ahead += data
        return bool(data)

    def is_quiet(self) -> bool:
        """Whether a kept connection is still open and has nothing to say, as it must be before the next request."""
        self.socket.settimeout(0)
        try:
            self.socket.recv(1, MSG_PEEK)  # b"" when the other side closed
        except BlockingIOError:
            return not self._ahead
        except OSError:
            return False
        return False

    def _some(self, most: int) -> bytes:
        if not self._ahead and not self.fill():
            raise _Lost(unprocessed=False)
        piece = bytes(self._ahead[:most])
        del self._ahead[:most]
        return piece

    def _line(self) -> bytes:
        start = 0
        while (end := self._ahead.find(b"\n", start)) < 0:
            start = len(self._ahead)
            if start > MAX_HEAD_BYTES:
                raise _NotHttp("a line of its head does not end")
            if not self.fill():
                raise _Lost(unprocessed=False)
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 1]
        return line.rstrip(b"\r")

    def _lines(self) -> Iterator[bytes]:
        size = 0
        while line := self._line():
            size += len(line)
            if size > MAX_HEAD_BYTES:
                raise _NotHttp("its head does not end")
            yield line

    def head(self) -> _Head:
        """The head of the answer; raises _Lost, telling whether the request can have been processed."""
        try:
            alive = bool(self._ahead) or self.fill()
        except ConnectionResetError:
            # Linux says this when the other side of a Unix socket closed with something of ours unread. The daemon acts on a
            # request only once it has read all of it, so it did not act on this one.
            raise _Lost(unprocessed=True) from None
        if not alive:
            raise _Lost(unprocessed=False)
        while True:
            try:
                head = _Head(list(self._lines()))
            except (IndexError, ValueError):
                raise _NotHttp("its head cannot be read") from None
            if head.status >= 200:  # 1xx: a word before the answer
                return head

    def pieces(self, head: _Head) -> Iterator[bytes]:
        """The body, as it arrives."""
        if head.chunked:
            yield from self._chunks()
        elif head.length is not None:
            yield from self._exactly(head.length)
        else:
            while self._ahead or self.fill():
                yield self._some(65536)

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self._some(size)
            size -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while True:
            try:
                size = int(self._line().partition(b";")[0], 16)
            except ValueError:
                raise _NotHttp("the size of a chunk cannot be read") from None
            if size == 0:
                list(self._lines())
                return
            yield from self._exactly(size)
            self._line()

    def exchange(self, request: bytes) -> _Head:
        """Send a request, return the head of its answer."""
        unsent = False
        try:
            self.send(request)
        except (BrokenPipeError, ConnectionResetError):
            unsent = True  # the daemon may have answered before it closed: "too large", "busy", "not you"
        try:
            return self.head()
        except _Lost as lost:
            raise _Lost(unprocessed=lost.unprocessed or unsent) from None


def _connect(path: str, deadline: float | None) -> Socket:
    connection = Socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.settimeout(None if deadline is None else max(deadline - monotonic(), 0.0001))
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:  # its queue of new connections is full; Linux does not let one wait for that
                if deadline is not None and monotonic() >= deadline:
                    raise TimeoutError from None
                sleep(CONNECT_RETRY_SECONDS)
            else:
                return connection
    except BaseException:
        connection.close()
        raise


def _request(method: str, target: str, body: Mapping[str, Any] | None) -> bytes:
    payload = b"" if body is None else json.dumps(body).encode()
    described = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    return f"{method} {target} HTTP/1.1\r\nHost: fleetctl\r\n{described}\r\n".encode("ascii") + payload


def _collect(pieces: Iterator[bytes]) -> bytes:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise _NotHttp(f"it is larger than {MAX_ANSWER_BYTES // 1024 // 1024} MiB")
        parts.append(piece)
    return b"".join(parts)


def _decode(status: int, raw: bytes) -> Any:
    """The JSON value of a good answer; raises the error of a bad one."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise FleetctlError(f"The daemon's answer (HTTP {status}) is not JSON: {raw[:80]!r}") from None
    if status < 400:
        return value
    error = value.get("error") if isinstance(value, dict) else None
    raise from_json(error) if isinstance(error, dict) else FleetctlError(f"The daemon answered HTTP {status}")


def _explained(error: Exception, path: str, timeout: float | None) -> FleetctlError:
    """What a failure of the socket or of HTTP means to a user."""
    if isinstance(error, TimeoutError):
        message = f"The daemon at {path} did not answer within {timeout:g} seconds" if timeout else None
        return TimedOut(message, hint="`fleetctl doctor` looks into it")
    if isinstance(error, _NotHttp):
        return FleetctlError(f"The answer at {path} cannot be read: {error}")
    if isinstance(error, _Lost):
        unsure = "" if error.unprocessed else "; whether it did what it was asked is not known"
        message = f"The daemon at {path} closed the connection before it answered{unsure}"
        return DaemonUnreachable(message, hint="`fleetctl status` shows how things are")
    if isinstance(error, FileNotFoundError):
        return DaemonUnreachable(f"The daemon does not run: there is no {path}")
    if isinstance(error, ConnectionRefusedError):
        return DaemonUnreachable(f"The daemon does not run: nothing listens at {path}")
    if isinstance(error, OSError) and error.errno is None:
        return StateDirectoryError(f"{path}: {error}")  # the path is too long for a Unix socket
    return DaemonUnreachable(f"The daemon cannot be reached at {path}: {getattr(error, 'strerror', None) or error}")


class Connection:
    """Asks the daemon and keeps the connection for the next question. Threads may share it; they then take turns.

    `timeout`, in seconds, bounds each request as a whole. Every method raises DaemonUnreachable, TimedOut, or the error that the
    daemon answered.
    """

    def __init__(self, path: str, timeout: float = 10.0) -> None:
        self.path = path
        self.timeout = timeout
        self._channel: _Channel | None = None
        self._pid = 0
        self._turn = allocate_lock()

    def request(self, method: str, target: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """The decoded answer to one request. `target` is the path with its query, already quoted."""
        return _decode(*self._ask(method, target, body, self.timeout if timeout is None else timeout))

    def text(self, target: str) -> str:
        """An answer that is no JSON."""
        status, raw = self._ask("GET", target, None, self.timeout)
        if status >= 400:
            _decode(status, raw)
        return raw.decode("utf-8", "replace")

    def _ask(self, method: str, target: str, body: Mapping[str, Any] | None, seconds: float) -> tuple[int, bytes]:
        with self._turn:
            try:
                return self._exchange(_request(method, target, body), monotonic() + seconds, repeatable=method == "GET")
            except (OSError, _Lost, _NotHttp) as error:
                raise _explained(error, self.path, seconds) from error

    def _exchange(self, request: bytes, deadline: float, *, repeatable: bool) -> tuple[int, bytes]:
        if channel := self._kept():
            channel.deadline = deadline
            try:
                return self._answer(channel, request)
            except _Lost as lost:
                # The daemon closes idle connections, perhaps just now. A change is sent again only if it surely was not made.
                if not (repeatable or lost.unprocessed):
                    raise
        return self._answer(_Channel(self.path, deadline), request)

    def _answer(self, channel: _Channel, request: bytes) -> tuple[int, bytes]:
        self._channel = None  # until the answer is complete, so that a failure never leaves half an answer to the next request
        try:
            head = channel.exchange(request)
            raw = _collect(channel.pieces(head))
        except BaseException:
            channel.socket.close()
            raise
        if head.reusable:
            self._channel, self._pid = channel, os.getpid()
        else:
            channel.socket.close()
        return head.status, raw

    def _kept(self) -> _Channel | None:
        """The kept connection, if it is still good; after a fork it belongs to the parent."""
        channel = self._channel
        if channel is None or (self._pid == os.getpid() and channel.is_quiet()):
            return channel
        self._drop()
        return None

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.socket.close()
            self._channel = None

    def close(self) -> None:
        """Give the kept connection back; a later request opens another."""
        with self._turn:
            self._drop()


class Stream(Generic[Reply]):
    """JSON objects, one a line, as they arrive, over a connection of their own.

    The answer's head is awaited when the stream is made (for `timeout` seconds), so an error of the daemon is raised there. Then
    each object may take `silence` seconds (None: as long as it takes). Ends when the daemon ends it, or after `close`, which another
    thread or a signal handler may call while this one waits.
    """

    def __init__(self, path: str, target: str, *, timeout: float = 10.0, silence: float | None = None) -> None:
        self._path = path
        self._silence = silence
        self._text = bytearray()
        self._closed = self._reading = False
        try:
            self._channel = _Channel(path, monotonic() + timeout)
        except OSError as error:
            raise _explained(error, path, timeout) from error
        try:
            head = self._channel.exchange(_request("GET", target, None))
            self._pieces = self._channel.pieces(head)
            if head.status >= 400:
                _decode(head.status, _collect(self._pieces))
        except (OSError, _Lost, _NotHttp) as error:
            self._channel.socket.close()
            raise _explained(error, path, timeout) from error
        except BaseException:
            self._channel.socket.close()
            raise

    def __iter__(self) -> "Stream[Reply]":
        return self

    def __next__(self) -> Reply:
        self._reading = True  # set before `_closed` is read, while `close` does it the other way round: one sees the other
        try:
            line = None if self._closed else self._line()
        except (OSError, _Lost, _NotHttp) as error:
            if not self._closed:
                self._closed = True
                raise _explained(error, self._path, self._silence) from error
            line = None
        finally:
            self._reading = False
            if self._closed:
                self._channel.socket.close()
        if line is None:
            self.close()
            raise StopIteration
        return self._decoded(line)

    def _line(self) -> bytes | None:
        self._channel.deadline = None if self._silence is None else monotonic() + self._silence
        start = 0
        while (end := self._text.find(b"\n", start)) < 0:
            start = len(self._text)
            if start > MAX_ANSWER_BYTES:
                raise _NotHttp("a line of it does not end")
            piece = next(self._pieces, None)
            if piece is None:
                return None
            self._text += piece
        line = bytes(self._text[:end])
        del self._text[: end + 1]
        return line

    def _decoded(self, line: bytes) -> Reply:
        value = _decode(200, line)
        if isinstance(value, dict) and "error" in value:  # how a stream says that it cannot go on
            self.close()
            _decode(500, line)
        reply: Reply = value
        return reply

    def close(self) -> None:
        """End the stream; a reader that waits for the next object wakes up and stops."""
        self._closed = True
        with suppress(OSError):  # closed already, by either side
            self._channel.socket.shutdown(SHUT_RDWR)
        if not self._reading:
            self._channel.socket.close()

    def __enter__(self) -> "Stream[Reply]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def quoted(text: str) -> str:
    """The text as one segment of a path or one value of a query."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in text.encode(errors="surrogateescape"))


def with_query(path: str, **values: str | float | bool | None) -> str:
    """The path with those values that are given; booleans become 0 and 1."""
    texts = {name: str(int(value) if isinstance(value, bool) else value) for name, value in values.items() if value is not None}
    return path + ("?" + "&".join(f"{name}={quoted(text)}" for name, text in texts.items()) if texts else "")
