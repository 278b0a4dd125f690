"""Statistics that `fisher` and `regmean` weight models by, computed on batches of text.

They are computed during a merge on text of the recipe, or from Python and written into a file
(`write_statistics`). Any torch module works that takes a batch as keyword arguments and returns
`logits`. Names are those of `named_parameters`, under which weights are saved.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from megamod.errors import UserError
from megamod.files import build_temporary_path, sync_file, sync_folder
from megamod.merging.methods.statistics import INPUT_FIRST
from megamod.merging.recipe import InputModel, MergeRecipe
from megamod.progress import show_progress
from megamod.schemas import check_against_schema, check_known_word
from megamod.states.forest import read_model_config
from megamod.states.stream import ModelFolder
from megamod.states.weights import write_tensors

Batch = Mapping[str, Tensor]
"""Keyword arguments of a model, the first axis of each being that of the rows."""


def compute_diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], *, labelled: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information: squared gradients averaged over rows,
    float32.

    The gradient of a row is that of the log-likelihood of labels that are sampled from the
    predictions of the model, at all positions that `attention_mask` does not exclude.

    The model is set to evaluation mode, and its gradients are removed.

    Args:
        model: takes a batch as keyword arguments and returns `logits` [B, T, V] or [B, C].
        batches: on the device of the model; with `labels` if `labelled`.
        labelled: use the gradient of the model's `loss` for those labels (the empirical Fisher).
        seed: seed of the sampled labels.
    Returns:
        on the CPU, a tensor of its shape for each parameter that requires a gradient.
    Raises:
        UserError: if there is no batch.
    Source: Matena and Raffel 2021 (Merging Models with Fisher-Weighted Averaging), section 3.2.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    rows = 0
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            model.zero_grad(set_to_none=True)
            single = {name: value[row : row + 1] for name, value in batch.items()}
            _compute_row_loss(model, single, labelled, generator).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name].add_(parameter.grad.float().square().cpu())
            rows += 1
    model.zero_grad(set_to_none=True)
    if not rows:
        raise UserError("there is no batch to compute the Fisher information on")
    return {name: total.div_(rows) for name, total in sums.items()}


def compute_input_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Compute the Gram matrices [in, in] of the inputs of all linear layers, in float32.

    The sum of x x^T over all positions that `attention_mask` does not exclude, accumulated in
    float64. Layers that share their weight with an embedding are skipped: a weight that is best for
    the output would be wrong for the input. The model is set to evaluation mode.

    Args:
        model: takes a batch as keyword arguments.
        batches: on the device of the model.
    Returns:
        on the CPU, matrices by the name of the layer's weight, with the suffix `.T` if that is
        stored as [in, out].
    Raises:
        UserError: if there is no batch, or no linear layer was used.
    Source: Jin et al. 2022 (Dataless Knowledge Fusion by Merging Weights), section 3.
    """
    model.eval()
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def make_gram_hook(key: str):
        """Make a forward pre-hook that adds a layer's inputs to the Gram matrix `key`."""

        def add_input_gram(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            """Add the products of a layer's inputs at positions that the mask does not exclude.

            A forward hook of torch: `inputs` are the arguments of the layer.
            """
            rows = inputs[0].detach()
            if mask is not None and rows.shape[:-1] == mask.shape:
                rows = rows[mask.bool()]
            rows = rows.reshape(-1, rows.shape[-1]).float()
            product = (rows.T @ rows).double().cpu()
            sums[key] = sums[key] + product if key in sums else product

        return add_input_gram

    handles = []
    for name, module in model.named_modules():
        # transformers' Conv1D is a linear layer with a transposed weight.
        transposed = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or transposed) and id(module.weight) not in tied:
            key = f"{name}.weight" + (INPUT_FIRST if transposed else "")
            handles.append(module.register_forward_pre_hook(make_gram_hook(key)))
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise UserError("there is no batch, or no linear layer, to compute Gram matrices of")
    return {name: total.float() for name, total in sums.items()}


