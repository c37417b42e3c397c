"""Takes secrets out of text that is meant for others. Pure; rather takes out too much than too little.

Two ways, because neither is enough: values that are known to be secret wherever they stand, and what looks like a secret.
"""

import re
from collections.abc import Iterable

GONE = "[removed]"
_SHORTEST = 4  # shorter values are in half of all words

# A word that says what follows is a secret, alone or at the end of a name; then the value, in quotes or up to a space.
_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|private[_-]?key|credentials?|authorization|cookie)"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&|)}\]\"']+)"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, flags), made)
    for pattern, flags, made in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL, GONE),
        (r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE, rf"\1 {GONE}"),
        # NAME=value, "name": "value", --name value, --name=value, ['--name', 'value']
        (rf"(?i)(-{{0,2}}\b{_NAME}s?[\"']?\s*(?:=|:|(?<=[\w\"'])\s|,)\s*)(?!\s)(?:bearer\s+|basic\s+)?{_VALUE}", 0, rf"\1{GONE}"),
        (r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)", 0, GONE),
        (r"\b(?:sk|pk|rk)-[\w-]{16,}|\b(?:sk|pk|rk)_(?:live|test)_\w{8,}", 0, GONE),
        (
            r"\bgh[opsur]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{12,}|\bAIza[\w-]{30,}",
            0,
            GONE,
        ),
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", 0, GONE),
        # Long and mixed, as only keys are: lower and upper case and digits, and no path.
        (r"(?<![\w/+-])(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])(?=[\w+-]*\d)[\w+-]{32,}={0,2}(?![\w/+-])", 0, GONE),
        (r"\b[0-9a-fA-F]{40,}\b", 0, GONE),
    )
)


def redact(text: str, known: Iterable[str] = ()) -> str:
    """The text without these values, as they are and as JSON or Python would write them, and without what looks like a secret."""
    for value in sorted(_spellings(known), key=len, reverse=True):  # the longer one first, or its rest would stay
        text = _without(text, value)
    for pattern, made in _RULES:
        text = pattern.sub(made, text)
    return text


def _spellings(known: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for value in known:
        for part in (value, *value.splitlines()):
            if len(part.strip()) >= _SHORTEST:
                found |= {part.strip(), repr(part.strip())[1:-1]}
    return found


def _without(text: str, value: str) -> str:
    """A short value only where it is a word of its own: "test" as a password must not make "latest" unreadable."""
    if len(value) >= 8 or not value.isalnum():
        return text.replace(value, GONE)
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", GONE, text)
