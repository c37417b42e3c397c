"""A spec -> the pod template of its agents. Pure."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

from fleetctl.addresses import filled, parse, parse_url, placeholders
from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.names import Object
from fleetctl.errors import ConfigError
from fleetctl.models import FleetSpec, LivenessSpec, OnTimeout, ReadinessSpec, TrustLevel

STATE = "/var/lib/fleetctl/state"
CHECKPOINTS = "/var/lib/fleetctl/checkpoints"
DEFAULT_CPU_REQUEST = 0.25
LONGEST_GRACE_SECONDS = 86400
# The default of 300 s leaves the agents of a dead node unreplaced for five minutes.
LOST_NODE_SECONDS = 30

Json = dict[str, Any]  # Any: JSON values


def template(spec: FleetSpec, pool: str = names.REPLICAS) -> Object:
    """Labels and pod spec, for a Deployment or a warm pool."""
    return {"metadata": {"labels": names.labels(spec.name) | names.selector(spec.name, pool)}, "spec": _pod(spec, pool)}


def cut_off(spec: FleetSpec) -> bool:
    """Whether its agents have no network but for their own ports."""
    return spec.trust_level is TrustLevel.UNTRUSTED and not spec.sandbox.network


def _pod(spec: FleetSpec, pool: str) -> Json:
    kubernetes, untrusted = spec.kubernetes, spec.trust_level is TrustLevel.UNTRUSTED
    mounts, volumes = _volumes(spec, scratch=untrusted)
    return _without_none(
        {
            "automountServiceAccountToken": kubernetes.service_account is not None,
            "serviceAccountName": kubernetes.service_account,
            "enableServiceLinks": False,
            "imagePullSecrets": [{"name": kubernetes.image_pull_secret}] if kubernetes.image_pull_secret else None,
            "securityContext": _pod_security(spec) or None,
            "terminationGracePeriodSeconds": grace_seconds(spec),
            "tolerations": [
                {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": LOST_NODE_SECONDS}
                for what in ("not-ready", "unreachable")
            ],
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": names.selector(spec.name, pool)},
                }
            ],
            "containers": [_container(spec, pool, mounts)],
            "volumes": volumes,
        }
    )


def _container(spec: FleetSpec, pool: str, mounts: list[Json]) -> Json:
    ports = [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports_of(spec).items()]
    return _without_none(
        {
            "name": names.CONTAINER,
            "image": spec.kubernetes.image,
            "command": [escaped(word) for word in _command(spec)],
            "workingDir": spec.kubernetes.working_directory,
            "env": _environment(spec, pool),
            "envFrom": [{"secretRef": {"name": names.env_secret_name(spec.name)}}] if spec.env_file else None,
            "ports": ports or None,
            "resources": resources(spec),
            **_probes(spec),
            "lifecycle": _lifecycle(spec),
            "securityContext": _container_security(spec) or None,
            "volumeMounts": mounts,
        }
    )


def _command(spec: FleetSpec) -> list[str]:
    words = ["/bin/sh", "-c", *spec.command] if spec.shell else list(spec.command)
    return [filled(word, _port_words(spec)) for word in words]


def _port_words(spec: FleetSpec) -> Mapping[str, str]:
    """What {port} and {port:NAME} stand for."""
    ports = _numbers(spec)
    words = {f"port:{name}": str(port) for name, port in ports.items()}
    only = spec.port_base if spec.port_base is not None else next(iter(ports.values()), None)
    return words if only is None else {**words, "port": str(only)}


def _numbers(spec: FleetSpec) -> dict[str, int]:
    """The ports of the sockets, by the sockets' names; a Unix socket has none."""
    return {name: parse(address).port for name, address in spec.sockets.items() if not address.startswith("unix:")}


def ports_of(spec: FleetSpec) -> dict[str, int]:
    """What the agents listen on, by a name that Kubernetes takes."""
    found: dict[str, int] = {}
    for name, port in _numbers(spec).items():
        plain = "".join(char if char.isalnum() else "-" for char in name.lower()).strip("-")[:15].strip("-")
        usable = plain if any(char.isalpha() for char in plain) and plain.isascii() and "--" not in plain and plain not in found else ""
        found[usable or f"port-{port}"] = port
    if spec.port_base is not None and spec.port_base not in found.values():
        found["port"] = spec.port_base
    return found


