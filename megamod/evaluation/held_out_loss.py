"""Mean losses of models on held-out text and labelled rows."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.masking import Masking
from megamod.data.tasks.classification import EncodedRows


@torch.no_grad()
def compute_masked_loss(
    model: nn.Module, blocks: np.ndarray, masking: Masking, seed: int, batch_size: int
) -> float:
    """Compute the mean cross entropy of masked tokens in nats; 0 if none was masked.

    Every call with the same arguments masks the same tokens.

    Args:
        model: takes `input_ids` and returns `logits` [B, T, V]; run in the mode that it is in.
        blocks: [n, T] token ids.
        masking: draws the masked tokens of a block and their replacements.
        seed: seed of the masks.
        batch_size: blocks per forward pass.
    """
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        # Seeds are far apart, so that no two of them share masks.
        rows = [
            masking.mask_tokens(block, (seed << 40) + start + index)[:2]
            for index, block in enumerate(blocks[start : start + batch_size])
        ]
        inputs, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        logits = model(input_ids=inputs.to(_get_device(model))).logits
        masked = labels != IGNORE
        total += _sum_cross_entropy(logits.cpu()[masked], labels[masked])
        count += int(masked.sum())
    return total / max(1, count)


@torch.no_grad()
def compute_causal_loss(model: nn.Module, blocks: np.ndarray, batch_size: int) -> float:
    """Compute the mean cross entropy of all tokens but the first of each block, in nats.

    Args:
        model: takes `input_ids` and returns `logits` [B, T, V]; run in the mode that it is in.
        blocks: [n, T] token ids, n at least 1 and T at least 2.
        batch_size: blocks per forward pass.
    """
    total = 0.0
    for start in range(0, len(blocks), batch_size):
        inputs = torch.from_numpy(blocks[start : start + batch_size].astype(np.int64))
        logits = model(input_ids=inputs.to(_get_device(model))).logits[:, :-1]
        total += _sum_cross_entropy(logits.cpu().flatten(0, 1), inputs[:, 1:].flatten())
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


@torch.no_grad()
def compute_classifier_loss(
    model: nn.Module,
    encoded: EncodedRows,
    inputs: tuple[str, ...],
    regression: bool,
    batch_size: int,
) -> float:
    """Compute the mean loss of labelled rows or tokens; 0 if there is no label.

    Args:
        model: takes the fields `inputs` of a batch and returns `logits`, [B, C], or [B, L, C] for
            labels of tokens; run in the mode that it is in.
        encoded: rows with labels.
        inputs: names of the fields, such as "input_ids".
        regression: squared error of `logits[:, 0]`; False: cross entropy in nats.
        batch_size: rows per forward pass.
    """
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded.gather_batch(np.arange(start, min(start + batch_size, len(encoded))), None)
        fields = {name: batch[name].to(_get_device(model)) for name in inputs}
        logits, labels = model(**fields).logits.float().cpu(), batch["labels"]
        if regression:
            total += float(functional.mse_loss(logits[:, 0], labels, reduction="sum"))
        else:
            total += _sum_cross_entropy(logits.flatten(0, -2), labels.flatten())
        count += batch["items"]
    return total / max(1, count)


def _sum_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Sum the cross entropy of logits [..., C], in nats, over labels [...] that are not ignored."""
    return float(
        functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    )


def _get_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return next(model.parameters()).device
