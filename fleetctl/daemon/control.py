"""What the control socket can ask for, as one object: the daemon's fleets, told and changed as JSON values.

Holds the fleets' managers and the last round of measurements. Joins; decides nothing and shows nothing by itself.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import fleetctl
from fleetctl import config
from fleetctl.core.orders import Mode, Wish
from fleetctl.core.recover import with_acquired
from fleetctl.daemon import metrics
from fleetctl.daemon.hands import expire_checkpoints, local_fleet
from fleetctl.daemon.hearing import Hearing
from fleetctl.daemon.views import Json, change_view, counted, dated, fleet_view, inspected, limits_view, rfc3339, sockets_view, trust_view
from fleetctl.errors import ConfigError, NotFound, StateDirectoryError, UsageError
from fleetctl.fleet import Fleet, check_replicas, recovered
from fleetctl.host import checkpoints, procfs
from fleetctl.host.checkpoint_store import LocalCheckpointStore
from fleetctl.host.clock import SystemClock
from fleetctl.host.commands import end_leftovers
from fleetctl.host.paths import Paths
from fleetctl.host.probes import check_probes
from fleetctl.host.process import LocalLifecycleManager
from fleetctl.host.state import LocalStateManager, read_wishes
from fleetctl.models import Agent, AgentState, AutoscalingMode, Event, FleetSpec, Found, ProcessRef, Usage, to_json
from fleetctl.sinks.joined import Sinks

log = logging.getLogger(__name__)

_FOLLOWER_EVENTS = 1000
_DISK_RETRY_SECONDS = 1.0


class Control:
    """The fleets of one state directory. Create it in the running loop, `restore`, and close it at the end."""

    def __init__(self, paths: Paths, state: LocalStateManager, lifecycle: LocalLifecycleManager, *, mode: Mode = Mode.RUN) -> None:
        self.paths, self.state, self.lifecycle = paths, state, lifecycle
        self.fleets: dict[str, Fleet] = {}
        self.hearing = Hearing(lifecycle, self.fleets)
        self.checkpoints = LocalCheckpointStore(lifecycle)
        self.usage: Mapping[str, Usage] = {}
        self.notes: list[str] = []
        self._tally = metrics.Tally()
        self.sinks = Sinks(paths, state.events_after)
        self._mode = mode
        self._clock = SystemClock()
        self._started = self._clock.monotonic()
        self._strays: list[Found] = []
        self._changed = asyncio.Event()
        self._downed = asyncio.Event()  # nothing is left of a fleet that was taken down
        self._followers: set[asyncio.Queue[Json | None]] = set()
        # One change at a time: each builds on the fleets and wishes it finds, and waits for the disk in between.
        self._changing = asyncio.Lock()
        self._shutdown: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # -- coming and going

    async def restore(self, records: Sequence[Agent]) -> None:
        """Bring back the fleets that are wished for, with every agent that still runs."""
        end_leftovers(self.paths.root)
        self.checkpoints.tidy()
        found = self.lifecycle.find()
        for stored in read_wishes(self.paths):
            if stored["spec"].get("name") != stored["name"]:  # a copy somebody made: two of a name would fight over the agents
                self._note(f"{self.paths.wish(stored['name'])} is not used: it is of fleet {stored['spec'].get('name')!r}")
                continue
            try:
                wish = Wish(spec=config.spec_from_json(stored["spec"]), down=stored["down"], mode=self._mode)
            except Exception as error:  # one unreadable wish must not keep the other fleets down
                self._note(f"a stored fleet cannot be used: {error}")
                continue
            name = wish.spec.name
            mine = [agent for agent in records if agent.fleet == name]
            trees = [tree for tree in found if tree.fleet == name]
            found = [tree for tree in found if tree.fleet != name]
            grown, agents = with_acquired(wish.spec, self._recovered(wish.spec, mine, trees))
            if grown != wish.spec:
                await self.state.save_wish(grown, down=wish.down)
            if grown.sockets and not wish.down:
                self.lifecycle.sockets.restore(grown, [agent.process for agent in agents if agent.process])
            self._add(replace(wish, spec=grown), agents, await self.state.load_spending(name))
        self._strays = found
        await self.state.save(forget=[agent.id for agent in records if agent.fleet not in self.fleets])
        known = {agent.id for fleet in self.fleets.values() for agent in fleet.agents}
        self.lifecycle.tidy(known | {tree.agent_id for tree in self._strays})
        for tree in self._strays:
            self._note(
                f"agent {tree.agent_id} of fleet {tree.fleet}, of which nothing is recorded, still runs; `fleetctl down --orphans` ends it"
            )

    def _recovered(self, spec: FleetSpec, records: Sequence[Agent], trees: Sequence[Found]) -> tuple[Agent, ...]:
        return recovered(spec, records, trees, lifecycle=self.lifecycle, clock=self._clock, boot_id=procfs.boot_id())

    def _add(self, wish: Wish, agents: Iterable[Agent] = (), spending: Mapping[str, Any] | None = None) -> Fleet:
        fleet = local_fleet(
            wish,
            lifecycle=self.lifecycle,
            state=self.state,
            checkpoints=self.checkpoints,
            clock=self._clock,
            agents=agents,
            spending=spending,
            on_change=self._announce,
            on_event=self._tell,
        )
        self.fleets[wish.spec.name] = fleet
        self._tally.know(agent.id for agent in fleet.agents if agent.started_at is not None)
        fleet.start().add_done_callback(self._fleet_ended)
        return fleet

    def _fleet_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            # A broken loop must not be mistaken for a quiet one: end, agents running on, and let the next daemon adopt them.
            log.critical("%s broke; the daemon ends, the agents run on", task.get_name(), exc_info=error)
            self.shutdown("keep")

    async def remove_downed(self) -> None:
        """Let go of fleets that were taken down once nothing is left of them; for ever."""
        while True:
            await self._downed.wait()
            self._downed.clear()
            try:
                await self._remove_downed()
            except StateDirectoryError as error:
                log.error("%s", error)
                await asyncio.sleep(_DISK_RETRY_SECONDS)
                self._downed.set()

    async def _remove_downed(self) -> None:
        async with self._changing:
            for name, fleet in list(self.fleets.items()):
                if fleet.wish.down and fleet.supervisor.empty:
                    await self.state.forget_wish(name)
                    self.lifecycle.sockets.close(name)
                    del self.fleets[name]
                    await fleet.close()
                    self._announce()

    def open_sinks(self) -> None:
        """Begin to send events to where sinks.toml says."""
        if trouble := self.sinks.start():
            self._note(trouble)

    def summary(self) -> str:
        """How things are, on one line."""
        fleets = self.fleets.values()
        ready, wished = sum(one.ready_replicas for one in fleets), sum(one.wish.replicas for one in fleets)
        return f"{counted(len(self.fleets), 'fleet')}, {ready} of {counted(wished, 'agent')} ready"

    async def wait_shutdown(self) -> str:
        return await self._shutdown

    async def stop_agents(self) -> None:
        """Have every agent of every fleet stop, for as long as it takes; the wishes stay."""
        for fleet in self.fleets.values():
            fleet.stop_with_daemon()
        while not all(fleet.supervisor.stopped for fleet in self.fleets.values()):
            await self.wait_change(1.0)

    async def expire_checkpoints(self) -> None:
        """For ever."""
        await expire_checkpoints(self.checkpoints, self.fleets)

    async def close(self) -> None:
        for queue in self._followers:
            queue.put_nowait(None)
        for fleet in self.fleets.values():
            await fleet.close()
        await self.sinks.close()
        self.checkpoints.close()

    @property
    def shutting_down(self) -> bool:
        return self._shutdown.done()

    def measured(self, usage: Mapping[str, Usage]) -> None:
        self.usage = usage
        self._announce()

    def directory_lost(self) -> None:
        log.critical("the state directory was removed or replaced; the daemon ends before a second one fights with it, the agents run on")
        self.shutdown("keep")

    # -- what others are told

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if any(fleet.wish.down and fleet.supervisor.empty for fleet in self.fleets.values()):
            self._downed.set()

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)

    def _tell(self, event: Event) -> None:
        self._tally.count(event)
        self.sinks.notify()
        log.info("%s: %s", event.kind, event.message)
        told = dated(to_json(event))
        for queue in list(self._followers):
            if queue.full():  # deaf: rather lose the reader than the memory
                self._followers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(told)

    async def wait_change(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return

    async def follow_events(self, fleet: str | None) -> AsyncIterator[Json]:
        queue: asyncio.Queue[Json | None] = asyncio.Queue(_FOLLOWER_EVENTS)
        self._followers.add(queue)
        try:
            while (event := await queue.get()) is not None:
                if fleet is None or event["fleet"] == fleet:
                    yield event
        finally:
            self._followers.discard(queue)

    # -- reads

    def daemon(self) -> Json:
        return {"schema": "fleetctl/daemon/v1", **self._daemon(), "fleets": sorted(self.fleets)}

    def _daemon(self) -> Json:
        troubles = sorted({fleet.supervisor.trouble for fleet in self.fleets.values() if fleet.supervisor.trouble})
        notes = [*([self.state.trouble] if self.state.trouble else []), *troubles, *self.notes]
        return {
            "alive": True,
            "pid": os.getpid(),
            "version": fleetctl.__version__,
            "uptime_seconds": round(self._clock.monotonic() - self._started, 3),
            "state_dir": self.paths.root,
            "note": "; ".join(notes) or None,
        }

    def status(self, fleet: str | None) -> Json:
        chosen = [self._find(fleet)] if fleet is not None else [self.fleets[name] for name in sorted(self.fleets)]
        return {
            "schema": "fleetctl/status/v1",
            "generated_at": rfc3339(time.time()),
            "daemon": self._daemon(),
            "fleets": [self._view(one) for one in chosen],
        }

    def fleet(self, name: str) -> Json:
        fleet = self._find(name)
        spec = config.spec_to_json(fleet.spec)
        spec["environment"] = dict.fromkeys(spec["environment"], "***")
        for key in (setting.key for setting in config.settings() if not setting.supported):
            table, _, inner = key.rpartition(".")
            (spec[table] if table else spec).pop(inner)
        return {"schema": "fleetctl/fleet/v1", **self._view(fleet), "spec": spec, "spec_hash": fleet.spec.process_hash}

    def agent(self, agent_id: str) -> Json:
        for fleet in self.fleets.values():
            for agent in fleet.agents:
                if agent.id == agent_id:
                    now, wall = self._clock.monotonic(), self._clock.time()
                    usage, dropped = self.usage.get(agent_id), self.hearing.dropped(agent_id)
                    told = inspected(fleet, agent, usage, self.paths, now=now, wall=wall, dropped=dropped)
                    return {**told, "limits": limits_view(fleet.spec, self.lifecycle.limits), "trust": trust_view(fleet.spec)}
        raise NotFound(f"no agent {agent_id}")

    async def history(self, fleet: str | None, limit: int) -> Json:
        entries = await self.state.last("history", fleet, limit)
        return {"schema": "fleetctl/history/v1", "entries": [dated({"details": {}, **entry}) for entry in entries]}

    async def samples(self, fleet: str | None, limit: int) -> Json:
        return {"schema": "fleetctl/samples/v1", "samples": [dated(one) for one in await self.state.last("samples", fleet, limit)]}

    async def events(self, fleet: str | None, limit: int) -> Json:
        events = await self.state.last("events", fleet, limit)
        return {"schema": "fleetctl/events/v1", "events": [dated(event) for event in events]}

    async def metrics(self) -> str:
        lag = await metrics.loop_lag_seconds()
        return metrics.tell(
            self.fleets,
            self.usage,
            self._tally,
            uptime=self._clock.monotonic() - self._started,
            lag=lag,
            write_failures=self.state.failures,
            followers=len(self._followers),
            sinks={pump.settings.name: pump.progress for pump in self.sinks.pumps},
        )

    # -- changes

    def _lift_hold(self) -> None:
        """Whoever asks for agents wants them started, though this daemon was started only to stop some."""
        if self._mode is Mode.HOLD:
            self._mode = Mode.RUN
            for fleet in self.fleets.values():
                fleet.supervisor.set_wish(replace(fleet.wish, mode=Mode.RUN))

    async def apply(self, name: str, spec: Mapping[str, Any], *, replicas_given: bool, dry_run: bool) -> Json:
        wanted = config.spec_from_json(spec)
        if wanted.name != name:
            raise UsageError(f"the spec is of fleet {wanted.name}, not {name}")
        if not os.path.isabs(wanted.cwd):
            raise ConfigError(f"cwd = {wanted.cwd!r}: must be absolute, because the daemon has a working directory of its own")
        async with self._changing:
            return await self._apply(wanted, replicas_given=replicas_given, dry_run=dry_run)

    async def _apply(self, wanted: FleetSpec, *, replicas_given: bool, dry_run: bool) -> Json:
        name = wanted.name
        known = self.fleets.get(name)
        if known is not None and not replicas_given and not known.wish.down:
            # What was scaled by hand stays so until a size is asked for.
            kept = min(max(known.spec.replicas, wanted.min_replicas if known.spec.replicas else 0), wanted.max_replicas)
            wanted = replace(wanted, replicas=kept)
        warning = ""
        decides = known is not None and (known.wish.replicas or known.wish.wakes)  # else at 0 no load decides anything
        if follows_load(wanted) and known is not None and decides and replicas_given:
            kept = min(max(known.spec.replicas, wanted.min_replicas), wanted.max_replicas)
            if kept != wanted.replicas:
                warning = f"; replicas = {wanted.replicas} is ignored while autoscaling is on"
            wanted = replace(wanted, replicas=kept)
        check_replicas(wanted, wanted.replicas)
        if known is not None:
            kept = known.spared(wanted.replicas, most=wanted.max_replicas)
            warning += _why_not_fewer(wanted.replicas, kept)
            wanted = replace(wanted, replicas=kept)
        self.lifecycle.check(wanted)
        check_probes(wanted)
        actions = self._planned(known, wanted)
        differences = config.differences(known.spec, wanted) if known is not None else []
        failed = [agent.id for agent in known.agents if agent.state is AgentState.FAILED and not agent.leaving] if known else []
        if failed:
            actions.append(f"try {counted(len(failed), 'failed agent')} again")
        if dry_run:
            self.lifecycle.sockets.check(wanted)
        if dry_run or not actions:
            message = f"{name} would change: {'; '.join(actions)}" if actions else f"{name} is up to date"
            message += warning
            return change_view(name, wanted.replicas, actions, message, created=known is None, dry_run=dry_run, differences=differences)
        with self.lifecycle.sockets.changing(wanted, self._processes(name)):
            self._lift_hold()
            if known is None:
                await self.state.save_wish(wanted, down=False)
                fleet = self._add(Wish(spec=wanted), self._take_strays(wanted))
                self._announce()
                if wanted.replicas:
                    await fleet.record_size(0, "up")
            else:
                await known.apply(wanted)
                if failed:
                    known.restart(failed, all_at_once=False)
                    await known.supervisor.wait_saved()
        message = f"{name}: {'; '.join(actions)}{warning}"
        return change_view(name, wanted.replicas, actions, message, created=known is None, differences=differences)

    def _processes(self, name: str) -> list[ProcessRef]:
        """Of the fleet's agents, also of those that nothing but their processes tells of."""
        known = self.fleets.get(name)
        recorded = [agent.process for agent in known.agents if agent.process] if known else []
        return recorded + [tree.leader for tree in self._strays if tree.fleet == name and tree.leader]

    def _take_strays(self, spec: FleetSpec) -> tuple[Agent, ...]:
        mine = [tree for tree in self._strays if tree.fleet == spec.name]
        self._strays = [tree for tree in self._strays if tree.fleet != spec.name]
        self.notes = [note for note in self.notes if not any(tree.agent_id in note for tree in mine)]
        return self._recovered(spec, (), mine) if mine else ()

    def _planned(self, known: Fleet | None, wanted: FleetSpec) -> list[str]:
        if known is None or known.wish.down:
            return [f"start {counted(wanted.replicas, 'replica')}"]
        changed = [key for key in FleetSpec.__dataclass_fields__ if getattr(wanted, key) != getattr(known.spec, key)]
        actions = []
        if "replicas" in changed:
            changed.remove("replicas")
            actions.append(f"scale from {known.wish.replicas} to {wanted.replicas}")
        if changed:
            actions.append(f"change {', '.join(changed)}")
        if wanted.process_hash != known.spec.process_hash:
            actions.append("replace the agents one by one")
        return actions

    async def scale(self, name: str, *, replicas: int | None, delta: int | None, dry_run: bool) -> Json:
        fleet = self._find(name)
        if (replicas is None) == (delta is None):
            raise UsageError("give either a number of replicas or a difference")
        async with self._changing:
            return await self._scale(fleet, replicas, delta, dry_run=dry_run)

    async def _scale(self, fleet: Fleet, replicas: int | None, delta: int | None, *, dry_run: bool) -> Json:
        name = fleet.spec.name
        _refuse_if_down(fleet)
        before = fleet.wish.replicas
        asked = target = replicas if replicas is not None else before + (delta or 0)
        check_replicas(fleet.spec, target)
        target = fleet.spared(target)
        if not dry_run:
            if target != before:
                self._lift_hold()
            decision = await fleet.scale(replicas, delta=delta or 0)
            before, target = (
                (decision.current_replicas, decision.target_replicas) if decision else (fleet.wish.replicas, fleet.wish.replicas)
            )
        actions = [f"scale from {before} to {target}"] if target != before else []
        word = "would scale" if dry_run else "scaling"
        message = f"{name}: {word} from {before} to {target}" if actions else f"{name} is at {target} already"
        message += _why_not_fewer(asked, target)
        message += _what_the_autoscaler_does(fleet.spec, target)
        return change_view(name, target, actions, message, dry_run=dry_run)

    async def resize_warm_pool(self, name: str, *, size: int, dry_run: bool) -> Json:
        fleet = self._find(name)
        _refuse_if_down(fleet)
        before = fleet.spec.warm_pool.size if fleet.spec.warm_pool.enabled else 0
        actions = [f"resize the warm pool from {before} to {size}"] if size != before else []
        if actions and not dry_run:
            self._lift_hold()
            async with self._changing:
                await fleet.resize_warm_pool(size)
        message = f"{name}: {actions[0]}" if actions else f"{name}: the warm pool is for {size} already"
        return change_view(name, fleet.wish.replicas, actions, message, dry_run=dry_run)

    def autoscaling(self, name: str) -> Json:
        return {"schema": "fleetctl/autoscaling/v1", "fleet": name, **self._find(name).autoscaling_status()}

    async def set_autoscaling(self, name: str, *, enabled: bool, mode: str, dry_run: bool) -> Json:
        fleet = self._find(name)
        _refuse_if_down(fleet)
        wanted, now = (AutoscalingMode(mode) if enabled else None), fleet.spec.autoscaling
        word = f"on ({wanted})" if wanted else "off"
        actions = [f"turn autoscaling {word}"] if wanted != (now.mode if now.enabled else None) else []
        if actions and not dry_run:
            self._lift_hold()
            async with self._changing:
                await (fleet.start_autoscaling(wanted) if wanted else fleet.stop_autoscaling())
            self._announce()
        bounds = f", between {fleet.spec.min_replicas} and {fleet.spec.max_replicas} agents" if wanted else ""
        stays = "" if wanted else f"; the fleet stays at {counted(fleet.wish.replicas, 'agent')}"
        message = (
            f"{name}: autoscaling {'would be' if dry_run else 'is'} {word}{bounds}{stays}"
            if actions
            else f"{name}: autoscaling is {word} already"
        )
        return change_view(name, fleet.wish.replicas, actions, message, dry_run=dry_run)

    async def renew_budget(self, name: str, *, dry_run: bool) -> Json:
        fleet = self._find(name)
        _refuse_if_down(fleet)
        spent = fleet.budget.status(fleet.spec.budget)
        changed, goes_on = bool(spent["tokens"] or spent["cost_usd"]), ", and the fleet goes on" if fleet.wish.paused else ""
        if changed and not dry_run:
            async with self._changing:
                await fleet.renew_budget()
        message = f"{name}: {'would count' if dry_run else 'counting'} what it spends from 0 again{goes_on}"
        if not changed:
            message = f"{name} has spent nothing yet"
        return change_view(name, fleet.wish.replicas, ["renew the budget"] * changed, message, dry_run=dry_run)

    async def acquire(self, name: str, *, claim: Mapping[str, Any], require_warm: bool, timeout_seconds: float) -> Json:
        fleet = self._find(name)
        _refuse_if_down(fleet)
        started = self._clock.monotonic()
        self._lift_hold()
        result = await fleet.acquire(claim, require_warm=require_warm, timeout_seconds=timeout_seconds)
        seconds = self._clock.monotonic() - started
        self._tally.acquisition(name, seconds, warm=result.from_warm_pool)
        return {
            "schema": "fleetctl/acquired/v1",
            "fleet": name,
            **to_json(result),
            "seconds": round(seconds, 6),
            "claim_path": self.paths.agent_claim(result.agent_id),
        }

    # -- what agents keep

    async def list_checkpoints(self, fleet: str | None, agent: str | None) -> Json:
        found, problems = await asyncio.to_thread(checkpoints.listing, self.paths, fleet, agent)
        told = [checkpoints.described(self.paths, one) for one in found]
        return {"schema": "fleetctl/checkpoints/v1", "checkpoints": told, "problems": problems}

    async def checkpoint(self, checkpoint_id: str) -> Json:
        return checkpoints.detailed(self.paths, await self.checkpoints.find(checkpoint_id))

    async def create_checkpoint(self, agent_id: str, *, dry_run: bool) -> Json:
        fleet, agent = self._find_agent(agent_id)
        fleet.find(agent_id)  # not one of the warm pool
        told = {"schema": "fleetctl/checkpointed/v1", "fleet": agent.fleet, "agent": agent_id, "dry_run": dry_run}
        if dry_run:
            nothing = self.checkpoints.keeps_nothing(agent) and not agent.resume_token
            would = "keeps nothing yet" if nothing else "would be saved"
            return {**told, "checkpoint": None, "problem": "", "message": f"{agent_id} {would}"}
        saved = await fleet.checkpoint(agent_id, "asked for")
        checkpoint = saved.checkpoint
        return {
            **told,
            "checkpoint": None if checkpoint is None else checkpoints.described(self.paths, checkpoint),
            "problem": saved.problem,
            "message": f"{agent_id} keeps nothing to save" if checkpoint is None else f"{agent_id}: checkpoint {checkpoint.id}",
        }

    async def restore_checkpoint(self, checkpoint_id: str, *, timeout_seconds: float, dry_run: bool) -> Json:
        started = self._clock.monotonic()
        checkpoint = await self.checkpoints.find(checkpoint_id)
        if checkpoint.fleet not in self.fleets:
            raise NotFound(f"checkpoint {checkpoint_id} is of fleet {checkpoint.fleet}, which is not up", hint="`fleetctl up` starts it")
        fleet = self._find(checkpoint.fleet)
        _refuse_if_down(fleet)
        if not checkpoint.resume_token and any("{token}" in word for word in fleet.spec.checkpoints.restore_command):
            raise UsageError(f"checkpoint {checkpoint_id} has no resume token, and restore_command of {checkpoint.fleet} needs one")
        told = {"schema": "fleetctl/restored/v1", "fleet": checkpoint.fleet, "checkpoint": checkpoint_id, "dry_run": dry_run}
        if dry_run:
            check_replicas(fleet.spec, fleet.wish.replicas + 1)
            message = f"{checkpoint.fleet}: one more agent would go on from {checkpoint_id}"
            return {**told, "agent_id": None, "state": None, "pid": None, "seconds": 0.0, "message": message}
        self._lift_hold()
        result = await fleet.restore(checkpoint, timeout_seconds=timeout_seconds)
        return {
            **told,
            "agent_id": result.agent_id,
            "state": str(result.state),
            "pid": result.pid,
            "seconds": round(self._clock.monotonic() - started, 6),
            "message": f"{result.agent_id} goes on from {checkpoint_id}",
        }

    async def remove_checkpoint(self, checkpoint_id: str, *, dry_run: bool) -> Json:
        await asyncio.to_thread(checkpoints.find, self.paths, checkpoint_id)
        if not dry_run:
            await self.checkpoints.remove(checkpoint_id)
        message = f"checkpoint {checkpoint_id} {'would be' if dry_run else 'was'} removed"
        return {"schema": "fleetctl/checkpoint-removed/v1", "checkpoint": checkpoint_id, "dry_run": dry_run, "message": message}

    async def drain(self, agent_id: str, *, now: bool, dry_run: bool) -> Json:
        fleet, agent = self._find_agent(agent_id)
        fleet.find(agent_id)
        changed = now or not agent.leaving
        how = "without a checkpoint" if now else "once it has finished"
        message = f"{agent_id} {'would leave' if dry_run else 'leaves'} {how}"
        if not dry_run:
            async with self._changing:
                await fleet.drain(agent_id, now=now)
            self._announce()
        replicas = fleet.wish.replicas - (dry_run and not agent.leaving and not fleet.wish.down)
        message += _what_the_autoscaler_does(fleet.spec, replicas)
        told = {"schema": "fleetctl/drained/v1", "fleet": agent.fleet, "agent": agent_id, "now": now, "dry_run": dry_run}
        return {**told, "changed": changed and not dry_run, "desired_replicas": replicas, "message": message}

    async def protect(self, agent_id: str, *, protected: bool, dry_run: bool) -> Json:
        fleet, agent = self._find_agent(agent_id)
        fleet.find(agent_id)  # not one of the warm pool
        changed = agent.protected is not protected
        if not dry_run:
            changed = await fleet.protect(agent_id, on=protected)
            self._announce()
        word, state = ("would be" if dry_run else "is"), ("protected" if protected else "protected no longer")
        message = (
            f"{agent_id} {word} {state}" if changed else f"{agent_id} is {'' if protected else 'not '}protected{' already' * protected}"
        )
        told = {"schema": "fleetctl/protected/v1", "fleet": agent.fleet, "agent": agent_id, "protected": protected, "dry_run": dry_run}
        return {**told, "changed": changed and not dry_run, "message": message}

    def _find_agent(self, agent_id: str) -> tuple[Fleet, Agent]:
        for fleet in self.fleets.values():
            for agent in fleet.agents:
                if agent.id == agent_id:
                    return fleet, agent
        raise NotFound(f"no agent {agent_id}")

    async def restart(self, name: str, *, agents: Sequence[str] | None, all_at_once: bool, dry_run: bool) -> Json:
        fleet = self._find(name)
        known = [agent.id for agent in fleet.agents if not agent.leaving]
        missing = [agent_id for agent_id in agents or () if agent_id not in known]
        if missing:
            raise NotFound(f"fleet {name} has no agent {', '.join(missing)}")
        chosen = known if agents is None else list(agents)
        if not dry_run:
            self._lift_hold()
            fleet.restart(chosen, all_at_once=all_at_once)
            await fleet.supervisor.wait_saved()
        how = ", all at once" if all_at_once else ", one by one"
        return change_view(
            name,
            fleet.wish.replicas,
            [f"restart {agent_id}" for agent_id in chosen],
            f"{name}: {'would ' * dry_run}restart {counted(len(chosen), 'agent')}{how * (len(chosen) > 1)}",
            dry_run=dry_run,
        )

    async def down(self, name: str, *, now: bool, dry_run: bool) -> Json:
        fleet = self._find(name)
        actions = [f"stop {agent.id}" for agent in fleet.agents if agent.process]
        if not dry_run:
            async with self._changing:
                await fleet.take_down(now=now)
            self._announce()
        return change_view(
            name,
            0,
            actions,
            f"{name}: {'would stop' if dry_run else 'stopping'} {counted(len(actions), 'agent')}",
            dry_run=dry_run,
            changed=True,
        )

    def shutdown(self, mode: str) -> Json:
        if mode not in ("keep", "drain"):
            raise UsageError(f"{mode}: a daemon stops with keep or drain")
        if not self._shutdown.done():
            self._shutdown.set_result(mode)
        return {"schema": "fleetctl/shutdown/v1", "mode": mode}

    def _view(self, fleet: Fleet) -> Json:
        view = fleet_view(fleet, self.usage, now=self._clock.monotonic(), wall=self._clock.time(), dropped=self.hearing.dropped)
        notes = [*view["notes"], *self.lifecycle.limits.notes(fleet.spec.resource_limits)]
        return {**view, "notes": notes, **(sockets_view(fleet, self.lifecycle.sockets, notes) if fleet.spec.sockets else {})}

    def _find(self, name: str) -> Fleet:
        try:
            return self.fleets[name]
        except KeyError:
            known = ", ".join(sorted(self.fleets)) or "none"
            raise NotFound(f"no fleet {name} (known: {known})") from None


