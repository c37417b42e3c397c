"""Addresses as people write them: sockets, probes' URLs, and the {port} and {fd} that stand in them. Pure text, no socket is touched."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

LONGEST_UNIX_PATH = 107
"""Bytes; the kernel takes no longer one."""

_PLACEHOLDER = re.compile(r"\{([a-z]+(?::[A-Za-z0-9_-]+)?)\}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where something listens: a literal IP address (or localhost) and a port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """What an HTTP probe asks for, and where."""

    address: Address
    path: str
    host_header: str


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with each {name} of `values` replaced; every other brace stays as it is."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def placeholders(text: str) -> set[str]:
    """What stands in braces and may be a name of ours: "port", "port:http", "slot"."""
    return set(_PLACEHOLDER.findall(text))


def parse(text: str) -> Address:
    """ "127.0.0.1:8080", "[::1]:8080", "localhost:8080" or "unix:/path". Raises ValueError, which says what is wrong."""
    if text.startswith("unix:"):
        return Address(path=_unix_path(text.removeprefix("unix:")))
    host, found, port = text.rpartition(":")
    if not found or not host:
        raise ValueError('must be like "127.0.0.1:8080", "[::1]:8080" or "unix:/path"')
    return Address(host=_host(host), port=_port(port))


def parse_url(text: str) -> Target:
    """ "http://127.0.0.1:8080/path", or "unix:/socket" with ":/path" behind it. Raises ValueError, which says what is wrong."""
    if re.search(r"[^\x21-\x7e]", text):
        raise ValueError("must be without spaces, control characters and letters beyond ASCII; write those as %20 and the like")
    if text.startswith("unix:"):
        socket, _, path = text.removeprefix("unix:").partition(":")
        return Target(Address(path=_unix_path(socket)), path or "/", "localhost")
    scheme, found, rest = text.partition("://")
    if not found or scheme.lower() != "http":
        other = "; for https let exec run a command that knows how" if scheme.lower() == "https" else ""
        raise ValueError(f'must be like "http://127.0.0.1:8080/path" or "unix:/socket:/path"{other}')
    netloc, path = re.fullmatch(r"([^/?#]*)([^#]*).*", rest).groups()  # type: ignore[union-attr]  # matches every text without newline
    if "@" in netloc:
        raise ValueError("must be without a user name")
    has_port = re.search(r":[^]:]*$", netloc)
    address = parse(netloc if has_port else f"{netloc}:80")
    return Target(address, path if path.startswith("/") else f"/{path}", netloc)


def is_loopback(host: str) -> bool:
    """Whether it surely is this machine and nothing else can be reached by it."""
    import ipaddress  # takes some milliseconds that most fleets need not pay

    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def _host(text: str) -> str:
    import ipaddress

    if text == "localhost":
        return text
    try:
        found = ipaddress.ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        raise ValueError(f"{text[:60]!r} must be a literal address, like 127.0.0.1 or [::1], and no name: names can change hands") from None
    if found.version == 6 and not text.startswith("["):
        raise ValueError(f"an IPv6 address stands in brackets: [{found}]")
    return str(found)


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text[:20]!r} must be a port, 0 to 65535")
    return int(text)


def _unix_path(path: str) -> str:
    if not path:
        raise ValueError("a path must follow unix:")
    if "\0" in path or path.startswith("@"):
        raise ValueError("must be the path of a file; abstract sockets belong to nobody")
    if len(path.encode()) > LONGEST_UNIX_PATH:
        raise ValueError(f"is longer than {LONGEST_UNIX_PATH} bytes, which the kernel does not take")
    return path