def write_statistics(path: Path, statistics: Mapping[str, Tensor]) -> None:
    """Write the file that a recipe names as `statistics:`, atomically; an existing one is replaced.

    Args:
        path: in an existing folder.
        statistics: result of `compute_diagonal_fisher` or `compute_input_grams`.
    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    temporary = build_temporary_path(path)
    try:
        write_tensors(temporary, statistics, {"format": "pt"})
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _compute_row_loss(
    model: nn.Module, row: Batch, labelled: bool, generator: torch.Generator
) -> Tensor:
    """Compute the summed negative log-likelihood of labels sampled from the predictions of one row.

    Args:
        row: a batch of one row.
        labelled: return the model's own `loss` of the row's labels instead.
        generator: for the sampled labels, on the CPU.
    """
    if labelled:
        return model(**row).loss
    logits = model(**{name: value for name, value in row.items() if name != "labels"}).logits
    mask = row.get("attention_mask")
    if mask is not None and logits.shape[:-1] == mask.shape:
        logits = logits[mask.bool()]
    logits = logits.reshape(-1, logits.shape[-1]).float()
    drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
    return functional.cross_entropy(logits, drawn.view(-1).to(logits.device), reduction="sum")


_KEYS = ("path", "fraction", "batch_size")  # of a `calibration:` block
_STATISTICS: dict[str, Callable[[nn.Module, Iterable[Mapping[str, Tensor]]], dict[str, Tensor]]] = {
    "fisher": compute_diagonal_fisher,
    "regmean": compute_input_grams,
}


def check_statistics_settings(recipe: MergeRecipe) -> None:
    """Refuse settings and calibration text with which statistics cannot be used, before any work.

    A recipe whose method needs no statistics passes.

    Raises:
        UserError: naming the recipe and the key, file or model.
    """
    if recipe.method in _STATISTICS and recipe.align is not None:
        raise UserError(
            f"{recipe.origin}: align reorders features, but {recipe.method} weights by statistics "
            "of the models as they are stored; leave out align, or use another method"
        )
    if recipe.method == "fisher" and recipe.vocabulary_request is not None:
        raise UserError(
            f"{recipe.origin}: fisher weights by statistics of each model's own words; leave out "
            f"{recipe.vocabulary_request.recipe_key}"
        )
    for model in recipe.inputs:
        block = _find_calibration_block(model, recipe)
        if block is None:
            continue
        where = f"{recipe.origin}, {model}, calibration"
        for key in block:
            check_known_word(str(key), _KEYS, f"{where}: unknown key")
        if not isinstance(block.get("path"), str) or not Path(block["path"]).is_file():
            raise UserError(f"{where}: path is {block.get('path')!r}; give a file with text")
        if model.adapter is not None:
            raise UserError(f"{where}: a model with an adapter is not run on text; merge it first")
        if model.member is not None or read_model_config(model.path).get("untie", "none") != "none":
            raise UserError(
                f"{where}: a model with experts is not run on text; give `statistics: FILE`"
            )


def write_missing_statistics(recipe: MergeRecipe, folder: Path) -> list[Path | None]:
    """Compute and write statistics of the models that have calibration text but no file of them.

    Args:
        folder: to write new files into.
    Returns:
        for each model the recipe's file, else the new one; None for a model that has neither file
        nor text, or whose method weights by no statistics.
    Raises:
        UserError: if a model cannot be loaded or run on its text, or its folder stores no tensor
            under the names of the statistics.
    """
    files = [model.statistics for model in recipe.inputs]
    for number, model in enumerate(recipe.inputs):
        block = _find_calibration_block(model, recipe)
        if block is not None:
            files[number] = folder / f"{number}.safetensors"
            statistics = _compute_model_statistics(model, block, recipe.method)
            with ModelFolder(model.path) as stored:
                if not any(n.removesuffix(INPUT_FIRST) in stored.tensors for n in statistics):
                    raise UserError(
                        f"{model}: weights are stored under other names than those of the model, "
                        f"such as {next(iter(statistics))}; load and save it, or give a file"
                    )
            write_statistics(files[number], statistics)
    return files


def _find_calibration_block(model: InputModel, recipe: MergeRecipe) -> Mapping[str, object] | None:
    """Return the `calibration:` of a model, else the recipe's; None: neither has one.

    Also None if it is not needed: with a file of statistics, or a method that reads none.
    """
    if model.statistics is not None or recipe.method not in _STATISTICS:
        return None
    return model.calibration if model.calibration is not None else recipe.calibration


def _compute_model_statistics(
    parent: InputModel, block: Mapping[str, object], method: str
) -> dict[str, Tensor]:
    """Load a model, run it on its calibration text and return the statistics that a method needs.

    Args:
        parent: the model to load.
        block: content of `calibration:`.
        method: a key of `_STATISTICS`.
    Raises:
        UserError: if the block is invalid, or the model or the text cannot be read.
    """
    # Imported here: other merges run no model, and need not wait for transformers.
    from megamod.merging.alignment.calibration import read_calibration_batches
    from megamod.merging.alignment.measure import load_model
    from megamod.merging.alignment.options import Calibration

    calibration = check_against_schema(block, Calibration, str(parent), "calibration")
    model = load_model(str(parent.path))
    batches = (
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch in read_calibration_batches(str(parent.path), model.config, calibration)
    )
    return _STATISTICS[method](model, show_progress(batches, f"statistics of {parent.path}"))
