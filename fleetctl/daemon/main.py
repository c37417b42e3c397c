"""The composition root: one process per state directory, from taking its lock to letting go of it.

Only here do the rules meet this machine's hands.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys

from fleetctl.core.orders import Mode
from fleetctl.daemon.control import Control
from fleetctl.daemon.exporter import HOST, MetricsPort
from fleetctl.daemon.rounds import Rounds
from fleetctl.daemon.server import ControlServer
from fleetctl.errors import FleetctlError
from fleetctl.host.metrics import LocalResourceManager
from fleetctl.host.paths import Paths
from fleetctl.host.process import LocalLifecycleManager, become_subreaper
from fleetctl.host.servicemanager import ServiceManager
from fleetctl.host.state import DirectoryLock, LocalStateManager

log = logging.getLogger(__name__)

READY_FD = "FLEETCTL_READY_FD"
_OPEN_FILES_WANTED = 65536
_STATUS_SECONDS = 10.0  # between two words to a service manager that does not watch
# How long a thread that measures may keep the loop waiting each time it wants the interpreter back; Python's own 5 ms would come
# several times in a handover that takes one.
_SWITCH_SECONDS = 0.0002


def run(state_dir: str, *, background: bool = False, hold: bool = False, keep: bool = False, metrics_port: int | None = None) -> int:
    """Run the daemon until it is told to stop; the exit status.

    `background`: report over the descriptor named by FLEETCTL_READY_FD once ready, and keep the agents running on SIGTERM. In the
    foreground SIGTERM and SIGINT stop the agents first; a second one lets them run on. `hold`: adopt what runs, start nothing.
    `keep`: keep the agents running on SIGTERM, though in the foreground.
    `metrics_port`: tell Prometheus there too, on the loopback address.
    """
    # Before anything is started that could take what is about this process for its own.
    manager = ServiceManager()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    paths = Paths(state_dir)
    umask = os.umask(0o077)  # what we write is for nobody else; the agents get back what we were started with
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        paths.prepare()
        lock = DirectoryLock(paths)
    except FleetctlError as error:
        _report(error)
        raise
    try:
        mode = Mode.HOLD if hold else Mode.RUN
        told = ServiceManager({}) if background else manager  # in the background it can only be that of whoever started us
        asyncio.run(
            _main(paths, lock, told, umask=umask, background=background, keep=keep or background, mode=mode, metrics_port=metrics_port)
        )
    except FleetctlError as error:
        _report(error)
        raise
    finally:
        lock.release()
    return 0


async def _main(
    paths: Paths,
    lock: DirectoryLock,
    manager: ServiceManager,
    *,
    umask: int,
    background: bool,
    keep: bool,
    mode: Mode,
    metrics_port: int | None,
) -> None:
    become_subreaper()
    state = LocalStateManager(paths)
    records = await state.open()
    control = Control(paths, state, LocalLifecycleManager(paths, umask=umask, owns_all_children=True), mode=mode)
    _raise_file_limit()  # after the lifecycle manager has seen the limit that agents are to get
    control.hearing.open()  # before the first agent that may say something, however fast it is
    control.open_sinks()  # before anything happens
    await control.restore(records)
    control.hearing.listen()
    server = ControlServer(control, paths.socket)
    await server.start()
    gc.collect()
    gc.freeze()  # what is loaded stays: a look at all of it takes ten milliseconds, which somebody would wait for
    port = MetricsPort(control.metrics, metrics_port) if metrics_port is not None else None
    rounds = Rounds(
        control,
        LocalResourceManager(),
        paths=paths,
        lock=lock,
        more=(control.remove_downed, control.hearing.keep_open, control.expire_checkpoints, server.keep_open, state.keep_there),
    )
    making_rounds = asyncio.create_task(rounds.run())
    try:
        stop = asyncio.Event()
        if port is not None:
            await port.open()
            log.info("metrics are at http://%s:%d/metrics", HOST, port.port)
        _on_signals(control, stop, background=background, keep=keep)
        log.info("fleetctl daemon (pid %d) looks after %s", os.getpid(), paths.root)
        _report(None)
        manager.tell("READY=1", f"STATUS={control.summary()}")
        beats = asyncio.create_task(_beat(manager, control))
        how = await control.wait_shutdown()
        log.info("stopping: %s", "the agents run on" if how == "keep" else "the agents stop too")
        manager.tell("STOPPING=1", f"STATUS=stopping; {'the agents run on' if how == 'keep' else 'the agents stop too'}")
        if how == "drain":
            draining = asyncio.create_task(control.stop_agents())
            enough = asyncio.create_task(stop.wait())
            await asyncio.wait([draining, enough], return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, enough):
                task.cancel()
        beats.cancel()
    finally:
        making_rounds.cancel()
        rounds.close()
        if port is not None:
            await port.close()
        await server.stop()
        control.hearing.close()
        await control.close()
        await state.close()


async def _beat(manager: ServiceManager, control: Control) -> None:
    """Say again and again that the loop turns, and ask for time while agents finish."""
    while manager.listens:
        await asyncio.sleep(manager.beat_seconds or _STATUS_SECONDS)
        watchdog = ["WATCHDOG=1"] if manager.beat_seconds else []
        if control.shutting_down:
            manager.tell(*watchdog, f"EXTEND_TIMEOUT_USEC={round(3e6 * (manager.beat_seconds or _STATUS_SECONDS))}")
        else:
            manager.tell(*watchdog, f"STATUS={control.summary()}")


def _on_signals(control: Control, stop: asyncio.Event, *, background: bool, keep: bool) -> None:
    def asked_to_end() -> None:
        if control.shutting_down:
            stop.set()
        control.shutdown("keep" if keep else "drain")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end)
    # Orphans of agents become our children, and somebody has to reap them.
    loop.add_signal_handler(signal.SIGCHLD, control.lifecycle.reap_orphans)
    # None of these has a meaning here yet, and a stray one must not end the daemon.
    for number in (signal.SIGUSR1, signal.SIGUSR2, *((signal.SIGHUP,) if background else ())):
        loop.add_signal_handler(number, log.info, "%s ignored", number.name)
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            # An agent would inherit that we ignore it (nohup, a job in the background); a handler it does not.
            signal.signal(number, lambda number, frame: None)


def _raise_file_limit() -> None:
    """One descriptor per agent; the agents themselves get back the limit we were started with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _report(error: FleetctlError | None) -> None:
    """Tell whoever started us in the background that we are ready, or why we are not."""
    fd = os.environ.pop(READY_FD, "")
    if not fd.isdigit():
        return
    text = "ready\n" if error is None else f"error {json.dumps(error.to_json())}\n"
    with contextlib.suppress(OSError):  # it may have given up waiting
        os.write(int(fd), text.encode())
        os.close(int(fd))
