"""From a status, a list of events, a change ... to lines of text. Pure: no terminal, no clock, no I/O.

A line is a list of segments (text, style); a style is a word or two that rich understands, and colour never says what the words do not.
Cheap to import: nothing here needs rich.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Segment = tuple[str, str]
Line = list[Segment]
Object = Mapping[str, Any]  # Any: an object of the control API; its keys are listed in daemon/wire.py

GAP = "  "
_SGR = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_STATE_STYLE = {
    "running": "green",
    "starting": "cyan",
    "suspended": "cyan",
    "draining": "yellow",
    "backoff": "yellow",
    "failed": "bold red",
    "terminated": "dim",
}

# Whole escape sequences go first (CSI; OSC, DCS and their kin up to their end; two-byte ones), then what is left of the control
# characters, and the marks that turn the direction of the text around them.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]+")


def clean(text: object) -> str:
    """Text from outside made safe to show on one line: no escape sequences, no control characters."""
    return _CONTROLS.sub(" ", _ESCAPES.sub("", str(text))).encode(errors="replace").decode()


def cell_width(text: str) -> int:
    """Columns the text takes on a terminal: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) or char in "\u200b\u200c\u200d\ufe0f" else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def cut(text: str, width: int) -> str:
    """The text, shortened to the width with an ellipsis where it is longer."""
    if cell_width(text) <= width:
        return text
    kept, used = "", 1
    for char in text:
        used += cell_width(char)
        if used > width:
            break
        kept += char
    return kept + "…" if width > 0 else ""


def plain(lines: Iterable[Line]) -> str:
    return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in lines)


def ansi(lines: Iterable[Line]) -> str:
    """The lines with colours, for a terminal."""
    return "".join("".join(_paint(*segment) for segment in line).rstrip() + "\n" for line in lines)


def _paint(text: str, style: str) -> str:
    codes = ";".join(_SGR[word] for word in style.split())
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text.strip() else text


def duration(seconds: float | None) -> str:
    """Two units at most: 4s, 3m12s, 2h05m, 4d03h."""
    if seconds is None:
        return "-"
    total = max(0, int(seconds))
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if total >= size:
            return f"{total // size}{unit}{total % size // small:02d}{smaller}"
    return f"{total}s"


def size(count: int | None) -> str:
    """Bytes with a unit of 1024: 512B, 12.3M, 1.5G."""
    if count is None:
        return "-"
    value = float(count)
    for unit in "BKMGT":
        if value < 999.5 or unit == "T":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value >= 99.95 or unit == "B" else f"{value:.1f}{unit}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}%"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def moment(at: object) -> str:
    """An RFC 3339 time as people read it, without the fraction: 2026-01-31 12:00:00Z."""
    text = clean(at)
    return f"{text[:10]} {text[11:19]}Z" if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", text) else text


def last_exit(found: Object | None) -> str:
    if not found:
        return "-"
    if found.get("text"):
        return clean(found["text"])
    if found.get("signal") is not None:
        return f"signal {found['signal']}"
    return "unknown" if found.get("code") is None else f"exit {found['code']}"


class Column(NamedTuple):
    """One column of a table. `drop`: where the line is too long, the column with the highest number goes first; 0 never goes.

    `least` is the width it has at any rate, so that a live table does not jitter; `shrink` columns may be cut down to `least`.
    """

    title: str
    value: Callable[[Any], Any]  # Any: a row in, whatever is to be shown out
    right: bool = False
    drop: int = 0
    least: int = 0
    shrink: bool = False
    style: Callable[[Any], str] | None = None
    reword: Callable[[str], str] | None = None  # of what does not fit, before it is cut


def table(columns: Sequence[Column], rows: Sequence[Any], width: int | None) -> list[Line]:
    """A header and a line a row, no longer than the width (None: as long as it takes)."""
    cells = [[clean(column.value(row)) for row in rows] for column in columns]
    kept = [index for index, column in enumerate(columns) if not column.shrink or any(text not in ("", "-") for text in cells[index])]
    widths = {index: max([len(columns[index].title), columns[index].least, *map(cell_width, cells[index])]) for index in kept}
    silent = {index for index in kept if columns[index].drop and all(text in ("", "-") for text in cells[index])}
    kept = _fit(columns, kept, silent, widths, width)
    header: Line = [("", "")]
    lines: list[Line] = [header, *([("", "")] for _ in rows)]
    for position, index in enumerate(kept):
        column, last = columns[index], position == len(kept) - 1
        for line, text, style in zip(
            lines,
            [column.title, *cells[index]],
            ["bold", *(column.style(row) if column.style else "" for row in rows)],
            strict=True,
        ):
            if column.reword and cell_width(text) > widths[index]:
                text = column.reword(text)
            text = cut(text, widths[index])
            space = " " * (widths[index] - cell_width(text))
            before, after = (space, "") if column.right else ("", "" if last else space)
            line += [(before, ""), (text, style), (after + ("" if last else GAP), "")]
    return lines