def escaped(text: str) -> str:
    """Kubernetes puts variables in for $(NAME) and reads $$ as one $, in commands and values; ours are to stay what they are."""
    return "".join("$$" if char == "$" and text[at + 1 : at + 2] in ("$", "(") else char for at, char in enumerate(text))


def _environment(spec: FleetSpec, pool: str) -> list[Json]:
    """What an agent finds locally, as far as a cluster has it; secrets by reference, never by value."""
    own: list[Json] = [
        {"name": "FLEETCTL_AGENT_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "FLEETCTL_FLEET", "value": spec.name},
        {"name": "FLEETCTL_LAUNCH", "value": "cold" if pool == names.REPLICAS else "standby"},
        {"name": "FLEETCTL_TRUST", "value": str(spec.trust_level)},
        {"name": "STATE_DIRECTORY", "value": STATE},
    ]
    if spec.checkpoints.command or spec.kubernetes.storage_size:
        own.append({"name": "FLEETCTL_CHECKPOINT_DIR", "value": CHECKPOINTS})
    if spec.port_base is not None:
        own.append({"name": "PORT", "value": str(spec.port_base)})
    given = [{"name": key, "value": escaped(value)} for key, value in sorted(spec.environment.items())]
    secret = names.secret_name(spec.name, spec.kubernetes.secret)
    kept = [{"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key in sorted(spec.secret_env)]
    return [*own, *given, *kept]


def cpu_request(spec: FleetSpec) -> float:
    """Cores set aside for an agent. Always written: without it an HPA has nothing to divide by."""
    return spec.kubernetes.cpu_request or spec.resource_limits.cpu_limit or DEFAULT_CPU_REQUEST


def resources(spec: FleetSpec) -> Json:
    limits, memory = spec.resource_limits, spec.kubernetes.memory_request_mb or spec.resource_limits.memory_limit_mb
    requests = {"cpu": thousandths(cpu_request(spec))} | ({"memory": mebibytes(memory)} if memory else {})
    most = {"cpu": thousandths(limits.cpu_limit)} if limits.cpu_limit else {}
    most |= {"memory": mebibytes(limits.memory_limit_mb)} if limits.memory_limit_mb else {}
    return {"requests": requests} | ({"limits": most} if most else {})


def thousandths(number: float) -> str:
    """As a quantity of Kubernetes: 2 -> 2, 0.25 -> 250m."""
    parts = max(1, round(number * 1000))
    return str(parts // 1000) if parts % 1000 == 0 else f"{parts}m"


def mebibytes(number: float) -> str:
    return f"{math.ceil(number)}Mi"


def _probes(spec: FleetSpec) -> Json:
    """readiness, liveness, and a startup probe for the time an agent has to become ready first."""
    ready, alive = _action(spec, "readiness", spec.readiness), _action(spec, "liveness", spec.liveness)
    probes: Json = {}
    if ready:
        probes["readinessProbe"] = ready | _rhythm(spec.readiness)
        if spec.readiness.start_timeout_seconds:
            seconds = math.ceil(spec.readiness.start_timeout_seconds)
            probes["startupProbe"] = ready | {
                "periodSeconds": 1,
                "timeoutSeconds": _whole(spec.readiness.timeout_seconds),
                "failureThreshold": seconds,
            }
    if alive:
        probes["livenessProbe"] = alive | _rhythm(spec.liveness)
    return probes


def _rhythm(probe: ReadinessSpec | LivenessSpec) -> Json:
    return {
        "periodSeconds": _whole(probe.interval_seconds),
        "timeoutSeconds": _whole(probe.timeout_seconds),
        "failureThreshold": probe.failure_threshold,
    }


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _action(spec: FleetSpec, section: str, probe: ReadinessSpec | LivenessSpec) -> Json:
    """What the kubelet does to ask; empty where nothing is asked or a cluster cannot ask it."""
    words = _port_words(spec)
    try:
        if probe.exec:
            return {"exec": {"command": [filled(word, words) for word in probe.exec]}}
        if probe.http and not probe.http.startswith("unix:"):
            target = parse_url(filled(probe.http, words))
            return {"httpGet": {"path": target.path, "port": target.address.port}}
        if probe.tcp and not probe.tcp.startswith("unix:"):
            return {"tcpSocket": {"port": parse(filled(probe.tcp, words)).port}}
    except ValueError as error:
        raise ConfigError(f"fleet {spec.name}: {section} cannot be asked in a cluster: {error}") from error
    return {}


def grace_seconds(spec: FleetSpec) -> int:
    """Time between the wish that an agent stops and its end by force; 0 would make Kubernetes forget it unseen."""
    drain = spec.graceful_drain
    if drain.on_timeout is OnTimeout.WAIT:
        return LONGEST_GRACE_SECONDS
    saving = drain.checkpoint_timeout_seconds if spec.checkpoints.command else 0.0
    return _whole(drain.timeout_seconds + saving)


def _lifecycle(spec: FleetSpec) -> Json | None:
    """The checkpoint command, then a signal other than TERM, both before the kubelet's own TERM."""
    signal = (spec.graceful_drain.drain_signal or spec.stop_signal).removeprefix("SIG")
    if signal == "TERM":
        return {"preStop": {"exec": {"command": list(spec.checkpoints.command)}}} if spec.checkpoints.command else None
    # The agent is process 1 of its container; the hook lasts until it has ended, so that no TERM disturbs it.
    asked = f"kill -{signal} 1; while kill -0 1 2>/dev/null; do sleep 1; done"
    steps = [shlex.join(spec.checkpoints.command), asked] if spec.checkpoints.command else [asked]
    return {"preStop": {"exec": {"command": ["/bin/sh", "-c", "; ".join(steps)]}}}


def _volumes(spec: FleetSpec, *, scratch: bool) -> tuple[list[Json], list[Json]]:
    """(mounts, volumes): a folder for each agent, on the claim where there is one, and one for the checkpoints of all."""
    if spec.kubernetes.storage_size:
        mounts: list[Json] = [
            {"name": "state", "mountPath": STATE, "subPathExpr": "agents/$(FLEETCTL_AGENT_ID)"},
            {"name": "state", "mountPath": CHECKPOINTS, "subPath": "checkpoints"},
        ]
        volumes: list[Json] = [{"name": "state", "persistentVolumeClaim": {"claimName": names.claim_name(spec.name)}}]
    else:
        mounts, volumes = [{"name": "state", "mountPath": STATE}], [{"name": "state", "emptyDir": {}}]
        if spec.checkpoints.command:
            mounts.append({"name": "checkpoints", "mountPath": CHECKPOINTS})
            volumes.append({"name": "checkpoints", "emptyDir": {}})
    if scratch:
        mounts.append({"name": "scratch", "mountPath": "/tmp"})
        volumes.append({"name": "scratch", "emptyDir": {}})
    return mounts, volumes


def _pod_security(spec: FleetSpec) -> Json:
    user, level = spec.kubernetes.user, spec.trust_level
    context: Json = {"runAsUser": user, "runAsGroup": user, "fsGroup": user} if user else {}
    if level is TrustLevel.UNTRUSTED or user:
        context["runAsNonRoot"] = True
    if level is not TrustLevel.TRUSTED:
        context["seccompProfile"] = {"type": "RuntimeDefault"}
    return context


def _container_security(spec: FleetSpec) -> Json:
    level = spec.trust_level
    if level is TrustLevel.TRUSTED:
        return {}
    context: Json = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return context | {"readOnlyRootFilesystem": True} if level is TrustLevel.UNTRUSTED else context


def check(spec: FleetSpec) -> None:
    """ConfigError for what no cluster can carry."""
    if not spec.kubernetes.image:
        raise ConfigError(
            f"fleet {spec.name}: kubernetes.image is missing; agents of a cluster run in a container image that holds their program",
            hint="build and push one, then set image in [fleet.kubernetes] (export takes --image too); see examples/kubernetes",
        )
    words = set().union(*(placeholders(word) for word in (*spec.command, *spec.environment.values())))
    if by_descriptor := sorted(word for word in words if word.partition(":")[0] == "fd"):
        raise ConfigError(
            f"fleet {spec.name}: {{{by_descriptor[0]}}} does not exist in a cluster, which hands no sockets to agents",
            hint="let the program listen by itself, on {port} and on all addresses",
        )
    unknown = sorted(word for word in words if word.partition(":")[0] == "port" and word not in _port_words(spec))
    if unknown:
        raise ConfigError(f"fleet {spec.name}: {{{unknown[0]}}} stands for no port", hint="set port_base, or a socket with a port")


def _without_none(values: Json) -> Json:
    return {key: value for key, value in values.items() if value is not None}
