"""Merge model folders: check everything, then stream tensor by tensor into a new folder.

Only a few pieces of a tensor are in memory at a time, whatever the size of the models; `regmean`,
which solves for a whole layer, holds one layer.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from megamod.errors import UserError, name_origin
from megamod.folder_lock import delete_leftovers
from megamod.merging.compatibility import check_configs_match
from megamod.merging.config_check import check_config_fits_weights
from megamod.merging.methods.table import METHODS
from megamod.merging.model_folder import (
    RECORD,
    find_commonest_chat_template,
    holds_merge,
    make_merge_record,
    write_files_besides_weights,
    write_merge_record,
)
from megamod.merging.naming import list_tieable_pairs, rename_to_template
from megamod.merging.plan import MergePlan, make_merge_plan
from megamod.merging.recipe import InputModel, MergeRecipe, build_weighted_recipe
from megamod.merging.statistics import check_statistics_settings, write_missing_statistics
from megamod.merging.tensors import (
    ModelTensor,
    TensorSource,
    have_same_bits,
    iterate_stored_pieces,
)
from megamod.merging.vocabulary import Vocabulary, unite_vocabularies
from megamod.merging.vocabulary_view import view_with_vocabulary
from megamod.states.output_folder import check_new_folder, create_new_folder
from megamod.states.stream import ModelFolder, TensorSpec, write_streamed_tensors
from megamod.states.weights import is_finite

SHARD_BYTES = 5 * 10**9
"""Size above which weights are split into several files, as in mergekit."""


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
    """Write the weighted average of models as a new model folder; write nothing on an error.

    Args:
        sources: model folder (or `MODEL+ADAPTER`), and the domain of one expert of a DEMix folder
            (None: all of it).
        weights: weight of each source.
        output: new folder.
        normalize: divide by the sum of the weights.
        domains: domains that each source was trained on, for the record.
        dtype: name of a dtype that weights are rounded to first; None: no rounding.
        out_dtype: name of the dtype to store; None: `dtype`, else that of the first model.
        shard_bytes: size above which weights are split into several files.
        origin: flag or file of the weights, for messages.
    Raises:
        UserError: naming the folder, tensor or value, if the models do not fit each other, the
            weights do not fit the models, or something is not finite.
    Source: Li et al. 2022 (Branch-Train-Merge), section on parameter averaging.
    """
    recipe = build_weighted_recipe(
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
    recipe: MergeRecipe,
    output: Path | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    threads: int = 1,
    seed: int = 0,
    copy_tokenizer: bool = True,
    quiet: bool = False,
) -> MergePlan:
    """Carry out a recipe; the folder `output` appears whole or not at all.

    Computes in float32 (float64 where that is stored) and copies buffers of integers from the base.
    Optimizer state is not read.

    Args:
        output: None with `dry_run`: no folder.
        shard_bytes: size above which weights are split into several files.
        dry_run: check everything and write nothing.
        threads: number of tensors merged at the same time; does not change the result.
        seed: seed of everything that is drawn at random.
        copy_tokenizer: give the result a tokenizer.
        quiet: no progress bar.
    Returns:
        the plan that was carried out, now or before: an equal merge is not written again.
    Raises:
        UserError: as `average_folders`.
    """
    check_output(recipe, output)
    with ExitStack() as stack:
        plan = open_merge_plan(recipe, shard_bytes, stack)
        if dry_run:
            return plan
        return write_merge(
            plan,
            output,
            threads=threads,
            seed=seed,
            copy_tokenizer=copy_tokenizer,
            quiet=quiet,
        )


def check_output(recipe: MergeRecipe, output: Path | None) -> None:
    """Refuse an output folder that exists, unless it may hold the result of this recipe already.

    Args:
        output: None: no folder.
    Raises:
        UserError: as `check_new_folder`.
    """
    if output is not None and not _may_hold_result(recipe, output):
        check_new_folder(output)


def write_merge(
    plan: MergePlan,
    output: Path,
    *,
    threads: int = 1,
    seed: int = 0,
    copy_tokenizer: bool = True,
    quiet: bool = False,
    record: Mapping[str, object] | None = None,
    note: str = "",
) -> MergePlan:
    """Write the result of a plan with open folders; `output` appears whole or not at all.

    Args:
        output, threads, seed, copy_tokenizer, quiet: see `merge`.
        record: further entries of merge.json; `note`: text for the model card.
    Returns:
        the plan that was carried out, now or before.
    Raises:
        UserError: as `average_folders`.
    """
    recipe = plan.recipe
    tokenizer = plan.folders[recipe.tokenizer].folder if copy_tokenizer else None
    make_record = partial(
        make_merge_record,
        recipe,
        plan.compute_shares(),
        tuple(plan.files),
        seed=seed,
        tokenizer=tokenizer,
        entries=record or {},
    )
    if _may_hold_result(recipe, output):
        content = make_record([folder.compute_digest() for folder in plan.folders])
        if holds_merge(output, content, untie_config_if_needed(plan.specs, plan.config, output)):
            delete_leftovers(output)
            return replace(plan, is_written=True)
        check_new_folder(output)
    with ExitStack() as stack:
        files = write_missing_statistics(recipe, Path(stack.enter_context(TemporaryDirectory())))
        statistics = [file and stack.enter_context(ModelFolder(file)) for file in files]
        plan = replace(plan, statistics=statistics)
        folder = stack.enter_context(create_new_folder(output))
        get_digests = stack.enter_context(hash_in_background(plan.folders))
        produce = partial(iterate_merged_tensor, plan, seed)
        write_merged_weights(folder, plan.files, plan.specs, produce, threads=threads, quiet=quiet)
        config = untie_config_if_needed(plan.specs, plan.config, folder)
        content = make_record(get_digests())
        if recipe.align is not None:
            content["unties_output_matrix"] = config != plan.config
        plan = replace(plan, config=config)
        write_config_and_tokenizer(plan, folder, tokenizer)
        write_merge_record(folder, recipe, content, config, note)
    return plan


def open_merge_plan(recipe: MergeRecipe, shard_bytes: int, stack: ExitStack) -> MergePlan:
    """Open the models of a recipe until the stack is closed, check them, and plan every tensor.

    An `align:` block is carried out, which may run models and write the folder `maps` that it
    names; nothing else is written.

    Args:
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: as `average_folders`.
    """
    with name_origin(recipe.document) if recipe.document else nullcontext():
        folders = [_open_input_model(model, stack) for model in recipe.inputs]
    for folder in {source.folder: source for source in folders}.values():
        check_config_fits_weights(folder)
    check_statistics_settings(recipe)
    vocabulary = _unite_vocabularies(recipe)
    paths = [folders[recipe.template_model].folder, *(folder.folder for folder in folders)]
    check_configs_match(
        paths, allow_cut=recipe.cut_vocabularies, require_same_tokens=vocabulary is None
    )
    common = rename_to_template(folders, recipe.template_model, all_tensors=not recipe.is_stacked)
    inputs = _align_folders_if_requested(recipe, common.folders)
    if vocabulary is not None:
        inputs = view_with_vocabulary(inputs, vocabulary)
    return make_merge_plan(recipe, inputs, shard_bytes, vocabulary, common.copied)


@contextmanager
def hash_in_background(sources: Sequence[TensorSource]) -> Iterator[Callable[[], list[str]]]:
    """Hash the weights of sources in a thread during a `with` block.

    Hashing releases the interpreter's lock, so that imports and writing go on meanwhile.

    Yields:
        a function that waits for the digests of the weights on disk, one of each source.
    """
    pool = ThreadPoolExecutor(1)
    try:
        digests = [pool.submit(source.compute_digest) for source in sources]
        yield lambda: [digest.result() for digest in digests]
    finally:
        pool.shutdown(cancel_futures=True)


def write_merged_weights(
    folder: Path,
    files: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
    compute: Callable[[str], Iterable[Tensor]],
    *,
    threads: int,
    quiet: bool,
) -> None:
    """Write the weight files of a merge with a progress bar.

    Args:
        folder: to write into.
        files: names of the tensors in each file.
        specs: specifications of the tensors.
        compute: yields the elements of a tensor in order, in its dtype.
        threads: number of tensors computed at the same time.
        quiet: no progress bar.
    """
    hidden = True if quiet else None  # None: hidden unless stderr is a terminal
    size = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=size, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:

        def compute_with_progress(name: str) -> Iterator[Tensor]:
            """Yield the elements of a tensor, and advance the progress bar."""
            for piece in compute(name):
                yield piece
                bar.update(piece.nbytes)

        write_streamed_tensors(folder, files, specs, compute_with_progress, threads)


def _may_hold_result(recipe: MergeRecipe, output: Path) -> bool:
    """Return True if the folder `output` may hold the result of a recipe.

    merge.json, which has digests of the models alone, can decide that, unless the merge read
    calibration text or statistics.
    """
    unrecorded = recipe.align or recipe.calibration
    unrecorded = unrecorded or any(m.statistics or m.calibration for m in recipe.inputs)
    return (output / RECORD).is_file() and not unrecorded


def write_config_and_tokenizer(plan: MergePlan, folder: Path, tokenizer: Path | None) -> None:
    """Write config.json, generation settings and the tokenizer of a result into a folder.

    The chat template is that of most models where the recipe of the plan copies it.

    Args:
        tokenizer: folder that has it; None: the result gets none.
    Raises:
        UserError: if a JSON file of a model cannot be read.
    """
    recipe = plan.recipe
    chat = (
        find_commonest_chat_template([model.path for model in recipe.inputs])
        if recipe.copy_chat_template
        else None
    )
    template = plan.folders[recipe.template_model].folder
    write_files_besides_weights(template, tokenizer, folder, plan.config, chat, plan.vocabulary)


def _open_input_model(model: InputModel, stack: ExitStack) -> TensorSource:
    """Open the folder of a model until the stack is closed, with its adapter if it has one.

    Raises:
        UserError: if its weights or its adapter cannot be read.
    """
    if not os.path.exists(model.path):  # also False for a name that is too long
        raise UserError(f"{model.path}: is not a folder")
    folder = stack.enter_context(
        ModelFolder(model.path, model.member, beside_anchor=model.beside_anchor)
    )
    if model.adapter is None:
        return folder
    from megamod.merging.lora import AdaptedFolder

    return AdaptedFolder(folder, model.adapter)


def _unite_vocabularies(recipe: MergeRecipe) -> Vocabulary | None:
    """Return the vocabulary that the recipe asks for; None if it asks for none, or all models have
    it already.

    Raises:
        UserError: if the vocabularies cannot be united, or the models are to be aligned too.
    """
    if recipe.vocabulary_request is None:
        return None
    paths = [model.path for model in recipe.inputs]
    vocabulary = unite_vocabularies(
        recipe.vocabulary_request, paths, recipe.template_model, recipe.base
    )
    if vocabulary is not None and recipe.align is not None:
        raise UserError(
            f"{recipe.origin}: align compares models that have the same words; leave out align, or "
            f"{recipe.vocabulary_request.recipe_key}"
        )
    return vocabulary


def _align_folders_if_requested(
    recipe: MergeRecipe, folders: Sequence[TensorSource]
) -> Sequence[TensorSource]:
    """Return views of all folders with their features in the order of the first.

    Without an `align:` block in the recipe they are the folders themselves.

    Raises:
        UserError: if they cannot be aligned.
    """
    if recipe.align is None:
        return folders
    # Imported here, as alignment may run models, which no other merge needs.
    from megamod.merging.alignment.merge_step import align_folder_views

    return align_folder_views(recipe.align, folders, recipe.origin)


def untie_config_if_needed(
    specs: Mapping[str, TensorSpec], config: dict[str, object], folder: Path
) -> dict[str, object]:
    """Return the configuration of the result, with `tie_word_embeddings` off if its matrices
    differ.

    Args:
        specs: specifications of the tensors of the result.
        config: returned as it is if nothing changes; else a changed copy.
        folder: with the weights of the result, which are compared.
    """
    pairs = list_tieable_pairs(specs)
    if not pairs or config.get("tie_word_embeddings") is False:
        return config
    with ModelFolder(folder) as written:
        if all(have_same_bits(written, table, written, output) for table, output in pairs):
            return config
    config = config | {"tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        config["text_config"] = inner | {"tie_word_embeddings": False}
    return config


def iterate_merged_tensor(plan: MergePlan, seed: int, name: str) -> Iterator[Tensor]:
    """Merge one tensor; yield its elements in order, 1-D in its dtype, in pieces.

    A piece may be overwritten when the next one is requested.

    Args:
        plan: of the merge.
        seed: seed of everything that is drawn at random.
        name: name of the tensor.
    Raises:
        UserError: if an element is not finite.
    """
    spec, recipe, tensor_plan = plan.specs[name], plan.recipe, plan.tensor_plans[name]
    if tensor_plan.copied:
        ((number, stored),) = tensor_plan.sources
        for piece in iterate_stored_pieces(plan.folders[number], stored):
            yield piece.to(spec.dtype)
        return
    cast = getattr(torch, recipe.dtype) if recipe.dtype else None
    target = plan.make_merge_tensor(name, seed)
    for piece in METHODS[recipe.method].function(target):
        piece = piece.reshape(-1) if cast is None else piece.reshape(-1).to(cast)
        piece = piece.to(spec.dtype)
        if not is_finite(piece):
            raise UserError(_explain_non_finite(plan, name, target.models))
        yield piece


def _explain_non_finite(plan: MergePlan, name: str, models: Sequence[ModelTensor]) -> str:
    """Explain why the tensor `name` of the result is not finite.

    Either a tensor of `models` is not, or the dtype of the plan cannot hold the result. Reads the
    tensor of every model whole, as it is called at the end of a failed merge.
    """
    for model in models:
        if not is_finite(model.read()):
            parent = plan.recipe.inputs[model.number]
            return f"{parent}: {model.name} holds values that are not finite"
    return f"{name} would hold values that are not finite in {plan.specs[name].dtype}"
