"""`checkpoint` and `drain`: what agents keep, saved and given back; and letting one agent go.

What is on disk is read from there, so it can be listed, shown, exported and removed while no daemon runs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.options import DryRun, Json, NoWait, StateDir, Timeout, positive_seconds
from fleetctl.cli.terminal import emit, emit_json, emit_lines, harmless, say, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import NotFound, UsageError

if TYPE_CHECKING:
    from fleetctl.daemon.wire import AgentStatus, CheckpointInfo, Status

RESTORE_SECONDS = 30.0

Agent = Annotated[str, typer.Argument(metavar="AGENT", help="Which agent, by its id")]
Id = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Which checkpoint, by its id")]

checkpoint = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)


@checkpoint.callback()
def overview(ctx: typer.Context, json: Json = False, state_dir: StateDir = None) -> None:
    """What was saved of agents, to go on from. Alone, the same as `checkpoint list`.

    \b
    Examples:
      fleetctl checkpoint
      fleetctl checkpoint create web-k3x9q
      fleetctl checkpoint restore 20261125t004530-ab3de
    """
    if ctx.invoked_subcommand is None:
        _list(state_dir, (), json=json)


@checkpoint.command()
def create(agent: Agent, dry_run: DryRun = False, json: Json = False, state_dir: StateDir = None) -> None:
    """Save what an agent keeps, its STATE_DIRECTORY and its resume token, while it goes on. Prints the checkpoint's id.

    \b
    Example:
      fleetctl checkpoint create web-k3x9q
    """
    with LocalEngine(state_dir) as engine:
        try:
            made = engine.client.create_checkpoint(agent, dry_run)
        except UsageError:  # what can be no id
            raise NotFound(f"no such agent: {agent}") from None
    if json:
        emit_json(made)
        return
    say(harmless(made["message"]))
    if made["problem"]:
        say(f"  {harmless(made['problem'])}")
    if made["checkpoint"] is not None:
        emit(f"{made['checkpoint']['id']}\n")


@checkpoint.command("list")
def list_(
    names: Annotated[list[str] | None, typer.Argument(metavar="FLEET|AGENT...", help="Only of these", show_default=False)] = None,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """List checkpoints, oldest first. Works with a dead daemon too, as do show, export and rm.

    \b
    Examples:
      fleetctl checkpoint list
      fleetctl checkpoint list web --json
    """
    _list(state_dir, names or (), json=json)


@checkpoint.command()
def show(checkpoint_id: Id, json: Json = False, state_dir: StateDir = None) -> None:
    """Show what is in a checkpoint, with every byte of it checked. Its resume token is not shown.

    \b
    Example:
      fleetctl checkpoint show 20261125t004530-ab3de
    """
    with LocalEngine(state_dir) as engine:
        found = engine.find_checkpoint(checkpoint_id)
    if json:
        emit_json(found)
        return
    from fleetctl.cli.render import checkpoint_lines

    emit_lines(checkpoint_lines(found, width()))


@checkpoint.command()
def restore(
    checkpoint_id: Id,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting for the agent after this long (exit status 124)")
    ] = RESTORE_SECONDS,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Start one more agent, which goes on from a checkpoint, and wait until it is ready. Prints its id.

    Its STATE_DIRECTORY holds the files, its FLEETCTL_LAUNCH is "restore", and where the fleet has a restore_command that is what it
    runs. The fleet has one replica more then.

    \b
    Example:
      fleetctl checkpoint restore 20261125t004530-ab3de
    """
    if not 0 <= timeout <= 3600:
        raise UsageError("--timeout: seconds, from 0 to 3600")
    with LocalEngine(state_dir) as engine:
        restored = engine.client.restore_checkpoint(checkpoint_id, timeout_seconds=timeout, dry_run=dry_run)
    if json:
        emit_json(restored)
        return
    say(harmless(restored["message"]))
    if restored["agent_id"] is not None:
        emit(f"{restored['agent_id']}\n")


