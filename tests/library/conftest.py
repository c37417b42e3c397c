"""The program that speaks to a daemon runs on a state directory of its own."""

from tests.real.conftest import place

__all__ = ["place"]
