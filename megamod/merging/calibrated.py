"""What `fisher` and `regmean` weigh models by: measured on batches, kept in a file beside a model.

Any module of torch will do that takes a batch as keyword arguments and gives `logits`, as models of
transformers do. Names are those of `named_parameters`, under which weights are saved.
"""

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from megamod.errors import UserError
from megamod.files import sync_file, sync_folder
from megamod.merging.by_statistics import INPUT_FIRST
from megamod.states.weights import write_tensors

Batch = Mapping[str, Tensor]
"""Keyword arguments of a model, the first axis of each being that of the rows."""


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], *, given: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: the mean over rows of squared gradients, in float32.

    A row's gradient is that of the log-likelihood of labels that are drawn from what the model
    predicts, at all positions that `attention_mask` does not exclude.

    Args:
        batches: each with a `labels` if `given`.
        given: take the gradient of the model's own `loss` for those labels (the empirical Fisher).
        seed: of the drawn labels.
    Returns:
        for each parameter that has a gradient, a tensor of its shape.
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
            one = {name: value[row : row + 1] for name, value in batch.items()}
            _loss(model, one, given, generator).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name].add_(parameter.grad.float().square().cpu())
            rows += 1
    model.zero_grad(set_to_none=True)
    if not rows:
        raise UserError("there is no batch to measure the Fisher information on")
    return {name: total.div_(rows) for name, total in sums.items()}


def input_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The Gram matrix [in, in] of the inputs of every linear layer, in float32.

    It is the sum of x x^T over all positions that `attention_mask` does not exclude, added up in
    float64. Layers that share their weight with an embedding are left out: what is good for the
    output would not be for the input.

    Returns:
        matrices by the name of the layer's weight; with `.T` behind it where that is [in, out], as
        in GPT-2.
    Raises:
        UserError: if there is no batch, or no linear layer was used.
    Source: Jin et al. 2022 (Dataless Knowledge Fusion by Merging Weights), section 3.
    """
    model.eval()
    tied = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def listen(key: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach()
            if mask is not None and rows.shape[:-1] == mask.shape:
                rows = rows[mask.bool()]
            rows = rows.reshape(-1, rows.shape[-1]).float()
            product = (rows.T @ rows).double().cpu()
            sums[key] = sums[key] + product if key in sums else product

        return hook

    handles = []
    for name, module in model.named_modules():
        # transformers' Conv1D is a linear layer that holds its weight transposed.
        turned = type(module).__name__ == "Conv1D"
        if (isinstance(module, nn.Linear) or turned) and id(module.weight) not in tied:
            key = f"{name}.weight" + (INPUT_FIRST if turned else "")
            handles.append(module.register_forward_pre_hook(listen(key)))
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise UserError("no batch, or no linear layer, to measure Gram matrices on")
    return {name: total.float() for name, total in sums.items()}


def write_statistics(path: Path, statistics: Mapping[str, Tensor]) -> None:
    """Write a file that a recipe names as `statistics:`; whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_tensors(temporary, statistics, {"format": "pt"})
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _loss(model: nn.Module, row: Batch, given: bool, generator: torch.Generator) -> Tensor:
    if given:
        return model(**row).loss
    logits = model(**{name: value for name, value in row.items() if name != "labels"}).logits
    mask = row.get("attention_mask")
    if mask is not None and logits.shape[:-1] == mask.shape:
        logits = logits[mask.bool()]
    logits = logits.reshape(-1, logits.shape[-1]).float()
    drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
    return functional.cross_entropy(logits, drawn.view(-1).to(logits.device), reduction="sum")
