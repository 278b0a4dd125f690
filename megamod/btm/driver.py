"""The driver: runs the jobs of a campaign until the forest is complete.

All of its state is on disk, so it can be killed and restarted at any time. It does not import
torch, so it starts at once and uses little memory.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamod.btm import tasks as task_builders
from megamod.btm.campaign import Campaign, Parsed, build_campaign, check_campaign_data
from megamod.btm.collect import add_round_to_forest
from megamod.btm.jobs import (
    acquire_lock,
    build_command,
    close_lock,
    kill_processes,
    read_log_tail,
    request_stop,
    start_process,
    write_lock_text,
)
from megamod.btm.placement import (
    allocate_slots,
    check_job_fits,
    find_free_port,
    format_include,
    list_local_slots,
    parse_include,
)
from megamod.btm.progress import ProgressRow, Screen, update_progress_row
from megamod.btm.scores import format_campaign_scores
from megamod.btm.tasks import Stage, Task
from megamod.dist.hostfile import Host, HostSlots, read_hostfile
from megamod.errors import DistributedFailure, Interrupted, PolicyStop, UserError
from megamod.folder_lock import lock_folder

POLL_SECONDS = 0.2  # between two checks of the jobs that this driver started
ADOPTED_POLL_SECONDS = 1.0  # between two checks of the lock of a job that another driver started
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a crashed job is started again
USER_ERROR, POLICY_STOP = UserError.exit_code, PolicyStop.exit_code


@dataclass
class TaskState:
    """State of a task in `Driver.run_tasks`: waiting, active or ended; updated in place.

    Attributes:
        row: its row in the table of progress.
        stage: the program that was started last; None: no program was started.
        process: the running program, started by this driver; None: no program runs.
        adopted: an earlier driver started the program that runs.
        placement: slots of that program; empty: none yet.
        port: TCP port of DeepSpeed's launcher for it.
        log_start: size of the log in bytes when it was started.
        not_before: time of `time.monotonic` before which a crashed task is not restarted, and an
            adopted one not checked again.
        ended: nothing is left to run, because all is done or a program failed.
        code: exit code of the program that failed; None if none failed.
        fault: the reason in words; "" if none failed.
    """

    task: Task
    row: ProgressRow
    stage: Stage | None = None
    process: subprocess.Popen[bytes] | None = None
    adopted: bool = False
    placement: HostSlots = ()
    port: int = 0
    log_start: int = 0
    not_before: float = 0.0
    ended: bool = False
    code: int | None = None
    fault: str = ""

    @property
    def active(self) -> bool:
        """True while a program of the task runs, whichever driver started it."""
        return self.process is not None or self.adopted


@dataclass
class Driver:
    """Starts and watches jobs on the slots of some hosts.

    Attributes:
        commands_folder: folder of the programs of stages, `megamod/commands`.
        output: output folder of the campaign, with the existing folders jobs and logs.
        hosts: hosts with all slots that jobs may use.
        hostfile: the file that names them; None: this machine.
        max_restarts: largest number of restarts of a job that crashes.
        screen: shows the progress.
        signals: number of signals to stop that were received.
        finished: rows of earlier calls of `run_tasks`, shown above the running tasks.
    """

    commands_folder: Path
    output: Path
    hosts: HostSlots
    hostfile: str | None
    max_restarts: int
    screen: Screen = field(default_factory=Screen)
    signals: int = 0
    finished: list[ProgressRow] = field(default_factory=list)

    def run_tasks(self, tasks: Sequence[Task]) -> None:
        """Run tasks in parallel, as many as the slots allow, until each has ended.

        A task that an earlier driver left running is waited for.

        Raises:
            UserError, PolicyStop, DistributedFailure: naming the failed tasks, once all others have
                finished.
            Interrupted: the driver received a signal, and its jobs have ended.
        """
        jobs = [TaskState(task, ProgressRow(task.name, "waiting", task.last)) for task in tasks]
        for job in jobs:
            self._adopt_if_running(job)
        while not all(job.ended for job in jobs):
            for job in jobs:
                if job.active:
                    self._update_job(job, jobs)
                elif not job.ended and not self.signals:
                    self._start_next_stage(job, jobs)
            self._show_progress(jobs)
            if self.signals and not any(job.active for job in jobs):
                raise Interrupted("the driver received a signal to stop; the same command resumes")
            time.sleep(POLL_SECONDS)
        self._show_progress(jobs, redraw_now=True)
        self.finished += [job.row for job in jobs]
        _raise_if_any_failed([job for job in jobs if job.fault])

    def count_signal(self, signal_number: int, frame: object) -> None:
        """Count a signal to stop; a signal handler, whose arguments have no effect.

        After the first one `run_tasks` starts nothing more and asks its jobs to write checkpoints
        and end; after the second it kills them.
        """
        self.signals += 1

    def _get_process_mark(self, task: Task) -> str:
        """Return the mark of a task's processes for `iterate_processes`: the path of its lock."""
        return str(self._get_lock_path(task).resolve())

    def _get_lock_path(self, task: Task) -> Path:
        """Return the path of the file whose lock the running programs of a task hold."""
        return self.output / "jobs" / f"{task.name}.lock"

    def _get_log_path(self, task: Task) -> Path:
        """Return the path of the file that gets the output of all programs of a task."""
        return self.output / "logs" / f"{task.name}.log"

    def _adopt_if_running(self, job: TaskState) -> None:
        """Adopt a task that an earlier driver left running, with the slots written in its lock
        file.

        If the lock is free, `job` does not change. The lock file is created if it is missing.
        """
        lock = acquire_lock(self._get_lock_path(job.task))
        if lock is not None:
            close_lock(lock)
            return
        job.adopted, job.row.state = True, "adopted"
        job.placement = parse_include(
            self._get_lock_path(job.task).read_text(encoding="utf-8").strip()
        )
        job.row.slots = format_include(job.placement)

    def _start_next_stage(self, job: TaskState, jobs: Sequence[TaskState]) -> None:
        """Start the next unfinished program of a task, once its pause after a crash is over.

        If all programs have finished, the task ends as done; if no slots are free, it waits; if
        another process holds its lock, it is adopted. Processes that an earlier program left are
        killed first. The slots are written into the lock file. `job` is updated.

        Args:
            jobs: all tasks, whose slots and ports are in use if they are active.
        """
        if time.monotonic() < job.not_before:
            return
        stage = job.task.find_next_stage()
        if stage is None:
            job.ended, job.row.state = True, "done"
            return
        busy = [host for other in jobs if other.active for host in other.placement]
        placement = allocate_slots(self.hosts, busy, job.task.gpus)
        if placement is None:
            job.row.state, job.row.slots = "waiting", ""
            return
        lock = acquire_lock(self._get_lock_path(job.task))
        if lock is None:
            self._adopt_if_running(job)
            return
        kill_processes(self._get_process_mark(job.task))
        job.port = find_free_port([other.port for other in jobs if other.active])
        job.stage, job.placement = stage, placement
        job.row.state, job.row.slots = stage.title, format_include(placement)
        write_lock_text(lock, job.row.slots)
        log = self._get_log_path(job.task)
        job.log_start = log.stat().st_size if log.exists() else 0
        command, variables = build_command(
            stage, placement, self.commands_folder, self.hostfile, job.port, self.hosts
        )
        job.process = start_process(command, variables, lock, self._get_process_mark(job.task), log)

    def _update_job(self, job: TaskState, jobs: Sequence[TaskState]) -> None:
        """Check whether a task's program has ended, and handle its exit code; `job` is updated.

        After a success the next program starts. Exit codes of user errors and policy stops, and
        crashes after `max_restarts` restarts, end the task as failed. After another crash, or a
        success that left the program unfinished, it restarts after a pause that doubles each time.
        If a signal was received, the job is asked to stop and nothing more is started.

        Args:
            jobs: see `_start_next_stage`.
        """
        if self.signals:
            self._stop_job(job)
        if job.adopted:
            self._update_adopted_job(job)
            return
        code = job.process.poll()
        if code is None:
            return
        job.process = None
        kill_processes(self._get_process_mark(job.task))
        if self.signals:
            job.row.state = "stopped"
        elif code == 0 and job.task.find_next_stage() is not job.stage:
            self._start_next_stage(job, jobs)
        elif code in (USER_ERROR, POLICY_STOP):
            self._record_failure(job, code, f"{job.stage.program} ended with exit code {code}")
        elif job.row.restarts >= self.max_restarts:
            event = "crashed" if code else "ended before it was finished"
            self._record_failure(
                job,
                code,
                f"{job.stage.program} {event} (exit code {code}), {job.row.restarts} restarts",
            )
        else:
            job.row.restarts += 1
            job.row.state = "restarting"
            pause = FIRST_PAUSE * 2 ** (job.row.restarts - 1)
            job.not_before = time.monotonic() + min(pause, LONGEST_PAUSE)

    def _update_adopted_job(self, job: TaskState) -> None:
        """Release an adopted job once its lock is free; do nothing within `ADOPTED_POLL_SECONDS` of
        the last check.

        The exit code of its program is unknown, so its files decide what is run next.
        """
        if time.monotonic() < job.not_before:
            return
        job.not_before = time.monotonic() + ADOPTED_POLL_SECONDS
        lock = acquire_lock(self._get_lock_path(job.task))
        if lock is not None:
            kill_processes(self._get_process_mark(job.task))
            close_lock(lock)
            job.adopted, job.not_before = False, 0.0
            job.row.state = "stopped" if self.signals else "waiting"

    def _stop_job(self, job: TaskState) -> None:
        """Ask a running job to stop; if it was asked before, kill it after the second signal."""
        if job.row.state != "stopping":
            job.row.state = "stopping"
            request_stop(self._get_process_mark(job.task))
        elif self.signals > 1:
            kill_processes(self._get_process_mark(job.task))

    def _record_failure(self, job: TaskState, exit_code: int, reason: str) -> None:
        """Mark a job as failed with `exit_code`, by `reason` and the end of its log; print the
        reason.
        """
        job.ended, job.code, job.row.state = True, exit_code, "failed"
        log = self._get_log_path(job.task)
        job.fault = (
            f"{job.task.name}: {reason}; the end of {log}:\n{read_log_tail(log, job.log_start)}"
        )
        self.screen.print_message(job.fault.partition("\n")[0])

    def _show_progress(self, jobs: Sequence[TaskState], redraw_now: bool = False) -> None:
        """Read the progress of all started jobs, and show the table by `Screen.show_jobs`."""
        for job in jobs:
            if job.active or job.ended:
                update_progress_row(job.task.folder, job.row)
        self.screen.show_jobs([*self.finished, *(job.row for job in jobs)], redraw_now)


