"""The driver: keeps the jobs of a recipe running until the forest is complete.

It holds nothing that is not on the disk, so it can be killed and started again at any time. It does
not import torch: it is small, starts at once and runs beside anything.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamod.btm import tasks as make
from megamod.btm.collect import collect
from megamod.btm.jobs import ask_to_stop, clear, command_of, start, tail, take
from megamod.btm.placement import (
    check_fits,
    free_port,
    include,
    local_hosts,
    pack,
    parse_include,
)
from megamod.btm.progress import Row, Screen, read_progress
from megamod.btm.recipe import Campaign, Parsed, make_campaign
from megamod.btm.tasks import Stage, Task
from megamod.dist.hostfile import Host, Place, read_hostfile
from megamod.errors import DistributedFailure, Interrupted, PolicyStop, UserError

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between two looks at the lock of a job that another driver started
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # before a crashed job is started again
USER_ERROR, POLICY_STOP = UserError.exit_code, PolicyStop.exit_code


@dataclass
class Running:
    """A task and what became of it so far.

    Attributes:
        code: why it failed, as the exit code of its last program; None if it did not.
        fault: the same in words.
    """

    task: Task
    row: Row
    stage: Stage | None = None
    process: subprocess.Popen[bytes] | None = None
    adopted: bool = False
    place: Place = ()
    port: int = 0
    log_start: int = 0
    not_before: float = 0.0
    ended: bool = False
    code: int | None = None
    fault: str = ""

    @property
    def active(self) -> bool:
        """True while it has a program running."""
        return self.process is not None or self.adopted


@dataclass
class Driver:
    """Where jobs can run, how they are started and how often.

    Attributes:
        launchers: folder of the launchers.
        output: folder of everything.
        hosts: machines with their slots.
    """

    launchers: Path
    output: Path
    hosts: Place
    hostfile: str | None
    max_restarts: int
    screen: Screen = field(default_factory=Screen)
    asked: int = 0
    finished: list[Row] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks side by side, as many as the slots allow, until each has ended.

        Raises:
            UserError, PolicyStop, DistributedFailure: naming the tasks that failed; the others were
                finished before.
            Interrupted: the driver was told to stop, and its jobs have ended.
        """
        jobs = [Running(task, Row(task.name, "waiting", task.last)) for task in tasks]
        for job in jobs:
            self._adopt(job)
        while not all(job.ended for job in jobs):
            for job in jobs:
                if job.active:
                    self._look_after(job, jobs)
                elif not job.ended and not self.asked:
                    self._begin(job, jobs)
            self._show(jobs)
            if self.asked and not any(job.active for job in jobs):
                raise Interrupted("the driver was told to stop; the same command goes on")
            time.sleep(POLL_SECONDS)
        self._show(jobs, now=True)
        self.finished += [job.row for job in jobs]
        _complain([job for job in jobs if job.fault])

    def ask_to_stop(self, number: int, frame: object) -> None:
        """Handle a signal: the first lets jobs write checkpoints, the second kills them."""
        self.asked += 1

    def _mark(self, task: Task) -> str:
        return str(self._lock(task).resolve())

    def _lock(self, task: Task) -> Path:
        return self.output / "jobs" / f"{task.name}.lock"

    def _log(self, task: Task) -> Path:
        return self.output / "logs" / f"{task.name}.log"

    def _adopt(self, job: Running) -> None:
        """See whether a driver before this one left the task running."""
        lock = take(self._lock(job.task))
        if lock is not None:
            _close(lock)
            return
        job.adopted, job.row.state = True, "adopted"
        job.place = parse_include(self._lock(job.task).read_text(encoding="utf-8").strip())
        job.row.slots = include(job.place)

    def _begin(self, job: Running, jobs: Sequence[Running]) -> None:
        """Start the next program of a task, if it has one, it is time and there are slots."""
        if time.monotonic() < job.not_before:
            return
        stage = job.task.next_stage()
        if stage is None:
            job.ended, job.row.state = True, "done"
            return
        busy = [host for other in jobs if other.active for host in other.place]
        place = pack(self.hosts, busy, job.task.gpus)
        if place is None:
            job.row.state, job.row.slots = "waiting", ""
            return
        lock = take(self._lock(job.task))
        if lock is None:
            self._adopt(job)
            return
        clear(self._mark(job.task))
        job.port = free_port([other.port for other in jobs if other.active])
        job.stage, job.place = stage, place
        job.row.state, job.row.slots = stage.title, include(place)
        _fill(lock, job.row.slots)
        log = self._log(job.task)
        job.log_start = log.stat().st_size if log.exists() else 0
        command, variables = command_of(stage, place, self.launchers, self.hostfile, job.port)
        job.process = start(command, variables, lock, self._mark(job.task), log)

    def _look_after(self, job: Running, jobs: Sequence[Running]) -> None:
        """See whether the program of a task ended, and how."""
        if self.asked:
            self._stop(job)
        if job.adopted:
            self._look_at_adopted(job)
            return
        code = job.process.poll()
        if code is None:
            return
        job.process = None
        clear(self._mark(job.task))
        if self.asked:
            job.row.state = "stopped"
        elif code == 0 and job.task.next_stage() is not job.stage:
            self._begin(job, jobs)
        elif code in (USER_ERROR, POLICY_STOP):
            self._fail(job, code, f"{job.stage.launcher} ended with exit code {code}")
        elif job.row.restarts >= self.max_restarts:
            self._fail(job, code, f"{job.stage.launcher} crashed (exit code {code}) once too often")
        else:
            job.row.restarts += 1
            job.row.state = "restarting"
            pause = FIRST_PAUSE * 2 ** (job.row.restarts - 1)
            job.not_before = time.monotonic() + min(pause, LONGEST_PAUSE)

    def _look_at_adopted(self, job: Running) -> None:
        if time.monotonic() < job.not_before:
            return
        job.not_before = time.monotonic() + LOOK_SECONDS
        lock = take(self._lock(job.task))
        if lock is not None:
            clear(self._mark(job.task))
            _close(lock)
            job.adopted, job.not_before = False, 0.0
            job.row.state = "stopped" if self.asked else "waiting"

    def _stop(self, job: Running) -> None:
        """Ask a job to end, once; kill it when asked a second time."""
        if job.row.state != "stopping":
            job.row.state = "stopping"
            ask_to_stop(self._mark(job.task))
        elif self.asked > 1:
            clear(self._mark(job.task))

    def _fail(self, job: Running, code: int, why: str) -> None:
        job.ended, job.code, job.row.state = True, code, "failed"
        log = self._log(job.task)
        job.fault = f"{job.task.name}: {why}; the end of {log}:\n{tail(log, job.log_start)}"
        self.screen.say(job.fault.partition("\n")[0])

    def _show(self, jobs: Sequence[Running], now: bool = False) -> None:
        for job in jobs:
            if job.active or job.ended:
                read_progress(job.task.folder, job.row)
        self.screen.show([*self.finished, *(job.row for job in jobs)], now)


