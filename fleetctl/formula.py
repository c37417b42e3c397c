"""Arithmetic that a user writes over metrics, such as `backlog / max(1, rate)`: read by Python's parser, and never run as Python.

Numbers, names, + - * /, brackets, and min, max, abs, ceil, floor; everything else is refused when it is read.
"""

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LONGEST = 500
_FUNCTIONS: Mapping[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs, "ceil": math.ceil, "floor": math.floor}
_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula that was read; `names` are the metrics that it needs."""

    text: str
    names: frozenset[str]
    _root: ast.expr

    def value(self, metrics: Mapping[str, float]) -> float:
        """Its value over these metrics. Raises ValueError, which says why it has none."""
        try:
            found = float(_value(self._root, metrics))
        except KeyError as error:
            raise ValueError(f"no value of {error.args[0]}") from None
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except (OverflowError, ValueError) as error:
            raise ValueError(str(error)) from None
        if not math.isfinite(found):
            raise ValueError("its value is no number")
        return found


def parse(text: str) -> Formula:
    """The formula in the text. Raises ValueError, which says what is not allowed."""
    if len(text) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    try:
        root = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("is no formula; write it like backlog / max(1, rate)") from None
    names: set[str] = set()
    _check(root, names)
    return Formula(text, frozenset(names), root)


def _check(node: ast.expr, names: set[str]) -> None:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e15:
            return
        case ast.Name(id=name):
            names.add(name)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=inner):
            _check(inner, names)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            _check(left, names)
            _check(right, names)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS and arguments:
            if name in ("abs", "ceil", "floor") and len(arguments) != 1:
                raise ValueError(f"{name} takes one value")
            if name in ("min", "max") and len(arguments) < 2:
                raise ValueError(f"{name} takes two values or more")
            for argument in arguments:
                _check(argument, names)
        case _:
            raise ValueError(f"{ast.unparse(node)[:60]!r} is not allowed; numbers, metrics, + - * /, and {', '.join(_FUNCTIONS)} are")


def _value(node: ast.expr, metrics: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return metrics[name]
        case ast.UnaryOp(op=operator, operand=inner):
            return -_value(inner, metrics) if isinstance(operator, ast.USub) else _value(inner, metrics)
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](_value(left, metrics), _value(right, metrics))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(argument, metrics) for argument in arguments))
    raise AssertionError(node)  # refused by _check
