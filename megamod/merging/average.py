"""Merging folders of models: checked first, then streamed tensor by tensor into a new folder.

No more than a few pieces of a tensor are in memory at a time, however large the models are; only
`regmean`, which solves for a layer as a whole, holds one.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from megamod.errors import UserError
from megamod.merging.compatibility import check_configs
from megamod.merging.measured import check_calibration, measure_statistics
from megamod.merging.methods import METHODS
from megamod.merging.model_folder import carry_over, commonest_chat, write_record
from megamod.merging.naming import harmonise, tied_pairs
from megamod.merging.plan import Plan, make_plan
from megamod.merging.recipe import Input, Recipe, weighted
from megamod.merging.reindexed import reindexed
from megamod.merging.tensors import Operand, TensorSource, same_bits
from megamod.merging.vocabulary import Vocabulary, unite
from megamod.states.output_folder import check_new_folder, new_folder
from megamod.states.stream import PIECE, ModelFolder, pieces, write_stream

SHARD_BYTES = 5 * 10**9
"""Size of a weight file above which there are several, as in mergekit."""


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
    recipe: Recipe,
    output: Path | None,
    *,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
    threads: int = 1,
    seed: int = 0,
    copy_tokenizer: bool = True,
    quiet: bool = False,
    found: Mapping[str, object] | None = None,
    note: str = "",
) -> Plan:
    """Carry out a recipe: the folder `output` appears whole or not at all.

    Computes in float32 (in float64 what is stored so), reads models by pieces, and takes buffers of
    integers from the base. Files of the optimizer are not read.

    Args:
        output: None: nowhere, with `dry_run`.
        shard_bytes: size of a weight file above which there are several.
        dry_run: check everything and write nothing.
        threads: how many tensors are merged at the same time; the result is the same.
        seed: of everything that is drawn at random.
        copy_tokenizer: whether the result gets the files of a tokenizer.
        quiet: no progress bar.
        found: what else to record, such as how the models were chosen; `note`: the same as text.
    Returns:
        what was done.
    Raises:
        UserError: as `average_folders`.
    """
    if output is not None:
        check_new_folder(output)
    with ExitStack() as stack:
        folders = [_opened(one, stack) for one in recipe.inputs]
        check_calibration(recipe)
        vocabulary = _vocabulary(recipe)
        paths = [folders[recipe.template].folder, *(folder.folder for folder in folders)]
        check_configs(paths, cut=recipe.cut, same_words=vocabulary is None)
        common = harmonise(folders, recipe.template, whole=not recipe.slices)
        inputs = _aligned(recipe, common.folders)
        if vocabulary is not None:
            inputs = reindexed(inputs, vocabulary)
        plan = make_plan(recipe, inputs, shard_bytes, vocabulary, common.copied)
        if dry_run:
            return plan
        measured = measure_statistics(recipe, Path(stack.enter_context(TemporaryDirectory())))
        statistics = [file and stack.enter_context(ModelFolder(file)) for file in measured]
        plan = replace(plan, statistics=statistics)
        folder = stack.enter_context(new_folder(output))
        # Neither digests nor reading hold the interpreter's lock.
        hashing = ThreadPoolExecutor(1)
        stack.callback(hashing.shutdown, cancel_futures=True)
        digests = [hashing.submit(one.digest) for one in folders]
        size = sum(spec.nbytes for spec in plan.specs.values())
        hidden = True if quiet else None  # None: where nobody looks
        with tqdm(total=size, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
            produce = partial(_produce, plan, bar, seed)
            write_stream(folder, plan.files, plan.specs, produce, threads)
        plan = replace(plan, config=_with_tie(plan, folder))
        words = folders[recipe.tokenizer].folder if copy_tokenizer else None
        chat = commonest_chat([one.path for one in recipe.inputs]) if recipe.chat else None
        carry_over(
            folders[recipe.template].folder, words, folder, plan.config, chat, plan.vocabulary
        )
        write_record(
            folder,
            recipe,
            plan.shares(),
            [digest.result() for digest in digests],
            plan.config,
            seed,
            found or {},
            note,
        )
    return plan


def _opened(one: Input, stack: ExitStack) -> TensorSource:
    """The tensors of a model until the stack is closed, with its adapter if it has one."""
    folder = stack.enter_context(ModelFolder(one.path, one.member))
    if one.adapter is None:
        return folder
    from megamod.merging.lora import AdaptedFolder

    return AdaptedFolder(folder, one.adapter)


def _vocabulary(recipe: Recipe) -> Vocabulary | None:
    """The vocabulary of the result, where it is not that of every model.

    Raises:
        UserError: if it cannot be made.
    """
    if recipe.words is None:
        return None
    paths = [one.path for one in recipe.inputs]
    vocabulary = unite(recipe.words, paths, recipe.template, recipe.base)
    if vocabulary is not None and recipe.align is not None:
        raise UserError(
            f"{recipe.origin}: align compares models that have the same words; leave out align, or "
            f"{recipe.words.where}"
        )
    return vocabulary


def _aligned(recipe: Recipe, folders: Sequence[TensorSource]) -> Sequence[TensorSource]:
    """The folders with their features in the order of the first one's, where the recipe asks so.

    Raises:
        UserError: if they cannot be aligned.
    """
    if recipe.align is None:
        return folders
    # Models may have to be run, which takes libraries that no other merge needs.
    from megamod.merging.alignment.before_merge import aligned_folders

    return aligned_folders(recipe.align, folders, recipe.origin)


def _with_tie(plan: Plan, folder: Path) -> dict[str, object]:
    """The configuration of the result, with `tie_word_embeddings` off if the matrices differ.

    Args:
        folder: with the weights of the result.
    """
    pairs = tied_pairs(plan.specs)
    if not pairs or plan.config.get("tie_word_embeddings") is False:
        return plan.config
    with ModelFolder(folder) as written:
        if all(same_bits(written, one, written, other) for one, other in pairs):
            return plan.config
    config = plan.config | {"tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        config["text_config"] = inner | {"tie_word_embeddings": False}
    return config


def _produce(plan: Plan, bar: tqdm, seed: int, name: str) -> Iterator[Tensor]:
    """The elements of one tensor of the result, in its dtype.

    Raises:
        UserError: if one of them is not finite.
    """
    spec, recipe, making = plan.specs[name], plan.recipe, plan.makings[name]
    if making.copied:
        ((number, theirs),) = making.sources
        for piece in _copied(plan.folders[number], theirs):
            yield piece.to(spec.dtype)
            bar.update(piece.nbytes)
        return
    cast = getattr(torch, recipe.dtype) if recipe.dtype else None
    blend = plan.blend(name, seed)
    for piece in METHODS[recipe.method].function(blend):
        piece = piece.reshape(-1) if cast is None else piece.reshape(-1).to(cast)
        piece = piece.to(spec.dtype)
        # The sum is forty times as fast as looking at each element, and only finite if all are.
        if not torch.isfinite(piece.sum()) and not torch.isfinite(piece).all():
            raise UserError(_not_finite(plan, name, blend.operands))
        yield piece
        bar.update(piece.nbytes)


def _copied(folder: TensorSource, name: str) -> Iterator[Tensor]:
    spec = folder.tensors[name]
    buffer = torch.empty(PIECE // spec.dtype.itemsize, dtype=spec.dtype)
    for start, stop in pieces(spec.numel, spec.dtype.itemsize):
        folder.read_into(name, start, buffer[: stop - start])
        yield buffer[: stop - start]


def _not_finite(plan: Plan, name: str, operands: Sequence[Operand]) -> str:
    """Says where values that are not finite come from."""
    for operand in operands:
        if not torch.isfinite(operand.read()).all():
            one = plan.recipe.inputs[operand.number]
            return f"{one}: {operand.name} holds values that are not finite"
    return f"{name} would hold values that are not finite in {plan.specs[name].dtype}"
