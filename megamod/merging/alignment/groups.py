"""Permutation groups: features that share one permutation, and their entries in the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorAxis:
    """Entries of a tensor that belong to a group: consecutive along `dim`, from `start` on.

    Attributes:
        tensor: name of the weight; `dim`: index of its axis.
        part: "features": all features of the group; "queries": all, but heads move as a whole;
            "keys": the same for the fewer key heads; "values": features of the key heads.
        role: matrices of an alignment that act on the entries: "stream" (residual stream), "qk" and
            "values" (inside attention heads), "sign" (gated features); "gain" and "shift" of a norm
            are never multiplied.
    """

    tensor: str
    dim: int
    start: int = 0
    part: str = "features"
    role: str = ""


@dataclass(frozen=True)
class Hook:
    """Module whose input or output holds the features of a group, in columns from `start` on.

    Attributes:
        module: name of the module in the model.
        side: "input" or "output".
    """

    module: str
    side: str
    start: int = 0


@dataclass(frozen=True)
class PermutationGroup:
    """Features of a model that share one permutation, and the weights that have them.

    Attributes:
        name: for example layer.3.ffn; for the expert of a domain layer.3.ffn.law.
        family: "ff", "attn", "qk" (features of queries and keys within heads), "res" or "head".
        size: number of features.
        heads: number of attention heads (key heads with grouped queries); None: no heads.
        queries_per_key: number of query heads per key head.
        producing_axes: weights that produce the features or act on each alone; `reading_axes`:
            weights that read them.
        hooks: where the features are observed; statistics of several hooks are added.
        projections: hooks of an attention group at which queries, keys and values are observed.
        centred: observe the features of each token without their mean.
    """

    name: str
    family: str
    size: int
    heads: int | None
    producing_axes: tuple[TensorAxis, ...]
    reading_axes: tuple[TensorAxis, ...]
    hooks: tuple[Hook, ...]
    queries_per_key: int = 1
    projections: tuple[Hook, ...] = ()
    centred: bool = False

    @property
    def axes(self) -> tuple[TensorAxis, ...]:
        """All axes of tensors along which the features are permuted."""
        return (*self.producing_axes, *self.reading_axes)

    @property
    def head_width(self) -> int:
        """Number of features of an attention head."""
        return self.size // ((self.heads or 1) * self.queries_per_key)

    def count_entries(self, axis: TensorAxis) -> int:
        """Count the entries of the group along a tensor axis: fewer for key heads than for
        features.
        """
        return (
            self.size if axis.part in ("features", "queries") else self.size // self.queries_per_key
        )

    def make_entry_index(self, axis: TensorAxis, permutation: Tensor) -> Tensor:
        """Make the index that reorders the group's entries along a tensor axis like its features.

        Args:
            permutation: [size] of the features; it keeps those of a head together, unless the part
                of the axis is "features".
        Returns:
            [entries] int64, counted from the first entry of the group; see `TensorAxis.part`.
        """
        if axis.part == "features":
            return permutation
        by_head = permutation.view(-1, self.head_width)
        if axis.part != "queries":
            by_head = by_head[:: self.queries_per_key]
        head_order, features_within = by_head[:, :1] // self.head_width, by_head % self.head_width
        if axis.part != "queries":
            head_order = head_order // self.queries_per_key
        if axis.part != "values":
            features_within = torch.arange(self.head_width)
        return (head_order * self.head_width + features_within).flatten()

    def repeat_blocks_for_entries(self, axis: TensorAxis, blocks: Tensor) -> Tensor:
        """Repeat matrices for all entries of the group along a tensor axis.

        Args:
            blocks: [m, h, h], one per key head.
        Returns:
            [n, h, h]: one per query head, that of its key head; `blocks` if the axis has key heads.
        """
        count, width = blocks.shape[:2]
        return blocks.repeat_interleave(self.count_entries(axis) // (count * width), 0)

    def expand_products_to_features(self, axis: TensorAxis, products: Tensor) -> Tensor:
        """Expand inner products of the entries of a tensor axis to pairs of features.

        For every permutation, the sum of `products` over pairs (i, index[i]) of
        `make_entry_index` equals the sum of the result over pairs (r, permutation[r]).

        Args:
            products: [entries, entries].
        Returns:
            [size, size].
        """
        if axis.part == "features":
            return products
        times = 1 if axis.part == "queries" else self.queries_per_key
        if axis.part == "values":
            entry = torch.arange(self.size)
            entry = entry // (self.head_width * times) * self.head_width + entry % self.head_width
            return products[entry][:, entry] / times
        blocks = products.view(
            -1, self.head_width, len(products) // self.head_width, self.head_width
        )
        whole = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        times *= self.head_width
        return whole.repeat_interleave(times, 0).repeat_interleave(times, 1) / times
