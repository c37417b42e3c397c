"""`scale` and `down`: how many agents there are to be."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import DryRun, Json, NoWait, Place, Timeout, check_fleets, on_any_engine, positive_seconds
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import say
from fleetctl.engines.local import LocalEngine, local
from fleetctl.engines.protocol import require
from fleetctl.errors import NotFound, NotStopped, TimedOut, UsageError

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Change, Status
    from fleetctl.engines.protocol import Engine

ORPHAN_SECONDS = 10.0
Wish = tuple[str | None, str, int]  # fleet, "replicas" or "delta", number
_WISH = re.compile(r"(?:([^=\s]+)=)?([+-]?)(\d{1,9})", re.ASCII)


def parse_wishes(words: Sequence[str]) -> list[Wish]:
    """What `scale` is asked for. UsageError for anything that is not N, +N, -N or FLEET= one of these."""
    wishes: list[Wish] = []
    for word in words:
        found = _WISH.fullmatch(word)
        if not found:
            if word.startswith("-"):
                raise UsageError(f"no such option: {word}", hint="`fleetctl scale --help` lists the options")
            raise UsageError(f"{word!r} is no number of agents", hint=_how_to_write(words))
        fleet, sign, number = found.groups()
        wishes.append((fleet, "delta", int(sign + number)) if sign else (fleet, "replicas", int(number)))
    named = [fleet for fleet, _, _ in wishes]
    if len(set(named)) < len(named) or (None in named and len(named) > 1):
        raise UsageError("each fleet can be scaled once at a time", hint="name each, such as `fleetctl scale web=10 worker=+2`")
    return wishes


def _how_to_write(words: Sequence[str]) -> str:
    """`scale web 2` is what many type first."""
    names = [word for word in words if not _WISH.fullmatch(word)]
    numbers = [word for word in words if _WISH.fullmatch(word) and "=" not in word]
    if len(words) == 2 and len(names) == len(numbers) == 1 and names[0].replace("-", "").isalnum():
        return f"`fleetctl scale {names[0]}={numbers[0]}`"
    return "write N, +N, -N or FLEET=N, such as `fleetctl scale web=10`"


def only_fleet(names: Sequence[str], example: str) -> str:
    """The fleet that is meant where none is named. `example` shows how to name one, with a %s."""
    if not names:
        raise NotFound("there are no fleets", hint="`fleetctl up` starts one")
    if len(names) > 1:
        raise UsageError(f"which fleet? There are {', '.join(names)}", hint=f"name it: `{example % names[0]}`")
    return names[0]


@on_any_engine
def scale(
    wishes: Annotated[list[str], typer.Argument(metavar="N|FLEET=N...", help="The number wanted; +N or -N: that many more or fewer")],
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Set the number of agents, and wait until they are ready and the surplus ones are gone.

    Agents that stay are never touched. FLEET may be left out where there is only one.

    \b
    Examples:
      fleetctl scale 10
      fleetctl scale web=10 worker=+2
      fleetctl scale -2
    """
    parsed, limit = parse_wishes(wishes), positive_seconds(timeout)
    with place.open() as engine:
        outcome = Outcome(json=json, dry_run=dry_run)
        names = engine.fleet_names()
        check_fleets((fleet for fleet, _, _ in parsed if fleet is not None), names)
        for fleet, kind, number in parsed:
            name = fleet or only_fleet(names, f"fleetctl scale %s={number:+d}" if kind == "delta" else f"fleetctl scale %s={number}")
            replicas, delta = (number, None) if kind == "replicas" else (None, number)
            outcome.attempt(name, lambda: engine.scale(name, replicas, delta, dry_run))  # noqa: B023 - called at once
        words = ""
        if outcome.changes and not dry_run and not no_wait:
            from fleetctl.cli.waiting import wait_until_settled

            words = wait_until_settled(engine, outcome, limit)
        outcome.finish(words)


