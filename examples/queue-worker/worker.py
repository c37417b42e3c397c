"""Takes jobs from a Redis list and loses none: a job stays in the worker's own list until its result is written.

A worker that is killed is started again under the same id and begins with the jobs it left. The jobs of one that never comes back
are returned to the queue by the others once its sign of life has run out. So each job is done at least once.
"""

import os
import signal
import sys
import time
from types import FrameType

import redis

ME = os.environ.get("FLEETCTL_AGENT_ID", f"worker-{os.getpid()}")
JOBS, DONE, TAKEN, ALIVE = "jobs", "jobs:done", "jobs:taken:", "jobs:alive:"
ALIVE_SECONDS = 10
JOB_SECONDS = 0.05

stopping = False


def stop(number: int, frame: FrameType | None) -> None:
    global stopping
    stopping = True


def work(job: str) -> str:
    """Stands for real work."""
    time.sleep(JOB_SECONDS)
    return f"{job}: {sum(range(int(job) + 1))}"


def finish(db: redis.Redis, job: str) -> None:
    result = work(job)
    # Both or neither: a job is never taken off the list without its result, nor counted twice by this worker.
    with db.pipeline(transaction=True) as both:
        both.hset(DONE, job, result)
        both.lrem(TAKEN + ME, 1, job)
        both.execute()
    print(f"{ME}: {result}", flush=True)


def give_back_jobs_of_the_dead(db: redis.Redis) -> None:
    for taken in db.scan_iter(match=TAKEN + "*"):
        if not db.exists(ALIVE + taken.removeprefix(TAKEN)):
            while job := db.lmove(taken, JOBS, "LEFT", "LEFT"):
                print(f"{ME}: job {job} of {taken.removeprefix(TAKEN)} goes back to the queue", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    db = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"), decode_responses=True)
    try:
        db.set(ALIVE + ME, "1", ex=ALIVE_SECONDS)
        for job in db.lrange(TAKEN + ME, 0, -1):
            finish(db, job)
        while not stopping:
            db.set(ALIVE + ME, "1", ex=ALIVE_SECONDS)
            job = db.blmove(JOBS, TAKEN + ME, 1, "RIGHT", "LEFT")
            if job is not None:
                finish(db, job)
            else:
                give_back_jobs_of_the_dead(db)
        db.delete(ALIVE + ME)
    except redis.ConnectionError as error:
        print(f"{ME}: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
