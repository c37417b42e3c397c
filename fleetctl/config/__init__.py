"""fleet.toml + environment + flags -> FleetSpec; every value knows its source, and every problem of a file is told at once.

    settings     what there is to set, read from the model: list, JSON Schema, first file
    toml_lines   on which line of a file each key stands
    checks       whether given settings make a fleet
    load         joins them: a file, a command line, a client's JSON -> spec and sources
    runnable     whether the command can be started on this machine
    differences  what differs between two specs, and what that takes

pydantic is imported at the first check, not here.
"""

from fleetctl.config.differences import Difference, differences
from fleetctl.config.load import Loaded, find_file, load_command, load_demo, load_file, load_library, spec_from_json, spec_to_json
from fleetctl.config.runnable import check_runnable
from fleetctl.config.settings import SettingInfo, is_default, schema, settings, starter

__all__ = [
    "Difference",
    "Loaded",
    "SettingInfo",
    "check_runnable",
    "differences",
    "find_file",
    "is_default",
    "load_command",
    "load_demo",
    "load_file",
    "load_library",
    "schema",
    "settings",
    "spec_from_json",
    "spec_to_json",
    "starter",
]
