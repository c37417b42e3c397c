"""The daemon as a process of its own."""

import asyncio
import resource
import signal
import subprocess
import sys

from fleetctl.host.paths import Paths
from fleetctl.host.state import LocalStateManager, read_agents
from fleetctl.models import FleetSpec
from tests.helpers import wait_until

DAEMON = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (777, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from fleetctl.daemon.main import run
run(sys.argv[1])
"""


def test_agents_get_the_limit_of_open_files_that_the_daemon_was_started_with(state_dir: str) -> None:
    """The daemon raises its own, for a descriptor per agent."""
    paths = Paths(state_dir)
    paths.prepare()

    async def wish() -> None:
        state = LocalStateManager(paths)
        await state.open()
        await state.save_wish(FleetSpec(name="demo", command=("sleep", "600"), cwd="/"), down=False)
        await state.close()

    asyncio.run(wish())
    with open(paths.daemon_log, "w") as log:
        daemon = subprocess.Popen([sys.executable, "-c", DAEMON, state_dir], stderr=log)
    try:
        wait_until(lambda: any(agent.process for agent in read_agents(paths)))
        (agent,) = read_agents(paths)
        assert agent.process is not None
        assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0] > 777
        assert resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)[0] == 777
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(20)
