"""Listening sockets: bound once, counted, kept from whoever else wants them, and got back from a process that has them."""

import asyncio
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetctl.addresses import Address
from fleetctl.errors import ConfigError
from fleetctl.host import procfs, sockets
from fleetctl.host.paths import Paths
from fleetctl.host.sockets import ListeningSockets, backlog
from fleetctl.models import FleetSpec, ProcessRef
from tests.helpers import wait_until


@pytest.fixture
def paths(state_dir: str) -> Paths:
    paths = Paths(state_dir)
    paths.prepare()
    return paths


@pytest.fixture
def store(paths: Paths) -> ListeningSockets:
    return ListeningSockets(paths, umask=0o022)


def fleet(name: str = "web", **addresses: str) -> FleetSpec:
    return FleetSpec(name=name, command=("x",), sockets=addresses)


def connected(address: Address) -> socket.socket:
    client = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    client.connect(address.path or (address.host, address.port))
    return client


@pytest.mark.parametrize("declared", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix"])
def test_connections_queue_and_are_counted(store: ListeningSockets, state_dir: str, declared: str) -> None:
    spec = fleet(http=f"unix:{state_dir}/s" if declared == "unix" else declared)
    store.listen(spec)
    (address,) = store.addresses(spec).values()
    assert store.backlogs(spec) == {"http": 0}
    clients = [connected(address) for _ in range(7)]
    wait_until(lambda: store.backlogs(spec) == {"http": 7})
    (held,) = store.held(spec)
    held.socket.accept()[0].close()
    assert store.backlogs(spec) == {"http": 6}
    for client in clients:
        client.close()
    store.close(spec.name)
    with pytest.raises(OSError, match=r"refused|No such file"):
        connected(address)


def test_what_is_held_is_held_once(store: ListeningSockets) -> None:
    spec = fleet(http="127.0.0.1:0", admin="127.0.0.1:0")
    store.listen(spec)
    first = store.addresses(spec)
    store.listen(spec)
    assert store.addresses(spec) == first
    assert len({address.port for address in first.values()}) == 2
    store.close(spec.name)


def test_a_port_that_the_kernel_chose_is_the_same_after_a_restart(paths: Paths) -> None:
    spec = fleet(http="127.0.0.1:0")
    before, after = ListeningSockets(paths), ListeningSockets(paths)
    before.listen(spec)
    address = before.addresses(spec)
    for held in before.held(spec):
        held.socket.close()  # as the kernel does it for who is killed
    after.listen(spec)
    assert after.addresses(spec) == address
    after.close(spec.name)
    assert not os.path.exists(paths.sockets(spec.name))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_that_somebody_has_is_refused_and_nothing_is_left_open(store: ListeningSockets, taken: int) -> None:
    spec = fleet(free="127.0.0.1:0", http=f"127.0.0.1:{taken}")
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (store.listen, store.check, store.held):
        with pytest.raises(ConfigError, match=f"sockets.http: 127.0.0.1:{taken} is taken$"):
            attempt(spec)
    assert len(os.listdir("/proc/self/fd")) == before
    assert store.addresses(spec) == {}


def test_a_port_of_another_fleet_is_refused_by_its_name(store: ListeningSockets) -> None:
    spec = fleet(http="127.0.0.1:0")
    store.listen(spec)
    port = store.ports(spec)["http"]
    with pytest.raises(ConfigError, match=rf"sockets\.api: 127\.0\.0\.1:{port} is taken by fleet web"):
        store.listen(fleet("other", api=f"127.0.0.1:{port}"))
    store.close(spec.name)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("192.0.2.1:0", "192.0.2.1 is no address of this machine"),
        ("unix:/no/such/folder/s", "No such file or directory"),
        (f"unix:{__file__}", "exists already, and is no socket"),
    ],
)
def test_what_cannot_be_bound_says_why(store: ListeningSockets, address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        store.listen(fleet(http=address))
    assert Path(__file__).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not")
def test_a_privileged_port_says_what_is_missing(paths: Paths) -> None:
    """In a process of its own, because becoming nobody is for good."""
    story = f"""
import ipaddress, os  # all imports now: that user may not be able to read our Python
from fleetctl.errors import ConfigError
from fleetctl.host.paths import Paths
from fleetctl.host.sockets import ListeningSockets
from fleetctl.models import FleetSpec
if int(open("/proc/sys/net/ipv4/ip_unprivileged_port_start").read()) <= 81:
    raise SystemExit
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    ListeningSockets(Paths({paths.root!r})).listen(FleetSpec(name="web", command=("x",), sockets={{"http": "127.0.0.1:81"}}))
except ConfigError as error:
    assert "port 81 needs a permission" in error.message and "1024" in error.hint, error
else:
    raise AssertionError("bound")
"""
    subprocess.run([sys.executable, "-c", story], check=True, timeout=30, cwd=Path(__file__).parents[2])


def test_a_path_on_which_nobody_listens_any_more_is_taken_over_and_another_is_not(store: ListeningSockets, state_dir: str) -> None:
    path = f"{state_dir}/s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    spec = fleet(http=f"unix:{path}")
    store.listen(spec)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o755
    with pytest.raises(ConfigError, match="taken by fleet web"):
        store.listen(fleet("other", http=f"unix:{path}"))
    store.close(spec.name)
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(path)
        living.listen()
        with pytest.raises(ConfigError, match="exists already, and somebody listens on it"):
            store.listen(spec)


def test_a_file_that_took_the_place_of_the_path_is_left(store: ListeningSockets, state_dir: str) -> None:
    spec = fleet(http=f"unix:{state_dir}/s")
    store.listen(spec)
    os.unlink(f"{state_dir}/s")
    Path(f"{state_dir}/s").write_text("somebody's")
    store.close(spec.name)
    assert Path(f"{state_dir}/s").read_text() == "somebody's"


def test_a_change_that_is_made_closes_what_is_no_longer_declared(store: ListeningSockets) -> None:
    old, new = fleet(http="127.0.0.1:0"), fleet(http="127.0.0.1:0", admin="127.0.0.1:0")
    store.listen(old)
    before = store.addresses(old)["http"]
    with store.changing(new):
        pass
    assert store.addresses(new)["http"] == before
    gone = store.addresses(new)["admin"]
    with store.changing(old):
        pass
    assert list(store.addresses(old).values()) == [before]
    with pytest.raises(ConnectionRefusedError):
        connected(gone)
    store.close("web")


def test_a_change_that_fails_leaves_everything_as_it_was(store: ListeningSockets, taken: int) -> None:
    old = fleet(http="127.0.0.1:0")
    store.listen(old)
    before = store.addresses(old)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError), store.changing(fleet(other="127.0.0.1:0")):
        raise RuntimeError("the disk is full")
    with pytest.raises(ConfigError), store.changing(fleet(a="127.0.0.1:0", b=f"127.0.0.1:{taken}")):
        pass
    assert store.addresses(old) == before
    assert len(os.listdir("/proc/self/fd")) == opened
    store.close("web")


