"""A spec -> every object of its fleet, as plain dicts in the order in which they are applied. Pure: `export` prints what `up` applies."""

import math
from collections.abc import Sequence

from fleetctl.engines.kubernetes import names, pod, scaling
from fleetctl.engines.kubernetes.names import Object
from fleetctl.models import FleetSpec

KEPT_REVISIONS = 3


def objects(spec: FleetSpec, *, sandbox_version: str | None = None, replicas: int | None = None) -> list[Object]:
    """Raises ConfigError for what no cluster can carry.

    `sandbox_version`: of the agent-sandbox API that the cluster serves; `replicas`: instead of the spec's.
    """
    pod.check(spec)
    found: list[Object] = []
    if spec.kubernetes.storage_size:
        found.append(_claim(spec))
    if pod.cut_off(spec):
        found.append(_network_policy(spec))
    if pod.ports_of(spec):
        found.append(_service(spec))
    if spec.autoscaling.min_available:
        found.append(scaling.disruption_budget(spec))
    found.append(_deployment(spec, spec.replicas if replicas is None else replicas))
    if scaling.autoscaled(spec):
        found.append(scaling.autoscaler(spec))
    if spec.warm_pool.enabled and spec.warm_pool.size:
        found += scaling.warm_pool(spec, sandbox_version)
    if spec.kubernetes.namespace:
        for one in found:
            one["metadata"]["namespace"] = spec.kubernetes.namespace
    return found


def _deployment(spec: FleetSpec, replicas: int) -> Object:
    settled = 0 if spec.readiness.probed else math.ceil(spec.readiness.settle_seconds)
    wish = {} if scaling.autoscaled(spec) else {"replicas": replicas}  # the HPA's, once there is one
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": spec.name,
            "labels": names.labels(spec.name) | {names.POOL: names.REPLICAS},
            "annotations": {
                names.MIN_REPLICAS: str(spec.min_replicas),
                names.MAX_REPLICAS: str(spec.max_replicas),
                names.WARM_SIZE: str(spec.warm_pool.size if spec.warm_pool.enabled else 0),
            },
        },
        "spec": {
            **wish,
            "revisionHistoryLimit": KEPT_REVISIONS,
            "minReadySeconds": settled,
            "selector": {"matchLabels": names.selector(spec.name)},
            # As on one machine: an agent goes when the one for it is ready.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": pod.template(spec),
        },
    }


def _claim(spec: FleetSpec) -> Object:
    kubernetes = spec.kubernetes
    given = {"storageClassName": kubernetes.storage_class} if kubernetes.storage_class else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": names.claim_name(spec.name), "labels": names.labels(spec.name)},
        "spec": {
            "accessModes": [str(kubernetes.storage_access)],
            **given,
            "resources": {"requests": {"storage": kubernetes.storage_size}},
        },
    }


def _service(spec: FleetSpec) -> Object:
    ports = [{"name": name, "port": port, "protocol": "TCP", "targetPort": port} for name, port in pod.ports_of(spec).items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": names.service_name(spec.name), "labels": names.labels(spec.name)},
        "spec": {"selector": names.selector(spec.name), "ports": ports},
    }


def _network_policy(spec: FleetSpec) -> Object:
    """Nothing out, and nothing in but to the ports that the fleet declares."""
    ports = [{"port": port, "protocol": "TCP"} for port in pod.ports_of(spec).values()]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": spec.name, "labels": names.labels(spec.name)},
        "spec": {
            "podSelector": {"matchLabels": {names.FLEET: spec.name}},
            "policyTypes": ["Ingress", "Egress"],
            **({"ingress": [{"ports": ports}]} if ports else {}),
        },
    }


def file_name(found: Object) -> str:
    """web-deployment.yaml"""
    return f"{found['metadata']['name']}-{found['kind'].lower()}.yaml"


def kustomization(files: Sequence[str]) -> Object:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(files)}
