"""First checkpoint of a new expert, built from the checkpoints of its parents.

`megamod forest branch` writes RUN/checkpoints/step-N, from which `megamod pretrain --output_dir
RUN` resumes like any interrupted run. With one parent, the optimizer state and its step are kept,
and so is the position in the learning-rate schedule; only the data start over. The average of
several parents, or a parent without an optimizer, starts at step 0 with a new optimizer.

Source: Li et al. 2022 (Branch-Train-Merge), section 3.1, and its release for the optimizer state.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from megamod.btm.forest_entry import RECORD
from megamod.btm.parents import ParentModel
from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.files import create_folder_atomically, link_file, write_json
from megamod.folder_lock import lock_folder
from megamod.merging.merge import average_folders
from megamod.names import check_name
from megamod.states.adapter import is_adapter
from megamod.states.checkpoint_folder import (
    KINDS,
    STATE,
    StateRecord,
    TrainState,
    build_optimizer_path,
    format_checkpoint_name,
    list_checkpoints,
    list_optimizer_files,
    read_fragment_ranges,
    read_fragments,
    write_fragments,
)
from megamod.states.dense import make_dense_config, write_dense_model
from megamod.states.forest import Parent, read_model_config
from megamod.states.manifest import MANIFEST, make_digest_entries, write_manifest
from megamod.states.stream import ModelFolder
from megamod.states.weights import read_weights

SCHEDULE = ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps")
"""Settings that a branched run shares with its parent, because they define the schedule."""
OPTIMIZER = ("optim", "muon_learning_rate")
"""Further settings that it shares. Older runs, which had no choice, say nothing of them."""

# Files of a parent that are not copied to the start model.
_SKIPPED = (MANIFEST, STATE, "config.json", "README.md", "merge.json", RECORD)


def write_branch_checkpoint(
    parents: Sequence[ParentModel],
    weights: Sequence[float],
    domains: Sequence[str],
    run_folder: Path,
    *,
    in_one_job: bool = False,
    learning_rate: float | None = None,
) -> Path:
    """Write the first checkpoint of an expert, RUN/checkpoints/step-N, and RUN/branch.json.

    A single parent that is a checkpoint with optimizer state gives its step N, optimizer and
    schedule; else N is 0 and the optimizer is new. RUN/branch.json names the parents with their
    shares. If the checkpoint cannot be written, folders that were created for it are deleted.

    Args:
        parents: one parent, or several to be averaged.
        weights: weight of each parent in the average; they are divided by their sum.
        domains: the new expert's domain; several only with `in_one_job`.
        run_folder: folder of the new run, created if needed.
        in_one_job: write the layout of independent models in one job (`--untie all`).
        learning_rate: peak of the new run's schedule, at the same place in it; None: that of the
            parent. Without effect if the optimizer is new.
    Returns:
        the folder of the checkpoint.
    Raises:
        UserError: if a domain's name cannot be a folder's, there are several without `in_one_job`,
            the run has checkpoints already or is in use, the parents are not compatible, or the
            parent's optimizer lacks the state of some weights.
    """
    run_folder = Path(run_folder)
    if list_checkpoints(run_folder / "checkpoints"):
        raise UserError(
            f"--output_dir {run_folder}: has checkpoints already; a branch starts a new run"
        )
    if len(domains) != 1 and not in_one_job:
        raise UserError(f"--domain: one expert has one domain, not {', '.join(domains)}")
    for domain in domains:
        check_name(domain, "--domain")
    keeps_optimizer = len(parents) == 1 and parents[0].step is not None
    step = parents[0].step if keeps_optimizer else 0
    final = run_folder / "checkpoints" / format_checkpoint_name(step)
    total = math.fsum(weights)
    parent_records = [
        Parent(path=_format_parent_name(parent), weight=float(weight) / total).model_dump()
        for parent, weight in zip(parents, weights, strict=True)
    ]
    with (
        _remove_new_folders_on_failure(final.parent),
        lock_folder(run_folder),
        create_folder_atomically(final) as folder,
    ):
        base = folder / ".start"
        _write_start_model(parents, weights, base)
        record = _read_parent_state(parents[0]) if keeps_optimizer else StateRecord(branched=True)
        if keeps_optimizer and learning_rate is not None:
            record.settings["learning_rate"] = learning_rate
        for number, domain in enumerate(domains):
            target = folder / domain if in_one_job else folder
            prefix = f"{domain}:" if in_one_job else ""
            target.mkdir(exist_ok=True)
            _link_start_model(base, target, domain)
            record.write(target)
            if keeps_optimizer:
                _copy_optimizer(parents[0], folder, number, prefix)
                _check_optimizer_complete(parents[0], base, folder, prefix)
            else:
                _write_new_optimizer(base, build_optimizer_path(folder, number), prefix)
        shutil.rmtree(base)
        files = [file for file in folder.rglob("*") if file.is_file()]
        write_manifest(folder, make_digest_entries(folder, files))
        # Before the checkpoint is renamed, so that no checkpoint exists without its record.
        write_json(
            run_folder / RECORD, {"format": 1, "parents": parent_records, "start_update": step}
        )
    return final


@contextmanager
def _remove_new_folders_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder`, and parent folders that did not exist before, if the block fails.

    Folders that are not empty stay. The error of the block is raised again.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # another process may have written into it
                path.rmdir()
        raise


def _write_start_model(
    parents: Sequence[ParentModel], weights: Sequence[float], start_folder: Path
) -> None:
    """Write the start model, from which the expert branches, as a dense folder.

    It is the average of several parents by `weights`, in float32, or a copy of the only one; a
    parent that is an adapter is merged into its seed, in float32.

    Args:
        parents: the parents, at least one.
        weights: weight of each parent in the average.
        start_folder: created; must not exist.
    Raises:
        UserError: if weights are missing, or the parents are not compatible.
    """
    if len(parents) > 1 or is_adapter(parents[0].model):
        # In float32, because the optimizer's master weights are copied from it.
        average_folders(
            [(source.model, source.member) for source in parents],
            weights,
            start_folder,
            out_dtype="float32",
            origin="--weights",
        )
        return
    (source,) = parents
    start_folder.mkdir()
    write_dense_model(source.model, source.member, start_folder, _SKIPPED)


def _format_parent_name(source: ParentModel) -> str:
    """Format a parent's absolute path, followed by the expert in parentheses if one is selected."""
    path = str(source.model.absolute())
    return f"{path} ({source.member})" if source.member else path


