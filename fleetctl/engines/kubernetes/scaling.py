"""A spec -> what makes its number of agents: HPA, disruption budget, warm pool. Pure.

The cluster's autoscaler does the scaling; ours does not run beside it.
"""

import re
from collections.abc import Mapping
from typing import Any

from fleetctl.engines.kubernetes import names, pod
from fleetctl.engines.kubernetes.names import Object
from fleetctl.errors import ConfigError
from fleetctl.models import RATE_PATTERN, AutoscalingMode, FleetSpec, MetricScope

LONGEST_WINDOW_SECONDS = 3600  # of an HPA's stabilization
LONGEST_PERIOD_SECONDS = 1800  # of its rate policies
SANDBOX_GROUP = "extensions.agents.x-k8s.io"

Json = dict[str, Any]  # Any: JSON values


def autoscaled(spec: FleetSpec) -> bool:
    """Whether an HPA owns the number of replicas."""
    return spec.autoscaling.enabled and spec.autoscaling.mode is AutoscalingMode.ACT


def autoscaler(spec: FleetSpec) -> Object:
    """The HPA. Raises ConfigError where it would have no metric to go by."""
    metrics = _metrics(spec)
    if not metrics:
        raise ConfigError(
            f"fleet {spec.name}: autoscaling has no metric that a cluster can measure",
            hint="leave autoscaling.use_cpu on, or set autoscaling.target_memory_utilization and resource_limits.memory_limit_mb",
        )
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": spec.name, "labels": names.labels(spec.name)},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec.name},
            "minReplicas": max(1, spec.min_replicas),
            "maxReplicas": spec.max_replicas,
            "metrics": metrics,
            "behavior": {
                "scaleUp": _behavior(spec.scale_up_stabilization_seconds, spec.autoscaling.scale_up_rates),
                "scaleDown": _behavior(spec.scale_down_stabilization_seconds, spec.autoscaling.scale_down_rates),
            },
        },
    }


def _metrics(spec: FleetSpec) -> list[Json]:
    """Ours are percents of an agent's limit (or of one core), an HPA's are percents of what was requested."""
    found = []
    if spec.autoscaling.use_cpu:
        limit = spec.resource_limits.cpu_limit or 1.0
        found.append(_utilization("cpu", spec.target_cpu_utilization * limit / pod.cpu_request(spec)))
    limit, target = spec.resource_limits.memory_limit_mb or 0.0, spec.autoscaling.target_memory_utilization
    if target is not None and limit:
        found.append(_utilization("memory", target * limit / (spec.kubernetes.memory_request_mb or limit)))
    return found + [_custom(name, *aim) for name, aim in custom_targets(spec).items()]


def custom_targets(spec: FleetSpec) -> Mapping[str, tuple[float, MetricScope]]:
    """Target and scope of the metrics of one's own that scaling aims at, by name; those without a target only stand in formulas."""
    return {name: (metric.target, metric.scope) for name, metric in spec.autoscaling.metrics.items() if metric.target is not None}


def _custom(name: str, target: float, scope: MetricScope) -> Json:
    """By the name under which the cluster's metrics adapter is to serve it: one number for the fleet, or one of each pod."""
    about = {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": pod.thousandths(target)}}
    if scope is MetricScope.PER_REPLICA:
        return {"type": "Pods", "pods": about}
    return {"type": "External", "external": about}


def _utilization(resource: str, percent: float) -> Json:
    target = {"type": "Utilization", "averageUtilization": max(1, round(percent))}
    return {"type": "Resource", "resource": {"name": resource, "target": target}}


def _behavior(seconds: float, rates: tuple[str, ...]) -> Json:
    behavior: Json = {"stabilizationWindowSeconds": min(LONGEST_WINDOW_SECONDS, round(seconds))}
    policies = [_policy(rate) for rate in rates]
    return behavior | ({"selectPolicy": "Max", "policies": policies} if policies else {})


def _policy(rate: str) -> Json:
    """ "4 per 15 s" and "100% per 15 s" -> a policy."""
    found = re.match(RATE_PATTERN, rate)
    if not found:
        raise ConfigError(f'{rate!r} is no rate; "4 per 15 s" and "100% per 15 s" are')
    number, percent, seconds = found[1], found[2], float(found[3])
    period = min(LONGEST_PERIOD_SECONDS, max(1, round(seconds)))
    return {"type": "Percent" if percent else "Pods", "value": int(number), "periodSeconds": period}


def disruption_budget(spec: FleetSpec) -> Object:
    """Holds evictions back, when a node is drained; a scale-down does not ask it."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": spec.name, "labels": names.labels(spec.name)},
        "spec": {
            "minAvailable": spec.autoscaling.min_available,
            "selector": {"matchLabels": names.selector(spec.name)},
        },
    }


def warm_pool(spec: FleetSpec, sandbox_version: str | None) -> list[Object]:
    """Agents beside the replicas: as sandboxes where the cluster knows them (by the version it serves), else a second Deployment."""
    name, labels, size = names.standby_name(spec.name), names.labels(spec.name) | {names.POOL: names.STANDBY}, spec.warm_pool.size
    template = pod.template(spec, names.STANDBY)
    if sandbox_version is None:
        return [
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": name, "labels": labels},
                "spec": {
                    "replicas": size,
                    "revisionHistoryLimit": 1,
                    "selector": {"matchLabels": names.selector(spec.name, names.STANDBY)},
                    "template": template,
                },
            }
        ]
    version = f"{SANDBOX_GROUP}/{sandbox_version}"
    # Left to itself the controller would cut the agents' network down; that is what trust levels are for.
    policy = {} if pod.cut_off(spec) else {"networkPolicyManagement": "Unmanaged"}
    return [
        {
            "apiVersion": version,
            "kind": "SandboxTemplate",
            "metadata": {"name": name, "labels": labels},
            "spec": {"podTemplate": template, **policy},
        },
        {
            "apiVersion": version,
            "kind": "SandboxWarmPool",
            "metadata": {"name": name, "labels": labels},
            "spec": {"replicas": size, "sandboxTemplateRef": {"name": name}},
        },
    ]
