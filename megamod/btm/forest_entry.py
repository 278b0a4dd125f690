"""Forest entry of a finished run: its model, parents and training record."""

import hashlib
import json
from pathlib import Path
from typing import Literal

from megamod.errors import UserError
from megamod.run_recipe import read_run_recipe
from megamod.schemas import Items, Schema, read_checked_file
from megamod.states.adapter import is_adapter, resolve_seed_folder
from megamod.states.checkpoint_folder import (
    STATE,
    StateRecord,
    is_optimizer_file,
    list_checkpoints,
)
from megamod.states.forest import (
    Expert,
    Forest,
    Parent,
    raise_wrong_member,
    read_model_config,
)
from megamod.states.model_folder import is_model_folder
from megamod.tables import format_table

RECORD = "branch.json"  # in the folder of a branched run, see `BranchRecord`
WITHOUT_EFFECT = ("output_dir", "data", "deepspeed", "report_to", "logging_steps")
"""Settings of a run that do not affect its model, and so not its `config_digest`."""


class BranchRecord(Schema):
    """Content of branch.json: parents of a branched run, and the step that it starts at."""

    format: Literal[1] = 1
    parents: Items[Parent]
    start_update: int


def read_branch_record(run: Path) -> BranchRecord | None:
    """Read branch.json of a run; None if the run was not branched.

    Raises:
        UserError: if it is malformed.
    """
    file = run / RECORD
    return read_checked_file(file, BranchRecord) if file.is_file() else None


def make_forest_entry(path: Path, domain: str | None = None, member: str | None = None) -> Expert:
    """Make the forest entry of a run or of a bare model folder; the forest is not changed.

    Args:
        path: folder of a run, whose `model` is entered, or of a model.
        domain: name in the forest; None: `member`, or the only domain that the model was trained
            on.
        member: expert to take from a model with experts; None, or without effect, for a dense
            model.
    Raises:
        UserError: if the folder has no model, `member` is none of its experts, its domain is
            ambiguous or unknown, or a file of the run is malformed.
    """
    path = Path(path).absolute()
    model = path / "model" if is_model_folder(path / "model") else path
    config = read_model_config(model)
    # The configuration of an adapter is its seed's, which names the domains of the seed.
    domains = [] if is_adapter(model) else config.get("domains") or []
    has_experts = config.get("untie", "none") != "none"
    if has_experts and member not in domains:
        raise_wrong_member(f"--path {path}: is a model with experts", domains, member)
    if domain is None:
        domains = domains or _read_training_domains(path)
        domain = member if has_experts else domains[0] if len(domains) == 1 else None
    if domain is None:
        named = ", ".join(domains) or "no named domain"
        raise UserError(f"--domain is missing: the model in {model} was trained on {named}")
    record = {"parents": list_seed_parents(model)} | _read_training_record(path)
    return Expert(domain=domain, path=model, member=member if has_experts else None, **record)


def list_seed_parents(model: Path) -> tuple[Parent, ...]:
    """List the seed of an adapter as its only parent; empty for a model that is no adapter.

    Raises:
        UserError: if the adapter names no seed that can be found.
    """
    return (Parent(path=str(resolve_seed_folder(model)), weight=1.0),) if is_adapter(model) else ()


def _read_training_domains(folder: Path) -> list[str]:
    """Read the training domains of a run from run.yaml in `folder`; empty if it does not name them.

    For one of several independent models (`untie: all`), whose folder is named after its domain, it
    is that domain alone.

    Raises:
        UserError: if run.yaml is malformed.
    """
    settings = read_run_recipe(folder)
    names = settings.get("domains")
    domains = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [folder.name] if settings.get("untie") == "all" and folder.name in domains else domains


def format_forest(forest: Forest) -> str:
    """Format the experts of a forest as a table: origin, training and size of the weight files.

    The size of an expert in a model with experts includes the weights that all of them share.
    """
    rows = [("domain", "model", "parents", "from", "steps", "tokens", "bytes")]
    for expert in forest.experts:
        size = sum(file.stat().st_size for file in _list_expert_files(expert))
        parents = " + ".join(f"{p.weight:.3g} {Path(p.path).name}" for p in expert.parents)
        path = f"{expert.path} ({expert.member})" if expert.member else str(expert.path)
        numbers = (expert.start_update, expert.updates, expert.tokens, size)
        rows.append((expert.domain, path, parents or "-", *(f"{n:,}" for n in numbers)))
    return format_table(rows, right_aligned_columns=range(3, len(rows[0])))


def _list_expert_files(expert: Expert) -> list[Path]:
    """List the weight files of an expert; for a member of a DEMix model, its file and the shared
    one.
    """
    expert_file = f"expert_{expert.member}.safetensors"
    return [
        file
        for file in expert.path.glob("*.safetensors")
        if not is_optimizer_file(file)
        and (
            expert.member is None or file.name == expert_file or not file.name.startswith("expert_")
        )
    ]


def _read_training_record(run: Path) -> dict[str, object]:
    """Read fields of `Expert` from branch.json, the last checkpoint and run.yaml of a run.

    A missing file leaves its fields out, so a bare model folder has none. The configuration digest
    is that of the settings in run.yaml without those in `WITHOUT_EFFECT`.

    Raises:
        UserError: if a file is malformed.
    """
    record: dict[str, object] = {}
    if branched := read_branch_record(run):
        record["parents"] = branched.parents
        record["start_update"] = branched.start_update
    checkpoints = list_checkpoints(run / "checkpoints")
    if checkpoints and (checkpoints[-1] / STATE).is_file():
        saved = StateRecord.read(checkpoints[-1])
        record |= {
            "updates": saved.state.step,
            "tokens": sum(saved.state.tokens.values()),
            "gpus": saved.world_size,
            "seed": saved.settings.get("seed"),
            "data_digest": saved.settings.get("data digest"),
        }
    if settings := read_run_recipe(run):
        relevant = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
        text = json.dumps(relevant, sort_keys=True).encode()
        record["config_digest"] = hashlib.sha256(text).hexdigest()
    return record
