"""The tables of README.md that are read from the code: `python -m tests.docs.tables` writes them anew, a test compares them."""

import json
from collections.abc import Callable, Mapping

from fleetctl import config, errors
from fleetctl.config import SettingInfo
from tests.real.harness import ROOT

README = ROOT / "README.md"

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


def planned_settings() -> str:
    return ", ".join(f"`{info.key}`" for info in config.settings() if not info.supported) + ".\n"


def _default(info: SettingInfo) -> str:
    if info.required:
        return "required"
    if info.default in (None, {}, []):
        return "none"
    return f"`{json.dumps(info.default)}`"


TABLES: Mapping[str, Callable[[], str]] = {
    "exit statuses": exit_statuses,
    "errors": error_codes,
    "settings": supported_settings,
    "planned": planned_settings,
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
