"""Line numbers of a TOML document, compared with what tomllib finds in it."""

from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from fleetctl.config.toml_lines import KeyPath, key_lines

DOCUMENT = '''\
# [not.a.table]
top = "x # y" # comment
"quoted key" = 1
'single' . dotted = 2

[a]
text = """
[b]
c = 1 \\"""
"" "almost"""""
literal = \'\'\'
it's ''here\'\'\'\'\'
list = [
  1, # one
  [ "]", 2 ],

  { x = 1, y.z = [ 3 ] },
]
inline = { p = "}", "q r" = { s = 1 } }
empty = [ ]
none = {}
date = 2024-01-01 10:00:00

[[t]]
n = 1
[t.sub]
m = 2
  [[t]]
  n = 3
  [[t.deep]]
  k = 4
  [[t.deep]]
  k = 5
[x.y."z w"]
last = true'''


def test_document_with_everything() -> None:
    lines = key_lines(DOCUMENT)
    expected = {
        ("top",): 2,
        ("quoted key",): 3,
        ("single",): 4,
        ("single", "dotted"): 4,
        ("a",): 6,
        ("a", "text"): 7,
        ("a", "literal"): 11,
        ("a", "list"): 13,
        ("a", "list", 0): 14,
        ("a", "list", 1): 15,
        ("a", "list", 1, 1): 15,
        ("a", "list", 2): 17,
        ("a", "list", 2, "y", "z", 0): 17,
        ("a", "inline", "p"): 19,
        ("a", "inline", "q r", "s"): 19,
        ("a", "empty"): 20,
        ("a", "none"): 21,
        ("a", "date"): 22,
        ("t",): 24,
        ("t", 0): 24,
        ("t", 0, "n"): 25,
        ("t", 0, "sub"): 26,
        ("t", 0, "sub", "m"): 27,
        ("t", 1): 28,
        ("t", 1, "n"): 29,
        ("t", 1, "deep", 0, "k"): 31,
        ("t", 1, "deep", 1): 32,
        ("t", 1, "deep", 1, "k"): 33,
        ("x",): 34,
        ("x", "y", "z w"): 34,
        ("x", "y", "z w", "last"): 35,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert not any("b" in path or "c" in path for path in lines), "nothing inside a string is a key"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment"])
def test_document_without_keys_has_no_lines(text: str) -> None:
    assert key_lines(text) == {}


def test_carriage_returns_do_not_count() -> None:
    assert key_lines("a = 1\r\n\r\n[b]\r\nc = 2\r\n") == {("a",): 1, ("b",): 3, ("b", "c"): 4}


SCALARS = st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TABLES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=3)
    ),
    max_leaves=15,
)


def _paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    pairs = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in pairs:
        yield (*path, key)
        yield from _paths(item, (*path, key))


@effort(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), TABLES, max_size=3), st.booleans())
def test_exactly_the_keys_of_a_document_have_lines(document: dict[str, Any], multiline: bool) -> None:
    text = tomli_w.dumps(document, multiline_strings=multiline)
    lines = key_lines(text)
    assert set(lines) == set(_paths(document))
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