def drive(parsed: Parsed, launchers: Path) -> None:
    """Run a recipe: seed, rounds of experts, and what comes after.

    Args:
        parsed: all arguments, `BtmArgs` first.
        launchers: folder of the launchers.
    Raises:
        UserError: for a recipe that cannot be run, before anything is written; and as `Driver.run`.
    """
    btm = parsed[0]
    campaign = make_campaign(parsed)
    hosts = read_hostfile(btm.hostfile) if btm.hostfile else local_hosts(btm.slots)
    waves = plan(campaign, parsed, hosts)
    if btm.dry_run:
        print(describe(campaign, waves, hosts, launchers, btm.hostfile))
        return
    output = campaign.output
    for folder in ("jobs", "logs", make.PRIORS, make.EVALUATION):
        (output / folder).mkdir(parents=True, exist_ok=True)
    own = take(output / "jobs" / ".driver.lock")
    if own is None:
        raise UserError(f"--output_dir {output}: another driver is at work there")
    print(campaign.accounting(), flush=True)
    driver = Driver(launchers, output, hosts, btm.hostfile, btm.max_restarts)
    before = {n: signal.signal(n, driver.ask_to_stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for tasks, after in waves:
            driver.run(tasks)
            after()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _close(own)
    print(f"\nthe forest of {', '.join(campaign.domains)} is {output / 'forest.json'}")


Wave = tuple[list[Task], Callable[[], None]]
"""Tasks that run side by side, and what is to be done when all of them are."""


def plan(campaign: Campaign, parsed: Parsed, hosts: Place) -> list[Wave]:
    """All tasks, in the order in which they can run.

    Raises:
        UserError: if a job does not fit the machines.
    """
    btm, run = parsed[0], parsed[1]
    waves: list[Wave] = []
    if campaign.seed_steps:
        gpus = btm.seed_gpus
        if gpus is None:
            gpus = _filled(campaign.batch // run.per_device_train_batch_size, hosts)
        check_fits(hosts, gpus, "--seed_gpus")
        if campaign.batch % (gpus * run.per_device_train_batch_size):
            raise UserError(
                f"--seed_gpus {gpus}: --global_batch_size {campaign.batch} is not a multiple of "
                f"{gpus} slots x --per_device_train_batch_size {run.per_device_train_batch_size}"
            )
        waves.append(([make.seed_task(campaign, parsed, gpus)], _nothing))
    if btm.in_one_world:
        world = make.world_task(campaign, parsed)
        check_fits(hosts, world.gpus, "--in_one_world")
        waves.append(([world], lambda: collect(campaign, 0, in_one_world=True)))
    else:
        check_fits(hosts, btm.gpus_per_expert, "--gpus_per_expert")
        for number, round_ in enumerate(campaign.rounds):
            tasks = [make.expert_task(campaign, parsed, number, domain) for domain in round_]
            waves.append((tasks, lambda n=number: collect(campaign, n)))
    return waves + [([task], _nothing) for task in make.final_tasks(campaign, parsed)]


def describe(
    campaign: Campaign, waves: Sequence[Wave], hosts: Place, launchers: Path, hostfile: str | None
) -> str:
    """What would be done: slots and commands of all jobs, and tokens; nothing is started."""
    lines = [campaign.accounting()]
    for tasks, _ in waves:
        busy: list[Host] = []
        for task in tasks:
            place = pack(hosts, busy, task.gpus)
            busy += place or ()
            where = include(place) if place else "waits for free slots"
            lines.append(f"\n{task.name}: {where}")
            for stage in task.stages:
                if stage.done():
                    lines.append(f"  {stage.title}: done")
                    continue
                some = place or pack(hosts, (), task.gpus)
                command, _ = command_of(stage, some, launchers, hostfile, port=29500)
                lines.append(f"  {stage.title}: {' '.join(command)}")
    return "\n".join(lines)


def _filled(sequences: int, hosts: Place) -> int:
    """The largest number of slots that divides `sequences` and fits the machines."""
    total = sum(len(host.slots) for host in hosts)
    return next(n for n in range(total, 0, -1) if sequences % n == 0 and pack(hosts, (), n))


def _complain(failed: Sequence[Running]) -> None:
    """Raise what the worst failure deserves."""
    if not failed:
        return
    codes = {job.code for job in failed}
    text = "\n".join(job.fault for job in failed)
    if USER_ERROR in codes:
        raise UserError(text)
    if POLICY_STOP in codes:
        raise PolicyStop(text)
    raise DistributedFailure(text)


def _nothing() -> None:
    pass


def _fill(lock: int, text: str) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, text.encode(), 0)


def _close(lock: int) -> None:
    os.close(lock)
