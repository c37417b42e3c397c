"""One set of tests, two worlds: the fake process table in fake time, and this machine with its real processes."""

import asyncio
import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.models import Agent, FleetSpec, Found, ProcessRef
from fleetctl.ports import LifecycleManager
from fleetctl.testing import FakeLifecycleManager, FakeMachine, run_in_fake_time, settled
from tests.helpers import wait_for

Story = Coroutine[Any, Any, None]  # Any: what a coroutine yields is the loop's affair
_numbers = itertools.count()


class Program(Enum):
    """What an agent does; the value is how /bin/sh does it. READY is written when it is set up."""

    SLEEPS = "echo READY; exec sleep 600"
    EXITS_3 = "echo READY; exit 3"
    IGNORES_STOP = "trap '' TERM; echo READY; while :; do sleep 600; done"
    LEAVES_CHILD = "sleep 600 & echo READY; exit 0"
    HAS_CHILDREN = "set -m; sleep 600 & set +m; sleep 600 & echo READY; wait"  # one of them in a process group of its own


class Finder(LifecycleManager, Protocol):
    """What both managers can do beyond the port."""

    def find(self) -> list[Found]: ...


class World(Protocol):
    @property
    def manager(self) -> Finder: ...

    def run(self, story: Story) -> None: ...
    async def start(self, program: Program, agent: Agent | None = None) -> Agent: ...
    async def until(self, condition: Callable[[], object]) -> None: ...
    def states(self, agent: Agent) -> list[bool]:
        """For each live process of its tree whether it is stopped."""
        ...

    def claim_of(self, agent: Agent) -> Mapping[str, object] | None: ...


def new_agent() -> Agent:
    agent_id = f"demo-{next(_numbers):05d}"
    return Agent(id=agent_id, fleet="demo", slot=3, created_at=0.0, token=secrets.token_hex(16), spec_hash="hash")


def with_process(agent: Agent, process: ProcessRef) -> Agent:
    return Agent(
        id=agent.id, fleet=agent.fleet, slot=agent.slot, created_at=0.0, token=agent.token, spec_hash=agent.spec_hash, process=process
    )


class FakeWorld:
    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.manager = FakeLifecycleManager(self.machine)

    def run(self, story: Story) -> None:
        run_in_fake_time(self.machine.clock, story)

    async def start(self, program: Program, agent: Agent | None = None) -> Agent:
        agent = agent or new_agent()
        self.manager.ignore_stop = program is Program.IGNORES_STOP
        started = with_process(agent, self.manager.spawn(agent, FleetSpec(name="demo", command=("x",))))
        leader = self.machine.leader(agent.id)
        if program is Program.LEAVES_CHILD:
            self.machine.fork(leader)
        if program is Program.HAS_CHILDREN:
            self.machine.fork(leader)
            self.machine.fork(leader)
        if program in (Program.EXITS_3, Program.LEAVES_CHILD):
            self.machine.end(leader, code=3 if program is Program.EXITS_3 else 0)
        return started

    async def until(self, condition: Callable[[], object]) -> None:
        await settled()
        assert condition()

    def states(self, agent: Agent) -> list[bool]:
        return [process.stopped for process in self.machine.living(agent.id)]

    def claim_of(self, agent: Agent) -> Mapping[str, object] | None:
        return self.manager.claims.get(agent.id)


class RealWorld:
    def __init__(self, state_dir: str) -> None:
        self.paths = Paths(state_dir)
        self.paths.prepare()
        self.manager = LocalLifecycleManager(self.paths)
        self.started: list[Agent] = []

    def run(self, story: Story) -> None:
        async def to_the_end() -> None:
            try:
                await story
            finally:
                self.manager.kill(self.started)
                await wait_for(lambda: not any(self.manager.survivors(self.started).values()))
                for agent in self.started:
                    if agent.process:
                        self.manager.watch(agent.process, lambda exit: None)
                        self.manager.release(agent.process)

        asyncio.run(to_the_end())

    async def start(self, program: Program, agent: Agent | None = None) -> Agent:
        return await self.start_command("/bin/sh", "-c", program.value, agent=agent)

    async def start_command(self, *command: str, agent: Agent | None = None) -> Agent:
        """Returns once the program has written READY."""
        agent = agent or new_agent()
        started = self.spawn(agent, FleetSpec(name="demo", command=command, cwd="/"))
        await wait_for(lambda: "READY" in self.output(started))
        return started

    def spawn(self, agent: Agent, spec: FleetSpec) -> Agent:
        started = with_process(agent, self.manager.spawn(agent, spec))
        self.started.append(started)
        return started

    def output(self, agent: Agent) -> str:
        with open(self.paths.agent_log(agent.fleet, agent.id)) as file:
            return file.read()

    async def until(self, condition: Callable[[], object]) -> None:
        await wait_for(condition)

    def states(self, agent: Agent) -> list[bool]:
        """Read here from what the kernel says, of whoever has the agent's token."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and f"FLEETCTL_TOKEN={agent.token}".encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    state = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2][0]
                    found += [state == "T"] if state not in "ZX" else []
        return found

    def claim_of(self, agent: Agent) -> Mapping[str, object] | None:
        path = Path(self.paths.agent_claim(agent.id))
        if not path.exists():
            return None
        assert path.stat().st_mode & 0o777 == 0o600
        claim: Mapping[str, object] = json.loads(path.read_text())
        return claim
