"""How the cluster is found and who we are to it: kubeconfig files as kubectl reads them, tokens, certificates, login plugins.

The certificates in `tls/` are for these tests alone, and good until 2126.
"""

import base64
import json
import ssl
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fleetctl.engines.kubernetes import kubeconfig
from fleetctl.engines.kubernetes.api import Api
from fleetctl.engines.kubernetes.engine import KubernetesEngine
from fleetctl.engines.kubernetes.kubeconfig import Target, find
from fleetctl.errors import ClusterRefused, ClusterUnreachable, ConfigError, FleetctlError
from tests.cli.conftest import Fleetctl
from tests.engines.fake_kubernetes import TOKEN, FakeKubernetes, running

TLS = Path(__file__).parent / "tls"
Json = dict[str, Any]  # Any: JSON values, which are YAML too


def config(name: str = "dev", *, server: str = "https://10.0.0.1:6443", cluster: Json | None = None, user: Json | None = None) -> Json:
    """A kubeconfig with one context."""
    context = {"cluster": f"{name}-cluster", "user": f"{name}-user"}
    return {
        "current-context": name,
        "clusters": [{"name": f"{name}-cluster", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": f"{name}-user", "user": user or {"token": TOKEN}}],
        "contexts": [{"name": name, "context": context}],
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a kubeconfig, outside of any cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(path: Path, content: Json) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_file_in_the_home_is_found(place: Path) -> None:
    write(place / ".kube/config", config())
    assert find(None, None) == Target(context="dev", namespace="default", server="https://10.0.0.1:6443", token=TOKEN)
    assert find("dev", "agents").namespace == "agents"


def test_of_several_files_the_first_that_says_something_is_right(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / "a", {"contexts": [{"name": "dev", "context": {"cluster": "dev-cluster", "user": "dev-user", "namespace": "mine"}}]})
    write(place / "b", config())
    write(place / "c", config("prod", server="https://prod:6443") | {"users": [{"name": "dev-user", "user": {"token": "other"}}]})
    monkeypatch.setenv("KUBECONFIG", f"{place / 'a'}:{place / 'nowhere'}:{place / 'b'}:{place / 'c'}")
    assert (find(None, None).namespace, find(None, None).token) == ("mine", TOKEN)
    with pytest.raises(ConfigError, match="context prod names user prod-user, which is not there"):
        find("prod", None)


def test_paths_are_relative_to_their_own_file(place: Path) -> None:
    (place / ".kube").mkdir()
    (place / ".kube/ca.pem").write_text("CERTIFICATE")
    (place / ".kube/token").write_text("t")
    write(place / ".kube/config", config(cluster={"certificate-authority": "ca.pem"}, user={"tokenFile": "token"}))
    target = find(None, None)
    assert target.authority == "CERTIFICATE"
    assert target.token_file == str(place / ".kube/token")


def test_a_pod_finds_its_own_cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("token", "t"), ("ca.crt", "CA"), ("namespace", "agents\n")):
        (place / name).write_text(text)
    monkeypatch.setattr(kubeconfig, "IN_CLUSTER", str(place))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    target = find(None, None)
    assert (target.server, target.namespace, target.authority) == ("https://[fd00::1]:443", "agents", "CA")


@pytest.mark.parametrize(
    ("content", "context", "words"),
    [
        (None, None, "there is no kubeconfig: "),
        ("{", None, ": not valid YAML"),
        ("- a\n", None, ": not a kubeconfig"),
        ("{}", None, "has no current context"),
        (config(), "prod", "has no context prod"),
        (config() | {"clusters": []}, None, "names cluster dev-cluster, which is not there"),
        (config(server=""), None, "has no server"),
        (config(server="10.0.0.1"), None, "has no server"),
        (config(cluster={"certificate-authority-data": "%%%"}), None, "certificate-authority-data is not base64"),
        (config(cluster={"certificate-authority": "/nowhere/ca"}), None, "/nowhere/ca: No such file"),
        (config(user={"auth-provider": {"name": "gcp"}}), None, "auth-provider, which Kubernetes has dropped"),
        (config(user={"exec": "login"}), None, "cannot be understood"),
    ],
)
def test_what_is_wrong_with_a_kubeconfig_is_said(place: Path, content: Json | str | None, context: str | None, words: str) -> None:
    if isinstance(content, str):
        (place / ".kube").mkdir()
        (place / ".kube/config").write_text(content)
    elif content is not None:
        write(place / ".kube/config", content)
    with pytest.raises(ConfigError) as found:
        find(context, None)
    assert words in found.value.message


def test_the_command_line_says_it_as_any_other_mistake(place: Path, fleetctl: Fleetctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    result = fleetctl("status", "--engine", "kubernetes", "--json")
    assert result.status == 6
    assert json.loads(result.out)["error"]["code"] == "E2002"
    assert f"there is no kubeconfig: {place}/.kube/config does not exist" in result.err


# Who we are


@pytest.fixture
def plain(place: Path) -> Iterator[FakeKubernetes]:
    with running() as fake:
        yield fake


def connected(fake: FakeKubernetes, place: Path, user: Json) -> Api:
    write(place / ".kube/config", config(server=fake.url, user=user))
    return Api(find(None, None), pause=lambda seconds: None)


def plugin(place: Path, body: str) -> Json:
    """A login plugin that runs this Python code."""
    script = place / "login.py"
    script.write_text("import json, os, sys, pathlib\n" + body)
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "env": [{"name": "WHO", "value": "me"}],
        }
    }


def lists(api: Api) -> list[Json]:
    return api.list("/api/v1/namespaces/default/pods")


def test_a_login_plugin_gives_the_token_and_is_asked_again_when_it_is_refused(plain: FakeKubernetes, place: Path) -> None:
    code = f"""
told = json.loads(os.environ["KUBERNETES_EXEC_INFO"])
assert told["kind"] == "ExecCredential" and os.environ["WHO"] == "me"
count = pathlib.Path({str(place / "count")!r})
count.write_text(count.read_text() + "x" if count.exists() else "x")
token = "old" if count.read_text() == "x" else {TOKEN!r}
print(json.dumps({{"apiVersion": told["apiVersion"], "kind": "ExecCredential", "status": {{"token": token}}}}))
"""
    api = connected(plain, place, plugin(place, code))
    assert lists(api) == lists(api) == []
    assert (place / "count").read_text() == "xx"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit('you are logged out')", "login.py|you are logged out"),
        ("print('no JSON')", "is no ExecCredential"),
        ("print(json.dumps({'kind': 'ExecCredential'}))", "is no ExecCredential"),
    ],
)
def test_a_login_plugin_that_fails_is_told_with_its_words(plain: FakeKubernetes, place: Path, code: str, words: str) -> None:
    with pytest.raises(ClusterRefused, match=words):
        lists(connected(plain, place, plugin(place, code)))


