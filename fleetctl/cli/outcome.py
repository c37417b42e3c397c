"""What a command that changes things did: collected while it works, and told once at the end, as words or as one JSON object."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import typer

from fleetctl.cli.terminal import AlreadyInJson, emit, emit_json, harmless, say
from fleetctl.errors import EXIT_FAILED, FleetctlError

if TYPE_CHECKING:
    from fleetctl.daemon.wire import Change, FleetStatus


def _plan(message: str, actions: Sequence[str]) -> list[str]:
    """What would be done: "would" is said once, and so is each action."""
    would = "" if "would" in message else "would "
    return [message, *(f"  {would}{action}" for action in actions if not (action in message and not would))]


class Outcome:
    """The changes made, the fleets as they are now, and what failed, by fleet."""

    def __init__(self, *, json: bool, dry_run: bool) -> None:
        self.json = json
        self.dry_run = dry_run
        self.changes: list[Change] = []
        self.fleets: Sequence[FleetStatus] = []
        self.orphans: list[str] = []
        self.failures: list[tuple[str, FleetctlError]] = []

    def attempt(self, fleet: str, change: "Callable[[], Change]") -> None:
        """Make one change and say so. A failure is kept, so that the others get their turn."""
        try:
            made = change()
        except FleetctlError as error:
            self.failures.append((fleet, error))
            return
        self.changes.append(made)
        if self.json:
            return
        for note in made.get("notes", ()):
            say(harmless(f"note: {fleet}: {note}"))
        if self.dry_run:
            from fleetctl.cli.render import difference_lines

            lines = [*_plan(made["message"], made["actions"]), *difference_lines(made.get("differences", ()))]
            emit("".join(f"{harmless(line)}\n" for line in lines))
        else:
            say(harmless(made["message"]))

    @property
    def changed_fleets(self) -> list[str]:
        return [change["fleet"] for change in self.changes]

    def finish(self, words: str = "") -> None:
        """Tell it. With exactly one failure and nothing done that failure is raised as it is, else the exit status is 1."""
        as_json = self.json and (bool(self.changes) or len(self.failures) != 1)
        if as_json:
            emit_json(
                {
                    "schema": "fleetctl/changes/v1",
                    "dry_run": self.dry_run,
                    "changes": self.changes,
                    "fleets": self.fleets,
                    "orphans": self.orphans,
                    "failed": [{"fleet": fleet, **error.to_json()} for fleet, error in self.failures],
                }
            )
        elif words and not self.json:
            emit(words)
        if not self.failures:
            return
        if len(self.failures) == 1:
            error = self.failures[0][1]
            if as_json:
                raise AlreadyInJson(error)
            raise error
        for fleet, error in self.failures:
            say(f"error: {fleet}: {harmless(error.message)}")
        raise typer.Exit(EXIT_FAILED)
