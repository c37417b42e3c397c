"""A wide table of specs, each for something else that a fleet may have; by name, which is that of its golden manifest."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fleetctl.models import (
    AutoscalingSpec,
    CheckpointsSpec,
    EngineName,
    FleetSpec,
    GracefulDrainSpec,
    KubernetesSpec,
    LivenessSpec,
    OnTimeout,
    ReadinessSpec,
    ResourceLimitsSpec,
    TrustLevel,
    VolumeAccess,
    WarmPoolSpec,
)

IMAGE = "registry.example.com/team/worker:1.0"


def a_spec(name: str = "web", **changes: Any) -> FleetSpec:
    """A small fleet that a cluster can carry."""
    cluster = replace(KubernetesSpec(image=IMAGE), **changes.pop("cluster", {}))
    given: dict[str, Any] = {"name": name, "command": ("python3", "-m", "worker"), "replicas": 3, "cwd": "/home/me/worker", **changes}
    return FleetSpec(engine=EngineName.KUBERNETES, kubernetes=cluster, **given)


LIMITS = ResourceLimitsSpec(cpu_limit=2.0, memory_limit_mb=512.5)
SPECS: Mapping[str, FleetSpec] = {
    "small": a_spec(),
    "digits": a_spec("7", port_base=8000),
    "none": a_spec(replicas=0),
    "shell": a_spec(command=('echo "$$ $(date) $HOME $(FLEETCTL_FLEET)"; exec ./serve --port {port}',), shell=True, port_base=9000),
    "http": a_spec(
        command=("serve", "--port", "{port}"),
        sockets={"http": "127.0.0.1:8080", "Admin_API": "[::1]:9090", "local": "unix:/run/x.sock"},
        readiness=ReadinessSpec(http="http://127.0.0.1:{port}/healthz?deep=1", interval_seconds=2.5, start_timeout_seconds=90),
        liveness=LivenessSpec(tcp="127.0.0.1:{port:http}", failure_threshold=5),
    ),
    "probes": a_spec(
        readiness=ReadinessSpec(exec=("./ready", "--fast"), start_timeout_seconds=0),
        liveness=LivenessSpec(exec=("./alive",), timeout_seconds=2.5),
    ),
    "secrets": a_spec(
        environment={"GREETING": "hello", "NUMBER": "7", "ANSWER": "yes", "PRICE": "$(NOT) $$"},
        env_file="/home/me/worker/.env",
        secret_env={"API_KEY": "env:API_KEY", "DB_PASSWORD": "file:/run/secrets/my db"},
    ),
    "drain": a_spec(
        graceful_drain=GracefulDrainSpec(timeout_seconds=120.5, checkpoint_timeout_seconds=15, drain_signal="SIGUSR2"),
        checkpoints=CheckpointsSpec(command=("./save", "to here")),
    ),
    "wait": a_spec(stop_signal="INT", graceful_drain=GracefulDrainSpec(timeout_seconds=0, on_timeout=OnTimeout.WAIT)),
    "checkpoint": a_spec(checkpoints=CheckpointsSpec(command=("./save",))),
    "autoscaled": a_spec(
        min_replicas=2,
        max_replicas=50,
        scale_down_stabilization_seconds=7200,
        resource_limits=LIMITS,
        autoscaling=AutoscalingSpec(enabled=True, min_available=1, target_memory_utilization=80.0, scale_down_rates=("10% per 60 s",)),
        cluster={"cpu_request": 0.5, "memory_request_mb": 256.0},
    ),
    "autoscaled-plainly": a_spec(autoscaling=AutoscalingSpec(enabled=True, scale_up_rates=())),
    "guarded": a_spec(replicas=1, autoscaling=AutoscalingSpec(min_available=1)),
    "warm": a_spec(warm_pool=WarmPoolSpec(enabled=True, size=4), cluster={"namespace": "agents"}),
    "untrusted": a_spec(trust_level=TrustLevel.UNTRUSTED, sockets={"http": "127.0.0.1:8080"}, tools=("search",)),
    "trusted": a_spec(trust_level=TrustLevel.TRUSTED),
    "stored": a_spec(
        cluster={
            "storage_size": "10Gi",
            "storage_class": "fast",
            "storage_access": VolumeAccess.ONCE,
            "user": 65532,
            "service_account": "worker",
            "image_pull_secret": "registry",
            "secret": "worker-keys",
            "working_directory": "/srv",
            "namespace": "agents",
        },
        secret_env={"API_KEY": "env:API_KEY"},
        resource_limits=LIMITS,
    ),
}
