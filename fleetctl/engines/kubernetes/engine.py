"""Fleets in a cluster, as one Engine. What it knows it asks the cluster for each time; nothing is kept here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Self

from fleetctl.daemon.wire import Change, EventInfo, HistoryEntry, Status
from fleetctl.engines.kubernetes import happenings, kubeconfig, logs, manifests, names, scaling, views
from fleetctl.engines.kubernetes.api import APPLY, MERGE, Api, ApiError, conflict, path_of
from fleetctl.engines.kubernetes.changes import applied_words, change, check_bounds, owns_replicas, tell_part
from fleetctl.engines.kubernetes.diff import differences
from fleetctl.engines.kubernetes.names import Object
from fleetctl.engines.kubernetes.notes import notes
from fleetctl.engines.kubernetes.times import rfc3339
from fleetctl.engines.kubernetes.watching import Alarm, parsed
from fleetctl.engines.protocol import Process
from fleetctl.errors import ClusterConflict, FleetctlError, NotFound

if TYPE_CHECKING:
    from types import TracebackType

    from fleetctl.models import FleetSpec

METRICS = "metrics.k8s.io/v1beta1"
BEAT_SECONDS = 5.0  # a watched status comes at least this often
LEAST_LOOK_SECONDS = 0.5  # between two looks at everything
AGAIN_SECONDS = 1.0
AUTOSCALER = "kube-controller-manager"  # by whose name the cluster's autoscalers change sizes
OLDEST_FIRST = "controller.kubernetes.io/pod-deletion-cost"

# (version, kind) of what `up` may make besides the Deployment, and makes away with once the file no longer asks for it; volumes stay.
_EXTRAS = (
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("policy/v1", "PodDisruptionBudget"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("v1", "Service"),
)
_VOLUMES = ("v1", "PersistentVolumeClaim")

_CANNOT = {
    "orphans": "a cluster has no orphans: it ends what belongs to a fleet itself",
    "command": "agents of a cluster run in an image; write a fleet.toml with [fleet.kubernetes] image",
    "offline": "what runs in a cluster is known to the cluster alone",
    "suspend": "Kubernetes cannot suspend an agent",
    "acquire": "Kubernetes cannot hand a single agent out; `fleetctl scale +1` makes the fleet one larger",
}


class KubernetesEngine:
    """One namespace of one cluster. Opens nothing before it is asked for something."""

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        self._context, self._namespace = context, namespace
        self._opened: Api | None = None
        self._sandbox: str | None = None
        self._sandbox_known = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None") -> None:
        if self._opened is not None:
            self._opened.close()

    def open(self, api: Api) -> None:
        """Use this connection, instead of what the kubeconfig says."""
        self._opened = api

    @property
    def api(self) -> Api:
        if self._opened is None:
            self._opened = Api(kubeconfig.find(self._context, self._namespace))
        return self._opened

    def capabilities(self) -> Mapping[str, str]:
        return _CANNOT

    def alive(self) -> bool:
        return True  # whoever asks gets an answer or an error that says why not

    # Looking

    def fleet_names(self) -> list[str]:
        return sorted({names.fleet_of(one) for one in self._list("apps/v1", "Deployment") if views.is_replicas(one)})

    def status(self) -> Status:
        target = self.api.target
        found = views.fleets(self._seen())
        return {
            "schema": "fleetctl/status/v1",
            "generated_at": rfc3339(time()),
            "daemon": {
                "alive": True,
                "pid": None,
                "version": None,
                "uptime_seconds": None,
                "state_dir": f"kubernetes:{target.context}/{target.namespace}",
                "note": None,
            },
            "fleets": found,
        }

    def _seen(self) -> views.Seen:
        deployments = self._list("apps/v1", "Deployment")
        wants_pool = any(one["metadata"].get("annotations", {}).get(names.WARM_SIZE, "0") != "0" for one in deployments)
        return views.Seen(
            deployments=deployments,
            pods=self._list("v1", "Pod"),
            autoscalers=self._list("autoscaling/v2", "HorizontalPodAutoscaler"),
            sandbox_pools=self._sandboxes("SandboxWarmPool") if wants_pool else [],
            usage=self._usage(),
            now=time(),
        )

    def _list(self, version: str, kind: str, fleet: str | None = None) -> list[Object]:
        found = self.api.list(self._path(version, kind), labels=names.ours(fleet))
        return [one for one in found if names.fleet_of(one)]

    def _path(self, version: str, kind: str, name: str = "") -> str:
        return path_of(version, kind, self.api.target.namespace, name)

    def _usage(self) -> dict[str, tuple[float, int]]:
        """Nothing where there is no metrics server, or it has no answer."""
        with suppress(FleetctlError):
            return views.usage(self.api.list(self._path(METRICS, "PodMetrics"), labels=names.ours(), tries=1))
        return {}

    def _sandbox_version(self) -> str | None:
        """Of the agent-sandbox API that the cluster serves, if it serves one."""
        if not self._sandbox_known:
            group = self.api.find(f"/apis/{scaling.SANDBOX_GROUP}")
            self._sandbox, self._sandbox_known = (group or {}).get("preferredVersion", {}).get("version"), True
        return self._sandbox

    def _sandboxes(self, kind: str, fleet: str | None = None) -> list[Object]:
        version = self._sandbox_version()
        return self._list(f"{scaling.SANDBOX_GROUP}/{version}", kind, fleet) if version else []

    @contextmanager
    def watch_status(self, interval: float, fleet: str | None = None) -> Iterator[Iterator[Status]]:
        """Watches wake us, and each time we look at everything: no picture to be kept in step."""
        woken = Alarm(self.api, [self._path("apps/v1", "Deployment"), self._path("v1", "Pod")])
        try:
            yield self._statuses(woken, max(interval, LEAST_LOOK_SECONDS))
        finally:
            woken.close()

    def _statuses(self, woken: Alarm, interval: float) -> Iterator[Status]:
        while True:
            began = monotonic()
            yield self.status()
            woken.wait(BEAT_SECONDS)
            woken.rest(interval - (monotonic() - began))

    def drain_seconds(self, fleet: str) -> float:
        return float(self._deployment(fleet)["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30))

    def _deployment(self, fleet: str) -> Object:
        found = self.api.find(self._path("apps/v1", "Deployment", fleet))
        if found is None or not names.is_ours(found, fleet):
            raise NotFound(f"no such fleet: {fleet}", hint=f"fleets here: {', '.join(self.fleet_names()) or 'none'}")
        return found

    # Changing

    def prepare(self) -> str:
        return ""

    def outdated(self, spec: "FleetSpec") -> set[Process]:
        return set()  # `updating` tells it

    def apply(self, spec: "FleetSpec", *, replicas_given: bool, dry_run: bool) -> Change:
        before = self.api.find(self._path("apps/v1", "Deployment", spec.name))
        size = spec.replicas if replicas_given or before is None else int(before["spec"].get("replicas", 1))
        version = self._sandbox_version() if spec.warm_pool.enabled and spec.warm_pool.size else None
        wanted = [self._placed(one) for one in manifests.objects(spec, sandbox_version=version, replicas=size)]
        live = [self._own(one, spec.name) for one in wanted]
        surplus = self._surplus(spec.name, wanted)
        # The server judges all of it before anything is done: permissions, admission, conflicts.
        ours = self._taken_over(spec.name)
        judged = [self._apply(one, ours, dry_run=True) for one in wanted]
        # A size that an autoscaler is to own is handed over, whatever the dry run makes of leaving it out.
        kept = "spec.replicas" if scaling.autoscaled(spec) else ""
        actions = [action for old, new in zip(live, judged, strict=True) for action in differences(old, new, but=kept)]
        actions += [f"delete {kind.lower()} {found['metadata']['name']}" for _, kind, found in surplus]
        changed = bool(actions)
        if changed and not dry_run:
            self._carry_out(spec, wanted, surplus, before, ours)
        return change(
            spec.name,
            created=before is None,
            changed=changed,
            dry_run=dry_run,
            replicas=size,
            actions=actions,
            message=applied_words(spec.name, self.api.target, created=before is None, changed=changed, dry_run=dry_run),
            notes=[str(note) for note in notes(spec)],
        )

    def _placed(self, one: Object) -> Object:
        """In the namespace that was chosen, whatever the file says."""
        return {**one, "metadata": {**one["metadata"], "namespace": self.api.target.namespace}}

    def _own(self, wanted: Object, fleet: str) -> Object | None:
        """What is there by this name. Raises ClusterConflict where it is not ours."""
        kind, name = wanted["kind"], wanted["metadata"]["name"]
        found = self.api.find(self._path(wanted["apiVersion"], kind, name))
        if found is not None and not names.is_ours(found, fleet):
            labels = found["metadata"].get("labels") or {}
            owner = labels.get(names.MANAGED_BY) or labels.get("app.kubernetes.io/instance") or "somebody else"
            raise ClusterConflict(
                f"there is a {kind} {name} in namespace {self.api.target.namespace} that belongs to {owner}; nothing was changed",
                hint="give the fleet another name, or choose another namespace with --namespace",
            )
        return found

    def _taken_over(self, fleet: str) -> tuple[str, ...]:
        """Beginnings of the managers whose fields are ours: of `scale` and `restart`, and of an autoscaler that is ours or gone."""
        scalers = self.api.list(self._path("autoscaling/v2", "HorizontalPodAutoscaler"))
        targets = [one["spec"].get("scaleTargetRef", {}).get("name") for one in scalers if not names.is_ours(one, fleet)]
        return (names.MANAGER,) if fleet in targets else (names.MANAGER, AUTOSCALER)

    def _apply(self, one: Object, ours: tuple[str, ...], *, dry_run: bool) -> Object:
        kind, name = one["kind"], one["metadata"]["name"]
        path = self._path(one["apiVersion"], kind, name)
        try:
            return self.api.patch(path, one, APPLY, manager=names.MANAGER, dry_run=dry_run)
        except ApiError as error:
            if not error.owners:
                raise
            if all(owner.startswith(ours) for owner in error.owners.values()):
                return self.api.patch(path, one, APPLY, manager=names.MANAGER, force=True, dry_run=dry_run)
            raise conflict(f"{kind} {name}", error.owners) from error

    def _carry_out(
        self,
        spec: "FleetSpec",
        wanted: Sequence[Object],
        surplus: list[tuple[str, str, Object]],
        before: Object | None,
        ours: tuple[str, ...],
    ) -> None:
        """All of it, or an error that lists what was done and how to undo it."""
        done: list[str] = []
        try:
            for version, kind, found in surplus:  # first, so that an autoscaler that is to go does not fight the new size
                self.api.delete(self._path(version, kind, found["metadata"]["name"]))
                done.append(f"deleted {kind.lower()} {found['metadata']['name']}")
            if before is not None and scaling.autoscaled(spec) and owns_replicas(before):
                self._hand_over(spec.name, before)
            for one in wanted:
                self._apply(one, ours, dry_run=False)
                done.append(f"applied {one['kind'].lower()} {one['metadata']['name']}")
        except FleetctlError as error:
            if not done:
                raise
            tell_part(error, done, spec.name, self.api.target)
            raise

    def _hand_over(self, fleet: str, before: Object) -> None:
        """Keep the size while it changes hands: a field that its only owner leaves out falls back to its default, 1."""
        wish = {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": before["spec"].get("replicas", 1)}}
        self.api.patch(self._path("apps/v1", "Deployment", fleet), wish, APPLY, manager=names.SCALE_MANAGER, force=True)

    def _surplus(self, fleet: str, wanted: Sequence[Object]) -> list[tuple[str, str, Object]]:
        """Our objects of this fleet that are no longer asked for; volumes are not among them."""
        keep = {(one["kind"], one["metadata"]["name"]) for one in wanted}
        return [(version, kind, found) for version, kind, found in self._extras(fleet) if (kind, found["metadata"]["name"]) not in keep]

    def _extras(self, fleet: str) -> list[tuple[str, str, Object]]:
        found = [(version, kind, one) for version, kind in _EXTRAS for one in self._list(version, kind, fleet)]
        found += [("apps/v1", "Deployment", one) for one in self._list("apps/v1", "Deployment", fleet) if not views.is_replicas(one)]
        if version := self._sandbox_version():
            for kind in ("SandboxWarmPool", "SandboxTemplate"):
                found += [(f"{scaling.SANDBOX_GROUP}/{version}", kind, one) for one in self._sandboxes(kind, fleet)]
        return found

    def scale(self, fleet: str, replicas: int | None, delta: int | None, dry_run: bool) -> Change:
        deployment = self._deployment(fleet)
        before = int(deployment["spec"].get("replicas", 1))
        wanted = replicas if replicas is not None else max(0, before + (delta or 0))
        check_bounds(fleet, wanted, deployment)
        if scaler := views.autoscaler_of(fleet, views.Seen(autoscalers=self._list("autoscaling/v2", "HorizontalPodAutoscaler", fleet))):
            spec = scaler["spec"]
            raise ClusterConflict(
                f"the cluster's autoscaler decides how many agents {fleet} has, {spec.get('minReplicas', 1)} to {spec['maxReplicas']}",
                hint="change min_replicas and max_replicas in fleet.toml and run `fleetctl up`, or turn autoscaling off there",
            )
        if wanted != before:
            if not dry_run and wanted < before:
                self._choose_victims(fleet, before - wanted)
            path = self._path("apps/v1", "Deployment", fleet) + "/scale"
            self.api.patch(path, {"spec": {"replicas": wanted}}, MERGE, manager=names.SCALE_MANAGER, dry_run=dry_run)
        words = f"{fleet}: {'would be scaled' if dry_run else 'scaling'} from {before} to {wanted}"
        return change(
            fleet,
            changed=wanted != before,
            dry_run=dry_run,
            replicas=wanted,
            actions=[f"scale from {before} to {wanted}"] if wanted != before else [],
            message=words if wanted != before else f"{fleet}: has {wanted} already",
        )

    def _choose_victims(self, fleet: str, number: int) -> None:
        """Have the oldest go first, as far as the cluster heeds it; its own choice is the youngest."""
        pods = [pod for pod in self._list("v1", "Pod", fleet) if pod["metadata"]["labels"].get(names.POOL) == names.REPLICAS]
        staying = sorted(
            (pod for pod in pods if "deletionTimestamp" not in pod["metadata"]), key=lambda pod: pod["metadata"]["creationTimestamp"]
        )
        for pod in staying[:number]:
            path, mark = self._path("v1", "Pod", pod["metadata"]["name"]), {"metadata": {"annotations": {OLDEST_FIRST: "-100"}}}
            with suppress(FleetctlError):  # best effort: the size is what was asked for
                self.api.patch(path, mark, MERGE, manager=names.SCALE_MANAGER)

    def restart(self, fleet: str, agents: Sequence[str] | None, all_at_once: bool, dry_run: bool) -> Change:
        deployment = self._deployment(fleet)
        pods = [
            pod["metadata"]["name"] for pod in self._list("v1", "Pod", fleet) if pod["metadata"]["labels"].get(names.POOL) == names.REPLICAS
        ]
        if unknown := [name for name in agents or () if name not in pods]:
            raise NotFound(f"fleet {fleet} has no agent {unknown[0]}")
        chosen = list(agents) if agents is not None else pods
        if not dry_run and (agents is not None or all_at_once):
            for name in chosen:
                self.api.delete(self._path("v1", "Pod", name))
        elif not dry_run:
            # By a manager of its own: `up` would take back what it does not ask for, and so replace all of them once more.
            stamp = {"spec": {"template": {"metadata": {"annotations": {names.RESTARTED_AT: rfc3339(time())}}}}}
            self.api.patch(self._path("apps/v1", "Deployment", fleet), stamp, MERGE, manager=names.RESTART_MANAGER)
        return change(
            fleet,
            changed=bool(chosen),
            dry_run=dry_run,
            replicas=int(deployment["spec"].get("replicas", 1)),
            actions=[f"replace {name}" for name in chosen],
            message=f"{fleet}: {'would replace' if dry_run else 'replacing'} {len(chosen)} agent{'s' * (len(chosen) != 1)}",
        )

    def down(self, fleet: str, now: bool, dry_run: bool) -> Change:
        deployment = self._find_going(fleet)
        extras, kept = self._extras(fleet), self._list(*_VOLUMES, fleet)
        owned = [*extras, *([("apps/v1", "Deployment", deployment)] if deployment else [])]
        actions = [f"delete {kind.lower()} {found['metadata']['name']}" for _, kind, found in owned]
        left = [f"leave volume claim {one['metadata']['name']}" for one in kept]
        if not dry_run:
            for version, kind, found in owned:
                self.api.delete(self._path(version, kind, found["metadata"]["name"]))
            for pod in self._list("v1", "Pod", fleet) if now else ():
                self.api.delete(self._path("v1", "Pod", pod["metadata"]["name"]), grace_seconds=0)
        words = f"{fleet}: {'would be taken down' if dry_run else 'taking it down'}"
        if kept:
            name = kept[0]["metadata"]["name"]
            words += f"; its volume stays: `kubectl delete persistentvolumeclaim {name}` deletes it, and what is saved there"
        return change(fleet, changed=True, dry_run=dry_run, replicas=0, actions=actions + left, message=words)

    def _find_going(self, fleet: str) -> Object | None:
        """The Deployment; None where it is gone and only its agents are left."""
        try:
            return self._deployment(fleet)
        except NotFound:
            if self._list("v1", "Pod", fleet) or self._extras(fleet):
                return None
            raise

    # What happened

    def history(self, fleet: str | None, limit: int) -> list[HistoryEntry]:
        fleets = [fleet] if fleet else self.fleet_names()
        scalers = self._list("autoscaling/v2", "HorizontalPodAutoscaler")
        return happenings.history(self._events(), scalers, fleets, limit)

    @property
    def source(self) -> str:
        target = self.api.target
        return f"/kubernetes/{target.context}/{target.namespace}"

    def events(self, fleet: str | None, limit: int) -> list[EventInfo]:
        return happenings.events(self._events(), [fleet] if fleet else self.fleet_names(), limit)

    def _events(self) -> list[Object]:
        return self.api.list(self._path("v1", "Event"))

    @contextmanager
    def follow_events(self, fleet: str | None, limit: int) -> Iterator[Iterator[EventInfo]]:
        yield self._following(fleet, limit)

    def _following(self, fleet: str | None, limit: int) -> Iterator[EventInfo]:
        """Each event once, also over watches that end: by its name and how often it was seen."""
        fleets = [fleet] if fleet else self.fleet_names()
        first, seen = self._events(), set()
        yield from happenings.events(first, fleets, limit)
        seen |= {_mark(event) for event in first}
        while True:
            stream = self.api.watch(self._path("v1", "Event"))
            try:
                for change in map(parsed, stream):
                    event = change.get("object") or {}
                    if change.get("type") not in ("ADDED", "MODIFIED") or _mark(event) in seen:
                        continue
                    seen.add(_mark(event))
                    if not fleet and not happenings.fleet_of(event, fleets):
                        fleets = self.fleet_names()
                    if owner := happenings.fleet_of(event, fleets):
                        yield happenings.told(event, owner)
            finally:
                stream.close()
            sleep(AGAIN_SECONDS)

    # What agents write

    def log_sources(self, wanted: Sequence[str], *, ended: bool = False) -> tuple[list[tuple[str, str]], int]:
        pods = {pod["metadata"]["name"]: pod for pod in self._list("v1", "Pod")}
        fleets = {names.fleet_of(pod) for pod in pods.values()}
        sources: list[tuple[str, str]] = []
        left_out = 0
        known = None
        for name in wanted or sorted(fleets):
            if name in fleets:
                own = [pod for pod in pods.values() if names.fleet_of(pod) == name]
                chosen = [pod["metadata"]["name"] for pod in own if ended or not views.has_ended(pod)]
                sources += [(name, pod) for pod in chosen]
                left_out += len(own) - len(chosen)
            elif name in pods:
                sources.append((names.fleet_of(pods[name]), name))
            else:
                known = self.fleet_names() if known is None else known
                if name not in known:
                    raise NotFound(f"no such fleet or agent: {name}")
        return list(dict.fromkeys(sources)), left_out

    def tail(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> Iterator[bytes]:
        return logs.tail(self.api, agent_id, lines, since)

    def follower(self, fleet: str, agent_id: str, lines: int | None, since: float | None) -> logs.Follower:
        return logs.Follower(self.api, agent_id, lines, since)

    def last_output(self, fleet: str, agent_id: str) -> list[str]:
        return logs.last_lines(self.api, agent_id)


def _mark(event: Object) -> tuple[str, object]:
    """What tells an event from another, and from itself when it was seen once more."""
    return str((event.get("metadata") or {}).get("name")), event.get("count") or (event.get("series") or {}).get("count")