def _refuse_if_down(fleet: Fleet) -> None:
    if fleet.wish.down:
        raise UsageError(f"fleet {fleet.spec.name} is being taken down", hint="`fleetctl up` starts it again")


def follows_load(spec: FleetSpec) -> bool:
    """Whether the number of agents is the autoscaler's to decide."""
    return spec.autoscaling.enabled and spec.autoscaling.mode is AutoscalingMode.ACT


def _why_not_fewer(asked: int, replicas: int) -> str:
    """Why the fleet shrinks less than it was asked to; empty where it does as asked."""
    if replicas <= asked:
        return ""
    return f", not {asked}: {counted(replicas, 'agent')} {'are' if replicas > 1 else 'is'} protected (`fleetctl protect --off AGENT`)"


def _what_the_autoscaler_does(spec: FleetSpec, replicas: int) -> str:
    """What becomes of a size that was asked for by hand; empty where nothing does."""
    if not follows_load(spec):
        return ""
    if not replicas and spec.autoscaling.idle_seconds is not None:
        return "; autoscaling is on: work brings an agent back"
    if not replicas and spec.min_replicas:
        return "; autoscaling rests until it is scaled up again"
    up, down = spec.scale_up_stabilization_seconds, spec.scale_down_stabilization_seconds
    return f"; autoscaling is on: it may raise that after {up:g} s, under high load at once, and lower it after {down:g} s of calm"
