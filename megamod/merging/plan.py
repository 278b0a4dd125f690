"""Plan of a merge: how each tensor of the result is computed, checked from headers before any
work.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from megamod.errors import UserError
from megamod.merging.assembly import TensorPlan, plan_tensors
from megamod.merging.methods.table import METHODS, Method, list_method_parameters
from megamod.merging.model_folder import build_merged_config
from megamod.merging.recipe import MergeRecipe
from megamod.merging.settings import WITHOUT_EFFECT, Scope, check_parameter_names
from megamod.merging.tensors import MergeTensor, ModelTensor, TensorSource
from megamod.merging.vocabulary import Vocabulary
from megamod.schemas import check_known_word
from megamod.states.forest import HOST_TYPE, read_model_config
from megamod.states.stream import TensorSpec, plan_shards
from megamod.states.weights import select_weight_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked and can be carried out while its folders are open.

    Attributes:
        folders: folders of the models, under common names.
        statistics: open file of each model; None: the method needs no statistics of it.
        tensor_plans: by name of the tensor in the result.
        specs: specifications of the tensors to write; `files`: names of the tensors in each file.
        config: content of config.json to write.
        vocabulary: vocabulary that the folders are read with; None: each has its own.
        is_written: True if the output folder holds the result already.
    """

    recipe: MergeRecipe
    folders: Sequence[TensorSource]
    statistics: Sequence[TensorSource | None]
    tensor_plans: dict[str, TensorPlan]
    specs: dict[str, TensorSpec]
    files: dict[str, list[str]]
    config: dict[str, object]
    vocabulary: Vocabulary | None = None
    is_written: bool = False

    def format_summary(self) -> str:
        """Format the models with their weights, and the size of the result, one line each."""
        lines = [f"{self.recipe.method} of {len(self.folders)} models"]
        has_base = METHODS[self.recipe.method].base != "none"
        for number, (model, weight) in enumerate(
            zip(self.recipe.inputs, self.compute_shares(), strict=True)
        ):
            share = f"{weight:.6g}" if weight is not None else "by tensor"
            share = "base" if has_base and number == self.recipe.base else share
            lines.append(f"  {share:>10}  {model}")
        size = sum(spec.nbytes for spec in self.specs.values())
        count = sum(spec.numel for spec in self.specs.values())
        files = f"{len(self.files)} files" if len(self.files) > 1 else next(iter(self.files))
        lines.append(f"{len(self.specs)} tensors, {count:,} parameters, {size:,} bytes in {files}")
        return "\n".join(lines)

    def compute_shares(self) -> list[float | None]:
        """Compute the weight of each model; None: it has none, or it differs between tensors.

        For a method without a base and with `normalize` it is divided by the sum of all. Copied
        tensors do not count.
        """
        plain = METHODS[self.recipe.method].base == "none"
        shares: list[set[float | None]] = [set() for _ in self.folders]
        for tensor_plan in self.tensor_plans.values():
            if tensor_plan.copied:
                continue
            overall, per_model = tensor_plan.values
            total = sum(values.get("weight", 0) for values in per_model)
            divisor = total if plain and overall.get("normalize") and total else 1.0
            for (number, _), values in zip(tensor_plan.sources, per_model, strict=True):
                share = values["weight"] / divisor if "weight" in values else None
                shares[number].add(share)
        return [share.pop() if len(share) == 1 else None for share in shares]

    def make_merge_tensor(self, name: str, seed: int = 0) -> MergeTensor:
        """Make the argument of the merge method for one tensor.

        Args:
            name: name of the tensor in the result.
            seed: seed of all random numbers.
        """
        tensor_plan, recipe = self.tensor_plans[name], self.recipe
        overall, per_model = tensor_plan.values
        cast = getattr(torch, recipe.dtype) if recipe.dtype else None
        models = [
            ModelTensor(
                self.folders[number], stored, values, cast, tensor_plan.merged_rows, number,
                self.statistics[number],
            )
            for (number, stored), values in zip(tensor_plan.sources, per_model, strict=True)
        ]  # fmt: skip
        base = None if tensor_plan.base_source is None else models[tensor_plan.base_source]
        return MergeTensor(name, models, base, overall, seed)


