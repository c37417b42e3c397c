"""`warm` and `acquire`: suspended instances that are ready at once, and getting one."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fleetctl.cli.change import only_fleet
from fleetctl.cli.options import DryRun, Json, NoWait, StateDir, Timeout, positive_seconds
from fleetctl.cli.outcome import Outcome
from fleetctl.cli.terminal import emit, emit_json, emit_lines, harmless, say, width
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import FleetctlError, NotFound, UsageError

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Status

ACQUIRE_SECONDS = 30.0
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)

Fleet = Annotated[str | None, typer.Argument(metavar="FLEET", help="Which fleet; may be left out if there is one", show_default=False)]

warm = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False, invoke_without_command=True)


@warm.callback()
def overview(ctx: typer.Context, json: Json = False, state_dir: StateDir = None) -> None:
    """The warm pool: suspended instances that are ready at once. Alone, the same as `warm status`.

    \b
    Examples:
      fleetctl warm
      fleetctl warm resize 5
      fleetctl warm drain web
    """
    if ctx.invoked_subcommand is None:
        _show_status(state_dir, (), json=json)


@warm.command()
def status(
    fleets: Annotated[list[str] | None, typer.Argument(metavar="FLEET...", help="Only these fleets", show_default=False)] = None,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Show how many instances are warm, and how often the pool had what was asked for.

    \b
    Examples:
      fleetctl warm status
      fleetctl warm status web --json
    """
    _show_status(state_dir, fleets or (), json=json)


@warm.command()
def fill(fleet: Fleet = None, timeout: Timeout = None, json: Json = False, state_dir: StateDir = None) -> None:
    """Wait until the warm pool is full. It fills by itself, behind the replicas.

    \b
    Examples:
      fleetctl warm fill
      fleetctl warm fill web --timeout 60
    """
    limit = positive_seconds(timeout)
    with LocalEngine(state_dir) as engine:
        from fleetctl.cli.waiting import find, wait_until_warm

        before = engine.client.status()
        name = fleet or only_fleet([one["name"] for one in before["fleets"]], "fleetctl warm fill %s")
        found = find(before, name)
        if found is None:
            raise NotFound(f"no such fleet: {name}")
        if not found["warm_pool"]["enabled"]:
            raise FleetctlError(f"{name} has no warm pool", hint=f"`fleetctl warm resize 5 {name}` gives it one")
        _tell(wait_until_warm(engine, [name], limit), [name], json=json)


