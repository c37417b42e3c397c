"""Addresses as people write them, good and bad, and what a fleet's settings may say with them."""

from pathlib import Path

import pytest

from fleetctl import config
from fleetctl.addresses import Address, filled, parse, parse_url
from fleetctl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", Address(host="127.0.0.1", port=8080)),
        ("0.0.0.0:0", Address(host="0.0.0.0", port=0)),
        ("[::1]:80", Address(host="::1", port=80)),
        ("[0:0::1]:80", Address(host="::1", port=80)),
        ("localhost:65535", Address(host="localhost", port=65535)),
        ("unix:/run/web.sock", Address(path="/run/web.sock")),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8080",
        ":8080",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:8o",
        "::1:80",
        "[::1]",
        "[::1:80",
        "example.com:80",
        "127.0.0.1:80:80",
        "127.1:80",
        "unix:",
        "unix:@abstract",
        "unix:/a\x00b",
        f"unix:/{'x' * 107}",
        "127.0.0.1:٣",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse(text)


@pytest.mark.parametrize(
    ("url", "address", "path", "host"),
    [
        ("http://127.0.0.1:8080/health?deep=1#top", "127.0.0.1:8080", "/health?deep=1", "127.0.0.1:8080"),
        ("HTTP://localhost", "localhost:80", "/", "localhost"),
        ("http://[::1]:81?x", "[::1]:81", "/?x", "[::1]:81"),
        ("http://[::1]/", "[::1]:80", "/", "[::1]"),
        ("unix:/run/s", "unix:/run/s", "/", "localhost"),
        ("unix:/run/s:/health", "unix:/run/s", "/health", "localhost"),
    ],
)
def test_a_url_is_read(url: str, address: str, path: str, host: str) -> None:
    target = parse_url(url)
    assert (str(target.address), target.path, target.host_header) == (address, path, host)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:80",
        "https://127.0.0.1/",
        "ftp://127.0.0.1/",
        "http://",
        "http://user@127.0.0.1/",
        "http://example.com/",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://127.0.0.1/ä",
        "http://127.0.0.1:x/",
    ],
)
def test_what_is_no_url_that_may_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_url(url)


def test_only_known_names_in_braces_are_filled_in() -> None:
    text = "{port} {port:http} {fd}{slot} {} {other} {{port}} ${port} {port"
    assert filled(text, {"port": "1", "port:http": "2", "slot": "3"}) == "1 2 {fd}3 {} {other} {1} $1 {port"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('sockets = { "a b" = "127.0.0.1:1" }', r'sockets\."a b" .*: is not a socket\'s name'),
        ('sockets = { a = "example.com:1" }', r"sockets\.a .* must be a literal address"),
        ('sockets = { a = "127.0.0.1:1", b = "127.0.0.1:1" }', r"sockets\.b .*: is the address of a already"),
        ('sockets = { a = "127.0.0.1:1", b = "[::1]:1" }', None),
        ('sockets = { a = "127.0.0.1:0", b = "127.0.0.1:0" }', None),
        ('sockets = { a = "unix:s" }', None),
        ("sockets = { a = 1 }", r"sockets\.a = 1: must be text in quotes|sockets\.a"),
        ("port_base = 0", r"port_base = 0: must be a whole number from 1 to 65535"),
        ('readiness.http = "http://127.0.0.1:{port}/"', r"\{port\} stands for nothing here"),
        ('port_base = 1\nreadiness.http = "http://127.0.0.1:{port}/"', None),
        ('sockets = { a = "127.0.0.1:0" }\nreadiness.http = "http://127.0.0.1:{port:a}/"', None),
        ('sockets = { a = "127.0.0.1:0" }\nreadiness.tcp = "127.0.0.1:{port}"', r"fleetctl itself listens on the fleet's sockets"),
        ('liveness.http = "https://127.0.0.1/"', r"liveness\.http .* for https let exec run"),
        ('liveness.tcp = "example.com:80"', r"liveness\.tcp .* must be a literal address"),
    ],
)
def test_what_a_fleet_may_say_of_addresses(tmp_path: Path, lines: str, problem: str | None) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(f'[fleet]\nname = "web"\ncommand = ["x", "{{fd}}"]\n{lines}\n')
    if problem is None:
        (loaded,) = config.load_file(file)
        assert all(address.removeprefix("unix:").startswith(("/", "127", "[")) for address in loaded.spec.sockets.values())
    else:
        with pytest.raises(ConfigError, match=problem):
            config.load_file(file)


def test_a_named_descriptor_has_to_be_declared(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('[fleet]\nname = "web"\ncommand = ["x", "{fd:other}"]\nsockets = { http = "127.0.0.1:0" }\n')
    with pytest.raises(ConfigError, match=r"command\[1\] .* there is no socket 'other' for \{fd:other\}; there are http"):
        config.load_file(file)
    file.write_text('[fleet]\nname = "web"\ncommand = ["awk", "{fd:other}"]\n')
    assert config.load_file(file)[0].spec.command == ("awk", "{fd:other}")
