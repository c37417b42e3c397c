"""The filter on system calls of agents that are not trusted: a program for the kernel (seccomp), as bytes. Nothing here does anything.

It refuses what changes the machine or the sandbox itself, what looks into other processes, and doors of the kernel that have often stood
open. Calls that are newer than this list do not exist for such an agent: a program that can do without them does.
"""

import errno
import os
import struct
from collections.abc import Mapping

# By machine: the architecture's number for seccomp, and those of the calls.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_NEWEST = 470

# Refused with EPERM; None: this machine has no such call.
_REFUSED: Mapping[str, tuple[int | None, int | None]] = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    # Namespaces and mounts: the sandbox itself.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    # The machine.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
    # Doors that have often stood open.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "lookup_dcookie": (212, 18),
    "uselib": (134, None),
    "modify_ldt": (154, None),
}
CLONE, PIVOT_ROOT = (56, 220), _REFUSED["pivot_root"]
_CLONE3, _SOCKET, _IOCTL = 435, (41, 198), (16, 29)

_NEW_NAMESPACE = 0x7E020000  # any CLONE_NEW* of clone(2)
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink: what is not of the network namespace, such as vsock, would lead out
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # write into a terminal as if it was typed there

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # in struct seccomp_data; both machines are little-endian
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def machine() -> str | None:
    """This machine's name where the filter is written for it."""
    name = os.uname().machine
    return name if name in _ARCHITECTURES else None


def numbers(machine: str) -> tuple[int, int]:
    """Of clone and pivot_root, for whoever has to call them by number."""
    column = _COLUMN[machine]
    return CLONE[column], PIVOT_ROOT[column] or 0


def refused(machine: str) -> dict[str, int]:
    """The calls that are refused whatever their arguments are, by name."""
    return {name: number for name, both in _REFUSED.items() if (number := both[_COLUMN[machine]]) is not None}


def program(machine: str) -> bytes:
    """The filter, as an array of struct sock_filter."""
    column = _COLUMN[machine]
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_JUMP_EQUAL, _ARCHITECTURES[machine], then=1),
        _fail(errno.ENOSYS),  # another machine's calls have other numbers, and would pass by this list
        _line(_LOAD, _NUMBER),
        *_on(_JUMP_GREATER, _NEWEST, [_fail(errno.ENOSYS)]),
        *_on(_JUMP_EQUAL, _CLONE3, [_fail(errno.ENOSYS)]),  # its flags are in memory, where no filter can look; clone does the same
        *_on(
            _JUMP_EQUAL,
            CLONE[column],
            [_line(_LOAD, _FIRST_ARGUMENT), *_on(_JUMP_ANY_BIT, _NEW_NAMESPACE, [_fail(errno.EPERM)]), _line(_RETURN, _ALLOW)],
        ),
        *_on(
            _JUMP_EQUAL,
            _SOCKET[column],
            [
                _line(_LOAD, _FIRST_ARGUMENT),
                *(line for family in _FAMILIES for line in _on(_JUMP_EQUAL, family, [_line(_RETURN, _ALLOW)])),
                _fail(errno.EAFNOSUPPORT),
            ],
        ),
        *_on(
            _JUMP_EQUAL,
            _IOCTL[column],
            [
                _line(_LOAD, _SECOND_ARGUMENT),
                *(line for request in (_TIOCSTI, _TIOCLINUX) for line in _on(_JUMP_EQUAL, request, [_fail(errno.EPERM)])),
                _line(_RETURN, _ALLOW),
            ],
        ),
    ]
    for number in refused(machine).values():
        lines += _on(_JUMP_EQUAL, number, [_fail(errno.EPERM)])
    return b"".join([*lines, _line(_RETURN, _ALLOW)])


def _on(test: int, value: int, then: list[bytes]) -> list[bytes]:
    """What to do where the test holds; elsewhere it is passed over."""
    return [_line(test, value, otherwise=len(then)), *then]


def _fail(code: int) -> bytes:
    return _line(_RETURN, _ERRNO | code)


def _line(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
