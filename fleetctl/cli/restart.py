"""`restart`: new processes for agents, a few at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import DryRun, Json, NoWait, Place, Timeout, on_any_engine, positive_seconds
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import say
from fleetctl.errors import NotFound

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Status
    from fleetctl.engines.protocol import Process


@on_any_engine
def restart(
    names: Annotated[list[str] | None, typer.Argument(metavar="FLEET|AGENT...", help="Default: all fleets", show_default=False)] = None,
    all_at_once: Annotated[bool, typer.Option("--all-at-once", help="Do not keep most of them ready meanwhile")] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    *,
    place: Place,
) -> None:
    """Replace the processes of agents, one after the other, and wait until the new ones are ready.

    \b
    Examples:
      fleetctl restart
      fleetctl restart web
      fleetctl restart web-k3x9q worker-81bd0 --all-at-once
    """
    limit = positive_seconds(timeout)
    with place.open() as engine:
        before = engine.status()
        outcome = Outcome(json=json, dry_run=dry_run)
        chosen = choose(before, names or [])
        for fleet, agents in chosen.items():
            outcome.attempt(fleet, lambda: engine.restart(fleet, agents, all_at_once, dry_run))  # noqa: B023 - called at once
        if not chosen and not json:
            say("nothing to restart")
        words = ""
        if outcome.changes and not dry_run and not no_wait:
            from fleetctl.cli.waiting import wait_until_settled

            old = {fleet: processes_of(before, fleet, chosen[fleet]) for fleet in outcome.changed_fleets}
            words = wait_until_settled(engine, outcome, limit, old)
        outcome.finish(words)


def choose(status: "Status", names: Sequence[str]) -> dict[str, list[str] | None]:
    """For each fleet that is meant its chosen agents, None for all of them. NotFound for a name that is neither."""
    fleets = [fleet["name"] for fleet in status["fleets"]]
    owner = {agent["id"]: fleet["name"] for fleet in status["fleets"] for agent in fleet["agents"]}
    if not names:
        return dict.fromkeys(fleets)
    chosen: dict[str, list[str] | None] = {}
    for name in dict.fromkeys(names):
        if name in fleets:
            chosen[name] = None
        elif name not in owner:
            raise NotFound(f"no such fleet or agent: {name}")
        elif (agents := chosen.setdefault(owner[name], [])) is not None:
            agents.append(name)
    return chosen


def processes_of(status: "Status", fleet: str, agents: Sequence[str] | None) -> "set[Process]":
    """The processes that a restart of these agents has to replace."""
    return {
        (agent["id"], agent["pid"])
        for one in status["fleets"]
        if one["name"] == fleet
        for agent in one["agents"]
        if agent["state"] != "terminated" and not agent["pooled"] and (agents is None or agent["id"] in agents)
    }