@warm.command()
def drain(
    fleet: Fleet = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """End all instances of the warm pool, and keep none. The replicas run on.

    \b
    Examples:
      fleetctl warm drain
      fleetctl warm drain web
    """
    _resize(state_dir, fleet, 0, "fleetctl warm drain %s", no_wait=no_wait, timeout=timeout, dry_run=dry_run, json=json)


@warm.command()
def resize(
    size: Annotated[int, typer.Argument(metavar="N", min=0, max=1000, help="Instances to keep ready; 0: none")],
    fleet: Fleet = None,
    no_wait: NoWait = False,
    timeout: Timeout = None,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Keep so many instances warm, and wait until it is so. Turns the pool on; `fleetctl up` with a file sets it as the file says.

    \b
    Examples:
      fleetctl warm resize 5
      fleetctl warm resize 2 web --no-wait
    """
    example = f"fleetctl warm resize {size} %s"
    _resize(state_dir, fleet, size, example, no_wait=no_wait, timeout=timeout, dry_run=dry_run, json=json)


def acquire(
    fleet: Fleet = None,
    require_warm: Annotated[bool, typer.Option("--require-warm", help="Fail where none is warm, instead of starting one")] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="For its claim file; can be repeated", show_default=False)
    ] = None,
    tool: Annotated[
        list[str] | None, typer.Option("--tool", metavar="NAME", help="For its claim file; can be repeated", show_default=False)
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up waiting for a cold start after this long (exit status 124)")
    ] = ACQUIRE_SECONDS,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Get one more agent: at once from the warm pool, else a new one once it is ready. Prints its id.

    The fleet has one replica more then; `fleetctl scale` makes it smaller. What --env and --tool say is in the file that the agent
    finds in FLEETCTL_CLAIM; an agent that does not read it is not told.

    \b
    Examples:
      fleetctl acquire
      fleetctl acquire web --require-warm --json
      fleetctl acquire web --env TASK=7 --tool search
    """
    environment = variables(env or [])
    if not 0 <= timeout <= 3600:
        raise UsageError("--timeout: seconds, from 0 to 3600")
    with LocalEngine(state_dir) as engine:
        name = fleet or only_fleet(engine.client.daemon()["fleets"], "fleetctl acquire %s")
        got = engine.client.acquire(name, environment=environment, tools=tool or [], require_warm=require_warm, timeout_seconds=timeout)
    if json:
        emit_json(got)
        return
    how = "from the warm pool" if got["from_warm_pool"] else "by a cold start"
    say(f"{got['agent_id']} (pid {got['pid']}) {how} in {got['seconds'] * 1000:.1f} ms; its claim is in {harmless(got['claim_path'])}")
    emit(f"{got['agent_id']}\n")


def variables(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a table. UsageError for anything else."""
    found = {}
    for word in words:
        pair = _VARIABLE.fullmatch(word)
        if pair is None:
            raise UsageError(f"--env {word!r}: not NAME=VALUE")
        found[pair[1]] = pair[2]
    return found


def _resize(
    state_dir: str | None, fleet: str | None, size: int, example: str, *, no_wait: bool, timeout: float | None, dry_run: bool, json: bool
) -> None:
    limit = positive_seconds(timeout)
    with LocalEngine(state_dir) as engine:
        name = fleet or only_fleet(engine.client.daemon()["fleets"], example)
        outcome = Outcome(json=json, dry_run=dry_run)
        outcome.attempt(name, lambda: engine.client.resize_warm_pool(name, size, dry_run))
        words = ""
        if outcome.changes and not dry_run and not no_wait:
            from fleetctl.cli.waiting import wait_until_warm

            try:
                found = wait_until_warm(engine, [name], limit)
            except FleetctlError as error:
                outcome.failures.append((name, error))
            else:
                outcome.fleets = [one for one in found["fleets"] if one["name"] == name]
                words = summary(found, [name])
        outcome.finish(words)


def _show_status(state_dir: str | None, fleets: Sequence[str], *, json: bool) -> None:
    from fleetctl.cli.look import read_status

    with LocalEngine(state_dir) as engine:
        found = read_status(engine, fleets)
    if json:
        emit_json(as_json(found))
        return
    from fleetctl.cli.render import warm_lines

    emit_lines(warm_lines(found["fleets"], width()))


def _tell(status: "Status", names: Sequence[str], *, json: bool) -> None:
    if json:
        emit_json(as_json({**status, "fleets": [one for one in status["fleets"] if one["name"] in names]}))
    else:
        emit(summary(status, names))


def as_json(status: "Status") -> dict[str, object]:
    """The warm pools of the fleets of a status, each with its suspended instances."""
    return {
        "schema": "fleetctl/warm/v1",
        "generated_at": status["generated_at"],
        "fleets": [
            {
                "name": fleet["name"],
                **fleet["warm_pool"],
                "instances": [agent for agent in fleet["agents"] if agent["pooled"] and agent["state"] == "suspended"],
            }
            for fleet in status["fleets"]
        ],
    }


def summary(status: "Status", names: Sequence[str]) -> str:
    pools = {fleet["name"]: fleet["warm_pool"] for fleet in status["fleets"] if fleet["name"] in names}
    return "".join(f"{name}: {pool['current_size']} of {pool['target_size']} warm\n" for name, pool in pools.items())
