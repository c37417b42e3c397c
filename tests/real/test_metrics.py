"""Prometheus itself reads what the daemon tells."""

import json
import socket
import subprocess
import urllib.request
from pathlib import Path

from tests.real.harness import ROOT, Place, eventually, spec
from tests.servers import require

MONITORING = ROOT / "examples" / "monitoring"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_prometheus_reads_the_daemon(place: Place, tmp_path: Path) -> None:
    prometheus = require("prometheus")
    promtool = require("promtool", package="prometheus")
    scraped, port = free_port(), free_port()
    scrape = f"scrape_configs: [{{job_name: fleetctl, static_configs: [{{targets: ['127.0.0.1:{scraped}']}}]}}]"
    (tmp_path / "prometheus.yml").write_text(f"global: {{scrape_interval: 200ms}}\n{scrape}\n")
    # First of all, because it looks for what to scrape five seconds after its start.
    server = subprocess.Popen(
        [
            prometheus,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def value(query: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={query}", timeout=5) as answer:
            return str(json.load(answer)["data"]["result"][0]["value"][1])

    try:
        place.environment = {"FLEETCTL_METRICS_PORT": str(scraped)}
        place.start()
        place.client.apply("web", spec("web", ["sleep", "600"], 2, warm_pool={"enabled": True, "size": 1}))
        eventually(lambda: place.client.status()["fleets"][0]["warm_pool"]["current_size"] == 1, "the pool is full")
        assert place.client.acquire("web")["from_warm_pool"]
        assert f"metrics are at http://127.0.0.1:{scraped}/metrics" in place.daemon_log()
        text = place.run("metrics").stdout
        checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
        eventually(lambda: value("fleetctl_fleet_desired_replicas") == "3", "the size is scraped", 30)
        assert value("fleetctl_acquire_duration_seconds_count") == "1"
        assert value("up") == "1"
    finally:
        server.kill()
        server.wait()


def test_the_examples_for_prometheus_are_valid() -> None:
    promtool = require("promtool", package="prometheus")
    done = subprocess.run([promtool, "check", "config", "prometheus.yml"], cwd=MONITORING, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_daemon_whose_port_is_taken_says_so_and_starts_nothing(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place.environment = {"FLEETCTL_METRICS_PORT": str(taken.getsockname()[1])}
        done = place.run("up", "-n", "1", "--", "sleep", "600", check=False)
    assert done.returncode == 2
    assert "--metrics-port" in done.stderr
    assert not place.processes()
