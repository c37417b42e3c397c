"""The machine's clocks."""

import time


class SystemClock:
    """`ports.Clock`: CLOCK_MONOTONIC counts from the boot, so its readings mean the same to every process until the next."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)
