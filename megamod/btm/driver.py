"""The driver: runs the jobs of a campaign until the forest is complete.

All of its state is on disk, so it can be killed and restarted at any time. It does not import
torch, so it starts at once and uses little memory.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamod.btm import tasks as make
from megamod.btm.campaign import Campaign, Parsed, build_campaign, check_data
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
from megamod.btm.tasks import Stage, Task
from megamod.dist.hostfile import Host, Place, read_hostfile
from megamod.errors import DistributedFailure, Interrupted, PolicyStop, UserError

POLL_SECONDS = 0.2
ADOPTED_POLL_SECONDS = 1.0  # between two checks of the lock of a job that another driver started
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # before a crashed job is started again
USER_ERROR, POLICY_STOP = UserError.exit_code, PolicyStop.exit_code


@dataclass
class Running:
    """A task and its present state.

    Attributes:
        code: exit code of the program that failed; None if none failed.
        fault: the reason in words.
    """

    task: Task
    row: Row
    stage: Stage | None = None
    process: subprocess.Popen[bytes] | None = None
    adopted: bool = False
    placement: Place = ()
    port: int = 0
    log_start: int = 0
    not_before: float = 0.0
    ended: bool = False
    code: int | None = None
    fault: str = ""

    @property
    def active(self) -> bool:
        """True while one of its programs runs."""
        return self.process is not None or self.adopted


@dataclass
class Driver:
    """Starts and watches jobs on the slots of some hosts.

    Attributes:
        launchers: folder of the launchers.
        output: output folder of the campaign.
        hosts: hosts with their slots.
    """

    launchers: Path
    output: Path
    hosts: Place
    hostfile: str | None
    max_restarts: int
    screen: Screen = field(default_factory=Screen)
    signals: int = 0
    finished: list[Row] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks in parallel, as many as the slots allow, until each has ended.

        Raises:
            UserError, PolicyStop, DistributedFailure: naming the failed tasks, once all others have
                finished.
            Interrupted: the driver received a signal, and its jobs have ended.
        """
        jobs = [Running(task, Row(task.name, "waiting", task.last)) for task in tasks]
        for job in jobs:
            self._adopt(job)
        while not all(job.ended for job in jobs):
            for job in jobs:
                if job.active:
                    self._check_job(job, jobs)
                elif not job.ended and not self.signals:
                    self._begin(job, jobs)
            self._show(jobs)
            if self.signals and not any(job.active for job in jobs):
                raise Interrupted("the driver received a signal to stop; the same command resumes")
            time.sleep(POLL_SECONDS)
        self._show(jobs, now=True)
        self.finished += [job.row for job in jobs]
        _raise_failures([job for job in jobs if job.fault])

    def ask_to_stop(self, number: int, frame: object) -> None:
        """Handle a signal: the first lets jobs write checkpoints, the second kills them."""
        self.signals += 1

    def _mark(self, task: Task) -> str:
        return str(self._lock(task).resolve())

    def _lock(self, task: Task) -> Path:
        return self.output / "jobs" / f"{task.name}.lock"

    def _log(self, task: Task) -> Path:
        return self.output / "logs" / f"{task.name}.log"

    def _adopt(self, job: Running) -> None:
        """Adopt the task if an earlier driver left it running."""
        lock = take(self._lock(job.task))
        if lock is not None:
            _close(lock)
            return
        job.adopted, job.row.state = True, "adopted"
        job.placement = parse_include(self._lock(job.task).read_text(encoding="utf-8").strip())
        job.row.slots = include(job.placement)

    def _begin(self, job: Running, jobs: Sequence[Running]) -> None:
        """Start the next program of a task if one is left, its pause is over and slots are free."""
        if time.monotonic() < job.not_before:
            return
        stage = job.task.next_stage()
        if stage is None:
            job.ended, job.row.state = True, "done"
            return
        busy = [host for other in jobs if other.active for host in other.placement]
        placement = pack(self.hosts, busy, job.task.gpus)
        if placement is None:
            job.row.state, job.row.slots = "waiting", ""
            return
        lock = take(self._lock(job.task))
        if lock is None:
            self._adopt(job)
            return
        clear(self._mark(job.task))
        job.port = free_port([other.port for other in jobs if other.active])
        job.stage, job.placement = stage, placement
        job.row.state, job.row.slots = stage.title, include(placement)
        _fill(lock, job.row.slots)
        log = self._log(job.task)
        job.log_start = log.stat().st_size if log.exists() else 0
        command, variables = command_of(stage, placement, self.launchers, self.hostfile, job.port)
        job.process = start(command, variables, lock, self._mark(job.task), log)

    def _check_job(self, job: Running, jobs: Sequence[Running]) -> None:
        """Check whether the program of a task has ended, and handle its exit code."""
        if self.signals:
            self._stop(job)
        if job.adopted:
            self._check_adopted(job)
            return
        code = job.process.poll()
        if code is None:
            return
        job.process = None
        clear(self._mark(job.task))
        if self.signals:
            job.row.state = "stopped"
        elif code == 0 and job.task.next_stage() is not job.stage:
            self._begin(job, jobs)
        elif code in (USER_ERROR, POLICY_STOP):
            self._fail(job, code, f"{job.stage.launcher} ended with exit code {code}")
        elif job.row.restarts >= self.max_restarts:
            self._fail(
                job,
                code,
                f"{job.stage.launcher} crashed (exit code {code}), {job.row.restarts} restarts",
            )
        else:
            job.row.restarts += 1
            job.row.state = "restarting"
            pause = FIRST_PAUSE * 2 ** (job.row.restarts - 1)
            job.not_before = time.monotonic() + min(pause, LONGEST_PAUSE)

    def _check_adopted(self, job: Running) -> None:
        if time.monotonic() < job.not_before:
            return
        job.not_before = time.monotonic() + ADOPTED_POLL_SECONDS
        lock = take(self._lock(job.task))
        if lock is not None:
            clear(self._mark(job.task))
            _close(lock)
            job.adopted, job.not_before = False, 0.0
            job.row.state = "stopped" if self.signals else "waiting"

    def _stop(self, job: Running) -> None:
        """Ask a job to stop; kill it at the second signal."""
        if job.row.state != "stopping":
            job.row.state = "stopping"
            ask_to_stop(self._mark(job.task))
        elif self.signals > 1:
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
    """Run a campaign: seed, rounds of experts, averaging and evaluation.

    Args:
        parsed: all arguments, `BtmArgs` first.
        launchers: folder of the launchers.
    Raises:
        UserError: if the campaign cannot run, before anything is written; else as `Driver.run`.
    """
    btm = parsed[0]
    campaign = build_campaign(parsed)
    hosts = read_hostfile(btm.hostfile, selectable=True) if btm.hostfile else local_hosts(btm.slots)
    waves = plan(campaign, parsed, hosts)
    if btm.dry_run:
        print(describe(campaign, waves, hosts, launchers, btm.hostfile))
        return
    check_data(campaign, parsed)
    output = campaign.output
    for folder in ("jobs", "logs", make.PRIORS, make.EVALUATION):
        (output / folder).mkdir(parents=True, exist_ok=True)
    driver_lock = take(output / "jobs" / ".driver.lock")
    if driver_lock is None:
        raise UserError(f"--output_dir {output}: another driver is running there")
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
        _close(driver_lock)
    print(f"\nthe forest of {', '.join(campaign.domains)} is {output / 'forest.json'}")


