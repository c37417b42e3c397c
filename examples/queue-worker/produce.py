"""Puts jobs on the queue: `python produce.py 100`; with `--watch` it also waits until all are done."""

import os
import sys
import time

import redis


def main() -> int:
    count, watch = int(sys.argv[1]) if len(sys.argv) > 1 else 100, "--watch" in sys.argv
    db = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), decode_responses=True)
    first = db.incrby("jobs:count", count) - count
    db.lpush("jobs", *range(first, first + count))
    print(f"{count} jobs put on the queue")
    while watch and db.hlen("jobs:done") < first + count:
        print(f"{db.hlen('jobs:done')} of {first + count} done, {db.llen('jobs')} waiting", flush=True)
        time.sleep(1)
    if watch:
        print(f"all {first + count} done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
