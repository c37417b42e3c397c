"""Labels, annotations and names of a fleet's objects: by them, and by nothing else, we know what is ours."""

from typing import Any

Object = dict[str, Any]  # Any: an object of the Kubernetes API, as JSON values

MANAGER = "fleetctl"
"""Field manager of what `up` applies. Other names of ours begin with it."""
SCALE_MANAGER = "fleetctl-scale"
RESTART_MANAGER = "fleetctl-restart"

MANAGED_BY = "app.kubernetes.io/managed-by"
NAME = "app.kubernetes.io/name"
FLEET = "fleetctl/fleet"
POOL = "fleetctl/pool"
REPLICAS, STANDBY = "replicas", "standby"  # values of POOL

MIN_REPLICAS = "fleetctl/min-replicas"
MAX_REPLICAS = "fleetctl/max-replicas"
WARM_SIZE = "fleetctl/warm-size"
RESTARTED_AT = "fleetctl/restarted-at"

CONTAINER = "agent"


def labels(fleet: str) -> dict[str, str]:
    """Of every object of a fleet."""
    return {NAME: fleet, MANAGED_BY: MANAGER, FLEET: fleet}


def selector(fleet: str, pool: str = REPLICAS) -> dict[str, str]:
    """What its pods are found by. Never to be changed: a Deployment's selector cannot be."""
    return {FLEET: fleet, POOL: pool}


def label_query(wanted: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in wanted.items())


def ours(fleet: str | None = None) -> str:
    """Label query for what is ours, or of one fleet of ours."""
    return label_query({MANAGED_BY: MANAGER} | ({FLEET: fleet} if fleet else {}))


def is_ours(found: Object, fleet: str) -> bool:
    given = found.get("metadata", {}).get("labels") or {}
    return given.get(MANAGED_BY) == MANAGER and given.get(FLEET) == fleet


def fleet_of(found: Object) -> str:
    return str((found.get("metadata", {}).get("labels") or {}).get(FLEET, ""))


def service_name(fleet: str) -> str:
    """A Service's name must begin with a letter, a fleet's need not."""
    return fleet if fleet[0].isalpha() else f"fleet-{fleet}"


def standby_name(fleet: str) -> str:
    return f"{fleet}-standby"


def claim_name(fleet: str) -> str:
    """Of its PersistentVolumeClaim."""
    return f"{fleet}-state"


def secret_name(fleet: str, given: str | None) -> str:
    return given or f"{fleet}-secrets"


def env_secret_name(fleet: str) -> str:
    """Of the Secret that stands for its env_file."""
    return f"{fleet}-env"
