"""`--engine kubernetes` through the command line, against an emulated API server."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleetctl.engines.kubernetes import api
from fleetctl.engines.kubernetes.engine import KubernetesEngine
from tests.cli.conftest import Fleetctl
from tests.engines.fake_kubernetes import FakeKubernetes, Fault, moment, write_kubeconfig

FILE = """
[fleet]
name = "web"
engine = "kubernetes"
command = ["serve"]
replicas = 2
max_replicas = 10

[fleet.kubernetes]
image = "example.com/web:1"
"""
SCALE = "/apis/apps/v1/namespaces/default/deployments/web/scale"
FORBIDDEN = (
    'deployments.apps "web" is forbidden: User "jo" cannot patch resource "deployments" in API group "apps" in the namespace "default"'
)


@pytest.fixture
def up(cluster: FakeKubernetes, fleetctl: Fleetctl) -> Callable[..., Any]:
    """Writes the file, runs `up` and wants it to work."""

    def run(text: str = FILE, *arguments: str) -> Any:
        Path("fleet.toml").write_text(text)
        result = fleetctl("up", *arguments)
        assert result.status == 0, result.err
        return result

    return run


def written(text: str = FILE) -> None:
    Path("fleet.toml").write_text(text)


def until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.005)


# up


def test_up_creates_the_fleet_and_waits_until_it_is_ready(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    result = up()
    assert "web: created in namespace default of context test" in result.err
    assert "note: web: kubernetes.storage_size" in result.err
    assert "web  2 of 2 ready" in result.out
    deployment = cluster.find("deployments", "web")
    assert deployment["spec"]["replicas"] == 2
    assert len(cluster.names("pods")) == 2
    assert {"fleetctl"} == {one["manager"] for one in deployment["metadata"]["managedFields"]}


def test_up_again_changes_nothing(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    up()
    before, pods = cluster.find("deployments", "web")["metadata"]["resourceVersion"], cluster.names("pods")
    assert "web: is as asked for" in up().err
    assert cluster.find("deployments", "web")["metadata"]["resourceVersion"] == before
    assert cluster.names("pods") == pods


def test_a_changed_fleet_is_rolled_out_and_waited_for(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    up()
    old = set(cluster.names("pods"))
    up(FILE.replace("web:1", "web:2"))
    assert cluster.find("deployments", "web")["spec"]["template"]["spec"]["containers"][0]["image"] == "example.com/web:2"
    assert old.isdisjoint(cluster.names("pods"))


def test_a_dry_run_is_judged_by_the_server_and_shows_what_would_change(
    cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]
) -> None:
    written()
    result = fleetctl("up", "--dry-run")
    assert result.status == 0
    assert "create deployment web" in result.out
    assert cluster.objects == {}
    up()
    written(FILE.replace("web:1", "web:2") + '[fleet.environment]\nKEY = "hidden"\n')
    result = fleetctl("up", "--dry-run", "--json")
    (change,) = json.loads(result.out)["changes"]
    assert "change deployment web: spec.template.spec.containers[agent].image: example.com/web:1 -> example.com/web:2" in change["actions"]
    assert "hidden" not in result.out
    assert change["dry_run"]
    assert cluster.find("deployments", "web")["spec"]["template"]["spec"]["containers"][0]["image"] == "example.com/web:1"


def test_what_scale_set_stays_where_the_file_says_no_number(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    plain = FILE.replace("replicas = 2\n", "")
    up(plain)
    assert fleetctl("scale", "3").status == 0
    up(plain)
    assert cluster.find("deployments", "web")["spec"]["replicas"] == 3


def test_the_file_wins_over_scale_where_it_says_a_number(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    fleetctl("scale", "3")
    up()
    assert cluster.find("deployments", "web")["spec"]["replicas"] == 2


def test_an_autoscaler_takes_over_the_number_without_a_dip(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    """A field that its only owner leaves out falls back to 1: two agents would be killed for nothing."""
    from dataclasses import replace

    from tests.engines.specs import SPECS, a_spec

    with KubernetesEngine() as engine:
        engine.apply(a_spec(replicas=4), replicas_given=True, dry_run=False)
        pods = cluster.names("pods")
        spec = replace(SPECS["autoscaled"], resource_limits=a_spec().resource_limits, kubernetes=a_spec().kubernetes)
        engine.apply(spec, replicas_given=True, dry_run=False)
        assert cluster.find("deployments", "web")["spec"]["replicas"] == 4
        assert cluster.names("pods") == pods
        engine.api.patch(SCALE, {"spec": {"replicas": 7}}, api.MERGE, manager="kube-controller-manager")  # the HPA's doing
        engine.apply(spec, replicas_given=True, dry_run=False)
        assert cluster.find("deployments", "web")["spec"]["replicas"] == 7
        fleet = engine.status()["fleets"][0]
        assert fleet["autoscaling"]["enabled"]
        assert fleet["notes"][0] == "the cluster's autoscaler decides how many, 2 to 50"
        # And back: the autoscaler goes first, then the number is ours again.
        change = engine.apply(a_spec(replicas=4), replicas_given=True, dry_run=False)
        assert "delete horizontalpodautoscaler web" in change["actions"]
        assert cluster.names("horizontalpodautoscalers") == cluster.names("poddisruptionbudgets") == []
        assert cluster.find("deployments", "web")["spec"]["replicas"] == 4


def test_the_number_is_left_to_an_autoscaler_of_somebody_else(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    target = {"scaleTargetRef": {"kind": "Deployment", "name": "web"}, "maxReplicas": 9}
    cluster.add("horizontalpodautoscalers", {"metadata": {"name": "theirs"}, "spec": target})
    with KubernetesEngine() as engine:
        engine.api.patch(SCALE, {"spec": {"replicas": 7}}, api.MERGE, manager="kube-controller-manager")
    result = fleetctl("up")
    assert result.status == 1
    assert "parts of it belong to others: spec.replicas to kube-controller-manager" in result.err
    assert cluster.find("deployments", "web")["spec"]["replicas"] == 7


def test_a_pod_that_was_evicted_is_a_note_and_no_agent(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    first = cluster.names("pods")[0]
    evicted = {"phase": "Failed", "reason": "Evicted", "message": "no memory"}
    labels = cluster.find("pods", first)["metadata"]["labels"]
    cluster.add("pods", {"metadata": {"name": "web-6d5f8c7b9d-zzzzz", "labels": labels}, "status": evicted})
    assert fleetctl("wait", "web").status == 0
    (fleet,) = json.loads(fleetctl("status", "--json").out)["fleets"]
    assert len(fleet["agents"]) == 2
    assert fleet["notes"] == ["web-6d5f8c7b9d-zzzzz has ended: Evicted: no memory"]


def test_scale_says_who_decides_where_an_autoscaler_does(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    from tests.engines.specs import SPECS

    with KubernetesEngine() as engine:
        engine.apply(SPECS["autoscaled"], replicas_given=True, dry_run=False)
    result = fleetctl("scale", "5")
    assert result.status == 1
    assert "the cluster's autoscaler decides how many agents web has, 2 to 50" in result.err


def test_standby_agents_are_shown_apart(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up(FILE + "[fleet.warm_pool]\nsize = 1\n")
    (fleet,) = json.loads(fleetctl("status", "--json").out)["fleets"]
    assert fleet["ready_replicas"] == 2
    assert [agent["pooled"] for agent in fleet["agents"]].count(True) == 1
    assert fleet["warm_pool"] | {"hits": 0} == {
        "enabled": True, "current_size": 1, "target_size": 1, "hits": 0, "misses": None, "hit_rate_percent": None,
    }  # fmt: skip
    assert fleet["notes"] == ["warm pool: a standby Deployment: its agents run, they are not suspended"]


def test_a_cluster_with_sandboxes_keeps_the_pool_as_sandboxes(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    cluster.sandbox_version = "v1beta1"
    up(FILE + "[fleet.warm_pool]\nsize = 1\n")
    assert cluster.names("sandboxwarmpools") == cluster.names("sandboxtemplates") == ["web-standby"]
    cluster.touch("sandboxwarmpools", "web-standby", {"status": {"readyReplicas": 1}})
    (fleet,) = json.loads(fleetctl("status", "--json").out)["fleets"]
    assert fleet["notes"] == ["warm pool: a SandboxWarmPool"]
    assert fleet["warm_pool"]["current_size"] == 1
    assert fleetctl("down").status == 0
    assert cluster.names("sandboxwarmpools") == cluster.names("sandboxtemplates") == []


# scale, restart, down


def test_scale_waits_and_lets_the_oldest_go(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    oldest = min(cluster.names("pods"))
    result = fleetctl("scale", "+2")
    assert (result.status, result.out) == (0, "web: 4 of 4 ready\n")
    assert fleetctl("scale", "web=3").status == 0
    assert oldest not in cluster.names("pods")
    assert len(cluster.names("pods")) == 3


def test_scale_keeps_to_the_bounds_that_up_set(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    result = fleetctl("scale", "11")
    assert result.status == 2
    assert "11 replicas are more than max_replicas of fleet web (10)" in result.err
    assert fleetctl("scale", "3", "--dry-run").status == 0
    assert cluster.find("deployments", "web")["spec"]["replicas"] == 2


def test_restart_replaces_all_and_up_does_not_undo_it(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    old = set(cluster.names("pods"))
    assert fleetctl("restart").status == 0
    new = set(cluster.names("pods"))
    assert old.isdisjoint(new)
    up()
    assert set(cluster.names("pods")) == new


@pytest.mark.parametrize("arguments", [["--all-at-once"], ["AGENT"]])
def test_restart_of_some(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any], arguments: list[str]) -> None:
    up()
    first, second = cluster.names("pods")
    result = fleetctl("restart", *[first if word == "AGENT" else word for word in arguments])
    assert result.status == 0, result.err
    assert first not in cluster.names("pods")
    assert (second in cluster.names("pods")) is (arguments == ["AGENT"])


def test_down_removes_what_is_ours_and_says_what_it_leaves(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up(FILE.replace('"example.com/web:1"', '"example.com/web:1"\nstorage_size = "1Gi"') + "[fleet.warm_pool]\nsize = 1\n")
    cluster.add("services", {"metadata": {"name": "web", "labels": {"app": "other"}}})
    result = fleetctl("down")
    assert result.status == 0
    assert "web is down" in result.out
    assert "kubectl delete persistentvolumeclaim web-state" in result.err
    left = {(kind, name) for kind, _, name in cluster.objects}
    assert left == {("services", "web"), ("persistentvolumeclaims", "web-state")}


def test_down_waits_for_agents_that_take_their_time_and_now_does_not(
    cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]
) -> None:
    up()
    cluster.obedient = False  # pods stay, marked for deletion
    assert fleetctl("down", "--timeout", "0.7").status == 124
    (fleet,) = json.loads(fleetctl("status", "--json").out)["fleets"]
    assert fleet["down"]
    assert {agent["state"] for agent in fleet["agents"]} == {"draining"}
    assert fleetctl("down", "--now").status == 0
    assert cluster.names("pods") == []


def test_down_dry_run_names_everything(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    result = fleetctl("down", "--dry-run")
    assert "delete deployment web" in result.out
    assert cluster.names("deployments") == ["web"]


# Looking


def test_status_has_the_keys_of_the_local_engine(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    from fleetctl.daemon.wire import AgentStatus, DaemonStatus, FleetStatus, Status

    up()
    cluster.usage = {cluster.names("pods")[0]: ("250m", "128Mi")}
    status = json.loads(fleetctl("status", "--json").out)
    assert set(status) == set(Status.__required_keys__)
    assert set(status["daemon"]) == set(DaemonStatus.__required_keys__)
    assert set(status["fleets"][0]) >= set(FleetStatus.__required_keys__)
    agent = status["fleets"][0]["agents"][0]
    assert set(agent) >= set(AgentStatus.__required_keys__)
    assert (agent["cpu_percent"], agent["memory_bytes"]) == (25.0, 128 * 1024 * 1024)
    assert status["daemon"]["state_dir"] == "kubernetes:test/default"


def waiting(reason: str, message: str = "", restarts: int = 0) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Running", "containerStatuses": [{"restartCount": restarts, "state": state}]}


UNPLACED = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
STATES: list[tuple[dict[str, Any], str, str]] = [
    ({"phase": "Pending"}, "starting", ""),
    ({"phase": "Pending", "conditions": [UNPLACED]}, "starting", "0/3 nodes are available"),
    ({"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}, "running", "on node-1"),
    (waiting("ImagePullBackOff", "no such image"), "failed", "ImagePullBackOff: no such image"),
    (waiting("CrashLoopBackOff", restarts=4), "backoff", "CrashLoopBackOff"),
]


@pytest.mark.parametrize(("state", "word", "note"), STATES)
def test_states_of_pods_in_our_words(
    cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any], state: dict[str, Any], word: str, note: str
) -> None:
    cluster.pod_state = state
    up(FILE, "--no-wait")
    agents = json.loads(fleetctl("ps", "--json").out)["agents"]
    assert {agent["state"] for agent in agents} == {word}
    assert all(note in agent["note"] for agent in agents)
    assert not any(agent["ready"] for agent in agents)


def test_an_image_that_cannot_be_pulled_ends_the_wait_with_the_reason(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    cluster.pod_state = STATES[3][0]
    written()
    result = fleetctl("up")
    assert result.status == 1
    assert "failed: ImagePullBackOff: no such image" in result.err


def test_the_last_exit_and_output_of_an_agent_that_crashes(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-31T12:00:00Z"}}
    cluster.pod_state = {"phase": "Running", "containerStatuses": [{"restartCount": 2, "state": ended, "lastState": ended}]}
    up(FILE, "--no-wait")
    (agent, _) = json.loads(fleetctl("ps", "--json").out)["agents"]
    assert agent["last_exit"]["text"] == "killed for using more memory than its limit"
    assert agent["restarts"] == 2
    cluster.previous_logs[agent["id"]] = [b"2026-01-31T12:00:00Z bye\x1b[0m"]
    with KubernetesEngine() as engine:
        assert engine.last_output("web", agent["id"]) == ["bye [0m"]


def test_lists_of_many_pages_are_read_whole(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    cluster.page_size = 2
    up(FILE.replace("replicas = 2", "replicas = 7"))
    assert len(fleetctl("ps", "-q").out.splitlines()) == 7


def test_wait_sees_a_change_through_the_watch(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    for name in cluster.names("pods"):
        cluster.touch("pods", name, {"status": {"conditions": []}})

    def mend() -> None:
        until(lambda: sum("watch=true" in asked for asked in cluster.asked) >= 2)
        for name in cluster.names("pods"):
            cluster.touch("pods", name, {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})

    thread = threading.Thread(target=mend)
    thread.start()
    result = fleetctl("wait", "web", "--timeout", "20")
    thread.join()
    assert result.status == 0, result.err
    assert fleetctl("wait", "web", "--for", "count=5", "--timeout", "0.2").status == 124
    assert fleetctl("wait", "nope").status == 5


def test_events_and_history_are_those_of_the_fleet(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    at = time.time() - 60
    pod = cluster.names("pods")[0]
    cluster.event("Deployment", "web", "ScalingReplicaSet", "Scaled up replica set web-6d5f8c7b9d to 2 from 0", at=at)
    cluster.event(
        "HorizontalPodAutoscaler", "web", "SuccessfulRescale", "New size: 5; reason: cpu resource utilization above target", at=at + 9
    )
    cluster.event("Deployment", "web", "ScalingReplicaSet", "Scaled up replica set web-6d5f8c7b9d to 5 from 2", at=at + 10)
    cluster.event("Deployment", "web", "ScalingReplicaSet", "Scaled up replica set web-aaaa to 1", at=at + 20)
    cluster.event("Deployment", "web", "ScalingReplicaSet", "Scaled down replica set web-6d5f8c7b9d to 4 from 5", at=at + 21)
    cluster.event("Pod", pod, "Started", "Started container agent", at=at + 2)
    cluster.event("Pod", "stranger-6d5f8c7b9d-abcde", "Started", "Started container", at=at + 3)
    entries = json.loads(fleetctl("history", "--json").out)["entries"]
    assert [(one["current_replicas"], one["target_replicas"], one["cause"]) for one in entries] == [
        (0, 2, "manual"), (2, 5, "autoscaler"), (5, 6, "rollout"), (6, 5, "rollout"),
    ]  # fmt: skip
    assert entries[1]["reason"] == "cpu resource utilization above target"
    events = json.loads(fleetctl("events", "--json").out)["events"]
    assert [event["subject"] for event in events if event["type"] == "fleetctl.pod.started"] == [pod]
    assert len({event["id"] for event in events}) == len(events)
    assert len(json.loads(fleetctl("events", "web", "-n", "2", "--json").out)["events"]) == 2


def test_what_holds_an_autoscaler_back_is_in_the_history() -> None:
    from fleetctl.engines.kubernetes import happenings

    condition = {
        "type": "ScalingLimited",
        "status": "True",
        "message": "more than the maximum",
        "lastTransitionTime": "2026-01-31T12:00:00Z",
    }
    scaler = {
        "metadata": {"labels": {"fleetctl/fleet": "web"}},
        "status": {"currentReplicas": 5, "desiredReplicas": 5, "conditions": [condition]},
    }
    (entry,) = happenings.history([], [scaler], ["web"], 10)
    assert (entry["action"], entry["reason"], entry["at"]) == ("no_action", "more than the maximum", "2026-01-31T12:00:00.000Z")


def test_following_events_tells_each_once_over_broken_watches(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    up()
    cluster.event("Deployment", "web", "One", "first")
    with KubernetesEngine() as engine, engine.follow_events(None, 10) as stream:
        found = iter(stream)
        assert next(found)["message"] == "first"
        threading.Timer(0.05, lambda: cluster.event("Deployment", "web", "Two", "second")).start()
        assert next(found)["message"] == "second"


# Logs


def test_logs_of_a_fleet_with_the_agent_before_each_line(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    first, second = cluster.names("pods")
    cluster.write(first, b"one")
    cluster.write(first, b"two")
    cluster.write(second, b"three")
    out = fleetctl("logs", "web", "-n", "1").out
    assert f"{second} | three" in out
    assert f"{first} | two" in out
    assert " | one" not in out
    assert fleetctl("logs", second).out == "three\n"
    cluster.write(first, b"\xff\xe2\x80\xa8\r bytes")
    with KubernetesEngine() as engine:
        assert list(engine.tail("web", first, None, None)) == [b"one", b"two", b"\xff\xe2\x80\xa8\r bytes"]
    assert fleetctl("logs", "nope").status == 5


def test_an_agent_that_has_not_started_has_no_output(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    cluster.pod_state = {"phase": "Pending"}
    up(FILE, "--no-wait")
    assert fleetctl("logs", "web").out == ""


def test_following_goes_on_over_a_break_and_shows_no_line_twice(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    up()
    pod = cluster.names("pods")[0]
    for word in (b"a", b"b"):
        cluster.write(pod, word)
    with KubernetesEngine() as engine:
        follower = engine.follower("web", pod, 1, None)
        lines: list[bytes] = []

        def has(wanted: list[bytes]) -> bool:
            lines.extend(follower.read())
            return lines == wanted

        until(lambda: has([b"b"]))
        cluster.write(pod, b"c")
        until(lambda: has([b"b", b"c"]))
        cluster.write(pod, b"lost with the connection <break>")
        until(lambda: sum("follow=true" in asked for asked in cluster.asked) >= 2)
        cluster.write(pod, b"d")
        until(lambda: has([b"b", b"c", b"lost with the connection <break>", b"d"]))
        follower.close()


def test_following_ends_with_the_reason_where_it_may_not(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    up()
    cluster.faults.append(
        Fault(r"/log\?", status=403, message=FORBIDDEN.replace("patch", "get").replace("deployments", "pods/log"), times=None)
    )
    with KubernetesEngine() as engine:
        follower = engine.follower("web", cluster.names("pods")[0], None, None)
        with pytest.raises(api.ApiError, match="may not get pods/log"):
            until(lambda: bool(follower.read()))


# What goes wrong


def test_a_missing_permission_is_named_with_the_role_that_grants_it(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    written()
    cluster.faults.append(Fault("PATCH .*/deployments/", status=403, message=FORBIDDEN))
    result = fleetctl("up")
    assert result.status == 1
    assert "jo may not patch deployments.apps in namespace default; this Role grants it:" in result.err
    for line in ("kind: Role", "- deployments", "- patch", "namespace: default"):
        assert line in result.err
    assert "kubectl create rolebinding fleetctl-more --role=fleetctl-more --user=jo" in result.err
    assert cluster.objects == {}


def test_an_admission_rule_is_told_as_it_is(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    written()
    cluster.faults.append(
        Fault("PATCH .*/deployments/", status=403, message='admission webhook "policy" denied the request: no latest tags')
    )
    result = fleetctl("up")
    assert result.status == 1
    assert 'admission webhook "policy" denied the request: no latest tags' in result.err


def test_an_expired_token_is_told_as_that(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    cluster.tokens = {"another"}
    result = fleetctl("status")
    assert result.status == 1
    assert "the cluster of context test does not know who asks: Unauthorized" in result.err
    assert "log in again" in result.err


def test_a_namespace_that_is_not_there(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    written()
    result = fleetctl("up", "--namespace", "nowhere")
    assert result.status == 5
    assert "there is no namespace nowhere in the cluster of context test" in result.err
    assert "kubectl create namespace nowhere" in result.err


def test_an_object_of_somebody_else_is_left_alone(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    cluster.obedient = False
    theirs = {"metadata": {"name": "web", "labels": {"app.kubernetes.io/managed-by": "Helm"}}, "spec": {"replicas": 1, "template": {}}}
    before = json.dumps(cluster.add("deployments", theirs))
    written()
    result = fleetctl("up")
    assert result.status == 1
    assert "there is a Deployment web in namespace default that belongs to Helm; nothing was changed" in result.err
    assert json.dumps(cluster.find("deployments", "web")) == before
    assert "no such fleet" in fleetctl("down", "web").err
    assert json.dumps(cluster.find("deployments", "web")) == before


def test_a_conflict_names_the_owner_and_changes_nothing(cluster: FakeKubernetes, fleetctl: Fleetctl, up: Callable[..., Any]) -> None:
    up()
    with KubernetesEngine() as engine:
        image = {"spec": {"template": {"spec": {"containers": [{"name": "agent", "image": "theirs:9"}]}}}}
        path = "/apis/apps/v1/namespaces/default/deployments/web"
        engine.api.patch(path, image, api.APPLY, manager="argocd", force=True)
    written(FILE.replace("web:1", "web:2"))
    result = fleetctl("up")
    assert result.status == 1
    assert "Deployment web is left as it is, because parts of it belong to others" in result.err
    assert "to argocd" in result.err
    assert cluster.find("deployments", "web")["spec"]["template"]["spec"]["containers"][0]["image"] == "theirs:9"


def test_what_was_done_before_a_failure_is_listed_with_the_command_that_removes_it(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    written(FILE.replace('"example.com/web:1"', '"example.com/web:1"\nstorage_size = "1Gi"'))
    cluster.faults.append(Fault(r"PATCH .*/deployments/web\?fieldManager=fleetctl$", status=422, message="the Deployment is invalid"))
    result = fleetctl("up")
    assert result.status == 1
    assert "the Deployment is invalid" in result.err
    assert "applied persistentvolumeclaim web-state" in result.err
    assert "fleetctl down web --engine kubernetes --context test --namespace default" in result.err


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(cluster: FakeKubernetes, up: Callable[..., Any], status: int) -> None:
    cluster.faults.append(Fault(".", status=status, times=2, headers={"Retry-After": "0"}))
    assert "2 of 2 ready" in up().out


@pytest.mark.parametrize(("status", "exit_status", "words"), [(429, 1, "too much to do"), (503, 4, "in trouble (HTTP 503)")])
def test_a_server_that_stays_busy_is_given_up(
    cluster: FakeKubernetes, fleetctl: Fleetctl, status: int, exit_status: int, words: str
) -> None:
    cluster.faults.append(Fault(".", status=status, times=None))
    result = fleetctl("status")
    assert result.status == exit_status
    assert words in result.err
    assert len(cluster.asked) == api.TRIES


def test_a_lost_connection_is_tried_again(cluster: FakeKubernetes, up: Callable[..., Any]) -> None:
    cluster.faults.append(Fault(".", hang_up=True, times=2))
    assert "2 of 2 ready" in up().out


def test_a_server_that_does_not_answer_is_given_up(cluster: FakeKubernetes, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "TIMEOUT_SECONDS", 0.1)
    cluster.faults.append(Fault(".", silent=True, times=None))
    result = fleetctl("status")
    assert result.status == 4
    assert "did not answer within 0.1 s" in result.err


def test_a_server_that_is_away(cluster: FakeKubernetes, fleetctl: Fleetctl, tmp_path: Path) -> None:
    write_kubeconfig(tmp_path / "kubeconfig", "http://127.0.0.1:1")
    result = fleetctl("status")
    assert result.status == 4
    assert "the cluster of context test (http://127.0.0.1:1) cannot be reached: Connection refused" in result.err


def test_what_is_no_kubernetes(cluster: FakeKubernetes, fleetctl: Fleetctl, tmp_path: Path) -> None:
    cluster.faults.append(Fault(".", status=418, message="", times=None))
    assert "HTTP 418" in fleetctl("status").err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["down", "--orphans"], 2, "--orphans: a cluster has no orphans"),
        (["up", "--", "sleep", "60"], 2, "agents of a cluster run in an image"),
        (["status", "--engine", "mainframe"], 2, "there is no engine mainframe"),
        (["status", "--engine", "local", "--context", "x"], 2, "are for a cluster"),
        (["status", "--context", "nope"], 6, "has no context nope"),
        (["scale", "5"], 5, "there are no fleets"),
        (["restart", "nope"], 5, "no such fleet or agent: nope"),
    ],
)
def test_what_it_cannot_do_is_said(cluster: FakeKubernetes, fleetctl: Fleetctl, arguments: list[str], status: int, words: str) -> None:
    result = fleetctl(*arguments)
    assert result.status == status, result.err
    assert words in result.err
    assert cluster.objects == {}


def test_a_spec_without_an_image_is_refused_before_anything_is_asked(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    written(FILE.replace('image = "example.com/web:1"', ""))
    assert "kubernetes.image is missing" in fleetctl("config", "check").err
    result = fleetctl("up")
    assert result.status == 6
    assert "kubernetes.image is missing" in result.err
    assert not any(asked.startswith("PATCH") for asked in cluster.asked)


def test_of_several_fleets_none_is_made_where_one_cannot_be(cluster: FakeKubernetes, fleetctl: Fleetctl) -> None:
    one = '[[fleet]]\nname = "NAME"\nengine = "kubernetes"\ncommand = ["serve"]\n'
    written(one.replace("NAME", "api") + 'kubernetes = { image = "example.com/api:1" }\n' + one.replace("NAME", "web"))
    result = fleetctl("up")
    assert result.status == 6
    assert "fleet web: kubernetes.image is missing" in result.err
    assert cluster.objects == {}


def test_fleets_of_different_places_are_not_mixed(cluster: FakeKubernetes, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEETCTL_ENGINE")
    one = '[[fleet]]\nname = "NAME"\ncommand = ["true"]\n'
    there = 'engine = "kubernetes"\nkubernetes = { image = "example.com/api:1" }\n'
    written(one.replace("NAME", "api") + there + one.replace("NAME", "web"))
    result = fleetctl("up")
    assert result.status == 2
    assert "api, web run in different places" in result.err
    assert cluster.objects == {}


def test_the_file_of_the_folder_chooses_engine_and_namespace(
    cluster: FakeKubernetes, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEETCTL_ENGINE")
    assert "no daemon" in fleetctl("status").err or "the daemon does not run" in fleetctl("status").err
    written(FILE + 'namespace = "agents"\n')
    cluster.namespaces.add("agents")
    assert fleetctl("up").status == 0
    assert cluster.names("deployments", "agents") == ["web"]
    assert "web  2 of 2 ready" in fleetctl("status").out
    assert "the daemon does not run" in fleetctl("status", "--engine", "local").err


def test_times_of_the_cluster_are_read() -> None:
    from fleetctl.engines.kubernetes.times import unix

    at = 1_700_000_000.0
    assert unix(moment(at)) == at
    assert unix(moment(at + 0.25, fine=True)) == at + 0.25
    assert unix("yesterday") is None
