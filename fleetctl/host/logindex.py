"""When an agent's output had which length, for `logs --since`: beside the log, bounded, and coarser the further back."""

import os
import struct

from fleetctl.host import logfiles

RECORD_SECONDS = 1.0  # there is no use in noting more often
_RECORD = struct.Struct("<dQ")  # Unix time, length of the whole output at that time
_RECORDS, _RECORDS_IN_FULL = 4096, 1024


def note(path: str, now: float, position: int) -> None:
    """`position`: how long the output of the log at `path` is at this Unix time."""
    fd = logfiles.open_file(f"{path}.idx", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, _RECORD.pack(now, position))
        full = os.fstat(fd).st_size > _RECORDS * _RECORD.size
    finally:
        os.close(fd)
    if full:
        _thin(path)


def _thin(path: str) -> None:
    """Leave out every second of the older records: the further back, the coarser."""
    records = _records(path)
    older, newer = records[:-_RECORDS_IN_FULL], records[-_RECORDS_IN_FULL:]
    temporary = f"{path}.idx.tmp"
    logfiles.unlink(temporary)
    fd = logfiles.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.write(fd, b"".join(_RECORD.pack(*record) for record in older[::2] + newer))
    finally:
        os.close(fd)
    os.rename(temporary, f"{path}.idx")


def _records(path: str) -> list[tuple[float, int]]:
    try:
        fd = logfiles.open_file(f"{path}.idx", os.O_RDONLY)
    except OSError:
        return []
    try:
        raw = os.pread(fd, (_RECORDS + 64) * _RECORD.size, 0)
    finally:
        os.close(fd)
    return [(at, position) for at, position in _RECORD.iter_unpack(raw[: len(raw) // _RECORD.size * _RECORD.size])]


def position_at(path: str, at: float) -> int:
    """How long the output was at that time, or a little before; 0 where nothing is known."""
    records = _records(path)
    earlier = [index for index, record in enumerate(records) if record[0] <= at]
    # Later records can be lower: the live file was deleted from outside. All that came after that time is wanted.
    return min(position for _, position in records[earlier[-1] :]) if earlier else 0
