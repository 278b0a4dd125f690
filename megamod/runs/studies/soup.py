"""Greedy soups: of many models those are averaged that make the average better on held-out data.

    merge_method: greedy_soup
    models: [{model: runs/one/model}, {model: runs/two/model}, {model: runs/three/model}]
    evaluation: {task: clm, data: valid.txt, max_items: 64}

Source: Wortsman et al. 2022 (Model Soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time), recipe 1.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megamod.data.tasks.specs import any_task
from megamod.errors import UserError
from megamod.evaluation.barrier import Losses
from megamod.merging.alignment.measure import load_model
from megamod.merging.alignment.options import Options
from megamod.merging.merge import SHARD_BYTES, merge
from megamod.merging.plan import Plan
from megamod.merging.recipe import GREEDY_SOUP, Recipe
from megamod.runs.studies.barrier import HEADS, ground_of
from megamod.runs.studies.barrier_recipe import CLM, MLM, Study, checked_fields

logger = logging.getLogger(__name__)

_KEYS = ("task", "data", "tokenizer", "max_seq_length", "batch_size", "max_items", "seed")
_KEYS += ("mlm_probability",)


@dataclass(frozen=True)
class Tasted:
    """A model, and what became of it.

    Attributes:
        number: of the model in the recipe; `path`: its folder.
        loss: on held-out data, of it alone.
        soup_loss: of the average of all that were kept before, with this one.
        kept: whether it is part of the soup.
    """

    number: int
    path: str
    loss: float
    soup_loss: float
    kept: bool


def greedy_soup(
    recipe: Recipe,
    output: Path | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    threads: int = 1,
    copy_tokenizer: bool = True,
    quiet: bool = False,
) -> tuple[Plan, list[Tasted]]:
    """Choose among the models of a recipe, and write their average as `merge` does.

    Holds two models and the soup in memory while it chooses.

    Models run on a GPU if there is one; with `dry_run` none is run. Arguments are those of `merge`.

    Returns:
        what was done, and all models, the best first.
    Raises:
        UserError: if the recipe says what the method has no use for, the models do not fit each
            other, or the loss of none of them is a number.
    """
    every = _average(recipe, range(len(recipe.inputs)))
    study = _study(recipe)
    options = {"shard_bytes": shard_bytes, "threads": threads, "quiet": quiet}
    plan = merge(every, output, dry_run=True, copy_tokenizer=copy_tokenizer, **options)
    if dry_run:
        return plan, []
    losses = ground_of(study, study.tasks[0]).losses
    paths = [str(one.path) for one in recipe.inputs]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasted = choose(paths, losses, device, HEADS.get(study.tasks[0]))
    kept = sorted(one.number for one in tasted if one.kept)
    record = {"merge_method": GREEDY_SOUP, "evaluation": dict(recipe.evaluation)}
    record |= {"tasted": [asdict(one) for one in tasted]}
    note = f"```\n{described(tasted)}\n```"
    options |= {"copy_tokenizer": copy_tokenizer, "record": record, "note": note}
    return merge(_average(recipe, kept), output, **options), tasted


def choose(
    paths: Sequence[str], losses: Losses, device: torch.device, auto: type | None = None
) -> list[Tasted]:
    """Go through the models from the best to the worst; keep those that do no harm.

    A model is kept if the uniform average with it has no larger loss than without. Of equal models
    the first comes first; a loss that is no number counts as the largest.

    Args:
        paths: folders of the models.
        losses: from a model to its losses, whose mean counts.
        auto: see `load_model`.
    Returns:
        all models in the order in which they were tried.
    Raises:
        UserError: if no model has a finite loss.
    """
    alone = [_mean_loss(losses, load_model(path, auto).to(device).eval()) for path in paths]
    order = sorted(range(len(paths)), key=lambda number: (alone[number], number))
    if not math.isfinite(alone[order[0]]):
        raise UserError(f"evaluation: the loss of every model is {alone[order[0]]}; none is usable")
    tasted: list[Tasted] = []
    soup: Mapping[str, Tensor] = {}
    best, count = math.inf, 0
    for number in order:
        model = load_model(paths[number], auto).to(device).eval()
        mixed = _mixed(soup, model.state_dict(), count)
        if count:
            model.load_state_dict(mixed)
        loss = _mean_loss(losses, model) if count else alone[number]
        kept = loss <= best
        if kept:
            soup, best, count = mixed, loss, count + 1
        tasted.append(Tasted(number, paths[number], alone[number], loss, kept))
        logger.info(
            "%s: loss %.6g alone, %.6g in the soup%s",
            *(paths[number], alone[number], loss, "" if kept else "; left out"),
        )
    return tasted


def described(tasted: Sequence[Tasted]) -> str:
    """What was kept and what was not, a line for each model."""
    lines = [f"{'loss alone':>12}{'in the soup':>13}"]
    for one in tasted:
        fate = "kept" if one.kept else "left out"
        lines.append(f"{one.loss:12.6g}{one.soup_loss:13.6g}  {fate:<8}  {one.path}")
    return "\n".join(lines)


def _mixed(
    soup: Mapping[str, Tensor], state: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """The mean of `count` models with one more; integers are those of the first."""
    if not count:
        return {name: tensor.clone() for name, tensor in state.items()}
    share = 1 / (count + 1)
    return {
        name: torch.lerp(mean, state[name], share) if mean.is_floating_point() else mean
        for name, mean in soup.items()
    }


def _mean_loss(losses: Losses, model: torch.nn.Module) -> float:
    found = losses(model)
    mean = math.fsum(found.values()) / len(found)
    return math.inf if math.isnan(mean) else mean


def _average(recipe: Recipe, numbers: Sequence[int]) -> Recipe:
    """The uniform average of some of the models.

    Raises:
        UserError: for what a soup has no use for.
    """
    used = {
        "base_model": recipe.base is not None,
        "slices": recipe.stacked,
        "modules": recipe.module_parameters or (recipe.parts and not recipe.stacked),
        "align": recipe.align,
        "tokenizer_source": recipe.words,
        "parameters": recipe.parameters or [one for one in recipe.inputs if one.parameters],
        "member": [one for one in recipe.inputs if one.member],
        "adapters (MODEL+ADAPTER)": [one for one in recipe.inputs if one.adapter],
    }
    for key, value in used.items():
        if value:
            raise UserError(f"{recipe.origin}: {GREEDY_SOUP} has no use for {key}; leave it out")
    inputs = tuple(replace(recipe.inputs[n], parameters={"weight": 1.0}) for n in numbers)
    return replace(recipe, method="linear", inputs=inputs, tokenizer=0, cut=False)


def _study(recipe: Recipe) -> Study:
    """Build a study from the `evaluation:` block.

    Raises:
        UserError: naming the key that is missing or wrong.
    """
    where = f"{recipe.origin}, evaluation"
    if recipe.evaluation is None:
        raise UserError(
            f"{where}: is missing; give `evaluation: {{task: clm, data: FILE}}`, the text that "
            "the losses are measured on"
        )
    fields = dict(recipe.evaluation)
    for key in fields:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}; allowed are {', '.join(_KEYS)}")
    task = fields.pop("task", CLM)
    if not isinstance(task, str):
        raise UserError(f"{where}, task: {task!r} is not clm, mlm or the name of a task")
    fields = checked_fields(fields, Path(where))
    if unused := [key for key in ("seed", "mlm_probability") if key in fields and task != MLM]:
        raise UserError(f"{where}, {unused[0]}: has no effect with task {task}; leave it out")
    if task not in (CLM, MLM):
        any_task(task)
    elif not isinstance(fields.get("data"), str) or not Path(fields["data"]).is_file():
        raise UserError(f"{where}, data: {fields.get('data')!r} is no file; give one with text")
    names = [str(one.path) for one in recipe.inputs]
    models = {str(number): name for number, name in enumerate(names)}
    variants = {GREEDY_SOUP: Options(method="identity")}
    return Study(models, (), (task,), variants, **fields)
