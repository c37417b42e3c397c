"""Servers that some tests need and that pip does not install. Without one a test is skipped, or fails where all must be there."""

import os
import shutil
from typing import NoReturn

import pytest


def require(program: str, package: str = "") -> str:
    """The program's path; skips the test without it, and fails it with FLEETCTL_REQUIRE_SERVERS=1 or CI=true."""
    path = shutil.which(program)
    if path is None:
        lacks(f"{program} is not installed (on Debian: apt-get install {package or program})")
    return path


def lacks(reason: str) -> NoReturn:
    """Skip the test for what this machine lacks, or fail it where all must be there."""
    if os.environ.get("FLEETCTL_REQUIRE_SERVERS") == "1" or os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