def test_renaming_a_socket_keeps_it(store: ListeningSockets, taken: int, state_dir: str) -> None:
    store.listen(fleet(http=f"unix:{state_dir}/s"))
    waiting = connected(Address(path=f"{state_dir}/s"))
    renamed = fleet(web=f"unix:{state_dir}/s")
    with store.changing(renamed):
        pass
    assert store.backlogs(renamed) == {"web": 1}
    waiting.close()
    store.close("web")


def holder(*socks: socket.socket) -> tuple["subprocess.Popen[bytes]", ProcessRef]:
    """A process that holds these sockets, among other things, and does nothing."""
    child = subprocess.Popen(["sleep", "600"], pass_fds=[sock.fileno() for sock in socks], start_new_session=True)
    found = procfs.stat(child.pid)
    assert found is not None
    return child, ProcessRef(pid=child.pid, start_ticks=found.start_ticks, boot_id=procfs.boot_id())


@pytest.mark.parametrize("declared", ["127.0.0.1:0", "unix"])
def test_a_socket_is_got_back_from_a_live_process_with_all_that_waits_in_it(paths: Paths, state_dir: str, declared: str) -> None:
    spec = fleet(http=f"unix:{state_dir}/s" if declared == "unix" else declared)
    first, second = ListeningSockets(paths), ListeningSockets(paths)
    first.listen(spec)
    (held,), address = first.held(spec), first.addresses(spec)["http"]
    client = connected(address)
    with socket.create_server(("127.0.0.1", 0)) as other, connected(address) as noise:
        child, process = holder(other, noise, held.socket)
        try:
            held.socket.close()
            second.restore(spec, [process])
            assert second.trouble(spec.name) is None
            assert second.addresses(spec) == {"http": address}
            assert second.backlogs(spec) == {"http": 2}
        finally:
            child.kill()
            child.wait()
    client.close()
    second.close(spec.name)


def test_where_nobody_has_it_any_more_it_is_bound_anew(paths: Paths) -> None:
    spec = fleet(http="127.0.0.1:0")
    child, process = holder()
    try:
        store = ListeningSockets(paths)
        store.restore(spec, [process])
        assert store.addresses(spec)
        store.close(spec.name)
    finally:
        child.kill()
        child.wait()


