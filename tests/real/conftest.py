"""A state directory for each real test, with nothing left of it behind."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.harness import Place


@pytest.fixture
def place() -> Iterator[Place]:
    # Not tmp_path: its names are long, and a socket's path may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    here = Place(folder)
    yield here
    here.close()
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(place: Place) -> Iterator[Place]:
    """A state directory on a file system of 4 MB."""
    folder = Path(place.root, "disk")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    small = Place(folder)
    yield small
    small.close()
    subprocess.run(["umount", "--lazy", folder], check=True)
