"""What a spec becomes in a cluster: valid for several versions of Kubernetes, and readable in review as golden files.

`python -m tests.engines.test_manifests` writes the golden files anew.
"""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from importlib_resources import files
from referencing import Registry, Resource

from fleetctl.engines.kubernetes import manifests, names, pod, rbac
from fleetctl.engines.kubernetes import yaml as our_yaml
from fleetctl.engines.kubernetes.notes import notes
from fleetctl.errors import ConfigError
from fleetctl.models import (
    AutoscalingSpec,
    FleetSpec,
    MetricScope,
    MetricSpec,
    ResourceLimitsSpec,
    RestartPolicy,
    RestartSpec,
    SandboxSpec,
)
from tests.engines.specs import SPECS, a_spec

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ["1.27", "1.29", "1.31", "1.33", kubernetes_validate.latest_version()]
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema"


def golden_text(spec: FleetSpec) -> str:
    said = "".join(f"# {note}\n" for note in notes(spec))
    return said + "---\n".join(["", *(our_yaml.dump(one) for one in manifests.objects(spec))])


@cache
def definitions(version: str) -> Any:  # Any: a JSON Schema
    return Resource.from_contents(json.loads((SCHEMAS / f"v{version}.0-local-strict" / "_definitions.json").read_text()))


@cache
def validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """As `kubernetes_validate.validate(strict=True)` makes it, which reads megabytes of definitions at each call."""
    group, _, plain = api_version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.partition(".")[0], plain])) + ".json"
    schema = json.loads((SCHEMAS / f"v{version}.0-local-strict" / name).read_text())
    registry: Registry[Any] = Resource.from_contents(schema) @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=definitions(version) @ registry)


def full(version: str) -> str:
    return ".".join(version.split(".")[:2])


def deployment(spec: FleetSpec) -> Any:  # Any: an object of the Kubernetes API
    return next(one for one in manifests.objects(spec) if one["kind"] == "Deployment")


def container(spec: FleetSpec) -> Any:  # Any: of the Kubernetes API
    return deployment(spec)["spec"]["template"]["spec"]["containers"][0]


def kinds(spec: FleetSpec) -> list[str]:
    return [one["kind"] for one in manifests.objects(spec)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SPECS)
def test_every_object_is_valid_to_the_letter(name: str, version: str) -> None:
    for one in manifests.objects(SPECS[name]):
        validator(full(version), one["kind"], one["apiVersion"]).validate(one)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_roles_are_valid_to_the_letter(version: str) -> None:
    for one in (rbac.role(None), rbac.role("agents"), rbac.role_for("patch", "apps", "deployments", "agents")):
        validator(full(version), "Role", one["apiVersion"]).validate(one)