def _fit(columns: Sequence[Column], kept: list[int], silent: set[int], widths: dict[int, int], width: int | None) -> list[int]:
    """The columns that stay: the silent ones, in which no row says anything, go first. Cuts down those that may shrink, in place."""

    def excess() -> int:
        return 0 if width is None else sum(widths[index] for index in kept) + len(GAP) * (len(kept) - 1) - width

    def spare(index: int) -> int:
        return widths[index] - max(columns[index].least, len(columns[index].title)) if columns[index].shrink else 0

    if excess() > 0:
        kept = [index for index in kept if index not in silent]
    while excess() > sum(map(spare, kept)) and (droppable := [index for index in kept if columns[index].drop]):
        kept = [index for index in kept if index != max(droppable, key=lambda index: columns[index].drop)]
    for index in reversed(kept):
        widths[index] -= min(max(0, excess()), spare(index))
    for index in sorted(kept, key=lambda index: -widths[index]):  # a terminal of a few columns: cut whatever is longest
        widths[index] -= min(max(0, excess()), widths[index] - min(4, widths[index]))
    return kept


def state_text(agent: Object) -> str:
    """The state in words; an agent that runs and is not ready yet says so."""
    return f"{agent['state']}, not ready" if agent["state"] == "running" and not agent["ready"] else str(agent["state"])


def failure_hint(fleet: str, agent: Object) -> str:
    """What to do about an agent that failed."""
    exit_ = agent["last_exit"] or {}
    done = exit_.get("code") == 0 and exit_.get("signal") is None
    policy = '; if it is meant to end, set restart.policy = "on-failure" or "never"' if done else ""
    return f"`fleetctl logs {clean(agent['id'])}` shows its output, `fleetctl restart {clean(fleet)}` tries again at once{policy}"


def failure_words(fleets: Sequence[Object]) -> str:
    """How many agents have failed, and what to do about the first; empty where none has."""
    failed = [
        (fleet["name"], agent) for fleet in fleets for agent in fleet["agents"] if agent["state"] == "failed" and not agent.get("replacing")
    ]
    return f"{count(len(failed), 'agent')} failed; {failure_hint(*failed[0])}" if failed else ""


def telling_first(note: str) -> str:
    """The daemon's note in another order for where it has to be cut: what the agent said, how it ended, the rest."""
    rest, _, output = note.partition("last output: ")
    parts = [part for part in rest.split("; ") if part]
    how = [found[2] for part in parts if (found := re.fullmatch(r"(.*), last: (.*)", part))]
    parts = sorted((re.sub(", last: .*", "", part) for part in parts), key=lambda part: part.startswith("next try"))
    return "; ".join([*([f'"{output}"'] if output else []), *how, *parts])


def note_text(agent: Object) -> str:
    """The note, else what the agent says of itself; an instance of the warm pool says that it is one, as it counts for nothing else."""
    return "; ".join(
        filter(
            None,
            [
                "in the warm pool" if agent["pooled"] else "",
                "protected" if agent["protected"] else "",
                agent["note"] or agent["status_text"],
            ],
        )
    )


def state_style(agent: Object) -> str:
    return "cyan" if agent["state"] == "running" and not agent["ready"] else _STATE_STYLE.get(str(agent["state"]), "")


