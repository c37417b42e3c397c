"""JSON values -> YAML that people read. Only writes, and only what JSON knows, so it needs no package."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

# What every YAML reader takes for this very text: it begins with a letter, holds nothing that YAML reads anything into, and is no
# word such as yes, null or 1e3 (which begins with a digit).
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def dump(value: object) -> str:
    """One document, without the line that separates documents."""
    return "".join(f"{line}\n" for line in _lines(value))


def _lines(value: object) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _entry(f"{_scalar(str(key))}:", item, nested="  " if isinstance(item, Mapping) else "")
    elif isinstance(value, list | tuple) and value:
        for item in value:
            inner = list(_lines(item))
            yield f"- {inner[0]}"
            yield from (f"  {line}" for line in inner[1:])
    else:
        yield _scalar(value)


def _entry(head: str, item: object, *, nested: str) -> Iterator[str]:
    """`key: value`, or the key and what is below it; lists stand below their key without indentation, as kubectl writes them."""
    if isinstance(item, Mapping | list | tuple) and item:
        yield head
        yield from (nested + line for line in _lines(item))
    elif isinstance(item, str) and _is_block(item):
        yield f"{head} |{'' if item.endswith(chr(10)) else '-'}"
        yield from (f"  {line}" if line else "" for line in item.removesuffix("\n").split("\n"))
    else:
        yield f"{head} {_scalar(item)}"


def _is_block(text: str) -> bool:
    """Whether a text of several lines can stand as it is."""
    lines = text.removesuffix("\n").split("\n")
    return len(lines) > 1 and all(line.isprintable() for line in lines) and not lines[0].startswith(" ") and bool(lines[0] and lines[-1])


def _scalar(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, Mapping) and not value:
        return "{}"
    if isinstance(value, Sequence) and not isinstance(value, str) and not value:
        return "[]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    return '"' + "".join(map(_char, text)) + '"'


def _char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char == "\n":
        return "\\n"
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
