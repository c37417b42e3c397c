"""Files that nobody needs any more, kept for the next who needs one: renaming is cheaper than removing and making.

Much cheaper on ext4: as long as an inode was removed within the last minutes, whoever makes a file in its neighbourhood has to step over
it, so that where agents come and go each start would cost more than the last.
"""

import contextlib
import os


class Spares:
    """Empty regular files of ours. `put` may be called in another thread than `take`."""

    def __init__(self, folder: str, *, most: int = 256) -> None:
        self._folder, self._most = folder, most
        self._files: list[str] = []

    def take(self, path: str) -> None:
        """Have a file at this path if there is one to spare, and none there; else whoever opens it makes it."""
        if self._files and not os.path.lexists(path):
            with contextlib.suppress(OSError, IndexError):
                os.rename(self._files.pop(), path)

    def put(self, path: str) -> None:
        """Take the file away from this path; where there is none, that is no error."""
        spare = f"{self._folder}/.spare-{os.path.basename(path)}"
        with contextlib.suppress(OSError):
            if len(self._files) >= self._most:
                os.unlink(path)
                return
            os.rename(path, spare)
            os.truncate(spare, 0)
            self._files.append(spare)

    def remove_all(self) -> None:
        """Remove what is there, by us or by who was before us."""
        self._files.clear()
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                if name.startswith(".spare-"):
                    os.unlink(f"{self._folder}/{name}")
