"""The daemon's fleets for Python programs: typed, blocking, one connection kept. Cheap to import.

For example:

    with Client() as client:
        client.scale("demo", replicas=10)
        for status in client.watch_status(0.5):
            ...
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fleetctl.daemon.wire import (
    Acquired,
    AgentDetail,
    AutoscalingDetail,
    Change,
    CheckpointDetail,
    Checkpointed,
    CheckpointRemoved,
    Checkpoints,
    Connection,
    DaemonInfo,
    Drained,
    EventInfo,
    Events,
    FleetDetail,
    History,
    Protected,
    Restored,
    Samples,
    Shutdown,
    Status,
    Stream,
    quoted,
    with_query,
)
from fleetctl.host.paths import Paths, choose_state_dir

# A status comes at least this often while it is watched, so a longer silence is a daemon that hangs.
WATCH_BEAT_SECONDS = 2.0
# Gigabytes may have to be read or written.
CHECKPOINT_SECONDS = 600.0


class Client:
    """Talks to the daemon of one state directory; threads may share it. Starts nothing.

    `state_dir`: default FLEETCTL_STATE_DIR, else the user's state directory. `timeout`: seconds for each request as a whole.
    Every method raises DaemonUnreachable when no daemon answers, TimedOut, or the error the daemon answered: NotFound, UsageError,
    ConfigError and their kin in `fleetctl.errors`. Durations are seconds, sizes bytes, times RFC 3339 UTC; unknown values are None.
    """

    def __init__(self, state_dir: str | None = None, *, timeout: float = 10.0) -> None:
        self.state_dir = choose_state_dir(state_dir)
        self.timeout = timeout
        self._connection = Connection(Paths(self.state_dir).socket, timeout)

    # The casts below: what the daemon sends is documented by these types, and checked where it is made.

    def status(self, fleet: str | None = None) -> Status:
        """The daemon, its fleets and their agents; or of one fleet only. Raises NotFound."""
        return cast(Status, self._connection.request("GET", with_query("/v1/status", fleet=fleet)))

    def watch_status(self, interval: float, fleet: str | None = None) -> Stream[Status]:
        """The status now, after every change (at most once each `interval` seconds, 0.05 to 60), and every 2 s without one.

        Iterate, and `close` it (or use `with`) when done. While iterating: NotFound when the fleet is gone, DaemonUnreachable when
        the daemon dies, TimedOut when it hangs; a daemon that is stopped ends the stream.
        """
        target = with_query("/v1/status", watch=interval, fleet=fleet)
        return Stream(self._connection.path, target, timeout=self.timeout, silence=max(interval, WATCH_BEAT_SECONDS) + self.timeout)

    def fleet(self, name: str) -> FleetDetail:
        """One fleet with its settings; values of environment variables are hidden. Raises NotFound."""
        return cast(FleetDetail, self._connection.request("GET", f"/v1/fleets/{quoted(name)}"))

    def agent(self, agent_id: str) -> AgentDetail:
        """One agent with its process tree. Raises NotFound."""
        return cast(AgentDetail, self._connection.request("GET", f"/v1/agents/{quoted(agent_id)}"))

    def apply(self, name: str, spec: Mapping[str, Any], replicas_given: bool = True, dry_run: bool = False) -> Change:
        """Make the fleet be as `spec` says (the settings of fleet.toml); returns when the wish is stored, not when it has come true.

        `replicas_given=False` keeps the number of replicas that an existing fleet has. Raises ConfigError.
        """
        body = {"spec": spec, "replicas_given": replicas_given, "dry_run": dry_run}
        return cast(Change, self._connection.request("PUT", f"/v1/fleets/{quoted(name)}", body))

    def scale(self, name: str, replicas: int | None = None, delta: int | None = None, dry_run: bool = False) -> Change:
        """Ask for `replicas` agents, or for `delta` more (or fewer). Raises NotFound; UsageError when out of bounds, or on both or none."""
        wish = {key: value for key, value in (("replicas", replicas), ("delta", delta)) if value is not None}
        return cast(Change, self._connection.request("POST", f"/v1/fleets/{quoted(name)}/scale", {**wish, "dry_run": dry_run}))

    def resize_warm_pool(self, name: str, size: int, dry_run: bool = False) -> Change:
        """Keep so many suspended instances of the fleet ready; 0 keeps none. Raises NotFound."""
        return cast(Change, self._connection.request("POST", f"/v1/fleets/{quoted(name)}/warm", {"size": size, "dry_run": dry_run}))

    def autoscaling(self, name: str) -> AutoscalingDetail:
        """What the fleet's autoscaler decided last, how it came to it, and when it decides again. Raises NotFound."""
        return cast(AutoscalingDetail, self._connection.request("GET", f"/v1/fleets/{quoted(name)}/autoscaling"))

    def set_autoscaling(self, name: str, enabled: bool, mode: str = "act", dry_run: bool = False) -> Change:
        """Let the load decide how many agents there are (or, with mode "recommend", only tell), or leave that to you. Raises NotFound."""
        body = {"enabled": enabled, "mode": mode, "dry_run": dry_run}
        return cast(Change, self._connection.request("POST", f"/v1/fleets/{quoted(name)}/autoscaling", body))

    def renew_budget(self, name: str, dry_run: bool = False) -> Change:
        """Count what the fleet spends in this period from 0 again; if it was paused for that, it goes on. Raises NotFound."""
        return cast(Change, self._connection.request("POST", f"/v1/fleets/{quoted(name)}/budget", {"dry_run": dry_run}))

    def acquire(
        self,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        tools: Sequence[str] = (),
        require_warm: bool = False,
        timeout_seconds: float = 30.0,
    ) -> Acquired:
        """One more agent: at once from the warm pool, else by a cold start, which is ready when this returns. The fleet grows by it.

        `environment` and `tools` are written to its claim file before it goes on. Raises NotFound, UsageError where the fleet is as
        large as it may be, WarmPoolEmpty with `require_warm`, TimedOut where the cold start takes longer (it goes on).
        """
        claim = {"environment": dict(environment or {}), "tools": list(tools)}
        body = {"claim": claim, "require_warm": require_warm, "timeout_seconds": timeout_seconds}
        target, timeout = f"/v1/fleets/{quoted(name)}/acquire", timeout_seconds + self.timeout
        return cast(Acquired, self._connection.request("POST", target, body, timeout=timeout))

    def checkpoints(self, fleet: str | None = None, agent: str | None = None) -> Checkpoints:
        """What was saved of agents, oldest first."""
        return cast(Checkpoints, self._connection.request("GET", with_query("/v1/checkpoints", fleet=fleet, agent=agent)))

    def checkpoint(self, checkpoint_id: str) -> CheckpointDetail:
        """One checkpoint, every byte of it checked. Raises UnknownCheckpoint, CheckpointDamaged."""
        target = f"/v1/checkpoints/{quoted(checkpoint_id)}"
        return cast(CheckpointDetail, self._connection.request("GET", target, timeout=self.timeout + CHECKPOINT_SECONDS))

    def create_checkpoint(self, agent_id: str, dry_run: bool = False) -> Checkpointed:
        """Save what an agent keeps while it goes on. Raises NotFound, StateDirectoryError on a full disk."""
        target, body = f"/v1/agents/{quoted(agent_id)}/checkpoint", {"dry_run": dry_run}
        return cast(Checkpointed, self._connection.request("POST", target, body, timeout=self.timeout + CHECKPOINT_SECONDS))

    def restore_checkpoint(self, checkpoint_id: str, *, timeout_seconds: float = 30.0, dry_run: bool = False) -> Restored:
        """Start one more agent of the fleet, which goes on from the checkpoint; ready when this returns.

        Raises UnknownCheckpoint, CheckpointDamaged, NotFound where the fleet is not up, UsageError where it is as large as it may be.
        """
        target, body = f"/v1/checkpoints/{quoted(checkpoint_id)}/restore", {"timeout_seconds": timeout_seconds, "dry_run": dry_run}
        timeout = timeout_seconds + self.timeout + CHECKPOINT_SECONDS
        return cast(Restored, self._connection.request("POST", target, body, timeout=timeout))

    def remove_checkpoint(self, checkpoint_id: str, dry_run: bool = False) -> CheckpointRemoved:
        """Raises UnknownCheckpoint."""
        target = with_query(f"/v1/checkpoints/{quoted(checkpoint_id)}", dry_run=dry_run)
        return cast(CheckpointRemoved, self._connection.request("DELETE", target, timeout=self.timeout + CHECKPOINT_SECONDS))

    def drain(self, agent_id: str, now: bool = False, dry_run: bool = False) -> Drained:
        """Let this agent finish, save what it keeps, and leave; the fleet shrinks by it. Returns at once; it leaves `status` when gone.

        `now`: without a checkpoint, and without time to finish. Raises NotFound, UsageError.
        """
        target, body = f"/v1/agents/{quoted(agent_id)}/drain", {"now": now, "dry_run": dry_run}
        return cast(Drained, self._connection.request("POST", target, body))

    def protect(self, agent_id: str, protected: bool = True, dry_run: bool = False) -> Protected:
        """Spare this agent where its fleet shrinks, or no longer; scaling to 0, `drain` and `down` end it all the same.

        Raises NotFound, UsageError for one that is on its way out or in the warm pool.
        """
        target, body = f"/v1/agents/{quoted(agent_id)}/protect", {"protected": protected, "dry_run": dry_run}
        return cast(Protected, self._connection.request("POST", target, body))

    def restart(self, name: str, agents: Sequence[str] | None = None, all_at_once: bool = False, dry_run: bool = False) -> Change:
        """Replace the fleet's agents (or those with these ids) by new ones, one after the other or all at once. Raises NotFound."""
        body = {"agents": None if agents is None else list(agents), "all_at_once": all_at_once, "dry_run": dry_run}
        return cast(Change, self._connection.request("POST", f"/v1/fleets/{quoted(name)}/restart", body))

    def down(self, name: str, now: bool = False, dry_run: bool = False) -> Change:
        """Take the fleet down: drain its agents, or kill them with `now`. Returns at once; the fleet leaves `status` when gone.

        Raises NotFound.
        """
        return cast(Change, self._connection.request("DELETE", with_query(f"/v1/fleets/{quoted(name)}", now=now, dry_run=dry_run)))

    def history(self, fleet: str | None = None, limit: int = 20) -> History:
        """The last `limit` scaling decisions, oldest first."""
        return cast(History, self._connection.request("GET", with_query("/v1/history", fleet=fleet, limit=limit)))

    def samples(self, fleet: str | None = None, limit: int = 500) -> Samples:
        """The last `limit` samples of load and size of autoscaled fleets, oldest first."""
        return cast(Samples, self._connection.request("GET", with_query("/v1/samples", fleet=fleet, limit=limit)))

    def events(self, fleet: str | None = None, limit: int = 100) -> Events:
        """The last `limit` events, oldest first."""
        return cast(Events, self._connection.request("GET", with_query("/v1/events", fleet=fleet, limit=limit)))

    def follow_events(self, fleet: str | None = None, limit: int = 0) -> Stream[EventInfo]:
        """The last `limit` events, then each new one as it happens, until closed or the daemon stops. Read it, or it is dropped."""
        target = with_query("/v1/events", fleet=fleet, limit=limit, follow=True)
        return Stream(self._connection.path, target, timeout=self.timeout)

    def daemon(self) -> DaemonInfo:
        """The daemon itself and the names of its fleets."""
        return cast(DaemonInfo, self._connection.request("GET", "/v1/daemon"))

    def metrics(self) -> str:
        """Numbers about the daemon and its fleets, in Prometheus' text format."""
        return self._connection.text("/metrics")

    def shutdown(self, mode: str) -> Shutdown:
        """Stop the daemon: "keep" leaves the agents running, "drain" stops them first. Returns at once."""
        return cast(Shutdown, self._connection.request("POST", "/v1/shutdown", {"mode": mode}))

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI 3.1 document of the control socket."""
        return cast(dict[str, Any], self._connection.request("GET", "/openapi.json"))

    def close(self) -> None:
        """Give the kept connection back; streams are closed on their own."""
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
