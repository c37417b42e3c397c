"""Who we are to the API server: headers with a token, and TLS with a certificate. Runs the exec plugin that a kubeconfig names."""

import base64
import json
import os
import ssl
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from fleetctl.engines.kubernetes.kubeconfig import Target
from fleetctl.errors import ClusterRefused, ConfigError

PLUGIN_SECONDS = 60.0
_EXEC_VERSIONS = tuple(f"client.authentication.k8s.io/{version}" for version in ("v1", "v1beta1"))


@dataclass(frozen=True, slots=True)
class Credential:
    """What an exec plugin answered."""

    token: str | None = None
    certificate: str | None = None
    key: str | None = None


class Identity:
    """Headers and TLS for one target. `renew` asks anew, for a token that the server takes no longer."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._credential: Credential | None = None

    @property
    def renewable(self) -> bool:
        return self._target.exec is not None or self._target.token_file is not None

    def renew(self) -> None:
        self._credential = None

    def headers(self) -> dict[str, str]:
        target, found = self._target, {}
        if token := self._token():
            found["Authorization"] = f"Bearer {token}"
        elif target.basic:
            found["Authorization"] = "Basic " + base64.b64encode(":".join(target.basic).encode()).decode()
        if target.impersonate:
            found["Impersonate-User"] = target.impersonate
        return found

    def _token(self) -> str | None:
        if self._target.exec is not None and (token := self._from_plugin().token):
            return token
        if self._target.token_file:
            try:
                with open(self._target.token_file, encoding="utf-8") as file:  # read anew: it is exchanged while we run
                    return file.read().strip()
            except OSError as error:
                raise ConfigError(f"{self._target.token_file}: {error.strerror}") from error
        return self._target.token

    def tls(self) -> ssl.SSLContext:
        target = self._target
        try:
            context = ssl.create_default_context(cadata=target.authority)
            if target.insecure:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            certificate, key = target.certificate, target.key
            if target.exec is not None and not certificate:
                certificate, key = self._from_plugin().certificate, self._from_plugin().key
            if certificate:
                _load(context, certificate, key or "")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"a certificate of context {target.context} cannot be used: {error}") from error
        return context

    def _from_plugin(self) -> Credential:
        if self._credential is None:
            assert self._target.exec is not None
            self._credential = _ask_plugin(self._target.exec, self._target)
        return self._credential


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Through a file that only we can read, for a moment: OpenSSL takes no text."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(f"{certificate}\n{key}\n")
        file.flush()
        context.load_cert_chain(file.name)


def _ask_plugin(plugin: Any, target: Target) -> Credential:  # Any: a table of the kubeconfig
    version, words = str(plugin.get("apiVersion")), [str(plugin.get("command")), *map(str, plugin.get("args") or ())]
    if version not in _EXEC_VERSIONS:
        known = f"known are {', '.join(_EXEC_VERSIONS)}"
        raise ConfigError(f"context {target.context}: exec plugins of {version} are not known", hint=known)
    asked = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    if plugin.get("provideClusterInfo"):
        asked["spec"] = {"interactive": False, "cluster": {"server": target.server, "insecure-skip-tls-verify": target.insecure}}
    given = {str(one["name"]): str(one["value"]) for one in plugin.get("env") or ()}
    environment = {**os.environ, **given, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    try:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PLUGIN_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClusterRefused(f"the login plugin {words[0]} did not answer within {PLUGIN_SECONDS:g} s") from error
    except OSError as error:
        raise ConfigError(f"the login plugin {words[0]}: {error.strerror}", hint=str(plugin.get("installHint") or "install it")) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise ClusterRefused("\n".join([f"the login plugin {words[0]} failed:", *said]), hint="log in again, as its tool says")
    try:
        status = json.loads(done.stdout)["status"]
        return Credential(status.get("token"), status.get("clientCertificateData"), status.get("clientKeyData"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterRefused(f"what the login plugin {words[0]} printed is no ExecCredential") from error
