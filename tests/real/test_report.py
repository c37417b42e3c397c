"""Secrets that were planted wherever a fleet can have some do not appear in a report."""

import json
from pathlib import Path

from tests.real.harness import Place, eventually, spec

# What an agent prints of itself when it fails: all that it was given.
LEAKY = 'echo "started with $PLAIN $FROM_FILE $FROM_ENV $FROM_DAEMON and --password $1"; exit 3'


def test_no_planted_secret_is_in_the_report(place: Place, tmp_path: Path) -> None:
    planted = {name: f"pl4nted-{name}-zq" for name in ("plain", "env-file", "secret-file", "daemon", "flag", "claim")}
    (tmp_path / "env").write_text(f"FROM_FILE='{planted['env-file']}'\n")
    (tmp_path / "key").write_text(planted["secret-file"] + "\n")
    place.environment = {"DAEMON_SECRET": planted["daemon"]}
    place.start()
    given = {
        "environment": {"PLAIN": planted["plain"]},
        "env_file": str(tmp_path / "env"),
        "secret_env": {"FROM_ENV": f"file:{tmp_path}/key", "FROM_DAEMON": "env:DAEMON_SECRET"},
    }
    failing = {"restart": {"crash_loop_failures": 2, "backoff_seconds": 0.01}}
    place.client.apply("leaky", spec("leaky", ["sh", "-c", LEAKY, "--password", planted["flag"]], 1, **given, **failing))
    place.client.apply(
        "web", spec("web", ["sh", "-c", "sleep 600", "--token", planted["flag"]], 0, warm_pool={"enabled": True, "size": 1}, **given)
    )
    place.client.acquire("web", environment={"TASK": planted["claim"]})
    eventually(lambda: place.agents("leaky")[0]["state"] == "failed", "it is in a crash loop")
    tokens = {process.token for process in place.processes()}

    place.environment = {}  # whoever reports need not have what the daemon was given
    report = place.run("report").stdout
    assert "leaky" in report
    assert "started with" in report, "what it wrote last is there, without what it was given"
    for value in [*planted.values(), *tokens]:
        assert value not in report

    place.kill()
    offline = place.run("report").stdout
    assert "daemon does not run" in offline
    for name in set(planted) - {"daemon"}:  # that one went with the daemon
        assert planted[name] not in offline, name
    assert json.dumps(planted["daemon"]) not in offline
