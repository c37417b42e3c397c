"""Times as the API writes them (RFC 3339, UTC) and Unix seconds."""

from calendar import timegm
from time import gmtime, strftime, strptime


def unix(text: object) -> float | None:
    """2026-01-31T12:00:00Z or with a fraction -> seconds; None for anything else."""
    if not isinstance(text, str):
        return None
    whole, _, rest = text.removesuffix("Z").partition(".")
    try:
        return timegm(strptime(whole, "%Y-%m-%dT%H:%M:%S")) + (float(f"0.{rest}") if rest else 0.0)
    except ValueError:
        return None


def rfc3339(at: float) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(at)) + f".{int(at * 1000) % 1000:03d}Z"
