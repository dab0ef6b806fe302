"""One campaign on one machine: a step, a look, what that shows; and the settling, after which all must be as new."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.campaign import invariants
from tests.campaign.invariants import EVERYBODY, Cause, Judged, Lingering, Noted, Unprovable, Used
from tests.campaign.observer import Observer
from tests.campaign.patience import Wedges, check_connections, loaded_by_probes
from tests.campaign.plan import Step
from tests.campaign.snapshot import Held, Process, Snapshot
from tests.campaign.stage import FULL_RUN, FULL_VAR, MODELS, PACKAGE, PROBED, Stage
from tests.campaign.users import Hold, Users
from tests.fakegpu import NEVER, FakeGpu, Faults, Return
from tests.machine.container import MachineError
from tests.machine.host import GPU_COUNT, default_gpus

AS_NEW_SECONDS = 60.0
LINGER_SECONDS = 6.0
STUCK_SECONDS = 4.0

OWN_UNITS = (
    *invariants.SERVICES,
    "gpusvc-gateway.service",
    "gpusvc-api.service",
)

_UNIT_OF = {who: f"gpusvc-{who}.service" for who in ("watchdog", "gateway", "api")}

# Those of the test's engine are its own, and come in the midst of others'.
_JOURNAL = """journalctl -q --no-pager -o short-unix --since="@$1" | grep -v "^[^ ]* [^ ]* test-engine\\[" |
    sed "s/^[^ ]* [^ ]* [^ ]*: //" | grep -A25 "^Traceback" | head -n 120"""


# The watchdog's verdicts, which somebody else than the models must have earned.
_VERDICTS = """journalctl -q --no-pager -o json --output-fields=GPUSVC_EVENT,GPUSVC_MODEL,MESSAGE --since="@$1" \
    GPUSVC_EVENT=stuck GPUSVC_EVENT=failing"""

# Of the models that are swapped for each other, no three fit on the GPUs together.
_LARGE = ("draw", "hear", "vague", "code")

# How a Python that is only just loading its modules may end, by what was done.
_EXCUSED = {
    "reinstall": r"^(ModuleNotFoundError|ImportError|FileNotFoundError)\b",
    "processes": r"^(BlockingIOError: \[Errno 11\]|RuntimeError: can't start new thread)",
    "descriptors": r"^OSError: \[Errno 24\]",
}


class ViolationError(Exception):
    """Something was seen that must never be."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = tuple(sentences)


@dataclass(slots=True)
class Fault:
    """One that is on. It ends after ``left`` more steps."""

    name: str
    left: int
    end: Callable[[], None]
    notes: list[int]
    makes_unprovable: Callable[[Held], bool] | None = None
    since: float = 0.0


@dataclass(slots=True)
class Tally:
    """What was done and seen."""

    steps: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    looks: int = 0
    settlings: int = 0
    longest_settling_seconds: float = 0.0
    holds: int = 0
    seconds: float = 0.0
    stuck: int = 0
    """Models whose release was not proven in time, each once between two settlings."""
    cooldowns: int = 0
    connections: int = 0
    probes: Counter[str] = field(default_factory=Counter)
    insisted: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    tracebacks: list[str] = field(default_factory=list)

    @property
    def operations(self) -> int:
        return sum(count for kind, count in self.steps.items() if kind != "settle")


