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
CACHE_BYTES, CACHE_ROWS = 2**20, 256  # on a CPU a chunk of so many rows or more stays in its cache


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Sum -log softmax(z)[label] over rows with a label, a float32 scalar in nats.

    z is that of `linear_cross_entropy`, and so are the arguments, but for one leading dimension:
    hidden [rows, D] and labels [rows].
    """
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


class _LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd function that computes the gradients in the forward pass, chunk by chunk.

    The loss is a sum, so the gradients with respect to hidden, weight and bias are known up to one
    scalar, which backward multiplies in: three matrix products in all, as without chunks, and
    nothing of size [rows, V] is saved or recomputed.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the log-probabilities [rows] of `linear_cross_entropy`.

        Args:
            ctx: gets the gradients of hidden, weight and bias, of those that are needed.
            hidden, labels: [rows, D] and [rows]; other arguments as in `linear_cross_entropy`.
        """
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        log_probs = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        differentiate = needs_hidden or needs_weight or needs_bias
        for rows in _split_rows(hidden, weight):
            logits = F.linear(hidden[rows], weight, bias).float()
            gradient, log_probs[rows] = _compute_loss_gradient(
                logits, labels[rows], scale, softcap, differentiate
            )
            if needs_bias:
                grad_bias += gradient.sum(0)
            if needs_hidden or needs_weight:
                gradient = gradient.to(hidden.dtype)
            if needs_hidden:
                torch.mm(gradient, weight, out=grad_hidden[rows])
            if needs_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, hidden[rows])
            elif needs_weight:
                grad_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(log_probs)
        return -log_probs.sum(), log_probs

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients of hidden, weight and bias, times `upstream`; else None.

        `upstream` is the gradient of the loss, a scalar.
        """
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood of `labels` under softmax(z), in float32.

        z = scale (hidden @ weight.T + bias);  with a softcap c: z <- c tanh(z / c)

    Args:
        hidden: [..., D] last hidden states, any float dtype.
        weight: [V, D] output matrix, same dtype.
        labels: [...] int64 token ids, -100 where nothing is predicted.
        bias: [V], same dtype; None for none.
        scale, softcap: see z; softcap None: logits are not bounded.
    Returns:
        The sum over labels (scalar float32, nats; differentiable once in hidden, weight and bias),
        and the log-probability of each label ([...] float32, not differentiable, 0 where ignored).
        Peak extra memory: one chunk of logits, and in training the gradients.
    Raises:
        ValueError: if the shapes of hidden, weight and labels do not fit.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not fit: expected [..., D], [V, D] and [...]"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    total, log_probs = _LinearCrossEntropyFunction.apply(
        rows, weight, labels.reshape(-1), bias, scale, softcap
    )
    return total, log_probs.view(labels.shape)


def _compute_loss_gradient(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None, differentiate: bool
) -> tuple[Tensor | None, Tensor]:
    """Compute log-probabilities of the labels and, if asked, the gradient of the loss of a chunk.

    Args:
        logits: [rows, V] float32, before scale and softcap; overwritten.
        labels: [rows] int64, -100 where nothing is predicted.
        scale, softcap: as in `linear_cross_entropy`.
        differentiate: compute the gradient.
    Returns:
        d(-sum of log p) / d logits [rows, V], None unless `differentiate`; and log p of each label
        [rows]. Both are float32 and 0 where nothing is predicted.
    """
    slope = None
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if differentiate else None  # of softcap * tanh(z / softcap)
        logits.mul_(softcap)
    counted = (labels != IGNORE_INDEX)[:, None]
    target = labels[:, None].where(counted, 0)
    # In place, with one exponential for the loss and the gradient.
    logits.sub_(logits.amax(dim=1, keepdim=True))
    chosen = logits.gather(1, target)
    total = logits.exp_().sum(dim=1, keepdim=True)
    log_probs = (chosen - total.log()).where(counted, 0.0)
    if not differentiate:
        return None, log_probs[:, 0]
    gradient = logits.mul_(counted / total)
    gradient.scatter_add_(1, target, -counted.float())
    if slope is not None:
        gradient.mul_(slope)
    return gradient.mul_(scale) if scale != 1.0 else gradient, log_probs[:, 0]


def _split_rows(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Split the rows of `hidden` [rows, D] into chunks, as slices.

    The logits of a chunk, [chunk, V] for `weight` [V, D], fit LOGITS_BYTES or the cache of a CPU.
    """
    row_bytes = 4 * weight.shape[0]
    chunk_rows = max(16, LOGITS_BYTES // row_bytes)
    if hidden.device.type == "cpu":
        chunk_rows = min(chunk_rows, max(CACHE_ROWS, CACHE_BYTES // row_bytes))
    return [slice(start, start + chunk_rows) for start in range(0, hidden.shape[0], chunk_rows)]
