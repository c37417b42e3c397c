"""The nouns: what a fleet should be, what its agents are, and what is told about them.

Every setting of `fleet.toml` is defined here once, with its default, its bounds and its description; flags, help, JSON Schema,
validation and the README table are read from these definitions. Standard library only.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from functools import cache, lru_cache
from operator import attrgetter
from os import urandom
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
# How fast a fleet may grow or shrink: "4 per 15 s", "100% per 15 s".
RATE_PATTERN = r"^([1-9][0-9]{0,5})(%?) per ([0-9]{1,5}(?:\.[0-9]{1,3})?) ?s$"
AGENT_ID_PATTERN = NAME_PATTERN.removesuffix("$") + "-[a-z0-9]{5}$"


class AgentState(StrEnum):
    """Where an agent is in its life; `core/lifecycle.py` holds the moves between these."""

    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    BACKOFF = "backoff"
    FAILED = "failed"
    TERMINATED = "terminated"


class RestartPolicy(StrEnum):
    NEVER = "never"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Replace(StrEnum):
    """Whether an agent's process is to be replaced by a new one, and whether others must be ready first."""

    NO = "no"
    ROLLING = "rolling"
    AT_ONCE = "at-once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Describes one setting: attached with `Annotated`, read by validation, help, the schema and the README.

    pydantic calls the two dunder methods below on whatever it finds in `Annotated`, so this module states the rules and does not
    import it.
    """

    doc: str
    ge: float | None = None
    le: float | None = None
    gt: float | None = None
    pattern: str | None = None
    min_length: int | None = None
    supported: bool = True

    # Any: these are pydantic's own schema objects, which this layer does not import.
    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        limits = {"ge": self.ge, "le": self.le, "gt": self.gt, "pattern": self.pattern, "min_length": self.min_length}
        schema, given = handler(source), {key: value for key, value in limits.items() if value is not None}
        if schema["type"] == "nullable":  # bounds beside the null are passed over
            return {**schema, "schema": {**schema["schema"], **given}}
        return {**schema, **given}

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> Any:
        return {**handler(core_schema), "description": self.doc}


_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_OBJECT_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSpec:
    """`[fleet.restart]`: what follows an exit."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    policy: Annotated[RestartPolicy, Setting(doc="When an agent that exited is started again")] = RestartPolicy.ALWAYS
    backoff_seconds: Annotated[float, Setting(doc="Wait before the second restart in a row; doubles each time", ge=0.01, le=3600)] = 0.5
    backoff_cap_seconds: Annotated[float, Setting(doc="Longest wait between two restarts", ge=0.01, le=86400)] = 60.0
    healthy_after_seconds: Annotated[float, Setting(doc="Running this long clears the record of failures", gt=0, le=86400)] = 30.0
    crash_loop_failures: Annotated[int, Setting(doc="This many failures inside the window are a crash loop", ge=2, le=1000)] = 6
    crash_loop_window_seconds: Annotated[float, Setting(doc="Length of the crash-loop window", gt=0, le=86400)] = 60.0
    crash_loop_retry_seconds: Annotated[
        float, Setting(doc="A crash-looping agent is tried again after this long; 0 means never", ge=0, le=86400)
    ] = 300.0


class ProbeOutcome(StrEnum):
    """What an agent's probes amount to: it does its work, it is not to be given any, or it is to be restarted."""

    READY = "ready"
    UNREADY = "unready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What is asked of an agent; where several are given, all have to pass. `{port}` and `{slot}` in it are the agent's."""

    http: str | None = None
    tcp: str | None = None
    exec: tuple[str, ...] = ()


class AutoscalingMode(StrEnum):
    """Whether the autoscaler's decisions are carried out, or only told."""

    ACT = "act"
    RECOMMEND = "recommend"


class FallbackBehavior(StrEnum):
    """What the autoscaler wishes for when no metric has been readable for a while."""

    STATIC = "static"
    CURRENT = "current"
    CURRENT_IF_HIGHER = "current-if-higher"
    CURRENT_IF_LOWER = "current-if-lower"


class EngineName(StrEnum):
    """Where a fleet runs: as processes of this machine, or as pods of a cluster."""

    LOCAL = "local"
    KUBERNETES = "kubernetes"


class VolumeAccess(StrEnum):
    """Whether a cluster's volume is for agents on any node, or for those of one node at a time."""

    MANY = "ReadWriteMany"
    ONCE = "ReadWriteOnce"


class TrustLevel(StrEnum):
    """How far an agent is trusted: as its user is; so, but never with more rights than it is born with; or not, and so in a sandbox."""

    TRUSTED = "trusted"
    STANDARD = "standard"
    UNTRUSTED = "untrusted"


