"""What a finished run adds to a forest: its model, and what is known of where it came from."""

import hashlib
import json
from pathlib import Path

import yaml

from megamod.errors import UserError
from megamod.states.forest import Expert, Forest, Parent, read_config
from megamod.states.manifest import list_checkpoints

RECORD = "branch.json"  # in the folder of a branched run: its parents and first step
WITHOUT_EFFECT = ("output_dir", "data", "deepspeed", "report_to", "logging_steps")
"""Settings of a run that say nothing about its model."""


def expert_of(path: Path, domain: str | None = None, member: str | None = None) -> Expert:
    """The entry for a run, or for a bare model folder.

    Args:
        domain: name in the forest; None: the one that the model was trained on.
        member: an expert of a model with experts.
    Raises:
        UserError: if there is no model, or its domain is not plain.
    """
    path = Path(path).absolute()
    model = path / "model" if (path / "model" / "config.json").is_file() else path
    config = read_config(model)
    known = config.get("domains") or []
    apart = config.get("untie", "none") != "none"
    if apart and member not in known:
        raise UserError(
            f"--path {path}: is a model with experts; --member must be one of {', '.join(known)}, "
            f"not {member!r}"
        )
    if domain is None:
        domain = member if apart else known[0] if len(known) == 1 else None
    if domain is None:
        told = ", ".join(known) or "none named"
        raise UserError(f"--domain is missing: the model in {model} was trained on {told}")
    return Expert(domain, model, member if apart else None, **_history(path))


def table(forest: Forest) -> str:
    """The experts as aligned text; the size of a member includes what it shares with others."""
    rows = [("domain", "model", "parents", "from", "steps", "tokens", "bytes")]
    for expert in forest.experts:
        size = sum(file.stat().st_size for file in _weight_files(expert))
        parents = " + ".join(f"{p.weight:.3g} {Path(p.path).name}" for p in expert.parents)
        where = f"{expert.path} ({expert.member})" if expert.member else str(expert.path)
        numbers = (expert.start_update, expert.updates, expert.tokens, size)
        rows.append((expert.domain, where, parents or "-", *(f"{n:,}" for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _weight_files(expert: Expert) -> list[Path]:
    """The files that an expert is read from."""
    own = f"expert_{expert.member}.safetensors"
    return [
        file
        for file in expert.path.glob("*.safetensors")
        if not file.name.startswith("optimizer-")
        and (expert.member is None or file.name == own or not file.name.startswith("expert_"))
    ]


def _history(run: Path) -> dict[str, object]:
    """What a run's folder tells about its last checkpoint; nothing for a bare model."""
    told: dict[str, object] = {}
    record = run / RECORD
    if record.is_file():
        branched = json.loads(record.read_text(encoding="utf-8"))
        told["parents"] = tuple(Parent(**parent) for parent in branched["parents"])
        told["start_update"] = branched["start_update"]
    there = list_checkpoints(run / "checkpoints")
    if there and (there[-1] / "state.json").is_file():
        saved = json.loads((there[-1] / "state.json").read_text(encoding="utf-8"))
        told |= {
            "updates": saved["state"]["step"],
            "tokens": sum(saved["state"]["tokens"].values()),
            "gpus": saved["world_size"],
            "seed": saved["settings"].get("seed"),
            "data_digest": saved["settings"].get("data digest"),
        }
    if (run / "run.yaml").is_file():
        settings = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
        text = json.dumps(kept, sort_keys=True).encode()
        told["config_digest"] = hashlib.sha256(text).hexdigest()
    return told