def test_a_login_plugin_that_is_not_installed(plain: FakeKubernetes, place: Path) -> None:
    missing = {"exec": {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": "no-such-login", "installHint": "get it"}}
    with pytest.raises(ConfigError, match="no-such-login: No such file") as found:
        lists(connected(plain, place, missing))
    assert found.value.hint == "get it"


def test_a_login_plugin_of_an_unknown_kind(plain: FakeKubernetes, place: Path) -> None:
    with pytest.raises(ConfigError, match="exec plugins of example/v9 are not known"):
        lists(connected(plain, place, {"exec": {"apiVersion": "example/v9", "command": "x"}}))


def test_a_token_that_is_exchanged_while_we_run_is_read_again(plain: FakeKubernetes, place: Path) -> None:
    (place / "token").write_text("first\n")
    plain.tokens = {"first"}
    api = connected(plain, place, {"tokenFile": str(place / "token")})
    assert lists(api) == []
    (place / "token").write_text("second\n")
    plain.tokens = {"second"}
    assert lists(api) == []


def test_impersonation_is_asked_for(plain: FakeKubernetes, place: Path) -> None:
    api = connected(plain, place, {"token": TOKEN, "as": "jo", "as-groups": ["a", "b"]})
    lists(api)
    assert plain.headers[-1].get("Impersonate-User") == "jo"
    assert plain.headers[-1].get_all("Impersonate-Group") == ["a", "b"]


# TLS


@pytest.fixture
def secure(place: Path) -> Iterator[FakeKubernetes]:
    """Lets nobody in who has no certificate of its authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(TLS / "ca.pem"))
    context.load_cert_chain(TLS / "server.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with running(context) as fake:
        yield fake


def in_base64(name: str) -> str:
    return base64.b64encode((TLS / name).read_bytes()).decode()


CLIENT = {"client-certificate-data": in_base64("client.pem"), "client-key-data": in_base64("client.pem"), "token": TOKEN}


def asks(fake: FakeKubernetes, place: Path, cluster: Mapping[str, object], user: Json) -> list[Json]:
    write(place / ".kube/config", config(server=fake.url, cluster=dict(cluster), user=user))
    return lists(Api(find(None, None), pause=lambda seconds: None))


def test_certificates_of_both_sides_are_used(secure: FakeKubernetes, place: Path) -> None:
    assert asks(secure, place, {"certificate-authority-data": in_base64("ca.pem")}, CLIENT) == []
    assert asks(secure, place, {"certificate-authority": str(TLS / "ca.pem"), "tls-server-name": "kube.test"}, CLIENT) == []
    assert asks(secure, place, {"insecure-skip-tls-verify": True}, CLIENT) == []


def test_a_login_plugin_may_give_a_certificate(secure: FakeKubernetes, place: Path) -> None:
    pem = (TLS / "client.pem").read_text()
    code = f"print(json.dumps({{'status': {{'clientCertificateData': {pem!r}, 'clientKeyData': {pem!r}, 'token': {TOKEN!r}}}}}))"
    assert asks(secure, place, {"certificate-authority-data": in_base64("ca.pem")}, plugin(place, code)) == []


@pytest.mark.parametrize(
    ("cluster", "user", "words"),
    [
        ({}, CLIENT, "shows a certificate that is not to be trusted"),
        ({"certificate-authority-data": in_base64("ca.pem"), "tls-server-name": "other.test"}, CLIENT, "not to be trusted"),
        ({"certificate-authority-data": in_base64("ca.pem")}, {"token": TOKEN}, "cannot be reached"),
    ],
)
def test_a_cluster_that_is_not_who_it_should_be_is_not_spoken_to(
    secure: FakeKubernetes, place: Path, cluster: Json, user: Json, words: str
) -> None:
    with pytest.raises(ClusterUnreachable, match=words):
        asks(secure, place, cluster, user)
    assert secure.asked == []


def test_a_certificate_that_is_none(secure: FakeKubernetes, place: Path) -> None:
    rubbish = base64.b64encode(b"rubbish").decode()
    with pytest.raises(ConfigError, match="a certificate of context dev cannot be used"):
        asks(secure, place, {"certificate-authority-data": rubbish}, CLIENT)


def test_without_pyyaml_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / ".kube/config", config())
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(FleetctlError, match="needs the package PyYAML") as found, KubernetesEngine() as engine:
        engine.status()
    assert "fleetctl[kubernetes]" in found.value.hint
