"""Where the cluster is and who we are, found as kubectl finds it: KUBECONFIG, ~/.kube/config, or the pod we run in.

Needs PyYAML, from the extra `kubernetes`.
"""

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleetctl.errors import ConfigError

Table = Mapping[str, Any]  # Any: what a kubeconfig says, checked where it is used

IN_CLUSTER = "/var/run/secrets/kubernetes.io/serviceaccount"
_LONGEST_FILE = 4 << 20
_PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A cluster, an identity and a namespace. Certificates as PEM text; `exec`: the plugin that tells who we are."""

    context: str
    namespace: str
    server: str
    authority: str | None = None
    insecure: bool = False
    server_name: str | None = None
    proxy: str | None = None
    token: str | None = None
    token_file: str | None = None
    basic: tuple[str, str] | None = None
    certificate: str | None = None
    key: str | None = None
    exec: Table | None = None
    impersonate: str | None = None
    impersonate_groups: Sequence[str] = field(default_factory=tuple)


def find(context: str | None, namespace: str | None) -> Target:
    """The target that is meant. ConfigError where there is none, or what describes it is wrong."""
    files = _files()
    there = [path for path in files if os.path.exists(path)]
    if not there:
        if context is None and (inside := _in_cluster(namespace)):
            return inside
        raise ConfigError(
            f"there is no kubeconfig: {', '.join(files)} does not exist", hint="set KUBECONFIG, or have your cluster's tool write one"
        )
    return _choose(_merged([_read(path) for path in there]), context, namespace, ", ".join(there))


def _files() -> list[str]:
    given = [os.path.expanduser(path) for path in os.environ.get("KUBECONFIG", "").split(os.pathsep) if path]
    return given or [os.path.expanduser("~/.kube/config")]


def _read(path: str) -> Table:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            "`--engine kubernetes` needs the package PyYAML, which is not installed", hint="pip install 'fleetctl[kubernetes]'"
        ) from None
    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.load(file.read(_LONGEST_FILE), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path}{f':{where.line + 1}' if where else ''}: not valid YAML") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a kubeconfig")
    return _rooted(loaded or {}, os.path.dirname(os.path.abspath(path)))


def _rooted(config: dict[str, Any], folder: str) -> Table:  # Any: YAML values
    """With paths made absolute: they are relative to their own file."""
    for part in ("clusters", "users"):
        for entry in _entries(config, part):
            body = entry.get(part[:-1])
            if not isinstance(body, dict):
                continue
            for key in _PATHS:
                if isinstance(body.get(key), str) and body[key]:
                    body[key] = os.path.join(folder, body[key])
            plugin = body.get("exec")
            if isinstance(plugin, dict) and "/" in str(plugin.get("command")):
                plugin["command"] = os.path.join(folder, str(plugin["command"]))
    return config


def _entries(config: Table, part: str) -> list[dict[str, Any]]:  # Any: YAML values
    found = config.get(part) or []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _merged(configs: Sequence[Table]) -> Table:
    """The first file that says something about a thing is right about it, as for kubectl."""
    merged: dict[str, Any] = {"clusters": {}, "users": {}, "contexts": {}, "current-context": ""}  # Any: YAML values
    for config in configs:
        merged["current-context"] = merged["current-context"] or str(config.get("current-context") or "")
        for part in ("clusters", "users", "contexts"):
            for entry in _entries(config, part):
                merged[part].setdefault(str(entry.get("name")), entry.get(part[:-1]) or {})
    return merged


def _choose(config: Table, context: str | None, namespace: str | None, where: str) -> Target:
    name, contexts = context or config["current-context"], config["contexts"]
    known = f"it has {', '.join(contexts)}" if contexts else "it has none"
    if not name:
        raise ConfigError(f"{where} has no current context", hint=f"choose one with --context; {known}")
    if name not in contexts:
        raise ConfigError(f"{where} has no context {name}", hint=known)
    chosen = _table(contexts[name], where, name)
    cluster = _part(config, "clusters", chosen.get("cluster"), where, name)
    user = _part(config, "users", chosen["user"], where, name) if chosen.get("user") else {}
    if user.get("auth-provider"):
        raise ConfigError(
            f"{where}: user {chosen['user']} has an auth-provider, which Kubernetes has dropped", hint="an exec plugin does it today"
        )
    server = str(cluster.get("server") or "")
    if not server.startswith(("https://", "http://")):
        raise ConfigError(f"{where}: the cluster of context {name} has no server, such as https://10.0.0.1:6443")
    basic = (str(user["username"]), str(user.get("password", ""))) if user.get("username") else None
    return Target(
        context=name,
        namespace=namespace or str(chosen.get("namespace") or "default"),
        server=server.rstrip("/"),
        authority=_pem(cluster, "certificate-authority", where),
        insecure=cluster.get("insecure-skip-tls-verify") is True,
        server_name=_text(cluster, "tls-server-name"),
        proxy=_text(cluster, "proxy-url"),
        token=_text(user, "token"),
        token_file=_text(user, "tokenFile"),
        basic=basic,
        certificate=_pem(user, "client-certificate", where),
        key=_pem(user, "client-key", where),
        exec=_table(user["exec"], where, name) if user.get("exec") else None,
        impersonate=_text(user, "as"),
        impersonate_groups=tuple(map(str, user.get("as-groups") or ())),
    )


def _part(config: Table, part: str, name: object, where: str, context: str) -> Table:
    if name not in config[part]:
        raise ConfigError(f"{where}: context {context} names {part[:-1]} {name}, which is not there")
    return _table(config[part][name], where, context)


def _table(value: object, where: str, context: str) -> Table:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: what belongs to context {context} cannot be understood")
    return value


def _text(table: Table, key: str) -> str | None:
    return str(table[key]) if table.get(key) else None


def _pem(table: Table, key: str, where: str) -> str | None:
    """A certificate or key that stands in the file itself or in one of its own."""
    try:
        if data := table.get(f"{key}-data"):
            return base64.b64decode(str(data), validate=True).decode()
        if path := table.get(key):
            with open(str(path), encoding="utf-8") as file:
                return file.read(_LONGEST_FILE)
    except OSError as error:
        raise ConfigError(f"{where}: {key} {error.filename}: {error.strerror}") from error
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {key}-data is not base64 of a text") from error
    return None


def _in_cluster(namespace: str | None) -> Target | None:
    """The cluster whose pod we are, if we are one."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    token = f"{IN_CLUSTER}/token"
    if not host or not os.path.exists(token):
        return None
    with open(f"{IN_CLUSTER}/ca.crt", encoding="utf-8") as authority, open(f"{IN_CLUSTER}/namespace", encoding="utf-8") as own:
        return Target(
            context="in-cluster",
            namespace=namespace or own.read().strip(),
            server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
            authority=authority.read(),
            token_file=token,
        )
