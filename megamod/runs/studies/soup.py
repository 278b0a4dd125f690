"""Greedy soups: average the models that lower the loss of the average on held-out data.

    merge_method: greedy_soup
    models: [{model: runs/one/model}, {model: runs/two/model}, {model: runs/three/model}]
    evaluation: {task: clm, data: valid.txt, max_items: 64}

With an `align:` block all models are brought to the features of the first before they are tried.
Source: Wortsman et al. 2022 (Model Soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time), recipe 1.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megamod.data.tasks.specs import find_any_task
from megamod.errors import UserError
from megamod.evaluation.barrier import Losses
from megamod.merging.alignment.merge_step import load_aligned_model
from megamod.merging.merge import SHARD_BYTES, check_output, open_merge_plan, write_merge
from megamod.merging.plan import MergePlan, make_merge_plan
from megamod.merging.recipe import GREEDY_SOUP, MergeRecipe
from megamod.progress import show_progress
from megamod.runs.studies.barrier import HEADS, open_held_out
from megamod.runs.studies.barrier_recipe import CLM, MLM, HeldOutSettings
from megamod.schemas import check_against_schema

logger = logging.getLogger(__name__)


class SoupEvaluation(HeldOutSettings):
    """Schema of the `evaluation:` block of a greedy soup: held-out data and one task.

    Attributes:
        task: "mlm", "clm" or the name of a task with labels.
    """

    task: str = CLM

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task as a tuple, like `BarrierStudy.tasks`, which `HeldOutSettings` checks."""
        return (self.task,)


@dataclass(frozen=True)
class Candidate:
    """Losses of one model of the recipe, and the decision about it.

    Attributes:
        number: index of the model in the recipe.
        path: folder of the model.
        loss: held-out loss of the model alone.
        soup_loss: held-out loss of the average of this model and all models kept before it.
        kept: True if the model is part of the soup.
    """

    number: int
    path: str
    loss: float
    soup_loss: float
    kept: bool


def write_greedy_soup(
    recipe: MergeRecipe,
    output: Path | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    threads: int = 1,
    copy_tokenizer: bool = True,
    quiet: bool = False,
) -> tuple[MergePlan, list[Candidate]]:
    """Select models of a recipe greedily and write their average as `merge` does.

    Selection holds two models and the soup in memory. Models run on a GPU if one is available; with
    `dry_run` only alignment by text runs any. The arguments are those of `merge`. The record of an
    aligned soup has the first model even if that is left out, with weight 0.

    Args:
        recipe: a recipe of the method greedy_soup, with its `evaluation:` block.
        output: folder to write; None with `dry_run`.
        shard_bytes, dry_run, threads, copy_tokenizer, quiet: see `merge`.
    Returns:
        the plan of the merge, and all candidates, smallest loss first; none with `dry_run`.
    Raises:
        UserError: if the recipe has keys that the method does not support, the models do not fit
            each other, or no model has a finite loss.
    """
    whole = _build_average_recipe(recipe, range(len(recipe.inputs)))
    settings = _read_evaluation(recipe)
    check_output(whole, output)
    paths = [str(model.path) for model in recipe.inputs]
    held_out = None if dry_run else open_held_out(settings, settings.task, paths[0])
    with ExitStack() as stack:
        plan = open_merge_plan(whole, shard_bytes, stack)
        if held_out is None:
            return plan, []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto, sources = HEADS.get(settings.task), plan.folders
        candidates = select_soup_models(
            paths, lambda n: load_aligned_model(sources[n], auto), held_out.losses, device
        )
        record = {"merge_method": GREEDY_SOUP, "evaluation": dict(recipe.evaluation)}
        record |= {"candidates": [asdict(candidate) for candidate in candidates]}
        plan = _plan_soup(recipe, plan, candidates, shard_bytes, stack)
        written = write_merge(
            plan,
            output,
            threads=threads,
            copy_tokenizer=copy_tokenizer,
            quiet=quiet,
            record=record,
            note=f"```\n{format_candidates(candidates)}\n```",
        )
    return written, candidates


def _plan_soup(
    recipe: MergeRecipe,
    whole: MergePlan,
    candidates: Sequence[Candidate],
    shard_bytes: int,
    stack: ExitStack,
) -> MergePlan:
    """Plan the average of the models that are kept.

    Aligned models are those of the plan `whole` of all models, which are in the feature order of
    the first; others are opened again, until the stack is closed.

    Args:
        recipe: the recipe of all models.
        candidates: all models, with the decision about each.
        shard_bytes: size above which weights are split into several files.
        stack: closes the models that are opened here.
    """
    kept = {candidate.number for candidate in candidates if candidate.kept}
    if recipe.align is None:
        return open_merge_plan(_build_average_recipe(recipe, kept), shard_bytes, stack)
    return make_merge_plan(
        _build_average_recipe(recipe, kept, reference=0),
        [whole.folders[number] for number in sorted({0, *kept})],
        shard_bytes,
        copied=[name for name, tensor in whole.tensor_plans.items() if tensor.copied],
    )