def test_the_validation_finds_what_is_not_in_the_schema() -> None:
    wrong = deployment(a_spec())
    wrong["spec"]["replica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        validator("1.31", "Deployment", "apps/v1").validate(wrong)


def test_the_validation_is_that_of_the_package() -> None:
    assert kubernetes_validate.validate(deployment(a_spec()), "1.31", strict=True) == "1.31"


@pytest.mark.parametrize("name", SPECS)
def test_manifests_are_those_of_the_golden_file(name: str) -> None:
    assert (GOLDEN / f"{name}.yaml").read_text() == golden_text(SPECS[name]), "python -m tests.engines.test_manifests writes them anew"


def test_there_are_no_other_golden_files() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_printed_is_read_back_as_it_was(name: str) -> None:
    text = "---\n".join(our_yaml.dump(one) for one in manifests.objects(SPECS[name]))
    assert list(yaml.safe_load_all(text)) == manifests.objects(SPECS[name])


NASTY = [
    "",
    " ",
    "yes",
    "No",
    "null",
    "~",
    "1e3",
    "0x1f",
    "1_000",
    "12:30",
    "- a",
    "a: b",
    "#",
    "a #b",
    "a\nb",
    "a\nb\n",
    " a\nb",
    "\n",
    "a\n\nb",
]
NASTY += [
    "'",
    '"',
    "\\",
    "\t",
    "\x00",
    "\x85",
    "\u2028",
    "é",
    "\U0001f600",
    "\U0010ffff",
    "{}",
    "[]",
    "*a",
    "&a",
    "!a",
    "|",
    ">",
    "%",
    "@",
    "`",
]
NASTY += ["a\n b", "a\n", "a\n\n", "\ta\nb", "a\r\nb", "=", "<<", "2026-01-31", ".5", "on", "y", "a/b.c-d_e"]


@pytest.mark.parametrize("text", NASTY)
def test_any_text_survives_yaml(text: str) -> None:
    value = {"key": text, text: [text, {"inner": text, "list": [[], {}, [text]]}], "number": 7, "none": None, "yes": True}
    assert yaml.safe_load(our_yaml.dump(value)) == value


@pytest.mark.parametrize("text", ["$", "$$", "$$$", "$(A)", "$$(A)", "$$$(A)", "a$b", "$(", "$(A) $HOME $$ ${A}", "$A$(A)$$A"])
def test_text_is_the_same_after_kubernetes_put_variables_in(text: str) -> None:
    def expand(given: str) -> str:
        """$$ is one $, $(NAME) the variable's value; all else stays."""
        return re.sub(r"\$(?:\$|\(A\))", lambda found: "$" if found[0] == "$$" else "REPLACED", given)

    assert expand(pod.escaped(text)) == text


def test_replicas_are_left_to_the_autoscaler_once_there_is_one() -> None:
    assert deployment(SPECS["small"])["spec"]["replicas"] == 3
    assert "replicas" not in deployment(SPECS["autoscaled"])["spec"]


def test_the_autoscaler_aims_at_the_same_load_whatever_is_requested() -> None:
    """70 % of 2 cores are 140 % of 1 requested core."""
    for request, percent in ((2.0, 70), (1.0, 140), (0.5, 280)):
        spec = a_spec(
            resource_limits=SPECS["autoscaled"].resource_limits, autoscaling=AutoscalingSpec(enabled=True), cluster={"cpu_request": request}
        )
        hpa = manifests.objects(spec)[-1]
        assert hpa["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"] == percent


@pytest.mark.parametrize(("scope", "kind"), [(MetricScope.TOTAL, "External"), (MetricScope.PER_REPLICA, "Pods")])
def test_metrics_of_ones_own_are_asked_of_the_clusters_adapter(scope: MetricScope, kind: str) -> None:
    metrics = {"backlog": MetricSpec(target=2.5, scope=scope, redis="LLEN jobs"), "rate": MetricSpec(file="rate")}
    auto = AutoscalingSpec(enabled=True, metrics=metrics)
    hpa = manifests.objects(a_spec(autoscaling=auto))[-1]
    own = hpa["spec"]["metrics"][1:]
    assert [one["type"] for one in own] == [kind]
    assert own[0][kind.lower()] == {"metric": {"name": "backlog"}, "target": {"type": "AverageValue", "averageValue": "2500m"}}
    for version in VERSIONS:
        validator(full(version), hpa["kind"], hpa["apiVersion"]).validate(hpa)
    assert "autoscaling.metrics.backlog" in {note.setting for note in notes(a_spec(autoscaling=auto))}


def test_that_a_cluster_goes_to_zero_otherwise_is_told() -> None:
    to_zero = a_spec(min_replicas=0, sockets={"http": "127.0.0.1:0"}, autoscaling=AutoscalingSpec(enabled=True, idle_seconds=60.0))
    assert any(note.setting == "autoscaling.idle_seconds" and "KEDA" in note.text for note in notes(to_zero))


def test_an_untrusted_agent_is_shut_in() -> None:
    policy = manifests.objects(SPECS["untrusted"])[0]
    assert (policy["kind"], policy["spec"]["policyTypes"]) == ("NetworkPolicy", ["Ingress", "Egress"])
    assert "egress" not in policy["spec"]
    assert policy["spec"]["ingress"] == [{"ports": [{"port": 8080, "protocol": "TCP"}]}]
    inner, outer = container(SPECS["untrusted"])["securityContext"], deployment(SPECS["untrusted"])["spec"]["template"]["spec"]
    assert (inner["readOnlyRootFilesystem"], inner["allowPrivilegeEscalation"], inner["capabilities"]) == (True, False, {"drop": ["ALL"]})
    assert outer["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert outer["automountServiceAccountToken"] is False


def test_an_untrusted_agent_that_may_has_a_network_and_what_it_sees_is_its_image() -> None:
    shown = replace(SPECS["untrusted"], sandbox=SandboxSpec(network=True, read_only_paths=("/srv/data",)))
    assert "NetworkPolicy" not in {one["kind"] for one in manifests.objects(shown)}
    assert "sandbox.read_only_paths" in {note.setting for note in notes(shown)}


def test_an_autoscaler_without_a_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="no metric"):
        manifests.objects(a_spec(autoscaling=AutoscalingSpec(enabled=True, use_cpu=False)))


def test_cpu_is_always_requested() -> None:
    assert all(container(spec)["resources"]["requests"]["cpu"] for spec in SPECS.values())


def test_no_secret_stands_in_a_manifest() -> None:
    spec = SPECS["secrets"]
    text = json.dumps(manifests.objects(spec))
    assert "my db" not in text
    assert "env:API_KEY" not in text
    by_name = {one["name"]: one for one in container(spec)["env"]}
    assert by_name["API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "web-secrets", "key": "API_KEY"}
    assert container(spec)["envFrom"] == [{"secretRef": {"name": "web-env"}}]


def test_everything_is_labelled_as_ours() -> None:
    for spec in SPECS.values():
        assert all(names.is_ours(one, spec.name) for one in manifests.objects(spec))


def test_pods_of_the_pool_are_not_found_by_the_selectors_of_the_replicas() -> None:
    first, second = (one for one in manifests.objects(SPECS["warm"]) if one["kind"] == "Deployment")
    chosen = first["spec"]["selector"]["matchLabels"].items()
    assert chosen <= first["spec"]["template"]["metadata"]["labels"].items()
    assert not chosen <= second["spec"]["template"]["metadata"]["labels"].items()


def test_a_cluster_that_knows_sandboxes_keeps_the_pool_as_sandboxes() -> None:
    found = manifests.objects(SPECS["warm"], sandbox_version="v1beta1")
    assert [one["kind"] for one in found] == ["Deployment", "SandboxTemplate", "SandboxWarmPool"]
    template, pool = found[1:]
    assert pool["apiVersion"] == "extensions.agents.x-k8s.io/v1beta1"
    assert pool["spec"] == {"replicas": 4, "sandboxTemplateRef": {"name": template["metadata"]["name"]}}
    assert template["spec"]["networkPolicyManagement"] == "Unmanaged"


def test_the_grace_period_covers_the_checkpoint_and_the_drain() -> None:
    template = deployment(SPECS["drain"])["spec"]["template"]["spec"]
    assert template["terminationGracePeriodSeconds"] == 136
    assert container(SPECS["drain"])["lifecycle"]["preStop"]["exec"]["command"][:2] == ["/bin/sh", "-c"]
    assert container(SPECS["checkpoint"])["lifecycle"] == {"preStop": {"exec": {"command": ["./save"]}}}


def test_a_dead_node_is_left_after_half_a_minute() -> None:
    tolerations = deployment(SPECS["small"])["spec"]["template"]["spec"]["tolerations"]
    assert {one["key"]: one["tolerationSeconds"] for one in tolerations} == {
        "node.kubernetes.io/not-ready": 30,
        "node.kubernetes.io/unreachable": 30,
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster": {"image": None}}, "kubernetes.image is missing"),
        ({"command": ("serve", "--fd", "{fd}"), "sockets": {"http": "127.0.0.1:80"}}, "{fd} does not exist in a cluster"),
        ({"command": ("serve", "{port}")}, "{port} stands for no port"),
        ({"command": ("serve", "{port:x}"), "port_base": 8000}, "{port:x} stands for no port"),
    ],
)
def test_what_no_cluster_can_carry_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as found:
        manifests.objects(a_spec(**changes))
    assert found.value.hint


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (a_spec(restart=RestartSpec(policy=RestartPolicy.NEVER)), {"restart.policy"}),
        (a_spec(restart=RestartSpec(backoff_seconds=3)), {"restart"}),
        (a_spec(command=("/home/me/worker/run",)), {"command"}),
        (a_spec(command=("./run",)), {"cwd"}),
        (a_spec(command=("./run",), cluster={"working_directory": "/srv"}), set()),
        (a_spec(environment={"API_TOKEN": "x"}), {"environment.API_TOKEN"}),
        (a_spec(environment={"N": "$FLEETCTL_SLOT"}), {"command"}),
        (a_spec(watchdog_seconds=30.0), {"watchdog_seconds"}),
        (a_spec(port_base=8000), {"port_base"}),
        (
            a_spec(resource_limits=ResourceLimitsSpec(cpu_limit=1.0, pids_limit=9, nofile=99)),
            {f"resource_limits.{key}" for key in ("pids_limit", "nofile")},
        ),
        (SPECS["guarded"], {"autoscaling.min_available"}),
        (SPECS["warm"], {"warm_pool"}),
        (SPECS["wait"], {"stop_signal", "graceful_drain.on_timeout"}),
    ],
)
def test_what_does_not_map_is_named(spec: FleetSpec, settings: set[str]) -> None:
    assert {note.setting for note in notes(spec)} - {"kubernetes.storage_size"} == settings


def test_the_command_that_makes_the_secret_is_told() -> None:
    text = "\n".join(str(note) for note in notes(SPECS["secrets"]))
    assert "--from-literal=API_KEY=\"$API_KEY\" --from-file=DB_PASSWORD='/run/secrets/my db'" in text
    assert "--from-env-file=/home/me/worker/.env" in text


if __name__ == "__main__":
    for name, spec in SPECS.items():
        (GOLDEN / f"{name}.yaml").write_text(golden_text(spec))
