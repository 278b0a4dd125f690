"""Log of a run: metrics.jsonl, its curves, a console line per log step, a progress bar."""

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

from megamod.dist.process import get_rank
from megamod.files import format_json, write_atomic, write_json
from megamod.states.checkpoint_folder import TrainState
from megamod.states.metrics_file import parse_metrics_line
from megamod.train.objectives import BatchScore
from megamod.train.trackers import Tracker, open_tracker

logger = logging.getLogger(__name__)

DENSE_BF16_PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Peak bf16 rates without sparsity in FLOP/s, from NVIDIA's data sheets, by a part of the device's
name; the first match counts."""


class Monitor:
    """Collects the steps between two log lines and writes a record of them.

    Records of steps after `first_step` are dropped from the log first. Files and console are
    written by rank 0 only.

    Args:
        folder: folder of the run, which exists; gets metrics.jsonl and the files of a tracker.
        groups: names of the losses that are logged separately, such as domains.
        unit: items that a loss is the mean over: "tokens" or "examples".
        max_steps: last step of the run.
        flops_per_token: FLOPs of a forward and backward pass; None where that is not defined.
        peak_flops: FLOP/s of one device; None if unknown, and then no MFU is printed.
        report_to: tracker of the curves, see `open_tracker`.
        first_step: finished steps of a resumed run, else 0.
    Raises:
        UserError: on rank 0, if the tracker does not start.
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[str],
        unit: str,
        max_steps: int,
        flops_per_token: float | None,
        peak_flops: float | None,
        report_to: str,
        first_step: int,
    ):
        self.folder = Path(folder)
        self.groups = tuple(groups)
        self.unit = unit
        self.max_steps = max_steps
        self.flops_per_token = flops_per_token
        self.peak = peak_flops
        self.metrics: TextIO | None = None
        self.tracker: Tracker | None = None
        self.bar = None
        self.discard_steps()
        if get_rank() > 0:
            return
        self.first_step = first_step
        _drop_records(self.folder / "metrics.jsonl", lambda record: record["step"] > first_step)
        self.metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.tracker = open_tracker(report_to, self.folder, first_step)
        if sys.stderr.isatty():
            self.bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def discard_steps(self) -> None:
        """Discard the collected steps; the next interval starts now."""
        self.scored: list[BatchScore] = []
        self.norm: float | None = None
        self.rate = 0.0
        self.steps = 0
        self.data_seconds = 0.0
        self.step_seconds = 0.0
        self.since = time.perf_counter()

    def add_step(
        self,
        scores: Sequence[BatchScore],
        grad_norm: float | None,
        learning_rate: float,
        data_seconds: float,
        step_seconds: float,
    ) -> None:
        """Add a step without reading anything back from the device.

        Args:
            scores: scores of the step's micro-batches on this rank.
            grad_norm: None if the update was skipped.
            learning_rate: of the step.
            data_seconds, step_seconds: time from the start of the step until its batches were read,
                and until its end.
        """
        self.scored += scores
        self.norm, self.rate = grad_norm, learning_rate
        self.steps += 1
        self.data_seconds += data_seconds
        self.step_seconds += step_seconds
        if self.bar is not None:
            self.bar.update()

    def write_record(self, state: TrainState) -> None:
        """Write one record of the collected steps, summed over all ranks; collective.

        There must be at least one step. Adds the interval's items to `state.tokens` on every rank,
        and discards the steps.
        """
        sums = torch.stack([torch.stack((s.total, s.items)) for s in self.scored]).double().sum(0)
        dist.all_reduce(sums)
        further_metrics = self._average_further_metrics()
        interval_seconds = time.perf_counter() - self.since
        totals, items = sums.tolist()
        for group, count in zip(self.groups, items, strict=True):
            state.tokens[group] = state.tokens.get(group, 0) + round(count)
        per_second = sum(items) / interval_seconds
        record: dict[str, object] = {
            "step": state.step,
            self.unit: sum(state.tokens.values()),
            "loss": sum(totals) / max(1.0, sum(items)),
            "loss_by_domain": {
                group: total / count
                for group, total, count in zip(self.groups, totals, items, strict=True)
                if count
            },
            **further_metrics,
            "lr": self.rate,
            "grad_norm": self.norm,
            f"{self.unit}_per_second": per_second,
            "mfu": self._compute_mfu(per_second),
            "step_ms": 1e3 * self.step_seconds / self.steps,
            "data_ms": 1e3 * self.data_seconds / self.steps,
            "memory_bytes": _measure_peak_memory(),
            "skipped": state.skipped,
        }
        if get_rank() == 0:
            self._append_record(record, self._select_curves(record, further_metrics))
            self._log_progress(record, interval_seconds)
        self.discard_steps()

    def log_scores(
        self, step: int, scores: Mapping[str, float], split: str, kind: str = "perplexity"
    ) -> None:
        """Log the scores of an evaluation, whose time does not count in the interval.

        At `first_step` they replace those of the same split and kind, as a resumed run repeats an
        evaluation.

        Args:
            step: finished steps.
            scores: by domain or task.
            split: name of the evaluated data, such as "valid".
            kind: name of the score.
        """
        if get_rank() == 0:
            if step == self.first_step:
                self._drop_evaluation(step, split, kind)
            tag = {"perplexity": "ppl"}.get(kind, kind)
            tags = {f"{split}/{name}/{tag}": value for name, value in scores.items()}
            self._append_record({"step": step, kind: dict(scores), "split": split}, tags)
            text = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self._log_line(f"step {step}  {split} {kind}  {text}")
        self.since = time.perf_counter()

    def _drop_evaluation(self, step: int, split: str, kind: str) -> None:
        """Drop the scores of an evaluation that a resumed run repeats, from metrics.jsonl.

        Args:
            step: number of finished steps.
            split: part of the data that was evaluated.
            kind: name of the record's field with the scores.
        """
        key = {"step": step, "split": split}
        path = self.folder / "metrics.jsonl"
        self._close_metrics()
        _drop_records(path, lambda record: kind in record and record.items() >= key.items())
        self.metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """Close metrics.jsonl, progress bar and tracker; nothing can be logged afterwards."""
        if self.metrics is not None:
            self._close_metrics()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close()

    def _close_metrics(self) -> None:
        """Close metrics.jsonl, with the text that failed writes left; a disk error is logged."""
        try:
            self.metrics.close()
        except OSError as error:
            self._report_disk_error(error)

    def _average_further_metrics(self) -> dict[str, float]:
        """Average the objective's further metrics over all steps and ranks; collective.

        A metric without items on any rank is not among the result.
        """
        names = list(self.scored[0].further)
        if not names:
            return {}
        rows = [torch.stack([s.further[name] for name in names]) for s in self.scored]
        sums = torch.stack(rows).double().sum(0)
        dist.all_reduce(sums)
        return {
            name: total / count
            for name, (total, count) in zip(names, sums.tolist(), strict=True)
            if count
        }

    def _compute_mfu(self, tokens_per_second: float) -> float | None:
        """Compute the model FLOP utilisation, 0 to 1; None if a figure is unknown."""
        if self.peak is None or self.flops_per_token is None:
            return None
        return tokens_per_second * self.flops_per_token / (self.peak * dist.get_world_size())

    def _append_record(self, record: Mapping[str, object], tags: Mapping[str, float]) -> None:
        """Append a record to metrics.jsonl, and points to the curves; a disk error is logged.

        `tags` maps names of curves to values.
        """
        try:
            self.metrics.write(format_json(record) + "\n")
            self.metrics.flush()  # after an error the text stays in the buffer for the next call
            if self.tracker is not None:
                self.tracker.write(record["step"], tags)
        except OSError as error:  # losing a line of the log must not end the run
            self._report_disk_error(error)

    def _report_disk_error(self, error: OSError) -> None:
        """Log that metrics.jsonl cannot be written; training continues without its lines."""
        logger.error("%s: cannot be written: %s", self.folder / "metrics.jsonl", error.strerror)

    def _select_curves(
        self, record: Mapping[str, object], further_metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Select the numbers of a record that a tracker draws, by tag such as `train/loss/law`.

        `further_metrics` are names of the record's other metrics, such as those of an objective.
        """
        names = ("loss", "lr", "grad_norm", f"{self.unit}_per_second", *further_metrics)
        tags = {f"train/{name}": record[name] for name in names}
        tags |= {f"train/loss/{g}": value for g, value in record["loss_by_domain"].items()}
        return {tag: value for tag, value in tags.items() if value is not None}

    def _log_progress(self, record: Mapping[str, object], interval_seconds: float) -> None:
        """Log a line about a record, with an estimate of the time left (ETA).

        `interval_seconds` is the time since the last record.
        """
        seconds = int((self.max_steps - record["step"]) * interval_seconds / self.steps)
        mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
        norm = "skipped" if record["grad_norm"] is None else f"{record['grad_norm']:.3g}"
        self._log_line(
            f"step {record['step']}/{self.max_steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.3g}  norm {norm}  "
            f"{record[f'{self.unit}_per_second']:,.0f} {self.unit}/s  MFU {mfu}  "
            f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        )

    def _log_line(self, line: str) -> None:
        """Log a line of text, above the progress bar if there is one."""
        with tqdm.external_write_mode(file=sys.stderr):  # redraws the bar below
            logger.info("%s", line)


def find_peak_flops(device_name: str) -> float | None:
    """Find the dense bf16 FLOP/s of a device by its name; None for one that is not in the table."""
    return next((peak for part, peak in DENSE_BF16_PEAK.items() if part in device_name), None)


def write_environment(path: Path) -> None:
    """Write versions and hardware of a run to the JSON file `path`.

    Of the environment variables it holds only three, which cannot be secrets.
    """
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "triton", "megamod")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    write_json(
        path,
        {
            # torch.__version__ also names the build.
            "versions": versions
            | {"python": platform.python_version(), "torch": torch.__version__},
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            if cuda
            else ["cpu"],
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "variables": {
                name: os.environ[name]
                for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
                if name in os.environ
            },
        },
    )


def _drop_records(path: Path, drop: Callable[[dict], bool]) -> None:
    """Drop the records for which `drop` is True from a metrics file; a missing one is passed over.

    Damaged lines are moved to PATH.damaged, and a disk error is logged: a log stops no run.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        kept, damaged = [], []
        for line in lines:
            record = parse_metrics_line(line)
            if record is not None:
                kept += [] if drop(record) else [line if line.endswith(b"\n") else line + b"\n"]
            elif line.endswith(b"\n"):  # otherwise a kill cut it short
                damaged.append(line)
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            logger.warning("%s: %d damaged lines are moved to %s", path, len(damaged), aside)
            with open(aside, "ab") as file:
                file.writelines(damaged)
        if len(kept) < len(lines):
            write_atomic(path, b"".join(kept))
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.error("%s: cannot be rewritten: %s", path, error.strerror)


def _measure_peak_memory() -> int:
    """Measure the peak bytes on the GPU, or resident bytes of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