def or_dash(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


_AGENT = Column("AGENT", lambda agent: agent["id"], least=8)
_FLEET = Column("FLEET", lambda agent: agent["fleet"], drop=6)
_STATE = Column("STATE", state_text, least=9, style=state_style)
_NUMBERS = (
    Column("PID", lambda agent: or_dash(agent["pid"]), right=True, drop=3, least=7),
    Column("CPU", lambda agent: percent(agent["cpu_percent"]), right=True, drop=4, least=6),
    Column("MEMORY", lambda agent: size(agent["memory_bytes"]), right=True, drop=5, least=6),
    Column("UPTIME", lambda agent: duration(agent["uptime_seconds"]), right=True, drop=2, least=6),
    Column("RESTARTS", lambda agent: agent["restarts"], right=True, drop=7),
    Column("LAST EXIT", lambda agent: last_exit(agent["last_exit"]), drop=8, shrink=True),
    Column("NOTE", lambda agent: note_text(agent), drop=1, least=12, shrink=True, reword=telling_first),
)
STATUS_COLUMNS = (_AGENT, _STATE, *_NUMBERS)
PS_COLUMNS = (_AGENT, _FLEET, _STATE, *_NUMBERS)


def command_line(words: Sequence[object]) -> str:
    """As it would be typed; one word alone is what a shell is given, and already that."""
    from shlex import join

    return str(words[0]) if len(words) == 1 else join(map(str, words))


def fleet_title(fleet: Object) -> Line:
    """`demo  5 of 5 ready`, what it runs, and whether it is going."""
    ready, desired = fleet["ready_replicas"], fleet["desired_replicas"]
    line: Line = [(clean(fleet["name"]), "bold"), ("  ", ""), (f"{ready} of {desired} ready", "green" if ready == desired else "yellow")]
    if fleet.get("down"):
        line.append((", being taken down", "yellow"))
    if fleet["autoscaling"] and fleet["autoscaling"].get("enabled"):
        scaling = fleet["autoscaling"]
        mode = " (recommend)" if scaling.get("mode") == "recommend" else ""
        line.append((f", autoscaling{mode} {scaling.get('min_replicas')}..{scaling.get('max_replicas')}", ""))
    warm = fleet["warm_pool"]
    if warm and warm.get("enabled"):
        line.append((f", {warm.get('current_size')} of {warm.get('target_size')} warm", ""))
    return [*line, ("  ", ""), (clean(command_line(fleet.get("command") or ())), "dim")]


def sockets_line(fleet: Object) -> Line:
    """Where the fleet listens, and how many wait there; nothing where it declares no socket."""
    found = []
    for one in fleet.get("sockets") or ():
        waiting = "" if one["backlog"] is None else f", {one['backlog']} waiting"
        found.append(f"{clean(one['address'])} ({clean(one['name'])}{waiting})")
    return [(f"listens on {', '.join(found)}", "")] if found else []


def autoscaling_line(fleet: Object) -> Line:
    """Why the fleet is as large as it is, and when that is thought over; nothing where no load decides it."""
    scaling = fleet["autoscaling"]
    if not scaling or not scaling.get("enabled") or not scaling.get("reason"):
        return []
    soon = scaling.get("next_decision_seconds")
    return [(f"autoscaler: {clean(scaling['reason'])}", ""), ("" if soon is None else f"; decides again in {duration(soon)}", "dim")]


AUTOSCALE_COLUMNS = (
    Column("FLEET", lambda fleet: fleet["name"]),
    Column("AUTOSCALING", lambda fleet: fleet["autoscaling"]["mode"] if fleet["autoscaling"]["enabled"] else "off"),
    Column("AGENTS", lambda fleet: fleet["desired_replicas"], right=True),
    Column("MIN", lambda fleet: fleet["autoscaling"]["min_replicas"], right=True, drop=3),
    Column("MAX", lambda fleet: fleet["autoscaling"]["max_replicas"], right=True, drop=3),
    Column("UPS", lambda fleet: or_dash(fleet["autoscaling"]["scale_up_count"]), right=True, drop=4),
    Column("DOWNS", lambda fleet: or_dash(fleet["autoscaling"]["scale_down_count"]), right=True, drop=4),
    Column("NEXT", lambda fleet: duration(fleet["autoscaling"]["next_decision_seconds"]), right=True, drop=2),
    Column("REASON", lambda fleet: or_dash(fleet["autoscaling"]["reason"]), least=10, shrink=True),
)


def autoscale_lines(fleets: Sequence[Object], width: int | None) -> list[Line]:
    return table(AUTOSCALE_COLUMNS, fleets, width) if fleets else [[("no fleets; `fleetctl up` starts one", "dim")]]


def clip(line: Line, width: int | None) -> Line:
    """The line, no longer than the width."""
    if width is None or sum(cell_width(text) for text, _ in line) <= width:
        return line
    clipped, left = [], width
    for text, style in line:
        clipped.append((cut(text, left), style))
        left -= cell_width(clipped[-1][0])
        if cell_width(text) > cell_width(clipped[-1][0]):
            break
    return clipped


def wrapped(text: str, width: int | None, style: str = "") -> list[Line]:
    """The text on as many lines as it takes; a command in backquotes stays in one piece, to be copied."""
    lines = [""]
    for word in re.findall(r"`[^`]*`\S*|\S+", text):
        together = f"{lines[-1]} {word}".lstrip()
        if width is None or not lines[-1] or cell_width(together) <= width:
            lines[-1] = together
        else:
            lines.append(word)
    return [[(line if width is None else cut(line, width), style)] for line in lines]


def fleet_lines(fleet: Object, width: int | None) -> list[Line]:
    lines = [clip(line, width) for line in (fleet_title(fleet), sockets_line(fleet), autoscaling_line(fleet)) if line]
    lines += [line for note in fleet.get("notes") or () for line in wrapped(f"note: {clean(note)}", width, "yellow")]
    return lines + (table(STATUS_COLUMNS, fleet["agents"], width) if fleet["agents"] else [[("no agents", "dim")]])


def status_lines(status: Object, width: int | None, height: int | None = None) -> list[Line]:
    """All fleets, one below the other; with a height, no more than that: every fleet's heading, and agents that are not ready first."""
    lines: list[Line] = []
    for fleet in status["fleets"]:
        lines += [[("", "")]] if lines else []
        lines += fleet_lines(fleet, width)
    if height is not None and len(lines) > height:
        return _fitted(status["fleets"], width, height)
    return lines or [[("no fleets; `fleetctl up` starts one", "dim")]]


_MOST_URGENT = ("failed", "backoff", "starting", "draining", "running", "suspended", "terminated")


def _urgency(agent: Object) -> int:
    state = "starting" if agent["state"] == "running" and not agent["ready"] else agent["state"]
    return _MOST_URGENT.index(state) if state in _MOST_URGENT else 0


def _fitted(fleets: Sequence[Object], width: int | None, height: int) -> list[Line]:
    """What of the fleets fits into so many lines."""
    heads = [fleet_lines({**fleet, "agents": ()}, width)[:-1] for fleet in fleets]
    gaps = len(fleets) - 1
    if sum(map(len, heads)) + gaps > height:
        heads, gaps = [head[:1] for head in heads], 0  # without their notes
    if len(heads) > height:
        shown = max(0, height - 1)
        return [line for head in heads[:shown] for line in head] + [_more(len(heads) - shown, "fleet", "status", width)]
    agents = [sorted(fleet["agents"], key=_urgency) for fleet in fleets]
    rows = _shares(agents, height - sum(map(len, heads)) - gaps)
    spare = height - sum(map(len, heads)) - gaps - sum(map(_table_height, agents, rows))
    lines: list[Line] = []
    for head, every, number in zip(heads, agents, rows, strict=True):
        lines += [[("", "")]] if lines and gaps else []
        lines += head + (table(STATUS_COLUMNS, every, width)[: number + 1] if number else [])
        if number or (every and spare > 0):
            spare -= not number
            lines += [_more(len(every) - number, "agent", "ps", width)] if number < len(every) else []
    return lines


def _shares(agents: Sequence[Sequence[Object]], room: int) -> list[int]:
    """How many agents of each fleet to show: the most urgent ones wherever they are, then from each fleet the same number."""
    rows = [0] * len(agents)

    def fits(index: int) -> bool:
        return sum(map(_table_height, agents, [*rows[:index], rows[index] + 1, *rows[index + 1 :]])) <= room

    while fitting := [index for index, every in enumerate(agents) if rows[index] < len(every) and fits(index)]:
        rows[min(fitting, key=lambda index: (_urgency(agents[index][rows[index]]), rows[index]))] += 1
    return rows


def _table_height(agents: Sequence[Object], rows: int) -> int:
    """Lines for so many of these agents: with a header, and a word on the others."""
    return rows and rows + 1 + (rows < len(agents))


def _more(number: int, noun: str, command: str, width: int | None) -> Line:
    return [(cut(f"... {count(number, f'more {noun}')}; `fleetctl {command}` shows all", width or 200), "dim")]


def ps_lines(agents: Sequence[Object], width: int | None) -> list[Line]:
    return table(PS_COLUMNS, agents, width)


WARM_COLUMNS = (
    Column("FLEET", lambda fleet: fleet["name"]),
    Column("WARM", lambda fleet: fleet["warm_pool"]["current_size"], right=True),
    Column("WANTED", lambda fleet: fleet["warm_pool"]["target_size"] if fleet["warm_pool"]["enabled"] else "off", right=True),
    Column("HITS", lambda fleet: or_dash(fleet["warm_pool"]["hits"]), right=True),
    Column("MISSES", lambda fleet: or_dash(fleet["warm_pool"]["misses"]), right=True),
    Column("HIT RATE", lambda fleet: percent(fleet["warm_pool"]["hit_rate_percent"]), right=True),
)


def warm_lines(fleets: Sequence[Object], width: int | None) -> list[Line]:
    return table(WARM_COLUMNS, fleets, width) if fleets else [[("no fleets; `fleetctl up` starts one", "dim")]]


HISTORY_COLUMNS = (
    Column("TIME", lambda entry: moment(entry["at"])),
    Column("FLEET", lambda entry: entry["fleet"], drop=3),
    Column("CHANGE", lambda entry: f"{entry['current_replicas']} -> {entry['target_replicas']}"),
    Column("CAUSE", lambda entry: or_dash(entry.get("cause")), drop=2),
    Column("REASON", lambda entry: entry["reason"], least=10, shrink=True),
)


def history_lines(entries: Sequence[Object], width: int | None) -> list[Line]:
    return table(HISTORY_COLUMNS, entries, width) if entries else [[("no decisions yet", "dim")]]


CHECKPOINT_COLUMNS = (
    Column("CHECKPOINT", lambda one: one["id"], style=lambda one: "bold"),
    Column("AGENT", lambda one: one["agent"]),
    Column("TAKEN", lambda one: moment(one["created_at"]), drop=2),
    Column("KIND", lambda one: one["kind"], drop=1),
    Column("FILES", lambda one: one["files"], right=True, drop=3),
    Column("SIZE", lambda one: size(one["bytes"]), right=True),
    Column("REASON", lambda one: "; ".join([one["reason"], *one["notes"]]), shrink=True, least=10),
)


def checkpoints_lines(checkpoints: Sequence[Object], width: int | None) -> list[Line]:
    return table(CHECKPOINT_COLUMNS, checkpoints, width) if checkpoints else [[("no checkpoints", "dim")]]


def checkpoint_lines(found: Object, width: int | None) -> list[Line]:
    """One checkpoint with its files, as `checkpoint show` has it."""
    token = f"yes, in {found['path']}/checkpoint.json" if found["has_token"] else "none"
    pairs: list[tuple[str, object]] = [
        ("checkpoint", found["id"]),
        ("agent", f"{found['agent']}, slot {found['slot']} of fleet {found['fleet']}"),
        ("taken", f"{moment(found['created_at'])}, {found['reason']}"),
        ("kind", found["kind"]),
        ("resume token", token),
        ("folder", found["path"]),
        ("files", f"{count(found['files'], 'file')}, {size(found['bytes'])}, each as it was saved"),
        *(("note", note) for note in found["notes"]),
    ]
    return [*fields(pairs, width), *([(f"  {clean(file['path'])}  {size(file['size'])}", "dim")] for file in found["contents"])]


def event_line(event: Object) -> Line:
    """One event; columns that stay where they are, because a stream has no table to fit them to."""
    who = event.get("agent_id") or event.get("fleet") or "-"
    return [
        (moment(event["at"]), "dim"),
        (f"  {clean(event['kind']):<16}  ", "cyan"),
        (f"{clean(who):<16}  ", "bold"),
        (clean(event["message"]), ""),
    ]


def fields(pairs: Sequence[tuple[str, object]], width: int | None = None) -> list[Line]:
    """`name: value` lines, aligned."""
    wide = max((len(name) for name, _ in pairs), default=0)
    return [clip([(f"{name + ':':<{wide + 1}}  ", "bold"), (clean(or_dash(value)), "")], width) for name, value in pairs]


def _said(agent: Object) -> Iterator[tuple[str, object]]:
    """What the agent told of itself, where it told anything."""
    if agent["status_text"] and agent["note"]:
        yield "Says", agent["status_text"]
    work = [("active", "in work"), ("slots", "at most"), ("pending", "waiting")]
    if any(agent[key] is not None for key, _ in work):
        yield "Work", ", ".join(f"{agent[key]} {word}" for key, word in work if agent[key] is not None)
    if agent["dropped_messages"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in agent["dropped_by_reason"].items())
        yield "Messages", f"{agent['dropped_messages']} dropped: {reasons}"


def agent_lines(agent: Object, width: int | None) -> list[Line]:
    """All that is known about one agent."""
    lines = fields(
        [
            ("Agent", agent["id"]),
            ("Fleet", f"{agent['fleet']}, slot {agent['slot']}"),
            ("State", state_text(agent)),
            ("Note", note_text(agent)),
            *_said(agent),
            ("Pid", agent["pid"]),
            ("Uptime", duration(agent["uptime_seconds"])),
            ("CPU", percent(agent["cpu_percent"])),
            ("Memory", size(agent["memory_bytes"])),
            ("Restarts", agent["restarts"]),
            ("Last exit", last_exit(agent["last_exit"])),
            ("Created", moment(agent["created_at"])),
            ("Started", moment(agent["started_at"]) if agent["started_at"] else None),
            ("Command", command_line(agent["command"])),
            ("Folder", agent["cwd"]),
            ("Log", agent["log_path"]),
            ("State dir", agent["state_directory"]),
            ("Environment", ", ".join(agent["environment"]) or None),
            *([("Trust", trust_text(agent["trust"]))] if agent.get("trust") else []),
            *([("Limits", limits_text(agent["limits"]))] if agent.get("limits") else []),
        ],
        width,
    )
    if agent["processes"]:
        lines += [[("", "")], [("Processes", "bold")], *table(_PROCESS_COLUMNS, agent["processes"], width)]
    return lines


def trust_text(trust: Object) -> str:
    return clean(f"{trust['level']}: {', '.join(trust['held_by'])}" if trust["held_by"] else f"{trust['level']}: all that its user may")


def limits_text(limits: Sequence[Object]) -> str:
    return ", ".join(f"{one['name']} {one['value']:g} ({clean(one['held_by']) or 'not enforced'})" for one in limits)


_PROCESS_COLUMNS = (
    Column("PID", lambda process: process["pid"], right=True, least=7),
    Column("PARENT", lambda process: process["ppid"], right=True, drop=2, least=7),
    Column("STATE", lambda process: process["state"], drop=1),
    Column("COMMAND", lambda process: _words(process["command"]), least=10, shrink=True),
)


def _words(command: object) -> str:
    return command_line(command) if isinstance(command, list | tuple) else str(command)


def toml_value(value: object) -> str:
    """A setting's value as fleet.toml would say it; a dash where it has none."""
    from json import dumps

    return "-" if value is None else dumps(value, ensure_ascii=False)


def difference_lines(found: Sequence[Object]) -> list[str]:
    """Settings that change, one a line: + added, ~ changed, - removed, and what it takes."""
    marks, takes = {"added": "+", "changed": "~", "removed": "-"}, {"live": "live", "rollout": "by rollout"}
    values = [f"{toml_value(one['old'])} -> {toml_value(one['new'])}" for one in found]
    return [f"  {marks[one['change']]} {one['key']}: {text} ({takes[one['how']]})" for one, text in zip(found, values, strict=True)]


def spec_lines(fleet: Object, width: int | None, shown: Callable[[str, object], bool]) -> list[Line]:
    """A fleet's agents, then those of its settings that are shown."""
    flat = [(key, toml_value(value)) for key, value in flatten(fleet["spec"]) if shown(key, value)]
    return [*fleet_lines(fleet, width), [("", "")], [("Settings", "bold")], *fields(flat, width)]


def rest_line(number: int) -> list[Line]:
    """That so many settings are not shown; nothing where all are."""
    return [[(f"{count(number, 'more setting')} as they are by default; --all shows them", "dim")]] if number else []


def flatten(value: Object, prefix: str = "") -> list[tuple[str, object]]:
    """The leaves of nested tables, each with its key path."""
    pairs: list[tuple[str, object]] = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        pairs += (
            flatten(item, f"{path}.")
            if isinstance(item, Mapping) and item
            else [(path, item or None if isinstance(item, Mapping) else item)]
        )
    return pairs
