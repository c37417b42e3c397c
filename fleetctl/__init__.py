"""fleetctl keeps fleets of long-lived agent processes alive, warm and right-sized on one machine.

Rules, hands, and one loop between them:

    models errors ports   the nouns, every error, and what the loop needs of the machine
    core/                 RULES: pure functions of (spec, agents, now) -> orders; no I/O, no clock. orders: their vocabulary; reconcile: who
                          starts and stops; warmpool, restarts, lifecycle, recover; scaling (demand, policy, memory, observation) and its
                          simulation (plant, trace, kubernetes_rule)
    host/                 HANDS: one kind of I/O a module, deciding nothing
    config                fleet.toml, environment and flags -> FleetSpec
    importing/            other tools' files -> fleet.toml, as text
    supervisor            THE LOOP, one per fleet: event in, ask the rules, hand the orders out, sleep until the next deadline
    autoscaler            what was measured of one fleet, and the scaling rule asked about it
    fleet                 Fleet: one fleet as a whole
    daemon/               one process per state directory: main (composition root), control, server, wire
    client                the control socket for Python users
    engines/              where a fleet runs, behind one interface
    testing               public fakes of the ports, and a loop in fake time
    cli/                  parse, call the engine, render

`tests/test_layers.py` holds who may import whom.
"""

__version__ = "0.1.0.dev0"
