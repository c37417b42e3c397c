"""What of a spec a cluster does differently or not at all: each with the setting it is about, so that nothing is lost in silence."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fleetctl.engines.kubernetes import names, scaling
from fleetctl.models import FleetSpec, LogSpec, OnTimeout, RestartPolicy, RestartSpec

_LOOKS_SECRET = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|CREDENTIAL)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that is different, or left out, in a cluster."""

    setting: str
    text: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.text}"


def notes(spec: FleetSpec) -> list[Note]:
    """All there is to say about this spec, in the order of its settings."""
    found = [
        *_process(spec),
        *_secrets(spec),
        *_sockets(spec),
        *_probes(spec),
        *_limits(spec),
        *_sandbox(spec),
        *_stopping(spec),
        *_scaling(spec),
        *_elsewhere(spec),
    ]
    return [Note(setting, text) for setting, text in found]


Said = Iterator[tuple[str, str]]


def _process(spec: FleetSpec) -> Said:
    words = [spec.command[0]] if spec.shell else list(spec.command)
    if here := next((word for word in words if word.startswith(spec.cwd.rstrip("/") + "/") or word == spec.cwd), None):
        yield "command", f"{here} is a path of this machine; the image must have it there"
    relative = "/" in words[0] and not words[0].startswith("/") and not spec.shell
    if relative and not spec.kubernetes.working_directory:
        yield "cwd", f"{words[0]} is looked for in the image's working directory; kubernetes.working_directory sets another"
    text = "\n".join([*words, *spec.environment.values()])
    if "FLEETCTL_SLOT" in text or "{slot}" in text:
        yield "command", "agents of a cluster have no slot: FLEETCTL_SLOT is not set"
    if spec.tools:
        yield "tools", "agents of a cluster have no claim file; give them what they may use in environment"
    if spec.restart.policy is not RestartPolicy.ALWAYS:
        yield (
            "restart.policy",
            f'"{spec.restart.policy}" does not map: a cluster starts an agent again whatever its exit status',
        )
    if _changed(spec.restart, RestartSpec(policy=spec.restart.policy)):
        yield "restart", "waits and the limits of a crash loop are the kubelet's own: 10 s, doubled up to 5 minutes"


def _sandbox(spec: FleetSpec) -> Said:
    for key in ("read_only_paths", "read_write_paths", "inaccessible_paths"):
        if getattr(spec.sandbox, key):
            yield f"sandbox.{key}", "does not map: agents of a cluster see their image, and nothing of this machine"


def _secrets(spec: FleetSpec) -> Said:
    name, namespace = names.secret_name(spec.name, spec.kubernetes.secret), ""
    if spec.kubernetes.namespace:
        namespace = f" --namespace {spec.kubernetes.namespace}"
    if spec.secret_env:
        literals = " ".join(_literal(key, place) for key, place in sorted(spec.secret_env.items()))
        yield "secret_env", f"the values come from Secret {name}: `kubectl create secret generic {name}{namespace} {literals}`"
    if spec.env_file:
        made = names.env_secret_name(spec.name)
        source = shlex.quote(spec.env_file)
        yield "env_file", f"the values come from Secret {made}: `kubectl create secret generic {made}{namespace} --from-env-file={source}`"
    for key in spec.environment:
        if _LOOKS_SECRET.search(key):
            yield f"environment.{key}", "looks like a secret and would stand in the manifest for all to read; secret_env keeps it out"


def _literal(key: str, reference: str) -> str:
    kind, _, place = reference.partition(":")
    return f'--from-literal={key}="${place}"' if kind == "env" else f"--from-file={key}={shlex.quote(place)}"


def _sockets(spec: FleetSpec) -> Said:
    for name, address in spec.sockets.items():
        if address.startswith("unix:"):
            yield f"sockets.{name}", "a Unix socket does not map; agents of a cluster share no file system"
        else:
            yield f"sockets.{name}", "no socket is handed over: each agent must listen on this port itself, on all its addresses"
    if spec.port_base is not None:
        yield "port_base", f"every agent has an address of its own, so PORT is {spec.port_base} for all of them"


