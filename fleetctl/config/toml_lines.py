"""Where each key of a TOML document stands: key path -> line number, which tomllib does not tell.

Reads only documents that tomllib has accepted, so it can skip over values without judging them. Standard library only.
"""

import re
import tomllib

KeyPath = tuple[str | int, ...]

_SPACE = re.compile(r"[ \t]*")
_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # between statements, and between the items of an array
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'  # up to two quotes may stand before the closing three
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\]|\\.)*"'
    r"|'[^']*'",
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line on which each table, key and array item of `text` is first named; `text` must be valid TOML."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.tables: dict[KeyPath, int] = {}  # path of an array of tables -> index of its last table
        self.line, self.counted = 1, 0  # lines up to `counted`, so that the whole text is counted once

    def read(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(_GAP)
        while self.at < len(self.text):
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._pair(table)
            self._skip(_GAP)
        return self.lines

    def _header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        *parents, last = self._key()
        self.at += 2 if is_array else 1
        path: KeyPath = ()
        for part in parents:
            path = self._enter((*path, part))
        path = (*path, last)
        if not is_array:
            self._mark(path)
            return path
        self.tables[path] = self.tables.get(path, -1) + 1
        self._mark(path)
        path = (*path, self.tables[path])
        self._mark(path)
        return path

    def _enter(self, path: KeyPath) -> KeyPath:
        """`path`, or the last table of the array of tables that `path` is."""
        self._mark(path)
        return (*path, self.tables[path]) if path in self.tables else path

    def _pair(self, table: KeyPath) -> None:
        path = table
        for part in self._key():
            path = (*path, part)
            self._mark(path)
        self.at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._skip(_SPACE)
            parts.append(self._key_part())
            self._skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return parts
            self.at += 1

    def _key_part(self) -> str:
        start = self.at
        if self.text[start] not in "\"'":
            self._skip(_BARE_KEY)
            return self.text[start : self.at]
        self._skip(_STRING)
        return str(tomllib.loads(f"key = {self.text[start : self.at]}")["key"])

    def _value(self, path: KeyPath) -> None:
        first = self.text[self.at]
        if first in "\"'":
            self._skip(_STRING)
        elif first == "[":
            self._items(path)
        elif first == "{":
            self._inline_table(path)
        else:
            self._skip(_SCALAR)

    def _items(self, path: KeyPath) -> None:
        index = 0
        while not self._closes("]"):
            self._mark((*path, index))
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: KeyPath) -> None:
        while not self._closes("}"):
            self._pair(path)

    def _closes(self, bracket: str) -> bool:
        """Step over an opening bracket or a comma, then over the closing bracket if it comes next."""
        self._skip(_GAP)
        if self.text[self.at] in "[{,":
            self.at += 1
            self._skip(_GAP)
        if self.text[self.at] != bracket:
            return False
        self.at += 1
        return True

    def _mark(self, path: KeyPath) -> None:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        self.lines.setdefault(path, self.line)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