class OnTimeout(StrEnum):
    """What happens to an agent that has not finished in its drain time."""

    KILL = "kill"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadinessSpec:
    """`[fleet.readiness]`: when an agent counts as ready. Without notify and probe: when it has lived for `settle_seconds`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    settle_seconds: Annotated[float, Setting(doc="Alive this long means ready, where nothing below says more", ge=0, le=3600)] = 1.0
    notify: Annotated[bool, Setting(doc="Ready when the agent says READY=1 on its NOTIFY_SOCKET")] = False
    http: Annotated[str | None, Setting(doc="Ready when this URL on loopback answers 2xx or 3xx; {port} is the agent's")] = None
    tcp: Annotated[str | None, Setting(doc='Ready when this address takes connections, like "127.0.0.1:{port}" or "unix:/path"')] = None
    exec: Annotated[tuple[str, ...], Setting(doc="Ready when this command, run as the agent is, exits with 0")] = ()
    interval_seconds: Annotated[float, Setting(doc="Time between two probes once the agent is ready", ge=0.1, le=3600)] = 10.0
    timeout_seconds: Annotated[float, Setting(doc="A probe that takes longer has failed", gt=0, le=600)] = 1.0
    failure_threshold: Annotated[int, Setting(doc="So many failed probes in a row make a ready agent not ready", ge=1, le=1000)] = 3
    start_timeout_seconds: Annotated[
        float,
        Setting(doc="With notify or a probe: not ready after this long is a failed start; 0 waits for ever", ge=0, le=86400),
    ] = 60.0

    @property
    def probed(self) -> bool:
        return bool(self.http or self.tcp or self.exec)

    @property
    def probe(self) -> Probe:
        return Probe(http=self.http, tcp=self.tcp, exec=self.exec)


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessSpec:
    """`[fleet.liveness]`: when a ready agent counts as stuck and is restarted. Off without a probe."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    http: Annotated[str | None, Setting(doc="Alive while this URL on loopback answers 2xx or 3xx; {port} is the agent's")] = None
    tcp: Annotated[str | None, Setting(doc="Alive while this address takes connections")] = None
    exec: Annotated[tuple[str, ...], Setting(doc="Alive while this command, run as the agent is, exits with 0")] = ()
    interval_seconds: Annotated[float, Setting(doc="Time between two probes", ge=0.1, le=3600)] = 10.0
    timeout_seconds: Annotated[float, Setting(doc="A probe that takes longer has failed", gt=0, le=600)] = 5.0
    failure_threshold: Annotated[int, Setting(doc="So many failed probes in a row are a failure of the agent", ge=1, le=1000)] = 3

    @property
    def probed(self) -> bool:
        return bool(self.http or self.tcp or self.exec)

    @property
    def probe(self) -> Probe:
        return Probe(http=self.http, tcp=self.tcp, exec=self.exec)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSpec:
    """`[fleet.logs]`: rotation of the agents' output."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    max_bytes: Annotated[int, Setting(doc="An agent's log is rotated at this size", ge=4096, le=1 << 40)] = 10 * 1024 * 1024
    keep: Annotated[int, Setting(doc="Rotated files kept for each agent", ge=0, le=1000)] = 5
    total_bytes: Annotated[
        int, Setting(doc="Most that all logs of the fleet may take; oldest rotated files go first", ge=4096, le=1 << 44)
    ] = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmPoolSpec:
    """`[fleet.warm_pool]`: suspended instances that answer at once."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    # The specification's default is true, and is what its FleetManager gets. A fleet of an arbitrary command has to ask for it: an
    # agent that takes work from a queue may be suspended with a piece of it in its hands.
    enabled: Annotated[bool, Setting(doc="Keep suspended instances ready beside the replicas; true where the section is given")] = False
    size: Annotated[int, Setting(doc="Suspended instances kept ready", ge=0, le=1000)] = 5
    refresh_interval_seconds: Annotated[float, Setting(doc="An instance twice as old as this is replaced", gt=0)] = 3600.0
    reads_claim: Annotated[
        bool,
        Setting(doc="The agents read FLEETCTL_CLAIM when they go on; known by itself of those that use fleetctl.agent"),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GracefulDrainSpec:
    """`[fleet.graceful_drain]`: how an agent is stopped."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    timeout_seconds: Annotated[float, Setting(doc="Time an agent has to finish before it is killed", ge=0, le=86400)] = 30.0
    drain_signal: Annotated[
        str | None,
        Setting(doc="Signal that asks an agent to finish, where that is not the stop signal", pattern=r"^(SIG)?[A-Z0-9]+$"),
    ] = None
    on_timeout: Annotated[OnTimeout, Setting(doc="What happens when that time is over")] = OnTimeout.KILL
    checkpoint_before_drain: Annotated[
        bool, Setting(doc="Save what an agent keeps in its STATE_DIRECTORY, and its resume token, when it is stopped")
    ] = True
    checkpoint_signal: Annotated[
        str | None,
        Setting(doc="Signal that asks an agent to save its state before the checkpoint is taken", pattern=r"^(SIG)?[A-Z0-9]+$"),
    ] = None
    checkpoint_timeout_seconds: Annotated[float, Setting(doc="Time it has for that", gt=0, le=3600)] = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsSpec:
    """`[fleet.checkpoints]`: what is saved of an agent that stops, and for how long."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    keep: Annotated[int, Setting(doc="Checkpoints kept for each agent", ge=1, le=10000)] = 3
    keep_seconds: Annotated[float, Setting(doc="Checkpoints older than this are removed", gt=0)] = 604800.0
    max_bytes: Annotated[int, Setting(doc="A larger STATE_DIRECTORY is left where it is and not copied", ge=0, le=1 << 44)] = 1 << 30
    command: Annotated[
        tuple[str, ...],
        Setting(doc="Command, run as the agent is, that writes the checkpoint into FLEETCTL_CHECKPOINT_DIR"),
    ] = ()
    restore_command: Annotated[
        tuple[str, ...],
        Setting(doc="Command of an agent that is restored; {token} is its resume token, {checkpoint} the folder"),
    ] = ()


class Enforce(StrEnum):
    """Whether agents are held to their limits."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimitsSpec:
    """`[fleet.resource_limits]`: what one agent, with all its processes, may use at most. Utilization is measured by it too."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    cpu_limit: Annotated[
        float | None,
        Setting(doc="Cores for an agent: 100 % of its CPU utilization; without it one core is", gt=0, le=4096),
    ] = None
    memory_limit_mb: Annotated[float | None, Setting(doc="MiB for an agent: 100 % of its memory utilization", gt=0, le=1 << 30)] = None
    pids_limit: Annotated[int | None, Setting(doc="Processes and threads of an agent", ge=1, le=1 << 22)] = None
    nofile: Annotated[int | None, Setting(doc="Open files of each of its processes", ge=16, le=1 << 30)] = None
    nice: Annotated[
        int | None, Setting(doc="Share of a busy CPU: 19 gives way to all others; below 0 comes first and takes privilege", ge=-20, le=19)
    ] = None
    enforce: Annotated[
        Enforce,
        Setting(doc="Hold agents to these: as far as this machine can (auto), refuse to start where it cannot (require), or not (off)"),
    ] = Enforce.AUTO


