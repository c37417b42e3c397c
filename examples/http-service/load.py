"""Ask the service over and over for some seconds, each time on a new connection, and count who answered and what failed."""

import asyncio
import sys
import time
from collections import Counter

AT_ONCE = 20


async def ask(port: int) -> str:
    """What the service said; raises where it said nothing, or no."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head, _, body = (await asyncio.wait_for(reader.read(), 30)).decode().partition("\r\n\r\n")
        if not head.startswith("HTTP/1.1 200"):
            raise ValueError(head.partition("\r\n")[0] or "closed without an answer")
        return body.strip()
    finally:
        writer.close()


async def ask_until(end: float, port: int, answers: Counter[str], failures: Counter[str]) -> None:
    while time.monotonic() < end:
        try:
            answers[await ask(port)] += 1
        except (OSError, ValueError, TimeoutError) as error:
            failures[repr(error)] += 1


async def main(seconds: float, port: int) -> int:
    answers: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    end = time.monotonic() + seconds
    await asyncio.gather(*(ask_until(end, port, answers, failures) for _ in range(AT_ONCE)))
    print(f"{answers.total()} answers from {len(answers)} processes, {failures.total()} failures", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8080)))