def run_campaign(parsed: Parsed, commands_folder: Path) -> None:
    """Run a campaign: seed, rounds of experts, averaging and evaluation.

    Writes the runs, logs and OUT/forest.json below --output_dir (see `megamod.btm.tasks`) and
    prints progress and scores. With --dry_run only the jobs are printed.

    Args:
        parsed: all arguments of the command.
        commands_folder: folder of the programs of stages, `megamod/commands`.
    Raises:
        UserError: if the campaign cannot run, before anything is written; if another process holds
            the output folder; or if a job failed by a user error.
        PolicyStop, DistributedFailure, Interrupted: see `Driver.run_tasks`.
    """
    btm = parsed[0]
    campaign = build_campaign(parsed)
    hosts = (
        read_hostfile(btm.hostfile, require_selectable=True)
        if btm.hostfile
        else list_local_slots(btm.slots)
    )
    waves = plan_waves(campaign, parsed, hosts)
    if btm.dry_run:
        print(describe_waves(campaign, waves, hosts, commands_folder, btm.hostfile))
        return
    check_campaign_data(campaign, parsed)
    output = campaign.output
    for folder in ("jobs", "logs", task_builders.PRIORS, task_builders.EVALUATION):
        (output / folder).mkdir(parents=True, exist_ok=True)
    with lock_folder(output / "jobs", f"--output_dir {output}"):
        driver = Driver(commands_folder, output, hosts, btm.hostfile, btm.max_restarts)
        _run_waves(campaign, waves, driver)
    print(f"\n{format_campaign_scores(campaign, btm.in_one_world)}")
    print(f"\nthe forest of {', '.join(campaign.domains)} is {output / 'forest.json'}")


