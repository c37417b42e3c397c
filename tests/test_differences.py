"""What differs between two specs, and what that takes."""

from dataclasses import fields, replace
from typing import Any

import pytest

from fleetctl.config import differences
from fleetctl.models import FleetSpec, MetricSpec, ResourceLimitsSpec, RestartSpec, TrustLevel, WarmPoolSpec

SPEC = FleetSpec(name="web", command=("a", "b"), environment={"A": "s3cret", "B": "2"}, secret_env={"KEY": "env:KEY"})
METRIC = MetricSpec(redis="LLEN jobs", redis_url="redis://user:s3cret@127.0.0.1:1/0")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"replicas": 3}, [("replicas", "changed", "live", 1, 3)]),
        ({"restart": RestartSpec(backoff_seconds=2)}, [("restart.backoff_seconds", "changed", "live", 0.5, 2)]),
        ({"warm_pool": WarmPoolSpec(enabled=True)}, [("warm_pool.enabled", "changed", "live", False, True)]),
        ({"command": ("a", "c")}, [("command", "changed", "rollout", ["a", "b"], ["a", "c"])]),
        ({"environment": {"A": "other", "B": "2"}}, [("environment.A", "changed", "rollout", "***", "***")]),
        ({"environment": {"B": "2"}}, [("environment.A", "removed", "rollout", "***", None)]),
        ({"secret_env": {"KEY": "env:KEY", "B": "env:B"}}, [("secret_env.B", "added", "rollout", None, "env:B")]),
        ({"port_base": 8000}, [("port_base", "added", "rollout", None, 8000)]),
        ({"trust_level": TrustLevel.TRUSTED}, [("trust_level", "changed", "rollout", "standard", "trusted")]),
        (
            {"resource_limits": ResourceLimitsSpec(cpu_limit=1.0, nofile=64)},
            [("resource_limits.cpu_limit", "added", "live", None, 1.0), ("resource_limits.nofile", "added", "rollout", None, 64)],
        ),
    ],
)
def test_differences(change: dict[str, Any], expected: list[tuple[object, ...]]) -> None:
    found = differences(SPEC, replace(SPEC, **change))
    assert [(one.key, one.change, one.how, one.old, one.new) for one in found] == expected


def test_no_secret_is_in_them() -> None:
    changed = replace(SPEC, environment={"A": "other"}, autoscaling=replace(SPEC.autoscaling, metrics={"jobs": METRIC}))
    assert "s3cret" not in str(differences(SPEC, changed) + differences(changed, SPEC))


@pytest.mark.parametrize("name", [field.name for field in fields(FleetSpec)])
def test_what_needs_new_processes_is_what_the_processes_are_compared_by(name: str) -> None:
    other = FleetSpec(
        name="web",
        command=("z",),
        shell=True,
        cwd="/z",
        environment={"Z": "1"},
        env_file="z",
        secret_env={"Z": "env:Z"},
        trust_level=TrustLevel.TRUSTED,
        tools=("z",),
        replicas=9,
        port_base=1,
        sockets={"z": "127.0.0.1:1"},
        watchdog_seconds=1.0,
        resource_limits=ResourceLimitsSpec(nofile=99),
    )
    changed = replace(SPEC, **{name: getattr(other, name)})
    assert any(one.how == "rollout" for one in differences(SPEC, changed)) is (changed.process_hash != SPEC.process_hash)
