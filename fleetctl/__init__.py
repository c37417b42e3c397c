"""fleetctl keeps fleets of long-lived agent processes alive, warm and right-sized on one machine.

Rules, hands, and one loop between them:

    models errors ports   the nouns, every error, and what the loop needs of the machine; addresses: those that people write
    core/                 RULES: pure functions of (spec, agents, now) -> orders; no I/O, no clock. orders: their vocabulary; reconcile: who
                          starts and stops; warmpool, restarts, lifecycle, recover; scaling (demand, policy, memory, observation) and its
                          simulation (plant, trace, kubernetes_rule)
    host/                 HANDS: one kind of I/O a module, deciding nothing
    config                fleet.toml, environment and flags -> FleetSpec
    importing/            other tools' files -> fleet.toml, as text
    supervisor            THE LOOP, one per fleet: event in, ask the rules, hand the orders out, sleep until the next deadline
    keeping               what agents keep, saved and given back beside that loop
    probing               who is probed when: a task for each probe of each agent
    autoscaler            what was measured of one fleet, and the scaling rule asked about it
    budget                what one fleet has spent, and whether that is all it may
    fleet                 Fleet: one fleet as a whole
    health                how a fleet is, in the specification's words
    daemon/               one process per state directory: main (composition root), control, server, wire
    manager, embedded     FleetManager, the specification's library: one fleet inside a Python program; and what it needs of the machine
    trial                 one process tried out without a daemon, for `fleetctl probe`
    sinks/                events to other places: file, webhook, Redis
    client                the control socket for Python users
    engines/              where a fleet runs, behind one interface
    agent                 what a Python agent imports to say how it is; nothing else of fleetctl comes with it
    testing               public fakes of the ports, and a loop in fake time
    cli/                  parse, call the engine, render

`tests/test_layers.py` holds who may import whom.

The names of the library, `from fleetctl import FleetManager`, are loaded when they are first used: `import fleetctl` costs nothing.
"""

TYPE_CHECKING = False  # not from typing, whose import would be most of ours; type checkers know the name
if TYPE_CHECKING:
    from fleetctl.host.metrics import LocalResourceManager
    from fleetctl.host.process import LocalLifecycleManager
    from fleetctl.host.state import LocalStateManager
    from fleetctl.manager import FleetManager
    from fleetctl.models import AgentConfig, AgentState, ScalingDecision, ScalingMetrics, SpawnResult, WarmInstance

__all__ = [
    "AgentConfig",
    "AgentState",
    "FleetManager",
    "LocalLifecycleManager",
    "LocalResourceManager",
    "LocalStateManager",
    "ScalingDecision",
    "ScalingMetrics",
    "SpawnResult",
    "WarmInstance",
    "__version__",
]

__version__ = "0.1.0.dev0"

_HOMES = {
    "FleetManager": "manager",
    "LocalLifecycleManager": "host.process",
    "LocalResourceManager": "host.metrics",
    "LocalStateManager": "host.state",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'models')}"), name)