def _run_waves(campaign: Campaign, waves: "Sequence[Wave]", driver: Driver) -> None:
    """Print the token counts, then run the waves in order; SIGTERM and SIGINT go to the driver.

    Raises as `Driver.run_tasks` and `add_round_to_forest`.
    """
    print(campaign.format_token_counts(), flush=True)
    before = {n: signal.signal(n, driver.count_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for tasks, after in waves:
            driver.run_tasks(tasks)
            after()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Wave = tuple[list[Task], Callable[[], None]]
"""Tasks that run in parallel, and a function to call once all of them have finished."""


def plan_waves(campaign: Campaign, parsed: Parsed, hosts: HostSlots) -> list[Wave]:
    """Divide the tasks of a campaign into waves that run one after the other; nothing is started.

    They are the seed, each round of experts (with --in_one_world one job of all experts), and, if
    the flags ask for them, the average and the evaluation.

    Raises:
        UserError: if a job does not fit the hosts, or the seed's slots do not divide its batch.
    """
    btm, run = parsed[0], parsed[1]
    waves: list[Wave] = []
    if campaign.seed_steps:
        gpus = btm.seed_gpus
        if gpus is None:
            gpus = _count_usable_slots(campaign.batch // run.per_device_train_batch_size, hosts)
        check_job_fits(hosts, gpus, "--seed_gpus")
        if campaign.batch % (gpus * run.per_device_train_batch_size):
            raise UserError(
                f"--seed_gpus {gpus}: --global_batch_size {campaign.batch} is not a multiple of "
                f"{gpus} slots x --per_device_train_batch_size {run.per_device_train_batch_size}"
            )
        waves.append(([task_builders.make_seed_task(campaign, parsed, gpus)], lambda: None))
    if btm.in_one_world:
        world = task_builders.make_world_task(campaign, parsed)
        check_job_fits(hosts, world.gpus, "--in_one_world")
        waves.append(([world], lambda: add_round_to_forest(campaign, 0, in_one_world=True)))
    else:
        check_job_fits(hosts, btm.gpus_per_expert, "--gpus_per_expert")
        for number, round_ in enumerate(campaign.rounds):
            tasks = [
                task_builders.make_expert_task(campaign, parsed, number, domain)
                for domain in round_
            ]
            waves.append((tasks, lambda n=number: add_round_to_forest(campaign, n)))
    return waves + [
        ([task], lambda: None) for task in task_builders.make_final_tasks(campaign, parsed)
    ]


def describe_waves(
    campaign: Campaign,
    waves: Sequence[Wave],
    hosts: HostSlots,
    commands_folder: Path,
    hostfile: str | None,
) -> str:
    """Describe tokens, slots and commands of all jobs as text, for --dry_run; start nothing.

    Slots are those that the jobs of a wave get at once; 29500 stands for the port of a launcher.

    Args:
        waves: result of `plan_waves` for `campaign` and `hosts`.
        commands_folder, hostfile: see `Driver`.
    """
    lines = [campaign.format_token_counts()]
    for tasks, _ in waves:
        busy: list[Host] = []
        for task in tasks:
            placement = allocate_slots(hosts, busy, task.gpus)
            busy += placement or ()
            slots = format_include(placement) if placement else "waits for free slots"
            lines.append(f"\n{task.name}: {slots}")
            for stage in task.stages:
                if stage.done():
                    lines.append(f"  {stage.title}: done")
                    continue
                usable = placement or allocate_slots(hosts, (), task.gpus)
                command, _ = build_command(stage, usable, commands_folder, hostfile, 29500, usable)
                lines.append(f"  {stage.title}: {' '.join(command)}")
    return "\n".join(lines)


def _count_usable_slots(sequence_count: int, hosts: HostSlots) -> int:
    """Return the largest number of slots that divides `sequence_count` and fits the hosts."""
    total = sum(len(host.slots) for host in hosts)
    return next(
        n for n in range(total, 0, -1) if sequence_count % n == 0 and allocate_slots(hosts, (), n)
    )


def _raise_if_any_failed(failed_jobs: Sequence[TaskState]) -> None:
    """Raise one exception for all failed jobs, with their reasons; return if there are none.

    Raises:
        UserError: if a program ended with the exit code of a user error.
        PolicyStop: else, if one ended with that of a policy stop.
        DistributedFailure: otherwise.
    """
    if not failed_jobs:
        return
    codes = {job.code for job in failed_jobs}
    text = "\n".join(job.fault for job in failed_jobs)
    if USER_ERROR in codes:
        raise UserError(text)
    if POLICY_STOP in codes:
        raise PolicyStop(text)
    raise DistributedFailure(text)
