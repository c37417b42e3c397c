"""`metrics`: what Prometheus reads, for a look at it."""

from fleetctl.cli.options import StateDir
from fleetctl.cli.terminal import emit
from fleetctl.engines.local import LocalEngine


def metrics(state_dir: StateDir = None) -> None:
    """Print numbers about the daemon and its fleets, in Prometheus' text format.

    Prometheus itself reads them from the control socket through a proxy, or from `fleetctl daemon --metrics-port 9309`.

    \b
    Examples:
      fleetctl metrics
      fleetctl metrics | promtool check metrics
      curl --unix-socket ~/.local/state/fleetctl/run/control.sock http://localhost/metrics
    """
    with LocalEngine(state_dir) as engine:
        emit(engine.client.metrics())
