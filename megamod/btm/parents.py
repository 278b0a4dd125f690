"""Parents of a new expert: checkpoints and model folders, resolved from paths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError
from megamod.mixture.prior import read_prior
from megamod.states.adapter import is_adapter
from megamod.states.checkpoint_folder import (
    StateRecord,
    is_checkpoint,
    list_checkpoints,
    parse_checkpoint_step,
)
from megamod.states.forest import open_forest, raise_wrong_member, read_model_config
from megamod.states.manifest import find_file_faults
from megamod.states.model_folder import is_model_folder, list_model_folders


@dataclass(frozen=True)
class ParentModel:
    """A parent: a checkpoint or a model folder, and the selected expert.

    Attributes:
        folder: the checkpoint or model folder.
        member: the expert, in a model with experts; None for a dense model.
        step: training step of a checkpoint whose optimizer the new expert can keep; None for a
            model folder or an adapter's checkpoint.
        world: the domain's subfolder in a checkpoint of independent models of one job; None for any
            other folder.
    """

    folder: Path
    member: str | None = None
    step: int | None = None
    world: str | None = None

    @property
    def model(self) -> Path:
        """Folder that holds its config.json."""
        return self.folder / self.world if self.world else self.folder


def find_parent(
    path: str | Path,
    *,
    step: int | None = None,
    step_share: float | None = None,
    member: str | None = None,
) -> ParentModel:
    """Resolve a path to a checkpoint or model folder.

    Args:
        path: a run, one of its checkpoints, or a model folder.
        step: select the run's checkpoint nearest to this step; -1 or None: the last.
        step_share: select the checkpoint nearest to this fraction of the last step; wins over
            `step`.
        member: a domain, for models with experts and for independent models of one job; None for a
            single dense model.
    Raises:
        UserError: if the path is none of these, the checkpoint is incomplete, `step` or
            `step_share` is given for a path that is no run, or `member` does not fit the model.
    """
    path = Path(path)
    checkpoint = select_checkpoint(path, step=step, step_share=step_share)
    if checkpoint is None:
        if not is_model_folder(path):
            raise UserError(f"--parents {path}: is no run, no checkpoint and no model folder")
        if step is not None or step_share is not None:
            raise UserError(
                f"--parents {path}: is a model folder, so --step and --share do not apply"
            )
        return ParentModel(path, _resolve_member(path, path, member))
    faults = find_file_faults(checkpoint)
    if faults:
        raise UserError(f"--parents {checkpoint}: is not a complete checkpoint: {faults[0]}")
    if is_model_folder(checkpoint):
        return ParentModel(
            checkpoint, _resolve_member(checkpoint, path, member), _read_resumable_step(checkpoint)
        )
    domains = [folder.name for folder in list_model_folders(checkpoint)]
    if member not in domains:
        raise_wrong_member(f"--parents {path}: holds independent models", domains, member)
    return ParentModel(checkpoint, None, _read_resumable_step(checkpoint / member), member)


def _read_resumable_step(checkpoint: Path) -> int | None:
    """Read the step of a checkpoint whose optimizer an expert can keep; None if it is an adapter's.

    The optimizer of an adapter has a state for the adapter alone, and an expert is a whole model.

    Raises:
        UserError: if state.json is missing or malformed.
    """
    return None if is_adapter(checkpoint) else StateRecord.read(checkpoint).state.step


def select_checkpoint(
    path: Path, *, step: int | None = None, step_share: float | None = None
) -> Path | None:
    """Select a checkpoint of a run; `path` itself if it is one; None if `path` is neither.

    Args:
        step, step_share: see `find_parent`. Of two checkpoints that are equally near the earlier
            one is selected, for a share above one half the later one.
    Raises:
        UserError: if the run has no checkpoint, or `path` is a checkpoint and step or share is set.
    """
    if is_checkpoint(path):
        if step is not None or step_share is not None:
            raise UserError(
                f"--parents {path}: is a single checkpoint, so --step and --share do not apply"
            )
        return path
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        if (path / "checkpoints").is_dir():
            raise UserError(f"--parents {path}: the run has no checkpoint yet")
        return None
    steps = [parse_checkpoint_step(checkpoint) for checkpoint in checkpoints]
    if step_share is not None:
        target, prefer_later = step_share * steps[-1], step_share > 0.5
    else:
        target, prefer_later = (steps[-1] if step in (None, -1) else step), False
    nearest = min(
        range(len(steps)), key=lambda n: (abs(steps[n] - target), -n if prefer_later else n)
    )
    return checkpoints[nearest]


def select_forest_parents(
    forest: str | Path,
    *,
    only_domains: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    prior: str | Path | None = None,
    topk: int = 0,
) -> tuple[list[ParentModel], list[float]]:
    """Select experts of a forest as parents, with their weights in an average.

    Args:
        only_domains: domains of the experts; None for all.
        weights: in the order of the domains; None: equal ones. Without effect if `prior` is given.
        prior: file with the weights, see `read_prior`; None: those in `weights`.
        topk: select only this many experts, those with the largest weights; 0 for all.
    Returns:
        the parents without those of weight 0, and their weights as they are, not scaled to sum 1.
    Raises:
        UserError: if the forest or the prior cannot be read, a domain is not in the forest, the
            weights do not fit, or `topk` is above the number of experts.
    """
    opened = open_forest(forest)
    experts = {expert.domain: expert for expert in opened.experts}
    domains = list(only_domains or experts)
    for domain in domains:
        if domain not in experts:
            raise UserError(
                f"--forest {forest}: no expert of domain {domain!r}; there are {', '.join(experts)}"
            )
    if prior is not None:
        weights = list(read_prior(Path(prior), domains).weights)
    weights = resolve_parent_weights(weights, len(domains))
    if topk > len(domains):
        raise UserError(f"--topk {topk}: there are only {len(domains)} experts")
    selected = select_largest_weights(weights, topk)
    sources = [ParentModel(experts[domains[i]].path, experts[domains[i]].member) for i in selected]
    return sources, [weights[i] for i in selected]


def select_largest_weights(weights: Sequence[float], count: int = 0) -> list[int]:
    """Return the ascending indices of the `count` largest weights; weights of 0 are skipped.

    Of equal weights the earlier one is selected. A `count` of 0 selects all.
    """
    largest = sorted(range(len(weights)), key=lambda i: -weights[i])[: count or None]
    return [i for i in sorted(largest) if weights[i]]


def resolve_parent_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one finite weight per parent; equal weights for None.

    Args:
        weights: as the user gave them; they need not sum to 1.
        count: number of parents.
    Raises:
        UserError: for another number of weights, one that is not finite, or a sum of 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} weights for {count} parents")
    if not all(map(math.isfinite, weights)) or not math.fsum(weights):
        raise UserError(f"--weights {' '.join(map(str, weights))}: must be finite, sum not 0")
    return list(weights)


def _resolve_member(folder: Path, path: Path, member: str | None) -> str | None:
    """Return `member` if the model has this expert, None for a dense model.

    Args:
        folder: folder of the model.
        path: as the user named it, for messages.
    Raises:
        UserError: if the model has no such expert, or is dense and a member is named.
    """
    config = read_model_config(folder)
    if config.get("untie", "none") == "none":
        if member is not None:
            raise UserError(f"--member {member}: {path} is one dense model, without members")
        return None
    if member not in config["domains"]:
        raise_wrong_member(f"--parents {path}: is a model with experts", config["domains"], member)
    return member