def _link_start_model(start_folder: Path, target: Path, domain: str) -> None:
    """Link or copy the files of the start model into the existing folder `target`.

    The new config.json names `domain` as the only training domain. README.md, merge.json and the
    manifest are not copied: the checkpoint has a manifest of its own.

    Args:
        start_folder: dense model folder that `_write_start_model` wrote.
        target: folder of the new checkpoint, or its subfolder of one domain.
        domain: domain of the new expert.
    """
    for file in start_folder.iterdir():
        if file.name not in ("config.json", "README.md", "merge.json", MANIFEST):
            link_file(file, target / file.name)
    write_json(target / "config.json", make_dense_config(read_model_config(start_folder), [domain]))


def _read_parent_state(source: ParentModel) -> StateRecord:
    """Read a parent's state.json as the state of a branch's first checkpoint.

    The step, the optimizer's count of updates, the loss scaler and the settings in `SCHEDULE` and
    `OPTIMIZER` stay; the position in the data and the token counts start at 0.

    Args:
        source: the parent, a checkpoint with optimizer state.
    Returns:
        the parent's record with new token counts and position, marked as branched.
    Raises:
        UserError: if state.json is missing or malformed.
    """
    record = StateRecord.read(source.model)
    settings = {name: record.settings.get(name) for name in SCHEDULE}
    settings |= {name: record.settings[name] for name in OPTIMIZER if name in record.settings}
    return replace(
        record, state=TrainState(step=record.state.step), settings=settings, branched=True
    )


def _copy_optimizer(source: ParentModel, folder: Path, number: int, prefix: str) -> None:
    """Copy the parent's master weights and moments to optimizer files of the new checkpoint.

    Copied are the parameters that all experts share and those of the selected expert, under their
    names in a dense model.

    Args:
        source: the parent, a checkpoint with optimizer state.
        folder: the new checkpoint.
        number: index of the new expert, in the names of the files.
        prefix: text before every name: "DOMAIN:" for independent models in one job, else "".
    """
    source_prefix = f"{source.world}:" if source.world else ""

    def is_selected(name: str) -> bool:
        """Return True for a parameter that all experts share or that is the selected expert's."""
        return name.startswith(source_prefix) and parse_expert_domain(name) in (None, source.member)

    for part, file in enumerate(list_optimizer_files(source.folder)):
        renamed = {
            prefix + convert_to_dense_name(name.removeprefix(source_prefix)): (start, tensors)
            for name, start, tensors in read_fragments(file, is_selected)
        }
        if renamed:
            write_fragments(build_optimizer_path(folder, number, part), renamed)


def _check_optimizer_complete(
    source: ParentModel, start_folder: Path, folder: Path, prefix: str
) -> None:
    """Check that the copied optimizer state in `folder` covers all floating-point weights.

    A parent that trained only some of its weights has no optimizer state for the others.

    Args:
        source: the parent that the state was copied from, for the message.
        start_folder: folder of the start model.
        folder: the new checkpoint.
        prefix: see `_copy_optimizer`.
    Raises:
        UserError: naming the first weight that lacks state.
    """
    sizes = {
        name: sum(stop - start for start, stop, _ in ranges)
        for name, ranges in read_fragment_ranges(folder).items()
    }
    for name, spec in ModelFolder(start_folder).tensors.items():
        if spec.dtype.is_floating_point and sizes.get(prefix + name) != spec.numel:
            raise UserError(
                f"--parents {source.folder}: the optimizer holds {sizes.get(prefix + name, 0)} of "
                f"the {spec.numel} elements of {name}; to start with a new optimizer, name the "
                "run's model folder"
            )


def _write_new_optimizer(start_folder: Path, path: Path, prefix: str) -> None:
    """Write the weights of the start model as float32 master weights to the optimizer file `path`.

    Moments are not written: a run that resumes takes missing ones as zero.

    Args:
        start_folder: folder of the start model.
        path: optimizer file of the new checkpoint.
        prefix: see `_copy_optimizer`.
    """
    fragments = {}
    for name, weight in read_weights(start_folder).items():
        if weight.is_floating_point():
            fragments[prefix + name] = 0, {KINDS[0]: weight.float().reshape(-1)}
    write_fragments(path, fragments)
