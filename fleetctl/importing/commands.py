"""Command lines of other tools: a list of words where that is all they are, a shell's line where they need one."""

import re
import shlex
from collections.abc import Sequence

# Whatever a shell would do something with. A tilde, an asterisk and a comment do so at the start of a word; being careful costs a shell.
_NEEDS_SHELL = re.compile(r"[$`|&;<>()*?\[\]{}~#!\n\\]|^\s*[A-Za-z_][A-Za-z0-9_]*=")
_BUILT_IN = {".", ":", "alias", "cd", "command", "eval", "exec", "exit", "export", "if", "for", "set", "source", "test", "trap"} | {
    "ulimit",
    "umask",
    "unset",
    "until",
    "while",
}

# Stands in a word for what a shell is to put there when the agent starts: these characters, and between them the shell's own words,
# without spaces, so that whoever splits a line into words takes the mark for a part of one.
OPEN, CLOSE, _SPACE = "\ue000", "\ue001", "\ue002"


def split_line(line: str) -> list[str] | None:
    """The words of a shell's command line; None where only a shell can run it."""
    if _NEEDS_SHELL.search(line):
        return None
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is not closed: the shell says it best
        return None
    return words if words and words[0] not in _BUILT_IN else None


def late(expression: str) -> str:
    """A mark for a word: `expression` is what a shell replaces it with."""
    return OPEN + expression.replace(" ", _SPACE) + CLOSE


def slot(start: int = 0, pattern: str = "%d") -> str:
    """A mark for the number of the instance, counted from `start` and printed by `pattern`."""
    number = f"$((FLEETCTL_SLOT + {start}))" if start else "$FLEETCTL_SLOT"
    return late(number if pattern in ("%d", "%s", "%i") else f"$(printf {pattern} {number})")


def is_late(text: str) -> bool:
    return OPEN in text


def shell_word(word: str) -> str:
    """The word as a shell reads it, marks as what they stand for."""
    parts = re.split(f"{OPEN}(.*?){CLOSE}", word)
    written = [f'"{part.replace(_SPACE, " ")}"' if index % 2 else shlex.quote(part) for index, part in enumerate(parts) if part]
    return "".join(written) or "''"


def shell_line(words: Sequence[str], exports: Sequence[tuple[str, str]] = ()) -> str:
    """A line that becomes the program itself, so that signals and exit statuses are the program's; variables before it."""
    return "".join(f"export {name}={shell_word(value)}; " for name, value in exports) + "exec " + " ".join(map(shell_word, words))
