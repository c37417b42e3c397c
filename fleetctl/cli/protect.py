"""`protect`: agents that are spared where their fleet shrinks."""

from typing import Annotated

import typer

from fleetctl.cli.options import DryRun, Json, StateDir
from fleetctl.cli.terminal import emit_json, harmless, say
from fleetctl.engines.local import LocalEngine
from fleetctl.errors import NotFound, UsageError


def protect(
    agents: Annotated[list[str], typer.Argument(metavar="AGENT...", help="Which agents")],
    off: Annotated[bool, typer.Option("--off", help="Protect them no longer")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Spare agents where their fleet shrinks, by hand or by the autoscaler. Scaling to 0, `drain` and `down` end them.

    A fleet never becomes smaller than the number of its protected agents. They are still restarted, as every other.

    \b
    Examples:
      fleetctl protect web-k3x9q
      fleetctl protect --off web-k3x9q
    """
    with LocalEngine(state_dir) as engine:
        client = engine.client
        chosen = list(dict.fromkeys(agents))
        for agent_id in chosen:  # all of them, before anything is changed
            try:
                client.agent(agent_id)
            except (NotFound, UsageError):  # the latter: what can be no id
                raise NotFound(f"no such agent: {agent_id}", hint="`fleetctl ps` lists them") from None
            client.protect(agent_id, not off, dry_run=True)
        made = [client.protect(agent_id, not off, dry_run=dry_run) for agent_id in chosen]
    if json:
        emit_json({"schema": "fleetctl/protection/v1", "dry_run": dry_run, "agents": made})
        return
    for one in made:
        say(harmless(one["message"]))
