"""Puts so many jobs a second into a folder, for so long: `python3 load.py burn-jobs 24 30`."""

import os
import sys
import time


def main() -> None:
    folder, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    os.makedirs(folder, exist_ok=True)
    began, number = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        while number < rate * passed:
            with open(f"{folder}/{time.time_ns()}-{os.getpid()}-{number}", "x"):
                number += 1
        time.sleep(0.02)
    print(f"{number} jobs put into {folder}")


if __name__ == "__main__":
    main()