@on_any_engine
def down(
    fleets: Annotated[list[str] | None, typer.Argument(metavar="FLEET...", help="Which fleets; default: all", show_default=False)] = None,
    now: Annotated[bool, typer.Option("--now", help="Kill the agents instead of letting them finish")] = False,
    orphans: Annotated[bool, typer.Option("--orphans", help="Also end agents that no record claims any more")] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Take fleets down: let their agents finish, stop them, and forget the fleets. Logs stay.

    Works with a dead daemon too: a new one takes the agents back first. A daemon that ran before keeps running.

    \b
    Examples:
      fleetctl down
      fleetctl down web --now
    """
    limit = positive_seconds(timeout)
    with place.open() as engine:
        if orphans:
            require(engine, "orphans", "--orphans")
        outcome = Outcome(json=json, dry_run=dry_run)
        before, started = _take_hold(engine, fleets or [], dry_run=dry_run)
        chosen = list(dict.fromkeys(fleets)) if fleets else [fleet["name"] for fleet in before["fleets"]]
        words = ""
        try:
            for name in chosen:
                if before["daemon"]["alive"]:
                    outcome.attempt(name, lambda: engine.down(name, now, dry_run))  # noqa: B023 - called at once
                else:
                    outcome.attempt(name, lambda: _planned(before, name))  # noqa: B023 - called at once
            if outcome.changes and not dry_run and (started or not no_wait):
                words = _wait_until_gone(engine, outcome, before, limit)
        finally:
            if started:
                # It starts nothing, so it must not stay. What did not go yet goes with the next daemon; others run on, as before.
                local(engine).stop_daemon("keep")
        if orphans:
            words += _end_orphans(local(engine), outcome, now=now)
        if not (chosen or orphans or json):
            say("nothing to take down: there are no fleets")
        outcome.finish(words)


def _take_hold(engine: "Engine", names: Sequence[str], *, dry_run: bool) -> "tuple[Status, bool]":
    """The status before anything is taken down, and whether a daemon had to be started to take the agents back.

    NotFound, with nothing done, where one of the names is no fleet's.
    """
    from fleetctl.errors import DaemonUnreachable

    try:
        found = engine.status()
    except DaemonUnreachable:
        found = local(engine).offline_status()
    check_fleets(names, [fleet["name"] for fleet in found["fleets"]])
    if found["daemon"]["alive"] or dry_run or not found["fleets"]:
        return found, False
    pid = local(engine).ensure_daemon(hold=True)
    if pid is not None:
        say(f"no daemon ran; started one (pid {pid}) to take the agents back")
    return engine.status(), pid is not None


def _wait_until_gone(engine: "Engine", outcome: Outcome, before: "Status", timeout: float | None) -> str:
    from fleetctl.cli.render import count
    from fleetctl.cli.waiting import Watched, find

    names = outcome.changed_fleets
    watched = Watched(engine, names)
    try:
        watched.until(lambda status: not any(find(status, name) for name in names), timeout=timeout, what="not down")
    except (TimedOut, NotStopped) as error:
        outcome.failures.append((", ".join(names), error))
        return ""
    gone = {name: fleet for name in names if (fleet := find(before, name))}
    # Those that ran: an agent of a cluster has no pid, one that is yet to be started has neither.
    ran = {name: sum(1 for agent in fleet["agents"] if agent["pid"] or agent["uptime_seconds"] is not None) for name, fleet in gone.items()}
    return "".join(f"{name} is down, {count(number, 'agent')} ended\n" for name, number in ran.items())


def _end_orphans(engine: LocalEngine, outcome: Outcome, *, now: bool) -> str:
    """End what no record claims; as words, and as failures of those that survived it."""
    from fleetctl.cli.render import clean, count

    orphans = engine.find_orphans()
    if outcome.dry_run or not orphans:
        outcome.orphans = [agent.id for agent in orphans]
        verb = "would be ended" if outcome.dry_run else "found"
        return f"{count(len(orphans), 'orphan')} {verb}" + "".join(f"\n  {clean(agent.id)}" for agent in orphans) + "\n"
    left = engine.end_orphans(orphans, seconds=0 if now else ORPHAN_SECONDS)
    outcome.orphans = [agent.id for agent in orphans if agent not in left]
    if left:
        outcome.failures.append(("", NotStopped(f"still alive: {', '.join(agent.id for agent in left)}")))
    return f"{count(len(outcome.orphans), 'orphan')} ended\n"


def _planned(before: "Status", name: str) -> "Change":
    """What `down` would do, told from the records alone."""
    from fleetctl.cli.waiting import find

    fleet = find(before, name)
    if fleet is None:
        raise NotFound(f"no such fleet: {name}")
    return {
        "schema": "fleetctl/change/v1",
        "fleet": name,
        "changed": True,
        "created": False,
        "dry_run": True,
        "desired_replicas": 0,
        "actions": [f"stop {agent['id']} (pid {agent['pid']})" for agent in fleet["agents"] if agent["pid"]],
        "message": f"{name}: would be taken down",
    }