class Campaign:
    """The state of one; ``do`` is for one step after the other."""

    def __init__(self, stage: Stage, *, say: Callable[[str], None] = lambda _: None) -> None:
        self.tally = Tally()
        self._stage = stage
        self._say = say
        self._observer = Observer(stage)
        self._users = self._new_users()
        self._notes: list[Noted] = []
        self._faults: dict[str, Fault] = {}
        self._unprovable: dict[str, list[Unprovable]] = {}
        self._used: dict[int, tuple[Hold, Used, float]] = {}
        self._lingering = Lingering(LINGER_SECONDS)
        self._stuck_for = Lingering(STUCK_SECONDS)
        self._counted_stuck: set[str] = set()
        self._wedges = Wedges()
        self._edited: set[str] = set()
        self._policy = False
        self._pinned: set[str] = set()
        self._busy: dict[Cause, int] = {}
        self._settled = time.monotonic()
        self._settled_wall = self._judged_wall = time.time()

    def close(self) -> None:
        self._users.close()

    # Steps

    def do(self, step: Step) -> None:
        """One step, and a look at what came of it.

        Raises:
            ViolationError: that is what must never be.
        """
        began = time.monotonic()
        name = step.kind if step.kind in {"settle", "request", "hold"} else f"{step.kind} {step.what}".strip()
        self.tally.steps[name] += 1
        self._say(f"{step.kind} {step.model} {step.what} {step.seconds or ''}".rstrip())
        getattr(self, "_do_" + step.kind.replace("-", "_"))(step)
        self._age_faults()
        time.sleep(step.pause)
        self._check(self._look())
        self.tally.seconds += time.monotonic() - began

    def _do_request(self, step: Step) -> None:
        self._users.request(step.model, step.seconds)

    def _do_hold(self, step: Step) -> None:
        self._users.hold(step.model, step.seconds)
        self.tally.holds += 1

    def _do_crowd(self, step: Step) -> None:
        """All models are asked at once, twice each, and no three of the large ones fit."""
        for name in (*MODELS, *MODELS):
            self._users.request(name, step.seconds)

    def _do_swap(self, step: Step) -> None:
        """Two clients ask for large models in turn, so that each answer needs another eviction."""
        place = _LARGE.index(step.model) if step.model in _LARGE else 0
        one, two, three = (_LARGE[(place + number) % len(_LARGE)] for number in range(3))
        self._users.swap([one, two, one, three], step.seconds)
        self._users.swap([three, one, two], step.seconds)

    def _do_insist(self, step: Step) -> None:
        self._users.insist(step.model, 0.5 + step.seconds, tries=20)

    def _do_socket(self, step: Step) -> None:
        self._users.connect(step.model, step.seconds)
        self.tally.connections += 1

    def _do_probe(self, step: Step) -> None:
        self._users.probe(step.model, step.what)
        self._users.probe(PROBED.name, step.what)

    def _do_wedge(self, step: Step) -> None:
        """The engine's health stays 200, and it answers each chat with 500, as long as it lives."""
        leases = self._observer.look(units=False).leases
        ready = [name for name in (step.model, *sorted(leases)) if name in leases and leases[name].ready]
        targets = self._targets("engine", ready[0]) if ready else []
        if not targets:
            return
        self._note(replace(step, model=ready[0]), Cause.WEDGED, Cause.ENDS, until=None)
        self._signal(targets, signal.SIGUSR2)
        self._wedges.begin(leases[ready[0]])
        self._users.insist(ready[0], 10.0, tries=1000)

    def _do_start(self, step: Step) -> None:
        self._systemctl("start", "--no-block", f"model@{step.model}.service")

    def _do_stop(self, step: Step) -> None:
        self._note(step, Cause.ENDS)
        self._systemctl("stop", "--no-block", f"model@{step.model}.service")

    def _do_restart(self, step: Step) -> None:
        self._note(step, Cause.ENDS)
        self._systemctl("restart", "--no-block", f"model@{step.model}.service")

    def _do_evict(self, step: Step) -> None:
        if step.what == "force":
            self._note(step, Cause.ENDS, lasts=5.0)
            self._begin("gpusvc", "evict", "--force", "--wait", "200ms", step.model)
        else:
            self._begin("gpusvc", "evict", "--wait", "1s", step.model)

    def _do_unload(self, step: Step) -> None:
        self._note(step, Cause.ENDS, lasts=2.0)
        url = f"http://127.0.0.1:8484/api/models/unload/{step.model}"
        self._begin("curl", "--silent", "--max-time", "20", "--request", "POST", url)

    def _do_pin(self, step: Step) -> None:
        (self._pinned.add if step.what == "pin" else self._pinned.discard)(step.model)
        self._begin("gpusvc", step.what, step.model)

    def _do_release(self, step: Step) -> None:
        self._begin("gpusvc", "release", step.model)

    def _do_edit(self, step: Step) -> None:
        model = MODELS[step.model]
        self._edited.add(step.model)
        if step.what == "gone":
            self._note(step, Cause.GONE, Cause.START, until=None)
            self._stage.inside(f"/etc/gpusvc/models/{step.model}.toml").unlink(missing_ok=True)
            return
        if step.what == "broken":
            self._note(step, Cause.START, until=None)
            self._stage.write_file(step.model, 'command = ["test-engine\nvram = ')
            return
        texts = {
            "priority": model.file(priority=7),
            "idle": model.file(idle="1s"),
            "description": model.file(description="another"),
            "back": model.file(),
        }
        self._stage.write_file(step.model, texts[step.what])
        self._end_notes(lambda note: note.model == step.model and note.what == "edit")

    def _do_policy(self, step: Step) -> None:
        self._policy = True
        if step.what == "reserve":
            self._stage.write_policy(reserve="2GiB")
        else:
            self._stage.write_policy(rules=step.what)

    def _do_reload(self, step: Step) -> None:
        self._systemctl("reload", step.what)

    def _do_kill(self, step: Step) -> None:
        targets = self._targets(step.what, step.model)
        if step.what == "gateway":
            self._note(replace(step, model=EVERYBODY), Cause.GATEWAY)
        elif step.what in {"launcher", "engine"}:
            self._note(step, Cause.ENDS)
        elif step.what in {"proof", "everything"}:
            self._note(step, Cause.ENDS, Cause.START, Cause.PROOF)
            self._note(replace(step, model=EVERYBODY), Cause.HELD)
        elif step.what == "watchdog":
            self._note(replace(step, model=EVERYBODY), Cause.WATCHDOG)
        self._signal(targets, signal.SIGKILL)

    def _do_freeze(self, step: Step) -> None:
        targets = self._targets(step.what, step.model)
        causes = {
            "launcher": (Cause.ENDS, Cause.START),
            "engine": (Cause.ENDS, Cause.START),
            "proof": (Cause.ENDS, Cause.START, Cause.PROOF),
            "gateway": (Cause.GATEWAY,),
            "api": (Cause.GATEWAY, Cause.START),
            "watchdog": (Cause.WATCHDOG,),
        }[step.what]
        model = step.model if step.what in {"launcher", "engine", "proof"} else EVERYBODY
        self._signal(targets, signal.SIGSTOP)
        self._start_fault(
            step, replace(step, model=model), causes, lambda: self._signal(targets, signal.SIGCONT), key=step.what
        )

    def _do_descriptors(self, step: Step) -> None:
        targets = self._targets(step.what, step.model)
        causes = {
            "launcher": (Cause.ENDS, Cause.START, Cause.PROOF),
            "gateway": (Cause.GATEWAY,),
            "api": (Cause.GATEWAY, Cause.START),
            "watchdog": (Cause.WATCHDOG,),
        }[step.what]
        before = []
        for process in targets:
            with suppress(OSError):
                limits = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
                used = max(map(int, os.listdir(f"/proc/{process.pid}/fd")), default=0)  # noqa: PTH208
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (min(used + 1, limits[0]), limits[1]))
                before.append((process, limits))

        def end() -> None:
            for process, limits in before:
                if _ticks(process.pid) == process.ticks:
                    with suppress(OSError):
                        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, limits)

        model = step.model if step.what == "launcher" else EVERYBODY
        self._start_fault(step, replace(step, model=model), causes, end, key=step.what)

    def _do_processes(self, step: Step) -> None:
        self._finish_commands()  # a systemd that executes itself anew without a process to spare is the end of it
        if not self._stage.limit_processes(spare=int(step.what)):
            self.tally.steps["(not possible here) processes"] += 1
            return
        self._start_fault(
            step,
            replace(step, model=EVERYBODY),
            (Cause.START, Cause.GATEWAY, Cause.PROOF, Cause.ENDS),
            self._stage.unlimit_processes,
        )

    def _do_driver(self, step: Step) -> None:
        gpus = self._stage.gpus
        self._end_fault("driver")
        index = sorted(MODELS).index(step.model) % GPU_COUNT
        start, proof = (Cause.START, Cause.HELD), (Cause.START, Cause.HELD, Cause.PROOF)
        causes: tuple[Cause, ...] = ()
        unprovable: Callable[[Held], bool] | None = None

        def on_it(lease: Held) -> bool:
            return any(given.index == index for given in lease.gpus)

        match step.what:
            case "slow":
                gpus.configure(slow_ms=15)
                causes = (Cause.HELD,)
            case "init-error":
                gpus.configure(init_error=Return.DRIVER_NOT_LOADED)
                causes = proof  # who has NVML open goes on, and proves releases by it
            case "list-error":
                gpus.change(index, processes_error=Return.UNKNOWN)
                causes, unprovable = proof, on_it
            case "lost":
                gpus.change(index, lost=True)
                causes, unprovable = proof, on_it
            case "lose":
                gpus.lose(index)
            case "late":
                gpus.configure(release_delay_ms=1000)
                causes = (Cause.HELD,)
            case "never":
                gpus.configure(release_delay_ms=NEVER)
                causes, unprovable = proof, lambda lease: True
            case "ghost":
                lease = self._observer.look(units=False).leases.get(step.model)
                if lease is None or lease.pid is None:
                    return
                run = lease
                gpus.change(lease.gpus[0].index, ghosts={run.pid: 0})
                causes, unprovable = proof, lambda lease: lease.model == run.model and lease.created == run.created
            case "no-bytes":
                gpus.change(index, process_bytes_unknown=True)
                causes = start
            case "grown":
                gpus.configure(insufficient_times=3)

        def end() -> None:
            gpus.configure(_sound(gpus.gpus), **{name: getattr(Faults(), name) for name in Faults.__dataclass_fields__})

        self._start_fault(step, replace(step, model=EVERYBODY), causes, end, unprovable=unprovable)

    def _do_full(self, step: Step) -> None:
        file = FULL_RUN if step.what == "run" else FULL_VAR
        self._stage.fill(file)
        causes = (Cause.START, Cause.HELD) if step.what == "run" else ()
        self._start_fault(
            step, replace(step, model=EVERYBODY), causes, lambda: self._stage.empty(file), key=f"full {step.what}"
        )

    def _do_touch(self, step: Step) -> None:
        """What a clock that is set leaves behind. (The clock itself is that of the machine outside.)"""
        when = time.time() + (86400 if step.what == "future" else -86400)
        for file in ("use", "door"):
            with suppress(OSError):
                os.utime(self._stage.inside(f"/run/gpusvc/models/{step.model}/{file}"), (when, when))

    def _do_systemd(self, step: Step) -> None:
        self._end_fault("processes")
        self._systemctl(step.what)

    def _do_service(self, step: Step) -> None:
        if step.what == "polkit.service" or step.what == "dbus.service":
            self._note(replace(step, model=EVERYBODY), Cause.START, Cause.HELD, lasts=3.0)
        self._systemctl("restart", step.what)

    def _do_reinstall(self, step: Step) -> None:
        everybody = replace(step, model=EVERYBODY)
        self._note(everybody, Cause.START, Cause.GATEWAY, Cause.HELD, Cause.PROOF, Cause.WATCHDOG, until=None)
        self._begin("dpkg", "--install", PACKAGE)

    def _do_reboot(self, step: Step) -> None:
        self._boot_anew(self._stage.reboot)

    def _do_power_cut(self, step: Step) -> None:
        def cut() -> None:
            self._stage.save_gpus()
            self._stage.cut_power()
            self._stage.boot()

        self._boot_anew(cut)

    def _boot_anew(self, boot: Callable[[], None]) -> None:
        for name in list(self._faults):
            self._end_fault(name)
        self._finish_commands()
        self._users.close()
        boot()
        self._users = self._new_users()
        self._observer.rebooted()
        now = time.monotonic()
        self._notes = [note if note.what == "edit" else replace(note, ended=note.ended or now) for note in self._notes]
        self._busy.clear()
        self._wedges.clear()
        self._used.clear()
        self._unprovable.clear()
        self._pinned.clear()
        self._lingering, self._stuck_for = Lingering(LINGER_SECONDS), Lingering(STUCK_SECONDS)

    # Settling

    def _do_settle(self, step: Step) -> None:
        """Ends all faults and all use, and waits until the machine is as new."""
        for name in list(self._faults):
            self._end_fault(name)
        for name in self._edited:
            self._stage.write_file(name, MODELS[name].file())
        self._edited.clear()
        if self._policy:
            self._stage.write_policy()
            self._policy = False
        self._users.leave()
        self._finish_commands()
        for name in self._pinned:
            self._stage.run("gpusvc", "unpin", name, check=False)
        self._pinned.clear()
        self._end_notes(lambda note: note.what != "wedge")
        self._busy.clear()
        began = time.monotonic()
        while True:
            snapshot = self._look()
            self._check(snapshot)
            wrong = list(invariants.unlike_new(snapshot, self._states()))
            wrong += [f"a request to {model} waits" for model, _ in list(self._users.pending.values())]
            wrong += [f"a client asks for {model} again and again" for model in list(self._users.insisting)]
            took = time.monotonic() - began
            if not wrong:
                break
            if took > AS_NEW_SECONDS:
                raise ViolationError([f"not as new {took:.0f} s after the last fault: {what}" for what in wrong])
            time.sleep(0.05)
        self.tally.settlings += 1
        self.tally.longest_settling_seconds = max(self.tally.longest_settling_seconds, took)
        self._say(f"as new after {took:.2f} s")
        self._read_journal()
        self._read_verdicts()
        # From here on nothing that was done before explains anything.
        self._notes.clear()
        self._busy.clear()
        self._wedges.clear()
        self._counted_stuck.clear()
        self._serve_as_new(began)
        self._settled = time.monotonic()

    def _serve_as_new(self, began: float) -> None:
        """Models answer, one after the other, and nothing is in their way."""
        number = self.tally.settlings
        names = sorted(MODELS)
        for name in (names[number % len(names)], names[(number + 1) % len(names)]):
            while True:
                self._users.request(name, 0.0)
                while self._users.pending:
                    time.sleep(0.005)
                answer = self._users.answers.pop()
                self.tally.statuses[str(answer.status)] += 1
                if answer.status == 200:
                    break
                said = answer.body.decode(errors="replace")[:600] or answer.problem
                took = time.monotonic() - began
                if took > AS_NEW_SECONDS:
                    raise ViolationError([f"{took:.0f} s after the last fault {name} got {answer.status}: {said}"])
                if invariants.COOLDOWN in said:
                    self.tally.cooldowns += 1
                    self._stage.write_file(name, MODELS[name].file())  # a new file is a new beginning
                time.sleep(1.5)  # the gateway repeats what it has just been told

    def _read_journal(self) -> None:
        """No traceback of ours, whatever happened."""
        since, self._settled_wall = self._settled_wall, time.time()
        found = self._stage.run("sh", "-c", _JOURNAL, "sh", f"{since:.6f}", check=False, timeout=60).stdout
        if not found:
            return
        self.tally.tracebacks.append(found)
        done = {note.what for note in self._notes}
        excused = [pattern for what, pattern in _EXCUSED.items() if what in done]
        ends = re.findall(
            r"^Traceback.*\n(?: .*\n|During handling.*\n|The above exception.*\n|\n)*(\S.*)$", found, re.MULTILINE
        )
        if not ends or not all(any(re.search(pattern, end) for pattern in excused) for end in ends):
            raise ViolationError([f"a traceback in the journal:\n{found}"])

    def _read_verdicts(self) -> None:
        """No model was judged stuck or failing, unless it was made so."""
        since, self._judged_wall = self._judged_wall, time.time()
        ahead = time.time() - time.monotonic()
        found = self._stage.run("sh", "-c", _VERDICTS, "sh", f"{since:.6f}", check=False, timeout=60).stdout
        wrong: list[str] = []
        for line in found.splitlines():
            entry = json.loads(line)
            when = int(entry["__REALTIME_TIMESTAMP"]) / 1e6 - ahead
            judged = Judged(entry["GPUSVC_MODEL"], entry["GPUSVC_EVENT"], when, str(entry.get("MESSAGE")))
            self.tally.verdicts[judged.kind] += 1
            wrong += invariants.misjudged(judged, self._notes)
        if wrong:
            raise ViolationError(wrong)

    def _states(self) -> dict[str, str]:
        said = self._stage.run("systemctl", "is-active", *OWN_UNITS, check=False).stdout.split()
        return dict(zip(OWN_UNITS, said, strict=False))

    def _finish_commands(self) -> None:
        deadline = time.monotonic() + 60
        while self._stage.unfinished:
            if time.monotonic() > deadline:
                raise ViolationError([f"a command does not end: {self._stage.running()}"])
            time.sleep(0.02)
        self._reap()

    # Looking

    def _look(self) -> Snapshot:
        self._inside = [hold for hold in self._users.holds if hold.is_inside]
        self.tally.looks += 1
        return self._observer.look()

    def _check(self, snapshot: Snapshot) -> None:
        self._reap()
        wrong = [sentence for check in invariants.INSTANT for sentence in check(snapshot)]
        wrong += invariants.falsely_released(snapshot, self._observer.owners)
        wrong += self._check_proofs(snapshot)
        wrong += self._check_uses(snapshot)
        wrong += self._check_patience(snapshot)
        now = snapshot.ended
        wrong += self._lingering.look(now, invariants.failed_alive(snapshot))
        wrong += self._check_stuck(snapshot)
        self._note_busy(snapshot)
        while self._users.answers:
            answer = self._users.answers.pop(0)
            self.tally.statuses[str(answer.status)] += 1
            wrong += invariants.untrue(answer, self._notes)
        while self._users.probed:
            probed = self._users.probed.pop(0)
            self.tally.probes[str(probed.status)] += 1
            wrong += invariants.untrue_state(probed, self._notes)
        while self._users.insisted:
            insisted = self._users.insisted.pop(0)
            self.tally.insisted += insisted.tries is None
            wrong += invariants.starved(insisted, self._notes)
        if wrong:
            raise ViolationError(wrong)

    def _check_patience(self, snapshot: Snapshot) -> Iterable[str]:
        """Wedged engines, quiet connections, and the model that nobody may load."""
        yield from loaded_by_probes(snapshot, PROBED.name)
        for name in self._wedges.over(snapshot):
            self._end_notes(lambda note, name=name: note.what == "wedge" and note.model == name)  # type: ignore[misc]
        yield from self._wedges.unnoticed(snapshot, self._notes, is_faulty=bool(self._faults))
        connections = list(self._users.connections)
        yield from check_connections(
            connections, snapshot, self._notes, lambda lease: self._is_settled(snapshot, lease)
        )
        for connection in connections:
            if connection.is_over:
                self._users.connections.remove(connection)

    def _check_proofs(self, snapshot: Snapshot) -> Iterable[str]:
        for fault in self._faults.values():
            if fault.makes_unprovable is None:
                continue
            known = self._unprovable.setdefault(fault.name, [])
            yield from invariants.wrongly_proven(snapshot, known)
            if snapshot.began < fault.since:
                continue
            for lease in snapshot.leases.values():
                case = Unprovable(lease.model, lease.created, fault.name)
                if case not in known and self._is_settled(snapshot, lease) and fault.makes_unprovable(lease):
                    known.append(case)

    def _check_uses(self, snapshot: Snapshot) -> Iterable[str]:
        for hold in self._inside:
            if not hold.is_inside:
                continue
            known = self._used.get(id(hold))
            if known is not None and any(
                note.explains(Cause.ENDS, hold.model, known[2], snapshot.ended) for note in self._notes
            ):
                del self._used[id(hold)]
                known = None
            if known is not None:
                yield from invariants.evicted_in_use(snapshot, [known[1]])
                continue
            lease = snapshot.leases.get(hold.model)
            recent = snapshot.ended - invariants.AFTERMATH_SECONDS
            if (
                lease is not None
                and self._is_settled(snapshot, lease)
                and not any(note.explains(Cause.ENDS, hold.model, recent, snapshot.ended) for note in self._notes)
            ):
                self._used[id(hold)] = (hold, Used(hold.model, lease.created), snapshot.ended)
        alive = set(map(id, self._users.holds))
        self._used = {key: value for key, value in self._used.items() if key in alive}

    def _is_settled(self, snapshot: Snapshot, lease: Held) -> bool:
        """Ready, and not on its way out."""
        unit = (snapshot.units or {}).get(invariants.service_of(lease.model))
        return lease.ready and unit is not None and unit.active == "active" and not unit.job

    def _check_stuck(self, snapshot: Snapshot) -> Iterable[str]:
        seen = list(invariants.stuck(snapshot))
        self.tally.stuck += len({*seen} - self._counted_stuck)
        self._counted_stuck.update(seen)
        for name in self._stuck_for.look(snapshot.ended, seen):
            if not any(note.explains(Cause.PROOF, name, self._settled, snapshot.ended) for note in self._notes):
                yield f"{name} is stuck, and no fault makes it so"

    def _note_busy(self, snapshot: Snapshot) -> None:
        loading = any(not lease.ready for lease in snapshot.leases.values()) or snapshot.changing
        stuck = any(True for _ in invariants.stuck(snapshot))
        self._note_while(Cause.BUSY, is_so=bool(self._users.holds or self._users.pending or loading))
        self._note_while(Cause.HELD, is_so=bool(self._pinned or stuck or self._policy))

    def _note_while(self, cause: Cause, *, is_so: bool) -> None:
        """Begin the note of ``cause`` when it becomes so, and end it when it is so no more."""
        if is_so and cause not in self._busy:
            self._busy[cause] = len(self._notes)
            self._notes.append(Noted(cause, EVERYBODY, time.monotonic(), None, "busy"))
        elif not is_so and cause in self._busy:
            number = self._busy.pop(cause)
            self._notes[number] = replace(self._notes[number], ended=time.monotonic())

    # Causes and faults

    def _note(self, step: Step, *causes: Cause, lasts: float = 0.0, until: float | None = 0.0) -> list[int]:
        """What this step explains from now on, until now and ``lasts`` seconds, or (None) until somebody ends that."""
        now = time.monotonic()
        ended = None if until is None else now + lasts
        numbers = []
        for cause in causes:
            numbers.append(len(self._notes))
            self._notes.append(Noted(cause, step.model, now, ended, step.kind))
        return numbers

    def _end_notes(self, which: Callable[[Noted], bool]) -> None:
        now = time.monotonic()
        self._notes = [replace(note, ended=now) if note.ended is None and which(note) else note for note in self._notes]

    def _start_fault(
        self,
        step: Step,
        noted: Step,
        causes: Iterable[Cause],
        end: Callable[[], None],
        *,
        key: str = "",
        unprovable: Callable[[Held], bool] | None = None,
    ) -> None:
        name = f"{step.kind} {key}".strip()
        self._end_fault(name)
        notes = self._note(noted, *causes, until=None)
        fault = Fault(f"{step.kind} {step.what}", max(step.lasts, 1), end, notes, unprovable, time.monotonic())
        self._faults[name] = fault

    def _end_fault(self, name: str) -> None:
        fault = self._faults.pop(name, None)
        if fault is None:
            return
        self._unprovable.pop(fault.name, None)
        fault.end()
        for number in fault.notes:
            self._notes[number] = replace(self._notes[number], ended=time.monotonic())

    def _age_faults(self) -> None:
        for name, fault in list(self._faults.items()):
            fault.left -= 1
            if fault.left < 0:
                self._end_fault(name)

    # Processes

    def _targets(self, who: str, model: str) -> list[Process]:
        snapshot = self._observer.look(units=False)
        service, scope = invariants.service_of(model), invariants.scope_of(model)

        def is_meant(process: Process) -> bool:
            parts = process.cgroup.split("/")
            match who:
                case "launcher":
                    return service in parts and "gpusvc.launcher" in process.command
                case "proof":
                    return "gpusvc.release" in process.command and process.command.endswith(f" {model}")
                case "engine":
                    lease = snapshot.leases.get(model)
                    return scope in parts and lease is not None and process.inner == lease.pid
                case "child":
                    lease = snapshot.leases.get(model)
                    return scope in parts and lease is not None and process.inner != lease.pid
                case "everything":
                    return service in parts or scope in parts
                case _:
                    return _UNIT_OF[who] in parts

        return [process for process in snapshot.processes if is_meant(process)]

    def _signal(self, targets: Iterable[Process], number: signal.Signals) -> None:
        for process in targets:
            with suppress(OSError):
                pidfd = os.pidfd_open(process.pid)
                try:
                    if _ticks(process.pid) == process.ticks:
                        signal.pidfd_send_signal(pidfd, number)
                finally:
                    os.close(pidfd)

    # Commands

    def _systemctl(self, *arguments: str) -> None:
        self._begin("systemctl", *arguments)

    def _begin(self, *command: str) -> None:
        self._stage.begin(*command)

    def _reap(self) -> None:
        for command, status, said in self._stage.reap():
            if "dpkg" in command:
                self._end_notes(lambda note: note.what == "reinstall")
            if status != 0 and said:
                self._say(f"  {' '.join(command[-4:])} → {status}: {said.strip()[:160]}")
            if "Traceback" in said:
                raise ViolationError([f"a traceback of {' '.join(command[-4:])}:\n{said}"])

    def _new_users(self) -> Users:
        assert self._stage.pid is not None
        return Users(self._stage.pid, self._stage.inside("/run/gpusvc/models"))


def _sound(gpus: Sequence[FakeGpu]) -> list[FakeGpu]:
    """These GPUs without a fault; one that its clients lost stays so for those who have not looked since."""
    pairs = zip(default_gpus(len(gpus)), gpus, strict=True)
    return [replace(sound, lost_serial=gpu.lost_serial) for sound, gpu in pairs]


def _ticks(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


__all__ = ["Campaign", "MachineError", "Tally", "ViolationError"]
