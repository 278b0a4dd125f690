"""The models that a new expert can grow from, as users name them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamod.errors import UserError
from megamod.mixture.prior import read_prior
from megamod.states.forest import open_forest, read_config
from megamod.states.manifest import MANIFEST, list_checkpoints, verify


@dataclass(frozen=True)
class Source:
    """A parent: a checkpoint (with `step`) or a model folder, and the expert in it that is meant.

    `world`: the domain's folder in a checkpoint of independent models of one job.
    """

    folder: Path
    member: str | None = None
    step: int | None = None
    world: str | None = None

    @property
    def model(self) -> Path:
        """Where its config.json lies."""
        return self.folder / self.world if self.world else self.folder


def find_source(
    path: str | Path,
    *,
    step: int | None = None,
    share: float | None = None,
    member: str | None = None,
) -> Source:
    """The checkpoint or model that a user means by a path.

    Args:
        path: a run, one of its checkpoints, or a model folder.
        step: take the run's checkpoint nearest to this step; -1 the last, as with None.
        share: take the one nearest to this share of the last one's step.
        member: a domain, for models with experts and for independent models of one job.
    Raises:
        UserError: if there is no such thing, or the checkpoint is not whole.
    """
    path = Path(path)
    chosen = choose_checkpoint(path, step=step, share=share)
    if chosen is None:
        if not (path / "config.json").is_file():
            raise UserError(f"--parents {path}: is no run, no checkpoint and no model folder")
        if step is not None or share is not None:
            raise UserError(f"--parents {path}: is a model folder, there is no step to choose")
        return Source(path, _member_of(path, path, member))
    faults = verify(chosen)
    if faults:
        raise UserError(f"--parents {chosen}: is not a whole checkpoint: {faults[0]}")
    if (chosen / "config.json").is_file():
        return Source(chosen, _member_of(chosen, path, member), _step_of(chosen))
    worlds = sorted(one.parent.name for one in chosen.glob("*/config.json"))
    if member not in worlds:
        raise UserError(
            f"--parents {path}: holds independent models; --member must be one of "
            f"{', '.join(worlds)}, not {member!r}"
        )
    return Source(chosen, None, _step_of(chosen / member), member)


def choose_checkpoint(
    path: Path, *, step: int | None = None, share: float | None = None
) -> Path | None:
    """A checkpoint of a run, or the checkpoint that `path` is; None for a model folder.

    Ties between two go to the earlier for shares up to one half, else to the later; for a step, to
    the earlier.

    Raises:
        UserError: if the run has no checkpoint, or a single one is given with a choice.
    """
    if (path / "state.json").is_file() or (path / MANIFEST).is_file():
        if step is not None or share is not None:
            raise UserError(f"--parents {path}: is one checkpoint, there is no step to choose")
        return path
    there = list_checkpoints(path / "checkpoints")
    if not there:
        if (path / "checkpoints").is_dir():
            raise UserError(f"--parents {path}: the run has no checkpoint yet")
        return None
    steps = [int(one.name[5:]) for one in there]
    if share is not None:
        wanted, later = share * steps[-1], share > 0.5
    else:
        wanted, later = (steps[-1] if step in (None, -1) else step), False
    nearest = min(range(len(steps)), key=lambda n: (abs(steps[n] - wanted), -n if later else n))
    return there[nearest]


def forest_sources(
    forest: str | Path,
    *,
    only: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    prior: str | Path | None = None,
    topk: int = 0,
) -> tuple[list[Source], list[float]]:
    """Experts of a forest as parents, with their weights in an average.

    Args:
        only: domains; None for all.
        weights: in the same order; `prior`: a file with those of these experts; neither: alike.
        topk: keep those with the largest weights only; 0 for all. A weight of 0 is left out.
    Raises:
        UserError: if a domain is not in the forest, or weights do not fit.
    """
    opened = open_forest(forest)
    experts = {expert.domain: expert for expert in opened.experts}
    domains = list(only or experts)
    for domain in domains:
        if domain not in experts:
            raise UserError(
                f"--forest {forest}: no expert of domain {domain!r}; there are {', '.join(experts)}"
            )
    if prior is not None:
        weights = list(read_prior(Path(prior), domains).weights)
    weights = check_weights(weights, len(domains))
    if topk > len(domains):
        raise UserError(f"--topk {topk}: there are only {len(domains)} experts")
    kept = strongest(weights, topk)
    sources = [
        Source(experts[domains[place]].path, experts[domains[place]].member) for place in kept
    ]
    return sources, [weights[place] for place in kept]


def strongest(weights: Sequence[float], count: int = 0) -> list[int]:
    """Places of so many of the largest weights, in order; 0 for all. A weight of 0 is left out."""
    best = sorted(range(len(weights)), key=lambda place: -weights[place])[: count or None]
    return [place for place in sorted(best) if weights[place]]


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight per parent; all alike where none are given.

    Raises:
        UserError: for another number of weights, one that is not finite, or a sum of 0.
    """
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} are given, there are {count} parents")
    if not all(map(math.isfinite, weights)) or not math.fsum(weights):
        raise UserError(f"--weights {' '.join(map(str, weights))}: must be finite, sum not 0")
    return list(weights)


def _step_of(folder: Path) -> int:
    """The finished steps of a checkpoint, whatever its folder is called."""
    try:
        return int(json.loads((folder / "state.json").read_text())["state"]["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--parents {folder}: state.json cannot be read: {error!r}") from error


def _member_of(folder: Path, path: Path, member: str | None) -> str | None:
    config = read_config(folder)
    if config.get("untie", "none") == "none":
        if member is not None:
            raise UserError(f"--member {member}: {path} is one dense model, without members")
        return None
    if member not in config["domains"]:
        raise UserError(
            f"--parents {path}: is a model with experts; --member must be one of "
            f"{', '.join(config['domains'])}, not {member!r}"
        )
    return member
