"""Puts jobs on the queue: `python produce.py 100`; with `--watch` it also waits until all are done."""

import os
import sys
import time
from pathlib import Path

import redis

REDIS_ENV = Path(__file__).with_name("redis.env")


def main() -> int:
    count, watch = int(sys.argv[1]) if len(sys.argv) > 1 else 100, "--watch" in sys.argv
    written = dict(line.split("=", 1) for line in REDIS_ENV.read_text().splitlines() if "=" in line)  # where the workers find it too
    url = os.environ.get("REDIS_URL") or written["REDIS_URL"]
    db = redis.Redis.from_url(url, decode_responses=True)
    try:
        db.ping()
    except redis.ConnectionError as error:
        print(f"no Redis at {url}: {error}", file=sys.stderr)
        return 1
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
