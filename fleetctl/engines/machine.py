"""What this machine can hold agents to, found out by trying: for `doctor`, which needs no daemon."""

from typing import NamedTuple

from fleetctl.host import sandbox
from fleetctl.host.limits import LocalLimits


class Groups(NamedTuple):
    """`kinds`: which control groups there are, such as "v2"; `missing`: why there is none, by limit."""

    kinds: tuple[str, ...]
    missing: dict[str, str]


class Enclosure(NamedTuple):
    """`trouble`: why no sandbox can be made, empty where one can; `user`: who agents are in it."""

    trouble: str
    advice: str
    user: str
    hides_abstract_sockets: bool


def groups(root: str) -> Groups:
    limits = LocalLimits(f"{root}/doctor")  # its groups are no daemon's
    kinds = tuple(sorted({f"v{one.version}" for one in limits.controllers.values()}))
    missing = {key: limits.why_not(key) for key in ("cpu_limit", "memory_limit_mb", "pids_limit") if limits.why_not(key)}
    limits.sweep()
    return Groups(kinds, missing)


def enclosure() -> Enclosure:
    trouble = sandbox.rehearse()
    return Enclosure(trouble, sandbox.advice(trouble) if trouble else "", sandbox.user(), sandbox.hides_abstract_sockets())
