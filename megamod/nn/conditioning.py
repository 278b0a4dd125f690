"""Layers conditioned on a task.

Tasks are few and rows are many, so each layer computes a table with a row per task and selects from
it by the task of each row of the batch. So every parameter takes part in every batch, whichever
tasks are in it, as ZeRO 3 requires.

Parameters have the names of the release. Source: Pilault et al. 2021 (CA-MTL), section 2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Film(nn.Module):
    """Feature-wise modulation: a linear layer from the task vector to a factor and a shift.

    Args:
        condition_size: features D of a task vector.
        size: size of the factor and of the shift.
    Source: Perez et al. 2018 (FiLM); with 1 + factor, as in the release of CA-MTL.
    """

    def __init__(self, condition_size: int, size: int):
        super().__init__()
        self.gb_weights = nn.Linear(condition_size, 2 * size)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map task vectors [T, D] to factors, 1 included, and shifts, [T, size] each."""
        factor, shift = self.gb_weights(condition).chunk(2, -1)
        return 1 + factor, shift


class ConditionalLayerNorm(nn.Module):
    """LayerNorm whose weight, but not its bias, is modulated by the task.

    Args:
        size, eps: features D, and epsilon of the norm.
    Source: Pilault et al. 2021, section 2.3, and its release.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.ln_weight_modulation = Film(size, size)

    def forward(self, x: Tensor, task_vectors: Tensor, row_task_ids: Tensor) -> Tensor:
        """Normalise each position.

        Args:
            x: [B, L, D].
            task_vectors: [T, D], a vector per task.
            row_task_ids: [B], task of each row.
        Returns:
            [B, L, D].
        """
        factor, shift = self.ln_weight_modulation(task_vectors)
        weight = (factor * self.weight + shift)[row_task_ids][:, None]
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * weight + self.bias


class Bottleneck(nn.Module):
    """Two linear layers through D // 3 features; the task modulates their input.

    Args:
        size: features D.
    Source: Pilault et al. 2021, section 2.4; linear and without a residual, as in the release.
    """

    def __init__(self, size: int):
        super().__init__()
        self.emb_transf = nn.Linear(size, size)
        self.hidden_modulation = Film(size, size)
        self.down_proj_layer = nn.Linear(size, size // 3)
        self.up_proj_layer = nn.Linear(size // 3, size)

    def forward(self, x: Tensor, task_vectors: Tensor, row_task_ids: Tensor) -> Tensor:
        """Modulate x and apply both layers: [B, L, D] -> [B, L, D].

        Args:
            task_vectors: [T, D], a vector per task.
            row_task_ids: [B], task of each row.
        """
        factor, shift = self.hidden_modulation(self.emb_transf(task_vectors))
        x = x * factor[row_task_ids][:, None] + shift[row_task_ids][:, None]
        return self.up_proj_layer(self.down_proj_layer(x))


class Adapter(nn.Module):
    """Bottleneck, residual and LayerNorm, all but the residual conditioned on the task.

    Args:
        size, eps: features D, and epsilon of the norm.
    Source: Pilault et al. 2021, section 2.4. Not a LoRA adapter (`megamod.models.lm.adapter`).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.bottleneck = Bottleneck(size)
        self.condlayernorm = ConditionalLayerNorm(size, eps)

    def forward(
        self, x: Tensor, residual: Tensor, task_vectors: Tensor, row_task_ids: Tensor
    ) -> Tensor:
        """Compute norm(bottleneck(x) + residual).

        Args:
            x, residual: [B, L, D].
            task_vectors, row_task_ids: as in `ConditionalLayerNorm.forward`.
        Returns:
            [B, L, D].
        """
        x = self.bottleneck(x, task_vectors, row_task_ids) + residual
        return self.condlayernorm(x, task_vectors, row_task_ids)


def compute_block_shape(hidden_size: int, max_length: int) -> tuple[int, int]:
    """Return the number of attention blocks, D / L, and their width, L / blocks rounded up.

    Args:
        hidden_size: hidden size D.
        max_length: L, longest sequence.

    Raises:
        ValueError: if L does not divide D.
    """
    if max_length < 1 or hidden_size % max_length:
        raise ValueError(f"max_seq_length {max_length} does not divide hidden_size {hidden_size}")
    blocks = hidden_size // max_length
    return blocks, -(-max_length // blocks)


def compute_block_bias(
    matrix: Tensor, factor: Tensor, shift: Tensor, sequence_length: int
) -> Tensor:
    """Compute the bias on attention scores by task: blocks along the diagonal, 0 elsewhere.

        bias[t, r, c] = factor[t, c mod w] * matrix[r, c mod w] + shift[t, c mod w]

    where r // w = c // w, so the last block ends where the sequence ends.

    Args:
        matrix: [L, w].
        factor, shift: [T, w].
        sequence_length: S <= L, of the sequences in the batch.
    Returns:
        [T, S, S].
    Source: Pilault et al. 2021, section 2.1, conditional attention; closed form of the release.
    """
    width = matrix.shape[1]
    position = torch.arange(sequence_length, device=matrix.device)
    blocks = factor[:, None] * matrix[:sequence_length] + shift[:, None]  # [T, S, w]
    same_block = position[:, None] // width == position // width
    return blocks[:, :, position % width] * same_block