def make_merge_plan(
    recipe: MergeRecipe,
    folders: Sequence[TensorSource],
    shard_bytes: int,
    vocabulary: Vocabulary | None = None,
    copied: Collection[str] = (),
) -> MergePlan:
    """Check that the open folders can be merged, and plan every tensor, from headers alone.

    Logs a warning for each parameter of the recipe that the method does not read.

    Args:
        folders: the recipe's models, open, with tensors named as in the template model, see
            `rename_to_template`.
        shard_bytes: size above which weights are split into several files.
        vocabulary: vocabulary that the folders are read with; None: each has its own.
        copied: names of tensors that only the template model has, which are copied and not merged.
    Raises:
        UserError: naming the folder, tensor or parameter, if they cannot be merged.
    """
    check_known_word(recipe.method, tuple(METHODS), f"{recipe.origin}: there is no merge method")
    check_parameter_names(_list_all_scopes(recipe), list_method_parameters(), recipe.method)
    _warn_of_unused_parameters(recipe)
    tensor_plans = plan_tensors(recipe, folders, copied)
    stored = recipe.out_dtype or recipe.dtype
    config = read_model_config(folders[recipe.template_model].folder)
    specs, config = {}, build_merged_config(config, recipe, stored, vocabulary)
    for name, tensor_plan in tensor_plans.items():
        number, lead = tensor_plan.sources[tensor_plan.lead_source]
        spec = folders[number].tensors[lead]
        if spec.dtype.is_floating_point:
            shape = spec.shape
            if not tensor_plan.copied:
                rows = _count_merged_rows(METHODS[recipe.method], tensor_plan, folders, name)
                tensor_plans[name] = replace(tensor_plan, merged_rows=rows)
                # A result with fewer rows of embeddings has a smaller vocabulary.
                if rows is not None and spec.shape[0] == config.get("vocab_size"):
                    config["vocab_size"] = rows
                shape = spec.shape if rows is None else (rows, *spec.shape[1:])
            spec = TensorSpec(getattr(torch, stored) if stored else spec.dtype, shape)
        specs[name] = spec
    # Models with experts have a file for each expert, so that one can be read alone.
    if config.get("model_type") in ("demix", HOST_TYPE) and config.get("untie") != "none":
        files: dict[str, list[str]] = {}
        for name in specs:
            files.setdefault(select_weight_file(name, has_experts=True), []).append(name)
    else:
        files = plan_shards(specs, shard_bytes)
    statistics = [None] * len(folders)  # opened by the caller, for methods that weight by them
    return MergePlan(recipe, folders, statistics, tensor_plans, specs, files, config, vocabulary)


def _list_all_scopes(recipe: MergeRecipe) -> list[Scope]:
    """List every level of the recipe that holds parameters; some levels may be listed twice."""
    scopes = [(f"{recipe.origin}, {model}", model.parameters) for model in recipe.inputs]
    for part in recipe.all_parts:
        scopes += [recipe.make_source_scope(part, source) for source in part.sources]
        scopes += recipe.list_scopes(part)
    return scopes


def _warn_of_unused_parameters(recipe: MergeRecipe) -> None:
    """Log a warning for each parameter of the recipe that its method does not read.

    Parameters of other methods are allowed, as in mergekit, and have no effect.
    """
    method = METHODS[recipe.method]
    # Those without effect on any method change mergekit's use of memory, and not its results.
    expected = {*method.per_model, *method.overall, *WITHOUT_EFFECT}
    unused = [
        (where, name)
        for where, settings in _list_all_scopes(recipe)
        for name in settings
        if name not in expected
    ]
    for where, name in dict.fromkeys(unused):
        logger.warning("%s, %s: has no effect with %s", where, name, recipe.method)


def _count_merged_rows(
    method: Method, tensor_plan: TensorPlan, folders: Sequence[TensorSource], name: str
) -> int | None:
    """Count the rows to merge where vocabularies differ in size; None: all rows, as they agree.

    They are the rows that all models have, or for methods that compare with a base those of the
    base.

    Args:
        method, tensor_plan, folders: merge method, sources of the tensor, all models.
        name: name of the tensor in the result, for the message.
    Raises:
        UserError: if a model has fewer than the base, for methods that compare all with it.
    """
    rows = [folders[number].tensors[stored].shape[:1] for number, stored in tensor_plan.sources]
    if len(set(rows)) == 1:
        return None
    if method.common_rows:
        return min(rows)[0]
    expected = rows[tensor_plan.lead_source]
    for (number, _), count in zip(tensor_plan.sources, rows, strict=True):
        if count < expected:
            raise UserError(
                f"{name} has {count[0]} rows in {folders[number].folder}, fewer than the "
                f"{expected[0]} of the base"
            )
    return expected[0]
