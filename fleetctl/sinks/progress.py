"""How far a sink came, and the file in which it remembers that. Cheap to import."""

import json
import os
from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """How far a sink came. `position`: the last event that is done with; `trouble`: why it does not go on, empty where it does."""

    position: int | None = None
    delivered: int = 0
    failures: int = 0
    waiting: int = 0
    trouble: str = ""


def load(path: str) -> Progress:
    """What the file says; a fresh start where there is none, or nonsense in it."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        return Progress(**{key: found[key] for key in ("position", "delivered", "failures", "waiting", "trouble")})
    except (OSError, ValueError, TypeError, KeyError):
        return Progress()


def save(path: str, progress: Progress) -> None:
    """Whole or not at all. A step back after a crash of the machine means events twice, not none."""
    fields = {key: getattr(progress, key) for key in Progress.__slots__}
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(fields, file)
    os.replace(f"{path}.tmp", path)
