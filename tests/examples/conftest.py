"""The examples are run on a state directory of their own."""

from tests.real.conftest import place

__all__ = ["place"]