def test_where_the_kernel_refuses_that_is_said_and_no_agent_gets_another(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ListeningSockets(paths), ListeningSockets(paths)
    spec = fleet(http="127.0.0.1:0")
    first.listen(spec)
    (held,) = first.held(spec)
    child, process = holder(held.socket)

    def refuse(*_: object) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sockets, "_copied", refuse)
    try:
        second.restore(spec, [process])
        trouble = second.trouble(spec.name)
        assert trouble is not None
        assert "the kernel does not let it be taken back" in trouble
        with pytest.raises(ConfigError, match="does not let it be taken back"):
            second.held(spec)
    finally:
        child.kill()
        child.wait()
    first.close(spec.name)
    assert second.held(spec)  # nobody has it now
    assert second.trouble(spec.name) is None
    second.close(spec.name)


@pytest.mark.parametrize("declared", ["127.0.0.1:0", "unix"])
def test_who_has_accepted_a_connection_is_serving(store: ListeningSockets, state_dir: str, declared: str) -> None:
    spec = fleet(http=f"unix:{state_dir}/s" if declared == "unix" else declared)
    store.listen(spec)
    with connected(store.addresses(spec)["http"]):
        wait_until(lambda: store.backlogs(spec) == {"http": 1})
        child, _ = holder(store.held(spec)[0].socket)
        try:
            assert not store.serving(spec.name, [child.pid])  # it waits in the queue
            (held,) = store.held(spec)
            accepted, _ = held.socket.accept()
            server, _ = holder(accepted)
            accepted.close()
            assert store.serving(spec.name, [server.pid])
            assert not store.serving(spec.name, [child.pid])
            server.kill()
            server.wait()
        finally:
            child.kill()
            child.wait()
    store.close(spec.name)


@pytest.mark.parametrize("declared", ["127.0.0.1:0", "[::1]:0", "unix"])
@pytest.mark.parametrize("closes_first", ["client", "agent"])
def test_whether_anybody_is_or_was_connected(store: ListeningSockets, state_dir: str, declared: str, closes_first: str) -> None:
    spec = fleet(http=f"unix:{state_dir}/s" if declared == "unix" else declared)
    store.listen(spec)
    (address,) = store.addresses(spec).values()
    (held,) = store.held(spec)
    assert not store.connected("web")
    client = connected(address)
    wait_until(lambda: store.connected("web"))  # it waits to be accepted
    taken = held.socket.accept()[0]
    assert store.connected("web"), "it is open"
    for end in (client, taken) if closes_first == "client" else (taken, client):
        end.close()
    if declared != "unix":  # where the kernel keeps no trace of what was closed
        wait_until(lambda: store.connected("web"))
    wait_until(lambda: not store.connected("web"))
    with socket.create_server(("127.0.0.1", 0)) as other, connected(Address(host="127.0.0.1", port=other.getsockname()[1])):
        assert not store.connected("web"), "that is no socket of the fleet"


def test_a_socket_that_does_not_listen_has_no_known_backlog() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        assert backlog(udp) is None


def test_a_loop_that_serves_on_the_held_socket_serves_what_waited(store: ListeningSockets) -> None:
    spec = fleet(http="127.0.0.1:0")
    store.listen(spec)
    clients = [connected(store.addresses(spec)["http"]) for _ in range(20)]

    async def story() -> None:
        served = 0

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            served += 1
            writer.close()

        async with await asyncio.start_server(serve, sock=store.held(spec)[0].socket.dup()):
            while served < 20:
                await asyncio.sleep(0.001)

    asyncio.run(story())
    assert store.backlogs(spec) == {"http": 0}
    for client in clients:
        client.close()
    store.close(spec.name)


@pytest.mark.parametrize(
    ("bound", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.9.8.7", "127.9.8.7"), ("::1", "::1"), ("::", "::1")]
)
def test_where_a_process_listens_is_told_as_one_asks_there(bound: str, asked: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in bound else socket.AF_INET) as server:
        server.bind((bound, 0))
        assert Address(asked, server.getsockname()[1]) not in sockets.listening([os.getpid()])
        server.listen()
        assert Address(asked, server.getsockname()[1]) in sockets.listening([os.getpid()])


def test_where_a_process_listens_may_be_a_path(state_dir: str) -> None:
    os.makedirs(state_dir)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{state_dir}/a b")
        server.listen()
        assert Address(path=f"{state_dir}/a b") in sockets.listening([os.getpid()])
