"""Formulas over metrics: what they compute, and that nothing else can be said in them."""

import pytest

from fleetctl.formula import LONGEST, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("backlog", 12.0),
        ("backlog / max(1, rate) * 2", 8.0),
        ("-backlog + 13.5", 1.5),
        ("min(backlog, rate, 2)", 2.0),
        ("ceil(backlog / 5) + floor(0.9) - abs(-1)", 2.0),
        (" ( backlog ) ", 12.0),
    ],
)
def test_arithmetic(text: str, value: float) -> None:
    formula = parse(text)
    assert formula.value({"backlog": 12.0, "rate": 3.0}) == value
    assert formula.names <= {"backlog", "rate"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "backlog +",
        "__import__('os').system('true')",
        "backlog.real",
        "backlog[0]",
        "'text'",
        "True",
        "[1, 2]",
        "(lambda: 1)()",
        "backlog ** 9",
        "backlog if rate else 1",
        "backlog < 3",
        "print(backlog)",
        "min(*backlog)",
        "max(1, key=abs)",
        "max(1)",
        "abs(1, 2)",
        "min()",
        "1e400",
        "1j",
        "x := 3",
        "f'{backlog}'",
        "9" * (LONGEST + 1),
        "(" * 300,
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(("text", "why"), [("1 / backlog", "division"), ("nothing", "no value of nothing"), ("huge * huge", "no number")])
def test_what_has_no_value_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(text).value({"backlog": 0.0, "huge": 1e200})
