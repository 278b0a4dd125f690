"""Figures of a cell as a JSON file, EVIDENCE/STUDY/CELL.json; tables are made from these alone.

{"format": 1, "study": "ladder_1k", "cell": "dense.t80.s1", "arm": "dense", "rung": "t80",
 "seed": 1, "config": {settings and digests of the inputs}, "config_digest": "...",
 "code": {"version": "...", "digest": "..."}, "machine": {...}, "finished": "2026-01-31",
 "seconds": 342.0, "processor_seconds": 340.1,
 "scores": {ROW: {VALUE: number}}, "details": {...}}
"""

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megamod.errors import UserError
from megamod.files import format_json, write_json
from megamod.runs.code_digest import compute_code_digest
from megamod.runs.studies.study_file import Cell, Study
from megamod.schemas import Number, Schema, read_checked_file
from megamod.version import __version__

TOLERANCE = 1e-4  # relative, of scores that are computed again on a machine of the same class
Scores = dict[str, dict[str, float]]
"""By row and value, such as {"own": {"perplexity": 36.5}}."""
Record = dict[str, object]
"""Content of a cell's file, see `CellRecord`."""


@dataclass
class Figures:
    """Result of a cell's run: `scores` by row and value, and `details` that tables do not need."""

    scores: Scores
    details: dict[str, object] = field(default_factory=dict)


class CellRecord(Schema):
    """Content of a cell's file.

    Attributes:
        config: kind, seed, settings, and digests of the inputs; `config_digest`: digest of all
            these.
        finished: date in UTC.
        seconds: duration by the clock; `processor_seconds`: processor time of this process.
    """

    format: Literal[1]
    study: str
    cell: str
    arm: str
    rung: str
    seed: int
    config: dict[str, Any]
    config_digest: str
    code: dict[str, str]
    machine: dict[str, Any]
    finished: str
    seconds: Number
    processor_seconds: Number
    scores: dict[str, dict[str, Any]]
    details: dict[str, Any]


def make_cell_record(
    study: Study,
    cell: Cell,
    figures: Figures,
    inputs: Mapping[str, object],
    seconds: float,
    processor_seconds: float,
) -> Record:
    """Return the content of a cell's file, with the machine and the code that made it.

    Args:
        study: the study of the cell.
        cell: the cell that was run.
        figures: result of the cell.
        inputs: digests of the data, part of the configuration.
        seconds: by the clock.
        processor_seconds: processor time of this process.
    """
    config = make_configuration(study, cell, inputs)
    return {
        "format": 1,
        "study": study.name,
        "cell": cell.name,
        "arm": cell.arm,
        "rung": cell.rung,
        "seed": cell.seed,
        "config": config,
        "config_digest": compute_json_digest(config),
        "code": {"version": __version__, "digest": compute_code_digest()[:16]},
        "machine": {
            "processor": _read_cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),
        "scores": figures.scores,
        "details": figures.details,
    }


def make_configuration(study: Study, cell: Cell, inputs: Mapping[str, object]) -> dict[str, object]:
    """Make the configuration of a cell: all that decides its figures.

    Args:
        inputs: digests of the inputs by name.
    Returns:
        kind, seed, settings and `inputs`.
    """
    return {"kind": study.file.kind, "seed": cell.seed, **cell.settings, "inputs": dict(inputs)}


def compute_json_digest(value: object) -> str:
    """Compute a digest of a JSON value, 16 hexadecimal digits; the order of keys has no effect."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_cell_record(folder: Path, record: Record) -> None:
    """Write a cell's file into `folder`, which is created if needed; an earlier one is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{record['cell']}.json", json.loads(format_json(record)))


def read_cell_record(folder: Path, cell: Cell) -> Record | None:
    """Read a cell's file in `folder`; return None if there is none.

    Raises:
        UserError: if it is malformed, or of other settings than the study has now.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    record = read_checked_file(path, CellRecord).model_dump()
    recorded_settings = {
        k: v for k, v in record["config"].items() if k not in ("kind", "seed", "inputs")
    }
    settings = json.loads(json.dumps(cell.settings))
    if recorded_settings != settings:
        keys = sorted(
            k
            for k in recorded_settings.keys() | settings.keys()
            if recorded_settings.get(k) != settings.get(k)
        )
        text = "; ".join(
            f"{k}: {recorded_settings.get(k)!r} then, {settings.get(k)!r} now" for k in keys
        )
        raise UserError(f"{path} has figures of other settings ({text}); remove it to run it anew")
    return record


def find_largest_difference(before: Record, now: Record) -> tuple[float, str]:
    """Find the largest relative difference between the scores of two records of one cell.

    Speeds and times are not compared.

    Returns:
        the difference, infinite if `now` lacks a score of `before`, and the row and value that have
            it.
    """
    worst, where = 0.0, "no score"
    for row, values in before["scores"].items():
        for name, value in values.items():
            if name in ("seconds", "instances_per_second"):
                continue
            other = now["scores"].get(row, {}).get(name)
            if other is None:
                return float("inf"), f"{row} {name}"
            difference = abs(value - other) / max(abs(value), 1e-12)
            if difference >= worst:
                worst, where = difference, f"{row} {name}"
    return worst, where


def _read_cpu_name() -> str:
    """Read the model name of the first CPU; outside of Linux what `platform.processor` returns."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
