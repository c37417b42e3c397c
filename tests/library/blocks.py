"""Code blocks of a document, run statement by statement as an asyncio prompt would, `await` at the top included."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

Names = dict[str, Any]  # Any: whatever the blocks define


class Enough(Exception):
    """The endless loop of an example has gone round often enough; what follows it is run."""


def blocks(document: Path) -> dict[str, str]:
    """The Python blocks by the title of their section, with imports of the specification's modules made imports of ours."""
    text = document.read_text(encoding="utf-8")
    parts = re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    titles = [re.findall(r"^#{2,3} (.+)$", prose, re.MULTILINE) for prose in parts[::2]]
    codes = [re.sub(r"^from L02_runtime\S* import", "from fleetctl import", code, flags=re.MULTILINE) for code in parts[1::2]]
    return {above[-1]: code for above, code in zip(titles[: len(codes)], codes, strict=True)}


async def run(code: str, names: Names) -> None:
    for statement in compiled(code):
        try:
            result = eval(statement, names)
            if inspect.iscoroutine(result):
                await result
        except Enough:
            continue


def compiled(code: str) -> Iterator[CodeType]:
    for statement in ast.parse(code).body:
        module = ast.Module([statement], [])
        yield compile(module, "<specification>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


class Rounds:
    """Stands for the module asyncio in an example's endless loop: sleeps not at all, and ends the loop after some rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    async def sleep(self, seconds: float) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Enough
