"""The filter on system calls, carried out here as the kernel would, for each machine that it is written for."""

import errno
import struct

import pytest

from fleetctl.host import seccomp

ALLOWED, THREAD, UNSHARE_USER, VSOCK = 0, 0x3D0F00, 0x10000000, 40
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS = {
    "x86_64": {"read": 0, "ioctl": 16, "socket": 41, "clone": 56, "execve": 59, "openat": 257, "ptrace": 101, "mount": 165, "bpf": 321},
    "aarch64": {"read": 63, "ioctl": 29, "socket": 198, "clone": 220, "execve": 221, "openat": 56, "ptrace": 117, "mount": 40, "bpf": 280},
}
CLONE3, LATER, X32 = 435, 471, 0x40000000
CALLS = [
    ("read", (), ALLOWED),
    ("execve", (), ALLOWED),
    ("openat", (), ALLOWED),
    ("ptrace", (), errno.EPERM),
    ("mount", (), errno.EPERM),
    ("bpf", (), errno.EPERM),
    ("clone", (THREAD,), ALLOWED),
    ("clone", (UNSHARE_USER,), errno.EPERM),
    ("clone", (THREAD | 0x20000,), errno.EPERM),
    ("socket", (1,), ALLOWED),
    ("socket", (10,), ALLOWED),
    ("socket", (VSOCK,), errno.EAFNOSUPPORT),
    ("ioctl", (0, 0x5401), ALLOWED),
    ("ioctl", (0, 0x5412), errno.EPERM),
    (CLONE3, (), errno.ENOSYS),
    (LATER, (), errno.ENOSYS),
    (X32, (), errno.ENOSYS),
]


def judged(program: bytes, architecture: int, number: int, arguments: tuple[int, ...]) -> int:
    """The error that a call gets; 0: it is let through."""
    seen = struct.pack("<iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    lines = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = value = 0
    while True:
        code, then, otherwise, operand = lines[at]
        at += 1
        match code:
            case 0x20:
                (value,) = struct.unpack_from("<I", seen, operand)
            case 0x06:
                assert operand >> 16 in (0x7FFF, 0x0005)
                return int(operand & 0xFFFF)
            case _:
                holds = {0x15: value == operand, 0x25: value > operand, 0x45: bool(value & operand)}[code]
                at += then if holds else otherwise


@pytest.mark.parametrize("machine", ARCHITECTURE)
@pytest.mark.parametrize(("call", "arguments", "error"), CALLS)
def test_the_filter_lets_through_what_programs_need(machine: str, call: str | int, arguments: tuple[int, ...], error: int) -> None:
    number = NUMBERS[machine][call] if isinstance(call, str) else call
    assert judged(seccomp.program(machine), ARCHITECTURE[machine], number, arguments) == error


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_calls_of_another_machine_do_not_exist(machine: str) -> None:
    assert judged(seccomp.program(machine), 0x40000003, 3, ()) == errno.ENOSYS


@pytest.mark.parametrize("machine", ARCHITECTURE)
def test_every_call_of_the_list_is_refused_and_no_number_is_there_twice(machine: str) -> None:
    refused = seccomp.refused(machine)
    assert {judged(seccomp.program(machine), ARCHITECTURE[machine], number, ()) for number in refused.values()} == {errno.EPERM}
    assert len(set(refused.values())) == len(refused)
