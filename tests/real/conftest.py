"""A state directory for each real test, with nothing left of it behind."""

import shutil
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
