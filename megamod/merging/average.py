"""Merging folders of models: checked first, then streamed tensor by tensor into a new folder.

No more than a few pieces of a tensor are in memory with the methods that go through it in pieces,
and no more than that tensor of every model with the others, however large the models are.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megamod.errors import UserError
from megamod.merging.fitting import check_configs, match_names
from megamod.merging.methods import METHODS, Operand, Values
from megamod.merging.model_folder import carry_over, merged_config, write_record
from megamod.merging.recipe import Recipe, check_word, depths, values_for, weighted
from megamod.states.convert import new_folder
from megamod.states.forest import read_config
from megamod.states.stream import PIECE, ModelFolder, Spec, pieces, plan_shards, write_stream
from megamod.states.weights import file_of

SHARD_BYTES = 5 * 10**9
"""Size of a weight file above which there are several, as in mergekit."""


@dataclass(frozen=True)
class Plan:
    """A merge that was checked and can be carried out while its folders are open.

    Attributes:
        folders: one for each model; `names`: what each calls the tensors that are merged.
        values: overall and per-model parameters of each tensor that is merged.
        specs: of the tensors to write; `files`: which of them go into which file.
        config: the configuration to write.
    """

    recipe: Recipe
    folders: Sequence[ModelFolder]
    names: Sequence[dict[str, str]]
    values: dict[str, tuple[Values, Sequence[Values]]]
    specs: dict[str, Spec]
    files: dict[str, list[str]]
    config: dict[str, object]

    def describe(self) -> str:
        """What would be merged into what, as text."""
        lines = [f"{self.recipe.method} of {len(self.folders)} models"]
        for one, weight in zip(self.recipe.inputs, self.shares(), strict=True):
            told = f"{weight:.6g}" if weight is not None else "by tensor"
            lines.append(f"  {told:>10}  {one}")
        size = sum(spec.nbytes for spec in self.specs.values())
        count = sum(spec.numel for spec in self.specs.values())
        files = f"{len(self.files)} files" if len(self.files) > 1 else next(iter(self.files))
        lines.append(f"{len(self.specs)} tensors, {count:,} parameters, {size:,} bytes in {files}")
        return "\n".join(lines)

    def shares(self) -> list[float | None]:
        """The factor that each model is multiplied with; None where there is no single one."""
        found: list[set[float | None]] = [set() for _ in self.folders]
        for overall, each in self.values.values():
            total = sum(values.get("weight", 0) for values in each)
            divisor = total if overall.get("normalize") and total else 1.0
            for shares, values in zip(found, each, strict=True):
                shares.add(values["weight"] / divisor if "weight" in values else None)
        return [shares.pop() if len(shares) == 1 else None for shares in found]


def average_folders(
    sources: Sequence[tuple[Path, str | None]],
    weights: Sequence[float],
    output: Path,
    *,
    normalize: bool = True,
    domains: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    origin: str = "--weights",
) -> None:
    """Write the weighted average of models as a new model folder; nothing if anything is wrong.

    Args:
        sources: model folder, and for an expert of a DEMix folder its domain (None: the whole).
        normalize: divide by the sum of the weights.
        domains: what each source was trained on, to be recorded.
        dtype: round weights to it first; `out_dtype`: what is stored, else that of the first.
        origin: where the weights come from, for messages.
    Raises:
        UserError: naming the folder, tensor or value, if the models do not fit each other, the
            weights do not fit the models, or something is not finite.
    Source: Li et al. 2022 (Branch-Train-Merge), section on parameter averaging.
    """
    recipe = weighted(
        sources,
        weights,
        normalize=normalize,
        domains=domains,
        dtype=dtype,
        out_dtype=out_dtype,
        origin=origin,
    )
    merge(recipe, output, shard_bytes=shard_bytes)


def merge(
    recipe: Recipe, output: Path, *, shard_bytes: int = SHARD_BYTES, dry_run: bool = False
) -> Plan:
    """Carry out a recipe: the folder `output` appears whole or not at all.

    Accumulates in float32 (in float64 what is stored so), reads one piece of one model at a time,
    and takes buffers of integers from the base. Files of the optimizer are not read.

    Args:
        shard_bytes: size of a weight file above which there are several.
        dry_run: check everything and write nothing.
    Returns:
        what was done.
    Raises:
        UserError: as `average_folders`.
    """
    with ExitStack() as stack:
        folders = [stack.enter_context(ModelFolder(one.path, one.member)) for one in recipe.inputs]
        plan = make_plan(recipe, folders, shard_bytes)
        if dry_run:
            return plan
        folder = stack.enter_context(new_folder(output))
        # Neither digests nor reading hold the interpreter's lock.
        hashing = ThreadPoolExecutor(1)
        stack.callback(hashing.shutdown, cancel_futures=True)
        digests = [hashing.submit(one.digest) for one in folders]
        size = sum(spec.nbytes for spec in plan.specs.values())
        with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            write_stream(folder, plan.files, plan.specs, partial(_produce, plan, bar))
        carry_over(folders[recipe.tokenizer].folder, folder, plan.config)
        write_record(
            folder, recipe, plan.shares(), [digest.result() for digest in digests], plan.config
        )
    return plan


def make_plan(recipe: Recipe, folders: Sequence[ModelFolder], shard_bytes: int) -> Plan:
    """Check that the open folders can be merged so, and settle what becomes of each tensor.

    Raises:
        UserError: as `average_folders`.
    """
    check_word(recipe.method, tuple(METHODS), f"{recipe.origin}: there is no merge method")
    method, base = METHODS[recipe.method], folders[recipe.base]
    check_configs([base.folder, *(folder.folder for folder in folders)])
    names = [match_names(base, folder) for folder in folders]
    merged = names[recipe.base]
    depth = depths(merged)
    values = {name: values_for(recipe, method, name, depth[name]) for name in merged}
    stored = recipe.out_dtype or recipe.dtype
    specs = {
        name: Spec(getattr(torch, stored), spec.shape) if stored and name in merged else spec
        for name, spec in base.tensors.items()
    }
    config = merged_config(read_config(base.folder), recipe, stored)
    if config.get("model_type") == "demix" and config.get("untie") != "none":
        files: dict[str, list[str]] = {}
        for name in specs:
            files.setdefault(file_of(name, has_experts=True), []).append(name)
    else:
        files = plan_shards(specs, shard_bytes)
    return Plan(recipe, folders, names, values, specs, files, config)


def _produce(plan: Plan, bar: tqdm, name: str) -> Iterator[Tensor]:
    """The elements of one tensor of the result, in its dtype.

    Raises:
        UserError: if one of them is not finite.
    """
    spec, recipe = plan.specs[name], plan.recipe
    if name not in plan.values:
        yield from _copied(plan.folders[recipe.base], name)
        return
    cast = getattr(torch, recipe.dtype) if recipe.dtype else None
    overall, each = plan.values[name]
    operands = [
        Operand(folder, names[name], values, cast)
        for folder, names, values in zip(plan.folders, plan.names, each, strict=True)
    ]
    for piece in METHODS[recipe.method].function(operands, overall):
        piece = piece.reshape(-1) if cast is None else piece.reshape(-1).to(cast)
        piece = piece.to(spec.dtype)
        # The sum is forty times as fast as looking at each element, and only finite if all are.
        if not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            raise UserError(_not_finite(plan, name, operands))
        yield piece
        bar.update(piece.nbytes)


def _copied(folder: ModelFolder, name: str) -> Iterator[Tensor]:
    spec = folder.tensors[name]
    buffer = torch.empty(PIECE // spec.dtype.itemsize, dtype=spec.dtype)
    for start, stop in pieces(spec.numel, spec.dtype.itemsize):
        folder.read_into(name, start, buffer[: stop - start])
        yield buffer[: stop - start]


def _not_finite(plan: Plan, name: str, operands: Sequence[Operand]) -> str:
    """Says where values that are not finite come from."""
    for one, operand in zip(plan.recipe.inputs, operands, strict=True):
        if not torch.isfinite(operand.read()).all():
            return f"{one}: {operand.name} holds values that are not finite"
    return f"{name} would hold values that are not finite in {plan.specs[name].dtype}"