class BudgetPeriod(StrEnum):
    """How often a fleet's budget is renewed, at the full hour, day or month of UTC; or never."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpec:
    """`[fleet.budget]`: what the agents together may spend, by what they report; the fleet is paused when that is used up."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    tokens: Annotated[int | None, Setting(doc="Tokens, in and out together (X_FLEETCTL_TOKENS)", ge=1, le=1 << 62)] = None
    cost_usd: Annotated[float | None, Setting(doc="US dollars (X_FLEETCTL_COST)", gt=0, le=1e12)] = None
    period: Annotated[BudgetPeriod, Setting(doc="For each hour, day or month of UTC, or in all")] = BudgetPeriod.DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """`[fleet.sandbox]`: what an agent with trust_level = "untrusted" may, besides its own directory."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    network: Annotated[bool, Setting(doc="It has the machine's network; else none, but for the fleet's sockets")] = False
    read_only_paths: Annotated[
        tuple[str, ...], Setting(doc="Files and folders it sees, besides /usr, /etc, /opt and the fleet's cwd; relative to the file")
    ] = ()
    read_write_paths: Annotated[tuple[str, ...], Setting(doc="Those it may change; relative to the file")] = ()
    inaccessible_paths: Annotated[tuple[str, ...], Setting(doc="Those of all these that it does not see; relative to the file")] = ()


class MetricScope(StrEnum):
    """What a metric's value is: of the whole fleet, or of each agent."""

    TOTAL = "total"
    PER_REPLICA = "per_replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """`[fleet.autoscaling.metrics.NAME]`: a metric of one's own; exactly one of the sources, from `command` to `formula`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    target: Annotated[float | None, Setting(doc="What it should be per agent; without it, it only stands in formulas", gt=0, le=1e12)] = (
        None
    )
    scope: Annotated[MetricScope, Setting(doc="Whether its value is the fleet's, to be shared by the agents, or each agent's")] = (
        MetricScope.TOTAL
    )
    command: Annotated[tuple[str, ...], Setting(doc="Command in the fleet's cwd that prints the number")] = ()
    file: Annotated[str | None, Setting(doc="File that holds the number; relative to the fleet's cwd")] = None
    http: Annotated[str | None, Setting(doc="URL on loopback of a number, JSON or Prometheus text; `field` says which of its values")] = (
        None
    )
    redis: Annotated[str | None, Setting(doc='What Redis is asked, like "LLEN jobs", "XLEN stream" or "GET key"')] = None
    python: Annotated[
        str | None, Setting(doc='Function without arguments, like "package.module:function", called in a process of its own')
    ] = None
    agents: Annotated[str | None, Setting(doc="Gauge that the agents report themselves, by X_FLEETCTL_METRIC=name=value")] = None
    formula: Annotated[
        str | None, Setting(doc="Arithmetic over other metrics, like backlog / max(1, rate); min, max, abs, ceil, floor")
    ] = None
    field: Annotated[str | None, Setting(doc='Of JSON, like queue.0.length; of Prometheus text, like requests{queue="a"}')] = None
    redis_url: Annotated[str, Setting(doc='Where Redis is: redis://HOST:PORT/DB, unix:/path, or "env:NAME" or "file:PATH" of that')] = (
        "redis://127.0.0.1:6379/0"
    )
    allow_hosts: Annotated[tuple[str, ...], Setting(doc="Other machines that may be asked, by address; else only this one is")] = ()
    interval_seconds: Annotated[float, Setting(doc="Time between two reads", ge=0.2, le=3600)] = 5.0
    timeout_seconds: Annotated[float, Setting(doc="A read that takes longer has failed", gt=0, le=60)] = 5.0
    fallback: Annotated[float | None, Setting(doc="Its value where it cannot be read; without it the fleet does not shrink then", ge=0)] = (
        None
    )

    @property
    def polled(self) -> bool:
        """Whether it is found outside of the agents and of other metrics."""
        return bool(self.command) or any(one is not None for one in (self.file, self.http, self.redis, self.python))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """`[[fleet.autoscaling.schedules]]`: other bounds or another target at times that recur; of several, the last in force wins."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    cron: Annotated[str, Setting(doc='When it begins, like "30 8 * * 1-5"')]
    duration_seconds: Annotated[float, Setting(doc="How long it is in force each time", ge=60, le=86400)]
    timezone: Annotated[str, Setting(doc='Where those times are of, like "Europe/Berlin"')] = "UTC"
    min_replicas: Annotated[int | None, Setting(doc="Fewest agents meanwhile", ge=0, le=100000)] = None
    max_replicas: Annotated[int | None, Setting(doc="Most agents meanwhile", ge=1, le=100000)] = None
    target_cpu_utilization: Annotated[float | None, Setting(doc="CPU utilization that scaling aims at meanwhile", gt=0, le=90)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingSpec:
    """`[fleet.autoscaling]`: a number of agents that follows the load, between min_replicas and max_replicas."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    enabled: Annotated[bool, Setting(doc="Let the load decide how many agents there are; true where the section is given")] = False
    mode: Annotated[AutoscalingMode, Setting(doc="Carry decisions out, or only tell of them in `history`")] = AutoscalingMode.ACT
    use_cpu: Annotated[bool, Setting(doc="CPU utilization counts, aimed at target_cpu_utilization")] = True
    target_memory_utilization: Annotated[
        float | None,
        Setting(doc="Memory utilization, in percent of resource_limits.memory_limit_mb, that scaling aims at", gt=0, le=100),
    ] = None
    target_occupancy: Annotated[
        float,
        Setting(doc="Slots in work and waiting for it, in percent, that scaling aims at, where agents report them", gt=0, le=100),
    ] = 70.0
    target_pending: Annotated[
        float | None,
        Setting(doc="Requests waiting per agent that scaling aims at, where agents report them", gt=0, le=1e9),
    ] = None
    metrics: Annotated[Mapping[str, MetricSpec], Setting(doc="Metrics of one's own, by name")] = field(default_factory=dict)
    schedules: Annotated[tuple[ScheduleSpec, ...], Setting(doc="Other bounds or another target at times that recur")] = ()
    metrics_interval_seconds: Annotated[float, Setting(doc="The agents are measured at least this often", ge=0.2, le=5)] = 5.0
    window_seconds: Annotated[
        float,
        Setting(doc="CPU and memory are means over this time, and count of agents that were ready for it", ge=0.2, le=3600),
    ] = 15.0
    scale_up_rates: Annotated[
        tuple[str, ...],
        Setting(doc='Growth at most like "4 per 15 s" or "100% per 15 s", whichever allows most; empty: any'),
    ] = ("4 per 15 s", "100% per 15 s")
    scale_down_rates: Annotated[
        tuple[str, ...],
        Setting(doc='Shrinkage at most like "1 per 60 s" or "10% per 60 s", whichever allows most; empty: any'),
    ] = ()
    min_available: Annotated[int, Setting(doc="Shrinking leaves at least so many agents ready", ge=0, le=100000)] = 0
    failure_threshold: Annotated[
        int, Setting(doc="So many decisions without any metric, and `fallback` says what to do", ge=1, le=1000)
    ] = 3
    fallback: Annotated[FallbackBehavior, Setting(doc="The size to wish for then, in relation to fallback_replicas")] = (
        FallbackBehavior.CURRENT
    )
    fallback_replicas: Annotated[int, Setting(doc="Agents for `fallback`", ge=0, le=100000)] = 1
    idle_seconds: Annotated[
        float | None,
        Setting(
            doc="With min_replicas = 0: without any work for this long, no agent is kept; the first request brings one back",
            gt=0,
            le=86400,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSpec:
    """`[fleet.kubernetes]`: what a cluster has to know besides, with `engine = "kubernetes"` and for `export kubernetes`."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    image: Annotated[str | None, Setting(doc="Container image that holds the command", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")] = None
    context: Annotated[str | None, Setting(doc="Context of the kubeconfig; default: its current one", pattern=r"^\S+$")] = None
    namespace: Annotated[
        str | None, Setting(doc="Namespace, which must exist; default: the context's", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    ] = None
    service_account: Annotated[
        str | None, Setting(doc="Service account of the agents; without one they get no token", pattern=_OBJECT_NAME)
    ] = None
    image_pull_secret: Annotated[str | None, Setting(doc="Secret that lets the image be pulled", pattern=_OBJECT_NAME)] = None
    secret: Annotated[
        str | None, Setting(doc="Secret that holds the values of secret_env; default: the fleet's name and -secrets", pattern=_OBJECT_NAME)
    ] = None
    working_directory: Annotated[str | None, Setting(doc="Working directory in the container; default: the image's", pattern=r"^/")] = None
    user: Annotated[int | None, Setting(doc="Numeric user and group of the agents; default: the image's", ge=1, le=2147483647)] = None
    cpu_request: Annotated[
        float | None, Setting(doc="Cores set aside for an agent; default: resource_limits.cpu_limit, else 0.25", gt=0, le=4096)
    ] = None
    memory_request_mb: Annotated[
        float | None, Setting(doc="MiB set aside for an agent; default: resource_limits.memory_limit_mb", gt=0, le=1 << 30)
    ] = None
    storage_size: Annotated[
        str | None,
        Setting(doc='Size, such as "10Gi", of a volume that keeps STATE_DIRECTORY and checkpoints', pattern=r"^[1-9][0-9]{0,6}(Mi|Gi|Ti)$"),
    ] = None
    storage_class: Annotated[str | None, Setting(doc="Storage class of that volume; default: the cluster's", pattern=_OBJECT_NAME)] = None
    storage_access: Annotated[VolumeAccess, Setting(doc="Agents on any node share that volume, or only agents of one node at a time")] = (
        VolumeAccess.MANY
    )


@lru_cache(maxsize=256)  # asked for at every look of every fleet
def _process_hash(
    command: tuple[str, ...],
    shell: bool,
    cwd: str,
    environment: tuple[tuple[str, str], ...],
    env_file: str | None,
    secret_env: tuple[tuple[str, str], ...],
    told: tuple[str, ...],
) -> str:
    parts = [list(command), shell, cwd, dict(environment), env_file, dict(secret_env), *([told] if told else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def signal_number(name: str) -> int:
    """Of a signal as people write it, with or without SIG. Raises KeyError."""
    return int(signal.Signals["SIG" + name.removeprefix("SIG")])


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """The wish: everything `[fleet]` in `fleet.toml` may say. Durations in seconds, sizes in bytes."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT
    name: Annotated[str, Setting(doc="The fleet's name: lower-case letters, digits and dashes", pattern=NAME_PATTERN)]
    command: Annotated[tuple[str, ...], Setting(doc="Program and arguments of an agent", min_length=1)]
    shell: Annotated[bool, Setting(doc="Give the command, one string, to /bin/sh")] = False
    cwd: Annotated[str, Setting(doc="Working directory of the agents; relative to the file", min_length=1)] = "."
    environment: Annotated[Mapping[str, str], Setting(doc="Environment variables of the agents")] = field(default_factory=dict)
    env_file: Annotated[str | None, Setting(doc="File of NAME=VALUE lines, read at each start; its values are never stored")] = None
    secret_env: Annotated[
        Mapping[str, str],
        Setting(doc='Variables taken by reference at each start: "env:NAME" from the daemon\'s environment or "file:PATH"'),
    ] = field(default_factory=dict)
    engine: Annotated[EngineName, Setting(doc="Where the agents run: on this machine or in a cluster")] = EngineName.LOCAL
    trust_level: Annotated[TrustLevel, Setting(doc="What the agents may, see below; told to them as FLEETCTL_TRUST")] = TrustLevel.STANDARD
    tools: Annotated[tuple[str, ...], Setting(doc="Names of the tools that an agent may use; told to it in its claim file")] = ()
    replicas: Annotated[int, Setting(doc="Agents to keep running", ge=0, le=100000)] = 1
    min_replicas: Annotated[int, Setting(doc="Fewest agents", ge=0, le=100000)] = 1
    max_replicas: Annotated[int, Setting(doc="Most agents", ge=1, le=100000)] = 100
    target_cpu_utilization: Annotated[float, Setting(doc="CPU utilization, in percent, that scaling aims at", gt=0, le=90)] = 70.0
    scale_up_stabilization_seconds: Annotated[float, Setting(doc="Least time between two growths", ge=0, le=86400)] = 60.0
    scale_down_stabilization_seconds: Annotated[float, Setting(doc="Calm needed before shrinking", ge=0, le=86400)] = 300.0
    autoscaling_interval_seconds: Annotated[float, Setting(doc="Time between two scaling decisions", gt=0, le=86400)] = 30.0
    stop_signal: Annotated[str, Setting(doc="Signal that asks an agent to stop", pattern=r"^(SIG)?[A-Z0-9]+$")] = "TERM"
    port_base: Annotated[int | None, Setting(doc="An agent's PORT, and {port} in its command, is this plus its slot", ge=1, le=65535)] = (
        None
    )
    sockets: Annotated[
        Mapping[str, str],
        Setting(doc='Listening sockets all agents share, by name: "127.0.0.1:8080" or "unix:PATH"; {fd} and {port} in the command'),
    ] = field(default_factory=dict)
    watchdog_seconds: Annotated[
        float | None, Setting(doc="An agent that does not say WATCHDOG=1 for this long has failed", ge=0.1, le=86400)
    ] = None
    stuck_after_seconds: Annotated[
        float | None,
        Setting(
            doc="An agent that reports work and no progress (PROGRESS, ACTIVE, TOKENS, COST) for this long is replaced", ge=1, le=604800
        ),
    ] = None
    restart: RestartSpec = RestartSpec()
    readiness: ReadinessSpec = ReadinessSpec()
    liveness: LivenessSpec = LivenessSpec()
    logs: LogSpec = LogSpec()
    warm_pool: WarmPoolSpec = WarmPoolSpec()
    graceful_drain: GracefulDrainSpec = GracefulDrainSpec()
    checkpoints: CheckpointsSpec = CheckpointsSpec()
    kubernetes: KubernetesSpec = KubernetesSpec()
    resource_limits: ResourceLimitsSpec = ResourceLimitsSpec()
    budget: BudgetSpec = BudgetSpec()
    sandbox: SandboxSpec = SandboxSpec()
    autoscaling: AutoscalingSpec = AutoscalingSpec()

    @property
    def process_hash(self) -> str:
        """Changes exactly when a running process no longer matches the spec and has to be replaced."""
        variables, secrets = tuple(sorted(self.environment.items())), tuple(sorted(self.secret_env.items()))
        told = (str(self.trust_level), *self.tools) if self.tools or self.trust_level is not TrustLevel.STANDARD else ()
        ports = (f"port_base={self.port_base}",) if self.port_base is not None else ()
        # The other limits are changed while a process runs.
        files = (f"nofile={self.resource_limits.nofile}",) if self.resource_limits.nofile is not None else ()
        listening = (*files, *ports, *(f"{name}={address}" for name, address in self.sockets.items()))
        sandbox = self.sandbox
        walls = () if sandbox == SandboxSpec() else (f"sandbox={json.dumps(to_json(sandbox))}",)
        watched = (f"watchdog_seconds={self.watchdog_seconds:g}",) if self.watchdog_seconds is not None else ()
        return _process_hash(self.command, self.shell, self.cwd, variables, self.env_file, secrets, told + listening + watched + walls)

    @property
    def stop_signal_number(self) -> int:
        return signal_number(self.stop_signal)

    @property
    def drain_signal_number(self) -> int:
        """What asks an agent to finish."""
        return signal_number(self.graceful_drain.drain_signal or self.stop_signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """A process that cannot be mistaken for a later one with the same pid. `start_ticks`: field 22 of /proc/PID/stat."""

    pid: int
    start_ticks: int
    boot_id: str

    def __hash__(self) -> int:  # of the three it is the pid that differs; the stop of an agent asks for this twenty times
        return self.pid


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a process ended; neither code nor signal where the kernel no longer tells. `at`: Unix time in seconds.

    `failing`: why it was stopped, where that was because it did not work; `out_of_memory`: the kernel killed for want of memory.
    """

    code: int | None = None
    signal: int | None = None
    at: float = 0.0
    failing: str = ""
    out_of_memory: bool = False

    def __str__(self) -> str:
        memory = ", out of memory" if self.out_of_memory else ""
        return self._status() + memory + (f", stopped: {self.failing}" if self.failing else "")

    def _status(self) -> str:
        if self.signal is not None:
            try:
                return f"killed by {signal.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        return "exit status unknown" if self.code is None else f"exit {self.code}"


class Saving(StrEnum):
    """What is to be saved of an agent before it is asked to stop: nothing, what it keeps as it is, or what it writes when asked to."""

    NO = "no"
    COPY = "copy"
    ASK = "ask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One agent as the supervisor knows it. Times named `_at` are Unix seconds; `_deadline` and `_clock` are seconds of the boot's clock.

    The boot's monotonic clock is the same for every process of a boot, so deadlines stay true over the daemon's death.
    `leader_exit` is set from the leader's exit until the rest of its process tree is gone; `leaving`: not replaced when gone.
    `rolled`: its process replaced an outdated one and has not been ready since.
    `pooled`: in the warm pool, no replica; `resume_owed`: a replica now, but not yet told to go on;
    `wish_owed`: acquired, and so many replicas are wished since; 0 once that is in the stored wish; `claimed`: acquired, so its claim is
    whoever's who did that.
    `stale_deadline`: set from its first suspension until it is handed out.
    `start_deadline`: not ready by then is a failed start; `said_ready`: its process told so, READY=1.
    `draining_since`: when it was asked to stop, a `_clock`; `failing`: why it is stopped though nobody asked for that.
    `aware`: it speaks the agent contract's level 2, so it reads its claim; `resume_token`: what it said to go on from, opaque.
    `blocked`: why it cannot work before `blocked_until`, a Unix time, such as a rate limit: no failure of its own.
    `saving`: it is not asked to stop before that is done; `checkpoint`: id of the one that its stop makes, or has made.
    `wish_shrunk`: drained, and so many replicas are wished since; None once that is in the stored wish.
    `restore`: AGENT/ID of the checkpoint that its process starts from, until one of them has been ready.
    `protected`: a fleet that shrinks spares it; one that is scaled to 0 or taken down does not.
    """

    id: str
    fleet: str
    slot: int
    state: AgentState = AgentState.STARTING
    created_at: float
    token: str = ""
    spec_hash: str = ""
    process: ProcessRef | None = None
    started_at: float | None = None
    started_clock: float | None = None
    ready_deadline: float | None = None
    start_deadline: float | None = None
    said_ready: bool = False
    ready: bool = False
    leader_exit: Exit | None = None
    restarts: int = 0
    failures: tuple[float, ...] = ()
    retry_deadline: float | None = None
    drain_deadline: float | None = None
    draining_since: float | None = None
    stop_sent: bool = False
    failing: str = ""
    leaving: bool = False
    replace: Replace = Replace.NO
    rolled: bool = False
    last_exit: Exit | None = None
    pooled: bool = False
    resume_owed: bool = False
    wish_owed: int = 0
    wish_shrunk: int | None = None
    claimed: bool = False
    stale_deadline: float | None = None
    from_warm_pool: bool = False
    aware: bool = False
    resume_token: str = ""
    blocked: str = ""
    blocked_until: float | None = None
    saving: Saving = Saving.NO
    checkpoint: str = ""
    restore: str = ""
    protected: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A live process tree that carries the token of one of our agents, as a scan of the machine found it."""

    agent_id: str
    fleet: str
    slot: int
    token: str
    spec_hash: str
    leader: ProcessRef | None
    started_at: float
    started_clock: float
    suspended: bool = False
    """Started for the warm pool, and stopped now."""


class Identity(StrEnum):
    """Whether a recorded process is the one that has its pid now. Only MATCH may ever be signalled."""

    MATCH = "match"
    GONE = "gone"
    UNVERIFIABLE = "unverifiable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one agent's whole process tree uses. `cpu_percent`: 100 is one core busy; `memory_bytes`: resident set, summed.

    `demand_percent`: CPU used or waited for; `hottest_percent`: the same of its busiest thread; None where the system does not tell.
    `stopped`: its leader is, by a signal; `frozen`: all of it is.
    """

    cpu_percent: float | None
    memory_bytes: int
    processes: int
    stopped: bool = False
    frozen: bool = False
    demand_percent: float | None = None
    hottest_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUsage:
    """What the machine has and uses. `cpu_percent`: 100 is all cores busy; None at the first look.

    `pressure_percent`: of the last 10 s in which every task stalled for want of memory (PSI); None where the kernel does not tell.
    """

    cpu_percent: float | None
    cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    pressure_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, as `fleetctl events` shows it. `at`: Unix time in seconds; `id`: no other event's, wherever it is told."""

    at: float
    kind: str
    fleet: str
    message: str
    agent_id: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON values
    id: str = field(default_factory=lambda: urandom(12).hex(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnResult:
    """An agent that was handed out; `from_warm_pool` False means a cold start."""

    agent_id: str
    state: AgentState
    from_warm_pool: bool
    pid: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingDecision:
    """What was decided about a fleet's size, and why; the four fields of the specification, when, and who asked.

    `details`: how the autoscaler came to it, as JSON values.
    """

    action: str
    target_replicas: int
    current_replicas: int
    reason: str
    at: float = 0.0
    cause: str = "manual"
    details: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON values


class CheckpointKind(StrEnum):
    """What an agent's checkpoint is: files it keeps, only the token it goes on from, or what a command wrote."""

    FILES = "files"
    TOKEN = "token"
    COMMAND = "command"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file of a checkpoint. `path`: below the checkpoint's folder; `mode`: the permission bits it had."""

    path: str
    size: int
    sha256: str
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFolder:
    path: str
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLink:
    """A symbolic link that stays inside its folder."""

    path: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was saved of one agent, whole. `created_at`: Unix time in seconds; `notes`: what is not in it as it was.

    Paths begin with `state/`, what was in its STATE_DIRECTORY, or `written/`, what it or a command wrote for the checkpoint.
    """

    id: str
    fleet: str
    agent_id: str
    slot: int
    spec_hash: str
    created_at: float
    reason: str
    kind: CheckpointKind
    resume_token: str = ""
    files: tuple[SavedFile, ...] = ()
    folders: tuple[SavedFolder, ...] = ()
    links: tuple[SavedLink, ...] = ()
    notes: tuple[str, ...] = ()
    keep_seconds: float = 0.0

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What came of saving an agent's state. `checkpoint` None: there was nothing to save; `complete`: all worth keeping is in it.

    `problem`: why something is not; `fresh`: it was written now, and not there already.
    """

    checkpoint: Checkpoint | None
    complete: bool = True
    fresh: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ScalingMetrics:
    """A fleet's size and load at one moment, as the specification has it. Utilizations in percent; NaN where nothing was measured."""

    current_replicas: int
    desired_replicas: int
    avg_cpu_utilization: float
    avg_memory_utilization: float
    pending_requests: int


@dataclass(frozen=True, slots=True)
class WarmInstance:
    """An instance of the warm pool, as the specification has it: an agent that waits, suspended."""

    agent_id: str
    created_at: datetime
    state: AgentState


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """The template of an agent, as the specification has it. Checked where it is used, by the rules of the settings of `fleet.toml`.

    `agent_id`: the template's own name; each agent made from it has an id of its own. `trust_level`: "trusted", "standard" or "untrusted".
    `resource_limits`: `cpu_limit` in cores, `memory_limit_mb`. `command`: program and arguments, without it the bundled demo agent;
    `cwd`: where it runs, without it where the FleetManager was made.
    """

    agent_id: str = "template"
    trust_level: str = "standard"
    resource_limits: Mapping[str, float] = field(default_factory=dict)
    tools: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] | None = None
    cwd: str | None = None


_PLAIN = (str, int, float, bool, type(None))


@cache
def _fields_of(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] | None:
    """The names of a dataclass's fields, and what reads them all at once; None for any other class."""
    fields = getattr(kind, "__dataclass_fields__", {})
    names = tuple(name for name in fields if not name.startswith("__"))
    if not names:
        return None
    return names, attrgetter(*names) if len(names) > 1 else lambda value: (getattr(value, names[0]),)


def to_json(value: Any) -> Any:  # Any: a dataclass in, JSON values out
    """JSON values of a dataclass from this module; many times cheaper than `dataclasses.asdict`, which copies deeply."""
    kind: Any = type(value)
    if (known := _fields_of(kind)) is not None:
        names, read = known
        # Most fields are plain, and an agent has forty.
        return {name: one if type(one) in _PLAIN else to_json(one) for name, one in zip(names, read(value), strict=True)}
    if isinstance(value, tuple):
        return [to_json(one) for one in value]
    if isinstance(value, dict):
        return {name: to_json(one) for name, one in value.items()}
    return value


if TYPE_CHECKING:
    from dataclasses import replace as replace
else:

    @cache
    def _writers(kind):
        """What writes each slot of the dataclass, and which is which, by name."""
        names, _ = _fields_of(kind)
        return tuple(getattr(kind, name).__set__ for name in names), {name: index for index, name in enumerate(names)}

    def replace(value, **changes):
        """`dataclasses.replace` in half its time, for classes with slots and without a say in how they are made.

        Each move of an agent is one, and an agent has forty fields: together they were a fifth of what it costs to stop many.
        """
        kind = type(value)
        writers, index = _writers(kind)
        values = list(_fields_of(kind)[1](value))
        for name, new in changes.items():
            values[index[name]] = new
        made = object.__new__(kind)
        for write, one in zip(writers, values, strict=True):
            write(made, one)
        return made


def agent_to_json(agent: Agent) -> dict[str, Any]:  # Any: JSON values
    """What differs from a new agent, as JSON values: a third of the whole. So a field's default must never change its meaning."""
    names, read = _fields_of(Agent) or ((), lambda _: ())
    return {
        name: one if type(one) in _PLAIN else to_json(one)
        for name, one, usual in zip(names, read(agent), _usual(), strict=True)
        if one is not usual and one != usual
    }


@cache
def _usual() -> tuple[Any, ...]:  # Any: whatever the fields hold; what has no default is like nothing
    return tuple(one.default for one in fields(Agent))


_AGENT_READERS: Mapping[str, Callable[[Any], Any]] = {  # Any: from JSON values to the field's
    "state": AgentState,
    "replace": Replace,
    "saving": Saving,
    "failures": tuple,
    "process": lambda data: ProcessRef(**data),
    "last_exit": lambda data: Exit(**data),
    "leader_exit": lambda data: Exit(**data),
}


def agent_from_json(data: Mapping[str, Any]) -> Agent:
    """The agent that `agent_to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
    known = {name: value for name, value in data.items() if name in Agent.__dataclass_fields__}
    return Agent(**{name: _AGENT_READERS[name](one) if one is not None and name in _AGENT_READERS else one for name, one in known.items()})
