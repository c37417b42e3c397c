"""One fleet on its way from another tool's file to fleet.toml, and the text of that file.

Every setting keeps the word it came from, and everything that has no place here keeps the reason. What fleet.toml would not accept
(out of bounds, not supported yet) is taken out again with that reason, so that what is written is always valid.
"""

import json
import posixpath
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fleetctl.config.checks import check
from fleetctl.config.settings import setting
from fleetctl.errors import ConfigError

Value = str | int | float | bool | list[str] | dict[str, str]

_SECRET = re.compile(r"secret|token|passw|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
_WIDTH = 120
# Where other tools give up for good.
RESTARTS_HERE = "restarts wait 0.5 s, 1 s, 2 s ... a minute; six failures within a minute are a crash loop, tried again every five minutes"
_NEVER_EMPTY = ("name", "command")


@dataclass(slots=True, kw_only=True)
class Draft:
    """A fleet that is being put together. `origin`: where in the file it stands; keys of settings are dotted, as in the README."""

    name: str
    origin: str
    settings: dict[str, Value] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)

    def carry(self, key: str, value: Value, source: str) -> None:
        self.settings[key] = value
        self.sources[key] = source

    def leave(self, what: str, why: str) -> None:
        if (what, why) not in self.left:
            self.left.append((what, why))

    def add_variable(self, name: str, value: str, source: str) -> None:
        self._add("environment", name, value, source)

    def refer(self, name: str, reference: str, source: str) -> None:
        self._add("secret_env", name, reference, source)

    def _add(self, key: str, name: str, value: str, source: str) -> None:
        self.settings[key] = {**self.table(key), name: value}
        self.sources.setdefault(key, source)

    def table(self, key: str) -> dict[str, str]:
        """A setting that is a table; empty where it was not given."""
        value = self.settings.get(key, {})
        assert isinstance(value, dict)
        return value

    def values(self) -> dict[str, object]:
        """The settings as fleet.toml nests them."""
        nested: dict[str, object] = {"name": self.name}
        for key, value in self.settings.items():
            table, _, leaf = key.rpartition(".")
            inner = nested.setdefault(table, {}) if table else nested
            assert isinstance(inner, dict)
            inner[leaf] = value
        return nested


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a file. `around`: parts of it that belong to no fleet, and why they are not carried over."""

    fleets: Sequence[Draft]
    around: Sequence[tuple[str, str]] = ()


def supports(key: str) -> bool:
    """Whether this fleetctl knows the setting and does something with it."""
    about = setting(key)
    return about is not None and about.supported


def fleet_name(wanted: str, taken: Sequence[str]) -> str:
    """The nearest name that a fleet may have and that no other fleet of the file has: Web_Server -> web-server, web-server-2."""
    plain = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")[:40].strip("-") or "fleet"
    others = (f"{plain[:35].strip('-')}-{number}" for number in range(2, len(taken) + 3))
    return next(name for name in (plain, *others) if name not in taken)


def settle(draft: Draft) -> Draft:
    """The draft without what fleet.toml would refuse, each with its reason. ConfigError where no fleet is left."""
    for _ in range(3):  # taking one setting out can leave another one alone
        _, problems = check(draft.values())
        if not problems:
            break
        for problem in problems:
            _take_out(draft, tuple(str(part) for part in problem.path), _reason(problem.text))
    else:
        raise ConfigError(
            f"{draft.origin}: this cannot be made a fleet", hint="write it by hand: `fleetctl config init` shows every setting"
        )
    for name in draft.table("environment"):
        if _SECRET.search(name):
            draft.leave(f"{name} as a secret", "its value is written below as it was; better is secret_env, which takes it by reference")
    return draft


def _take_out(draft: Draft, path: tuple[str, ...], why: str) -> None:
    table, inside = draft.settings.get(path[0]), path[1:]
    if isinstance(table, dict) and inside and inside[0] in table:
        del table[inside[0]]
        draft.leave(f"{inside[0]} ({path[0]})", why)
        if not table:
            del draft.settings[path[0]]
        return
    key = next((key for key in (".".join(path[:2]), path[0]) if key in draft.settings), "")
    if not key or key in _NEVER_EMPTY:
        raise ConfigError(f"{draft.origin}: {'.'.join(path)} {why}")
    del draft.settings[key]
    draft.leave(f"{draft.sources[key]} ({key})", why)


def _reason(text: str) -> str:
    return text.lstrip(": ").removesuffix("; leave it out")


def to_toml(imported: Imported, source: str) -> str:
    """The text of a fleet.toml: each line with the word it came from, and what was not carried over as comments."""
    lines = [
        f"# Made by `fleetctl import {source}`. A word behind a setting is what it was called there.",
        "# `fleetctl config check` checks this file, `fleetctl up` starts what is in it.",
    ]
    if imported.around:
        lines += ["", "# Not carried over:", *_remarks(imported.around)]
    for draft in imported.fleets:
        lines += ["", *_fleet_lines(draft)]
    return "\n".join(lines) + "\n"


def _fleet_lines(draft: Draft) -> list[str]:
    lines = ["[[fleet]]", _line("name", draft.name, draft.origin)]
    if draft.left:
        lines[1:1] = ["# Not carried over, or not the same:", *_remarks(draft.left)]
    tables: dict[str, list[str]] = {}
    for key, value in draft.settings.items():
        table, _, leaf = key.rpartition(".")
        if isinstance(value, dict):
            tables[f"[fleet.{key}]  # {_comment(draft.sources[key])}"] = [_line(name, item) for name, item in value.items()]
        elif table:
            tables.setdefault(f"[fleet.{table}]", []).append(_line(leaf, value, draft.sources[key]))
        else:
            lines.append(_line(leaf, value, draft.sources[key]))
    for header, inside in tables.items():
        lines += ["", header, *inside]
    return lines


def _line(key: str, value: Value, source: str = "") -> str:
    written = f"{_key(key)} = {_toml(value)}"
    if len(written) > _WIDTH - 20 and source:
        return f"# {_comment(source)}\n{written}"
    return f"{written}  # {_comment(source)}" if source else written


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Value) -> str:
    if isinstance(value, str) and "\\" in value and value.isprintable() and "'" not in value:
        return f"'{value}'"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON's strings are TOML's, but for DEL, which TOML wants written out.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    """TOML allows no control character in a comment."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _remarks(remarks: Sequence[tuple[str, str]]) -> list[str]:
    return [
        line
        for what, why in remarks
        for line in textwrap.wrap(
            _comment(f"{what}: {why}"),
            width=_WIDTH,
            initial_indent="# - ",
            subsequent_indent="#   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def under(folder: str, path: str) -> str:
    """`path`, which was relative to `folder`."""
    return posixpath.normpath(posixpath.join(folder, path))


def flag(value: object) -> bool | None:
    """What other tools take for yes and no; None for anything else."""
    words: Mapping[str, bool] = {
        **dict.fromkeys(("true", "yes", "on", "1"), True),
        **dict.fromkeys(("false", "no", "off", "0"), False),
    }
    return words.get(str(value).strip().lower())