def _probes(spec: FleetSpec) -> Said:
    if spec.readiness.notify:
        yield "readiness.notify", "does not map: a cluster has no NOTIFY_SOCKET; give readiness.http, tcp or exec"
    if spec.watchdog_seconds is not None:
        yield "watchdog_seconds", "does not map: a cluster has no NOTIFY_SOCKET; give liveness.http, tcp or exec"
    if spec.stuck_after_seconds is not None:
        yield "stuck_after_seconds", "does not map: a cluster does not hear of an agent's progress; give liveness.http, tcp or exec"
    if spec.budget.tokens is not None or spec.budget.cost_usd is not None:
        yield "budget", "does not map: a cluster does not hear what agents spend"
    for key, probe in (("readiness", spec.readiness), ("liveness", spec.liveness)):
        if probe.http or probe.tcp:
            what = "http" if probe.http else "tcp"
            if (probe.http or probe.tcp or "").startswith("unix:"):
                yield f"{key}.{what}", "does not map: a cluster cannot ask a Unix socket; give a port or exec"
            else:
                yield f"{key}.{what}", "the question comes from outside: the agent must not listen on loopback only"
        short = probe.probed and (probe.interval_seconds % 1 or probe.timeout_seconds % 1)
        if short:
            yield key, "a cluster counts whole seconds: intervals and timeouts are rounded up"


def _limits(spec: FleetSpec) -> Said:
    for key in ("pids_limit", "nofile"):
        if getattr(spec.resource_limits, key) is not None:
            yield f"resource_limits.{key}", "does not map: a cluster sets that for all pods of a node"
    if spec.resource_limits.nice is not None:
        yield "resource_limits.nice", "does not map: a cluster shares CPU by kubernetes.cpu_request"


def _stopping(spec: FleetSpec) -> Said:
    drain = spec.graceful_drain
    if spec.stop_signal.removeprefix("SIG") != "TERM" or drain.drain_signal:
        setting = "graceful_drain.drain_signal" if drain.drain_signal else "stop_signal"
        yield setting, "sent by a preStop hook, so the image must have /bin/sh and kill; what is left after it gets TERM"
    if drain.on_timeout is OnTimeout.WAIT:
        yield "graceful_drain.on_timeout", '"wait" does not map: an agent has a day to finish and is killed then'
    if drain.checkpoint_signal:
        yield "graceful_drain.checkpoint_signal", "does not map; checkpoints.command runs before an agent is stopped"
    if spec.checkpoints.command and not spec.kubernetes.storage_size:
        yield "checkpoints.command", "without kubernetes.storage_size a checkpoint is gone with its pod"
    if spec.checkpoints.restore_command:
        yield "checkpoints.restore_command", "does not map: an agent of a cluster finds older checkpoints in FLEETCTL_CHECKPOINT_DIR"


def _scaling(spec: FleetSpec) -> Said:
    auto = spec.autoscaling
    if auto.enabled and auto.mode == "recommend":
        yield "autoscaling.mode", '"recommend" does not map: nothing is scaled, and nothing is recommended'
    elif auto.enabled:
        if auto.idle_seconds is not None:
            yield "autoscaling.idle_seconds", "does not map: an HPA keeps at least 1; the cluster's HPAScaleToZero, or KEDA, goes to none"
        elif spec.min_replicas == 0:
            yield "min_replicas", "an HPA keeps at least 1"
        for key in ("scale_up_stabilization_seconds", "scale_down_stabilization_seconds"):
            if getattr(spec, key) > 3600:
                yield key, "an HPA looks back 3600 s at most"
        for name in scaling.custom_targets(spec):
            yield f"autoscaling.metrics.{name}", f"its source is not asked: the cluster's metrics adapter must serve it as {name}"
        if auto.target_pending is not None:
            yield "autoscaling.target_pending", "does not map by itself: a cluster needs a metrics adapter that tells it what is pending"
        yield "autoscaling_interval_seconds", "the cluster decides for itself how often it looks, by default every 15 s"
    if auto.min_available:
        floor = spec.min_replicas if auto.enabled else spec.replicas
        yield "autoscaling.min_available", "a disruption budget: it holds evictions back, when a node is drained, not `scale`"
        if auto.min_available >= floor:
            yield "autoscaling.min_available", f"is not below the {floor} replicas there may be: no node with an agent can then be drained"
    if spec.warm_pool.enabled and spec.warm_pool.size:
        yield "warm_pool", "a cluster cannot suspend: standby agents run, know it by FLEETCTL_LAUNCH=standby, and must wait by themselves"


def _elsewhere(spec: FleetSpec) -> Said:
    if _changed(spec.logs, LogSpec()):
        yield "logs", "does not map: the kubelet of each node cuts and keeps output by its own settings"
    if not spec.kubernetes.storage_size:
        yield "kubernetes.storage_size", "not given: STATE_DIRECTORY outlives a restart of an agent, not its pod"
    elif spec.kubernetes.storage_access == "ReadWriteOnce":
        yield "kubernetes.storage_access", "all agents must run on the one node that holds the volume"


def _changed(value: Any, default: Any) -> bool:  # Any: two sections of the same kind
    return bool(value != default)
