"""The tables of README.md that are read from the code: `python -m tests.docs.tables` writes them anew, a test compares them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from fleetctl import config, errors
from fleetctl.cli import render
from fleetctl.config import SettingInfo
from tests.cli.fake_daemon import a_fleet, a_pool, an_agent, an_autoscaler
from tests.real.harness import ROOT

README = ROOT / "README.md"

FIRST_SETTINGS = (
    "name",
    "command",
    "replicas",
    "cwd",
    "environment",
    "secret_env",
    "restart.policy",
    "readiness.http",
    "graceful_drain.timeout_seconds",
    "warm_pool.size",
    "min_replicas",
    "max_replicas",
    "resource_limits.memory_limit_mb",
)
"""What a newcomer meets; the rest is looked up."""

EXIT_STATUSES: Mapping[int | str, str] = {
    0: "done; a read succeeded, whatever the states are",
    errors.EXIT_FAILED: "the operation failed, wholly or in part",
    errors.EXIT_USAGE: "the command line is wrong",
    errors.EXIT_NOT_DESIRED: "`--check`: not in the desired state",
    errors.EXIT_NO_DAEMON: "no daemon runs, or no cluster answers, and the command needs one",
    errors.EXIT_NOT_FOUND: "no such fleet or agent",
    errors.EXIT_CONFIG: "the configuration is invalid",
    errors.EXIT_TIMEOUT: "`--timeout` ran out",
    "130, 143": "interrupted by INT, TERM",
}


def exit_statuses() -> str:
    return "| exit status | meaning |\n|---|---|\n" + "".join(f"| {status} | {meaning} |\n" for status, meaning in EXIT_STATUSES.items())


def error_codes() -> str:
    classes: list[type[errors.FleetctlError]] = [errors.FleetctlError, *errors.FleetctlError.__subclasses__()]
    rows = sorted((cls.code, cls.exit_status, str(cls())) for cls in classes)
    header = "| code | exit status | meaning |\n|---|---|---|\n"
    return header + "".join(f"| {code} | {status} | {sentence} |\n" for code, status, sentence in rows)


def supported_settings() -> str:
    rows = (f"| `{info.key}` | {_default(info)} | {info.bounds} | {info.doc} |\n" for info in config.settings() if info.supported)
    return "| setting | default | allowed | |\n|---|---|---|---|\n" + "".join(rows)


def first_settings() -> str:
    found = {info.key: info for info in config.settings()}
    rows = (f"| `{key}` | {_default(found[key])} | {found[key].doc} |\n" for key in FIRST_SETTINGS)
    return "| setting | default | |\n|---|---|---|\n" + "".join(rows)


def status_view() -> str:
    """What `status` shows of a fleet in which something goes on."""
    waiting: dict[str, Any] = {
        "state": "backoff",
        "ready": False,
        "pid": None,
        "cpu_percent": None,
        "memory_bytes": None,
        "uptime_seconds": None,
    }
    note = "next try in 1 s; exit 1, 2 in a row"
    fleet = a_fleet(
        "web",
        command=["python3", "worker.py"],
        desired_replicas=3,
        ready_replicas=2,
        autoscaling=an_autoscaler(
            enabled=True,
            mode="act",
            min_replicas=2,
            max_replicas=10,
            reason="CPU utilization 82.0% > target 70%",
            next_decision_seconds=12.0,
        ),
        warm_pool=a_pool(1),
        agents=[
            an_agent(1, id="web-tq4mn", cpu_percent=81.4, memory_bytes=43_200_000, uptime_seconds=11_520.0, status_text="12 of 20 pages"),
            an_agent(2, id="web-8ysjp", cpu_percent=82.6, memory_bytes=41_900_000, uptime_seconds=11_520.0, status_text="3 of 9 pages"),
            an_agent(3, id="web-d38d3", **waiting, restarts=2, note=note),
            an_agent(4, id="web-m5zk9", state="suspended", ready=True, pooled=True, cpu_percent=0.0, uptime_seconds=640.0),
        ],
    )
    return f"```text\n{render.plain(render.fleet_lines(fleet, 110))}```\n"


def _default(info: SettingInfo) -> str:
    if info.required:
        return "required"
    if info.default in (None, {}, []):
        return "none"
    return f"`{json.dumps(info.default)}`"


TABLES: Mapping[str, Callable[[], str]] = {
    "exit statuses": exit_statuses,
    "errors": error_codes,
    "first settings": first_settings,
    "status view": status_view,
    "settings": supported_settings,
}


def with_tables(text: str) -> str:
    """The text with every table between its marks as the code has it."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->\n")
        assert begin, f"README.md has no place for the table of {name}"
        assert end, f"the table of {name} in README.md has no end"
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
