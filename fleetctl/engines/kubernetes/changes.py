"""What a change of a fleet in a cluster is told as, and what is looked at before one. Pure."""

import shlex
from collections.abc import Sequence

from fleetctl.daemon.wire import Change
from fleetctl.engines.kubernetes import names
from fleetctl.engines.kubernetes.kubeconfig import Target
from fleetctl.engines.kubernetes.names import Object
from fleetctl.errors import FleetctlError, UsageError


def change(
    fleet: str,
    *,
    changed: bool,
    dry_run: bool,
    replicas: int,
    actions: Sequence[str],
    message: str,
    created: bool = False,
    notes: Sequence[str] = (),
) -> Change:
    return {
        "schema": "fleetctl/change/v1",
        "fleet": fleet,
        "changed": changed,
        "created": created,
        "dry_run": dry_run,
        "desired_replicas": replicas,
        "actions": list(actions),
        "message": message,
        "notes": list(notes),
    }


def applied_words(fleet: str, target: Target, *, created: bool, changed: bool, dry_run: bool) -> str:
    where = f"namespace {target.namespace} of context {target.context}"
    if not changed:
        return f"{fleet}: is as asked for in {where}"
    verb = "created" if created else "changed"
    return f"{fleet}: would be {verb} in {where}" if dry_run else f"{fleet}: {verb} in {where}"


def check_bounds(fleet: str, wanted: int, deployment: Object) -> None:
    """UsageError for a size outside what the fleet's file allowed when it was applied; none at all is always possible."""
    given = deployment["metadata"].get("annotations") or {}
    least, most = _number(given.get(names.MIN_REPLICAS)), _number(given.get(names.MAX_REPLICAS))
    if most is not None and wanted > most:
        raise UsageError(
            f"{wanted} replicas are more than max_replicas of fleet {fleet} ({most})",
            hint=f"ask for at most {most}, or raise max_replicas in fleet.toml and run `fleetctl up`",
        )
    if least is not None and 0 < wanted < least:
        raise UsageError(
            f"{wanted} replicas are fewer than min_replicas of fleet {fleet} ({least})",
            hint="lower min_replicas in fleet.toml, or ask for 0 to run none",
        )


def _number(text: object) -> int | None:
    return int(text) if isinstance(text, str) and text.isdigit() else None


def owns_replicas(deployment: Object) -> bool:
    """Whether what `up` applied last says how many there are."""
    entries = deployment["metadata"].get("managedFields") or ()
    return any(
        entry.get("manager") == names.MANAGER and "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {}) for entry in entries
    )


def tell_part(error: FleetctlError, done: Sequence[str], fleet: str, target: Target) -> None:
    """Have the error say what was done before it, and the command that undoes it."""
    undo = f"fleetctl down {fleet} --engine kubernetes --context {shlex.quote(target.context)} --namespace {target.namespace}"
    error.args = ("\n".join([error.message, "done before that:", *(f"  {one}" for one in done)]),)
    error.hint = f"`fleetctl up` goes on from there, `{undo}` removes it" + (f"; {error.hint}" if error.hint else "")