@checkpoint.command()
def export(
    checkpoint_id: Id,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Default: AGENT-CHECKPOINT.tar.gz here", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Write a checkpoint as a .tar.gz, every byte of it checked. The archive holds the resume token too.

    \b
    Examples:
      fleetctl checkpoint export 20261125t004530-ab3de
      fleetctl checkpoint export 20261125t004530-ab3de -o /backup/web.tar.gz
    """
    with LocalEngine(state_dir) as engine:
        found = engine.find_checkpoint(checkpoint_id)
        path = output or f"{found['agent']}-{found['id']}.tar.gz"
        size = None if dry_run else engine.export_checkpoint(checkpoint_id, path)
    if json:
        schema = "fleetctl/checkpoint-exported/v1"
        emit_json({"schema": schema, "checkpoint": checkpoint_id, "path": path, "bytes": size, "dry_run": dry_run})
    elif dry_run:
        emit(f"checkpoint {checkpoint_id} is whole and would be written to {harmless(path)}\n")
    else:
        emit(f"{harmless(path)}\n")


@checkpoint.command()
def rm(
    checkpoint_ids: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Which checkpoints, by their ids")],
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Remove checkpoints. Old ones go by themselves, as `checkpoints.keep` and `keep_seconds` say.

    \b
    Example:
      fleetctl checkpoint rm 20261125t004530-ab3de
    """
    ids = list(dict.fromkeys(checkpoint_ids))
    with LocalEngine(state_dir) as engine:
        engine.remove_checkpoints(ids, dry_run=dry_run)
    if json:
        emit_json({"schema": "fleetctl/checkpoints-removed/v1", "checkpoints": ids, "dry_run": dry_run})
    else:
        emit("".join(f"{one} {'would be' if dry_run else 'was'} removed\n" for one in ids))


def drain(
    agent: Agent,
    now: Annotated[bool, typer.Option("--now", help="Without a checkpoint, and without time to finish")] = False,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Let one agent finish and leave: what it keeps is saved, it is asked to stop, and the fleet is one smaller.

    Prints the id of the checkpoint, if it kept anything. The counterpart of `acquire`.

    \b
    Examples:
      fleetctl drain web-k3x9q
      fleetctl drain web-k3x9q --now
    """
    limit = positive_seconds(timeout)
    with LocalEngine(state_dir) as engine:
        before = engine.checkpoints(agent_id=agent)["checkpoints"]
        known = _agent(engine.client.status(), agent)
        told = engine.client.drain(agent, now, dry_run)
        if not json:
            say(harmless(told["message"]))
        if dry_run or no_wait:
            if json:
                emit_json({**told, "ended": False, "checkpoint": None})
            return
        _wait_until_gone(engine, told["fleet"], agent, limit)
        taken = _taken(before, engine.checkpoints(agent_id=agent)["checkpoints"], leaving=known["state"] == "draining")
    if json:
        emit_json({**told, "ended": True, "checkpoint": taken})
        return
    say(f"{agent} has ended; " + ("nothing of it was saved" if taken is None else f"what it kept is in checkpoint {taken['id']}"))
    if taken is not None:
        emit(f"{taken['id']}\n")


def _agent(status: "Status", agent_id: str) -> "AgentStatus":
    for fleet in status["fleets"]:
        for agent in fleet["agents"]:
            if agent["id"] == agent_id:
                return agent
    raise NotFound(f"no such agent: {agent_id}")


def _wait_until_gone(engine: LocalEngine, fleet: str, agent_id: str, timeout: float | None) -> None:
    from fleetctl.cli.waiting import Watched, find

    def gone(status: "Status") -> bool:
        found = find(status, fleet)
        return found is None or all(agent["id"] != agent_id for agent in found["agents"])

    Watched(engine, [fleet]).until(gone, timeout=timeout, what=f"{agent_id} has not ended")


def _taken(before: "Sequence[CheckpointInfo]", after: "Sequence[CheckpointInfo]", *, leaving: bool) -> "CheckpointInfo | None":
    """The checkpoint that the drain made: the newest, unless that was there before. One that was leaving already may have been saved."""
    newest = after[-1] if after else None
    known = {one["id"] for one in before}
    return newest if newest is not None and (leaving or newest["id"] not in known) else None


def _list(state_dir: str | None, names: Sequence[str], *, json: bool) -> None:
    with LocalEngine(state_dir) as engine:
        found = engine.checkpoints()
        if names:
            there = {name for one in found["checkpoints"] for name in (one["fleet"], one["agent"])}
            there |= {name for known in engine.known_names() for name in known}
            if unknown := [name for name in names if name not in there]:
                raise NotFound(f"no such fleet or agent: {', '.join(unknown)}")
            chosen = [one for one in found["checkpoints"] if one["fleet"] in names or one["agent"] in names]
            found = {**found, "checkpoints": chosen}
    if json:
        emit_json(found)
        return
    from fleetctl.cli.render import checkpoints_lines

    emit_lines(checkpoints_lines(found["checkpoints"], width()))
    for problem in found["problems"]:
        say(f"left out: {harmless(problem)}")
