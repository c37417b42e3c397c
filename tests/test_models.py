"""What the models can do beyond holding values."""

import dataclasses
import json
from typing import Any

import pytest

from fleetctl.models import (
    Agent,
    AgentState,
    Event,
    Exit,
    FleetSpec,
    ProcessRef,
    ScalingDecision,
    agent_from_json,
    agent_to_json,
    replace,
    to_json,
)

AGENT = Agent(
    id="web-abcde",
    fleet="web",
    slot=3,
    created_at=1.5,
    process=ProcessRef(pid=7, start_ticks=8, boot_id="b"),
    last_exit=Exit(code=1, at=2.0),
    failures=(1.0, 2.0),
)


@pytest.mark.parametrize(
    "changes", [{}, {"slot": 4}, {"process": None, "state": AgentState.DRAINING, "failures": ()}, {"last_exit": Exit(signal=9, at=3.0)}]
)
def test_replace_does_what_that_of_the_standard_library_does(changes: dict[str, Any]) -> None:
    before = dataclasses.replace(AGENT)
    changed = replace(AGENT, **changes)
    assert changed == dataclasses.replace(AGENT, **changes)
    assert type(changed) is Agent
    assert before == AGENT
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.slot = 5  # type: ignore[misc]  # that is the point


def test_replace_knows_every_model_that_is_changed() -> None:
    spec = FleetSpec(name="web", command=("x",))
    assert replace(spec, replicas=7) == dataclasses.replace(spec, replicas=7)
    with pytest.raises(KeyError):
        replace(spec, no_such_setting=1)  # type: ignore[call-arg]  # the checker knows too


def test_json_of_a_model_holds_what_the_model_holds() -> None:
    found = to_json(AGENT)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(dataclasses.asdict(AGENT)))
    event = Event(at=1.0, kind="k", fleet="web", message="m", data={"lines": ["a"]})
    assert to_json(event)["data"] == {"lines": ["a"]}
    assert to_json(ScalingDecision(action="none", target_replicas=1, current_replicas=1, reason="r"))["cause"] == "manual"


@pytest.mark.parametrize(
    "agent", [AGENT, Agent(id="web-abcde", fleet="web", slot=0, created_at=0.0), replace(AGENT, last_exit=None, failures=())]
)
def test_a_record_holds_what_is_special_of_an_agent_and_older_ones_held_everything(agent: Agent) -> None:
    record = json.loads(json.dumps(agent_to_json(agent)))
    assert agent_from_json(record) == agent == agent_from_json(json.loads(json.dumps(to_json(agent))))
    assert {"id", "fleet", "slot", "created_at"} <= record.keys()
    assert "retry_deadline" not in record
    with pytest.raises(TypeError):
        agent_from_json({"id": "web-abcde"})
