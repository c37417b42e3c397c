"""The permissions that `--engine kubernetes` needs, as a Role: all of them, and the one that was missing."""

from collections.abc import Sequence

from fleetctl.engines.kubernetes.names import Object
from fleetctl.engines.kubernetes.scaling import SANDBOX_GROUP

_KEPT = ("get", "list", "create", "patch")
_OWNED = (*_KEPT, "delete")

# (API group, resources, verbs)
RULES: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
    ("apps", ("deployments",), (*_OWNED, "watch")),
    ("apps", ("deployments/scale",), ("patch",)),
    ("apps", ("replicasets",), ("list",)),
    ("", ("pods",), ("get", "list", "watch", "patch", "delete")),
    ("", ("pods/log",), ("get",)),
    ("", ("events",), ("list", "watch")),
    ("", ("services",), _OWNED),
    ("", ("persistentvolumeclaims",), _KEPT),
    ("autoscaling", ("horizontalpodautoscalers",), _OWNED),
    ("policy", ("poddisruptionbudgets",), _OWNED),
    ("networking.k8s.io", ("networkpolicies",), _OWNED),
    (SANDBOX_GROUP, ("sandboxtemplates", "sandboxwarmpools"), _OWNED),
    ("metrics.k8s.io", ("pods",), ("list",)),
)


def role(namespace: str | None) -> Object:
    """All that fleetctl does in a namespace."""
    return _role("fleetctl", namespace, RULES)


def role_for(verb: str, group: str, resource: str, namespace: str) -> Object:
    """What grants one permission."""
    return _role("fleetctl-more", namespace, [(group, (resource,), (verb,))])


def _role(name: str, namespace: str | None, rules: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> Object:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": name} | ({"namespace": namespace} if namespace else {}),
        "rules": [{"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)} for group, resources, verbs in rules],
    }
