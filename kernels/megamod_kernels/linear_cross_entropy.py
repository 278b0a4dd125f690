"""Output projection and cross entropy in one operation that never holds [rows, vocabulary] logits.

The matrix products are left to the vendor library; what is fused is their order: a chunk of rows is
projected, scored and turned into gradients before the next chunk is touched. Language-model heads,
masked-LM heads and retrieval heads all end here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
LOGITS_BYTES = 64 * 2**20  # of one chunk, in float32: large enough for full-speed products


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition: sum over rows of -log softmax(hidden @ weight.T)[label], in float32."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


class _LinearCrossEntropyFunction(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's probabilities are at hand.

    The loss is a sum, so the gradient with respect to hidden and weight is known up to one scalar,
    which backward multiplies in: three matrix products in all, as without chunks, and nothing of
    size [rows, V] is saved or recomputed.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        log_probs = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(hidden, weight):
            gradient, log_probs[rows] = _score(hidden[rows], weight, labels[rows])
            if needs_hidden or needs_weight:
                gradient = gradient.to(hidden.dtype)
            if needs_hidden:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if needs_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, hidden[rows])
            elif needs_weight:
                grad_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(log_probs)
        return -log_probs.sum(), log_probs

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of `labels` under softmax(hidden @ weight.T), taken in float32.

    Args:
        hidden: [..., D] last hidden states, any float dtype.
        weight: [V, D] output matrix, same dtype.
        labels: [...] int64 token ids, -100 where nothing is predicted.
    Returns:
        The sum over labels (scalar float32, nats; differentiable once in hidden and weight), and
        the log-probability of each label ([...] float32, not differentiable, 0 where ignored).
        Peak extra memory: one chunk of logits, and in training the two gradients.
    Raises:
        ValueError: if the shapes do not fit.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not fit: expected [..., D], [V, D] and [...]"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    total, log_probs = _LinearCrossEntropyFunction.apply(rows, weight, labels.reshape(-1))
    return total, log_probs.view(labels.shape)


def _score(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """d(-log p)/d logits [rows, V] and log p of the label [rows], both float32, 0 where ignored."""
    logits = F.linear(hidden, weight).float()
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    counted = (labels != IGNORE_INDEX)[:, None]
    target = labels[:, None].where(counted, 0)
    log_probs = (logits.gather(1, target) - normaliser).where(counted, 0.0)
    gradient = logits.sub_(normaliser).exp_()
    gradient.scatter_add_(1, target, torch.full_like(log_probs, -1.0))
    return gradient.mul_(counted), log_probs[:, 0]


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(16, LOGITS_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