def select_soup_models(
    paths: Sequence[str],
    load: Callable[[int], PreTrainedModel],
    losses: Losses,
    device: torch.device,
) -> list[Candidate]:
    """Try the models in order of their loss; keep each that does not raise the loss of the soup.

    The soup is the uniform average of the kept models. Models of equal loss keep their order; NaN
    counts as infinity.

    Args:
        paths: folders of the models.
        load: loads the model of a number.
        losses: computes the losses of a model; their mean is compared.
        device: device that models run on.
    Returns:
        all candidates in the order of the trials.
    Raises:
        UserError: if no model has a finite loss.
    """
    alone = [
        _compute_mean_loss(losses, load(number).to(device).eval())
        for number in show_progress(range(len(paths)), "single models", unit="model")
    ]
    order = sorted(range(len(paths)), key=lambda number: (alone[number], number))
    if not math.isfinite(alone[order[0]]):
        raise UserError(f"evaluation: the loss of every model is {alone[order[0]]}; none is usable")
    candidates: list[Candidate] = []
    soup: Mapping[str, Tensor] = {}
    best, count = math.inf, 0
    for number in show_progress(order, "soup", unit="model"):
        model = load(number).to(device).eval()
        updated = _update_mean(soup, model.state_dict(), count)
        if count:
            model.load_state_dict(updated)
        loss = _compute_mean_loss(losses, model) if count else alone[number]
        kept = loss <= best
        if kept:
            soup, best, count = updated, loss, count + 1
        candidates.append(Candidate(number, paths[number], alone[number], loss, kept))
        logger.info(
            "%s: loss %.6g alone, %.6g in the soup%s",
            *(paths[number], alone[number], loss, "" if kept else "; left out"),
        )
    return candidates


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """Return a table of the losses and the decision, one line for each candidate."""
    lines = [f"{'loss alone':>12}{'in the soup':>13}"]
    for candidate in candidates:
        losses = f"{candidate.loss:12.6g}{candidate.soup_loss:13.6g}"
        decision = "kept" if candidate.kept else "left out"
        lines.append(f"{losses}  {decision:<8}  {candidate.path}")
    return "\n".join(lines)


def _update_mean(
    soup: Mapping[str, Tensor], state: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Compute the mean of weights with one more model.

    Integer tensors are those of the first model. The arguments are not changed.

    Args:
        soup: mean of the weights of `count` models, by name; empty if `count` is 0.
        state: weights of the further model.
    """
    if not count:
        return {name: tensor.clone() for name, tensor in state.items()}
    share = 1 / (count + 1)
    return {
        name: torch.lerp(mean, state[name], share) if mean.is_floating_point() else mean
        for name, mean in soup.items()
    }


def _compute_mean_loss(losses: Losses, model: torch.nn.Module) -> float:
    """Return the mean of a model's losses; infinity instead of NaN."""
    values = losses(model).values()
    mean = math.fsum(values) / len(values)
    return math.inf if math.isnan(mean) else mean


def _build_average_recipe(
    recipe: MergeRecipe, kept: Collection[int], reference: int | None = None
) -> MergeRecipe:
    """Build the recipe for the uniform average of some models of a recipe.

    Args:
        kept: indices of these models.
        reference: index of the model whose order of features the aligned models have; it stays an
            input of the new recipe, with weight 0 unless it is kept. None: only kept ones are.
    Raises:
        UserError: for keys that a soup does not support.
    """
    unsupported = {
        "base_model": recipe.base is not None,
        "slices": recipe.is_stacked,
        "modules": recipe.module_parameters or (recipe.parts and not recipe.is_stacked),
        "tokenizer_source": recipe.vocabulary_request,
        "parameters": recipe.parameters or [model for model in recipe.inputs if model.parameters],
        "member": [model for model in recipe.inputs if model.member],
        "adapters (MODEL+ADAPTER)": [model for model in recipe.inputs if model.adapter],
    }
    for key, value in unsupported.items():
        if value:
            raise UserError(f"{recipe.origin}: {GREEDY_SOUP} does not support {key}; leave it out")
    inputs = tuple(
        replace(model, parameters={"weight": float(number in kept)})
        for number, model in enumerate(recipe.inputs)
        if number in kept or number == reference
    )
    return replace(recipe, method="linear", inputs=inputs, tokenizer=0, cut_vocabularies=False)


def _read_evaluation(recipe: MergeRecipe) -> SoupEvaluation:
    """Read and check the `evaluation:` block of a recipe.

    Raises:
        UserError: naming the key that is missing or wrong.
    """
    if recipe.evaluation is None:
        raise UserError(
            f"{recipe.origin}, evaluation: is missing; give `evaluation: {{task: clm, data: FILE}}`"
            ", the text that the losses are measured on"
        )
    settings = check_against_schema(recipe.evaluation, SoupEvaluation, recipe.origin, "evaluation")
    if settings.task not in (CLM, MLM):
        find_any_task(settings.task)
    elif settings.data is None or not Path(settings.data).is_file():
        raise UserError(
            f"{recipe.origin}, evaluation.data: {settings.data!r} is not a file; give a text file"
        )
    return settings
