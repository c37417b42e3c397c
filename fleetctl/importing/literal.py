"""JavaScript that is plain data, such as most ecosystem.config.js files, read without running any of it.

Takes what JSON takes and what people write besides: comments, names without quotes, single quotes, trailing commas, `module.exports =`.
Anything that would have to be computed is refused, with its line.
"""

import json
import re

# Space and comments.
_GAP = re.compile(r"(?:\s|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_HEAD = re.compile(r"\ufeff?(?:(?:'use strict'|\"use strict\");?\s*)?(?:module\.exports\s*=|export\s+default\b)?")
_NAME = re.compile(r"[A-Za-z_$][\w$]*")
_NUMBER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d[\d_]*(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)(?![\w$.])")
_PRODUCT = re.compile(r"\s*\*\s*(\d+)(?![\w$.])")
_STRING = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|`(?:[^`\\$]|\\.|\$(?!\{))*`", re.DOTALL)
_ESCAPE = re.compile(r"\\(u\{[0-9a-fA-F]{1,6}\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\r?\n|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}
_WORDS = {"true": True, "false": False, "null": None, "undefined": None}
_DEEPEST = 32


class NotPlain(ValueError):
    """Something that has to be computed, or that is no JavaScript at all. `line`: where."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


def read(text: str) -> object:
    """The value that the text is. Raises NotPlain."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise NotPlain("nested too deeply", 1) from error
    except ValueError:
        return _Reader(text).document()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def document(self) -> object:
        self._skip()
        head = _HEAD.match(self.text, self.at)
        self.at = head.end() if head else self.at
        self._skip()
        value = self._value(0)
        self._skip()
        if self.text.startswith(";", self.at):
            self.at += 1
            self._skip()
        if self.at < len(self.text):
            raise self._trouble()
        return value

    def _skip(self) -> None:
        gap = _GAP.match(self.text, self.at)
        self.at = gap.end() if gap else self.at

    def _value(self, depth: int) -> object:
        first = self.text[self.at : self.at + 1]
        if depth > _DEEPEST:
            raise NotPlain("nested too deeply", self._line())
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._array(depth)
        if first and first in "'\"`":
            return self._string()
        if found := _NUMBER.match(self.text, self.at):
            self.at = found.end()
            return self._number(found[0].replace("_", ""))
        name = _NAME.match(self.text, self.at)
        if name and name[0] in _WORDS and not re.match(r"\s*[.([]", self.text[name.end() : name.end() + 20]):
            self.at = name.end()
            return _WORDS[name[0]]
        raise self._trouble()

    def _number(self, text: str) -> int | float:
        number: int | float
        try:
            number = int(text, 16) if "x" in text.lower() else float(text) if re.search(r"[.eE]", text) else int(text)
        except ValueError as error:  # more digits than Python reads
            raise NotPlain("a number without end", self._line()) from error
        while factor := _PRODUCT.match(self.text, self.at):  # 60 * 1000
            number *= int(factor[1])
            self.at = factor.end()
        return number

    def _string(self) -> str:
        found = _STRING.match(self.text, self.at)
        if not found:
            raise self._trouble()
        self.at = found.end()
        return _ESCAPE.sub(_unescaped, found[0][1:-1])

    def _array(self, depth: int) -> list[object]:
        values: list[object] = []
        while not self._closes("]", bool(values)):
            values.append(self._value(depth + 1))
        return values

    def _object(self, depth: int) -> dict[str, object]:
        values: dict[str, object] = {}
        while not self._closes("}", bool(values)):
            key = self._key()
            self._skip()
            if not self.text.startswith(":", self.at):
                raise self._trouble()
            self.at += 1
            self._skip()
            values[key] = self._value(depth + 1)
        return values

    def _key(self) -> str:
        if self.text[self.at : self.at + 1] in ("'", '"'):
            return self._string()
        found = _NAME.match(self.text, self.at) or re.compile(r"\d+").match(self.text, self.at)
        if not found:
            raise self._trouble()
        self.at = found.end()
        return found[0]

    def _closes(self, bracket: str, started: bool) -> bool:
        """Step over the opening bracket, or the comma behind an item, then over the closing bracket if it comes next."""
        if not started:
            self.at += 1
        self._skip()
        if started and self.text.startswith(",", self.at):
            self.at += 1
            self._skip()
        elif started and not self.text.startswith(bracket, self.at):
            raise self._trouble()
        if not self.text.startswith(bracket, self.at):
            return False
        self.at += 1
        return True

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _trouble(self) -> NotPlain:
        rest = self.text[self.at :].partition("\n")[0].strip()
        return NotPlain(f"{rest[:40]!r} is not plain data" if rest else "the text ends too early", self._line())


def _unescaped(found: re.Match[str]) -> str:
    what = found[1]
    if what[0] in "ux" and len(what) > 1:
        code = int(what[1:].strip("{}"), 16)
        return chr(code) if code <= 0x10FFFF else "?"
    return _ESCAPES.get(what, "" if what.strip("\r") == "\n" else what)
