"""Whether an agent uses more than it may, where nothing but looking at it holds it to its limits."""

from collections.abc import Collection

from fleetctl.models import ResourceLimitsSpec, Usage

_MIB = 1 << 20


def exceeded(limits: ResourceLimitsSpec, usage: Usage, watched: Collection[str]) -> str | None:
    """Why the agent has to go; None where it keeps to the limits in `watched`, such as "memory_limit_mb"."""
    memory, processes = limits.memory_limit_mb, limits.pids_limit
    if "memory_limit_mb" in watched and memory is not None and usage.memory_bytes > memory * _MIB:
        return f"it uses {usage.memory_bytes / _MIB:.0f} MiB, more than memory_limit_mb = {memory:g}"
    if "pids_limit" in watched and processes is not None and usage.processes > processes:
        return f"it has {usage.processes} processes, more than pids_limit = {processes}"
    return None