Wave = tuple[list[Task], Callable[[], None]]
"""Tasks that run in parallel, and a function to call once all of them have finished."""


def plan(campaign: Campaign, parsed: Parsed, hosts: Place) -> list[Wave]:
    """Order all tasks into waves.

    Raises:
        UserError: if a job does not fit the hosts.
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
    """Describe slots, commands and tokens of all jobs, without starting anything."""
    lines = [campaign.accounting()]
    for tasks, _ in waves:
        busy: list[Host] = []
        for task in tasks:
            placement = pack(hosts, busy, task.gpus)
            busy += placement or ()
            slots = include(placement) if placement else "waits for free slots"
            lines.append(f"\n{task.name}: {slots}")
            for stage in task.stages:
                if stage.done():
                    lines.append(f"  {stage.title}: done")
                    continue
                usable = placement or pack(hosts, (), task.gpus)
                command, _ = command_of(stage, usable, launchers, hostfile, port=29500)
                lines.append(f"  {stage.title}: {' '.join(command)}")
    return "\n".join(lines)


def _filled(sequences: int, hosts: Place) -> int:
    """Return the largest number of slots that divides `sequences` and fits the hosts."""
    total = sum(len(host.slots) for host in hosts)
    return next(n for n in range(total, 0, -1) if sequences % n == 0 and pack(hosts, (), n))


def _raise_failures(failed: Sequence[Running]) -> None:
    """Raise the exception of the worst failure."""
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
