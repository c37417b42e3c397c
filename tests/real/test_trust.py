"""An agent in a sandbox under a real daemon: it is heard, handed out, adopted, saved and restored as any other."""

import os
import signal
import sys

from fleetctl.host import sandbox
from tests.real.harness import Place, eventually, spec
from tests.servers import lacks

# Says who it works for whenever it is continued, and that it lives when asked; remembers that it was, over its restarts.
SPEAKS = """
import json, os, signal, socket, sys
kept = os.environ["STATE_DIRECTORY"] + "/kept"
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
def stop(*_):
    open(kept, "w").write("its work")
    print("finished", flush=True)
    sys.exit(0)
def job(*_):
    say("STATUS=at " + json.load(open(os.environ["FLEETCTL_CLAIM"]))["environment"].get("JOB", "nothing"))
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGCONT, job)
signal.signal(signal.SIGUSR1, lambda *_: say("STATUS=here"))
restored = os.environ.get("FLEETCTL_RESTORE")
if restored:
    print("restored", open(kept).read(), os.listdir(restored), flush=True)
say("READY=1\\nX_FLEETCTL_IDLE=1")
while True:
    signal.pause()
"""


def test_an_agent_in_a_sandbox_lives_as_others_do(place: Place) -> None:
    if trouble := sandbox.rehearse():
        lacks(f"no sandbox can be made here: {trouble}")
    wanted = spec(
        "box",
        [sys.executable, "-S", "-c", SPEAKS],
        1,
        trust_level="untrusted",
        sandbox={"read_only_paths": list(dict.fromkeys((sys.prefix, sys.base_prefix)))},
        environment={"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")},
        readiness={"notify": True, "start_timeout_seconds": 30.0},
        warm_pool={"enabled": True, "size": 1, "reads_claim": True},
    )
    place.start()
    place.client.apply("box", wanted)
    eventually(lambda: {agent["state"] for agent in place.agents()} == {"running", "suspended"}, "one works and one waits")
    (first,) = (agent["id"] for agent in place.agents() if not agent["pooled"])
    got = place.client.acquire("box", environment={"JOB": "work"}, require_warm=True)["agent_id"]
    eventually(lambda: told(place, got) == "at work", "the instance reads its claim")
    detail = place.json("inspect", first)["trust"]
    assert (detail["level"], "no network" in detail["held_by"]) == ("untrusted", True)

    place.client.drain(first)
    eventually(lambda: saved(place, first), "it finishes, and what it keeps is saved")
    assert b"finished" in place.log("box", first)
    again = place.client.restore_checkpoint(saved(place, first)[0])["agent_id"]
    assert again
    assert place.log("box", again).startswith(b"restored its work ['")

    place.kill()
    before = place.leaders()
    place.start()
    assert place.leaders() == before == place.shown()
    os.kill(before[again], signal.SIGUSR1)
    eventually(lambda: told(place, again) == "here", "the new daemon hears who is older than it")


def saved(place: Place, agent_id: str) -> list[str]:
    return [one["id"] for one in place.client.checkpoints()["checkpoints"] if one["agent"] == agent_id]


def told(place: Place, agent_id: str) -> object:
    return next(agent["status_text"] for agent in place.agents() if agent["id"] == agent_id)
