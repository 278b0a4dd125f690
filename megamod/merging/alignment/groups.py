"""Permutation groups: features that share one permutation, and their entries in the weights."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Entries of a tensor that belong to a group: consecutive along `axis`, from `start` on.

    Attributes:
        part: "features": all features of the group; "queries": all, but heads move as a whole;
            "keys": the same for the fewer key heads; "values": features of the key heads.
    """

    tensor: str
    axis: int
    start: int = 0
    part: str = "features"


@dataclass(frozen=True)
class Hook:
    """Module whose input or output holds the features of a group, in columns from `start` on."""

    module: str
    side: str  # "input" or "output"
    start: int = 0


@dataclass(frozen=True)
class Group:
    """Features that share one permutation.

    Attributes:
        name: for example layer.3.ffn; for the expert of a domain layer.3.ffn.law.
        family: "ff", "attn", "qk" (features of queries and keys within heads), "res" or "head".
        size: number of features.
        heads: number of attention heads (key heads with grouped queries); None: no heads.
        queries: number of query heads per key head.
        out: weights that produce the features or act on each alone; `into`: weights that read them.
        hooks: where the features are observed; statistics of several hooks are added.
    """

    name: str
    family: str
    size: int
    heads: int | None
    out: tuple[Slot, ...]
    into: tuple[Slot, ...]
    hooks: tuple[Hook, ...]
    queries: int = 1

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All entries that are permuted."""
        return (*self.out, *self.into)

    @property
    def width(self) -> int:
        """Number of features of an attention head."""
        return self.size // ((self.heads or 1) * self.queries)

    def length(self, slot: Slot) -> int:
        """Number of entries along the axis of a slot."""
        return self.size if slot.part in ("features", "queries") else self.size // self.queries

    def index(self, slot: Slot, permutation: Tensor) -> Tensor:
        """Index of the entries of a slot [length] for a permutation of the features [size]."""
        if slot.part == "features":
            return permutation
        each = permutation.view(-1, self.width)
        if slot.part != "queries":
            each = each[:: self.queries]
        order, within = each[:, :1] // self.width, each % self.width
        if slot.part != "queries":
            order = order // self.queries
        if slot.part != "values":
            within = torch.arange(self.width)
        return (order * self.width + within).flatten()

    def spread(self, slot: Slot, products: Tensor) -> Tensor:
        """Spread inner products of the entries of a slot over pairs of features, [size, size].

        Args:
            products: [length, length]. Its sum over pairs of `index` equals the sum of the result
                over pairs of the permutation.
        """
        if slot.part == "features":
            return products
        times = 1 if slot.part == "queries" else self.queries
        if slot.part == "values":
            entry = torch.arange(self.size)
            entry = entry // (self.width * times) * self.width + entry % self.width
            return products[entry][:, entry] / times
        blocks = products.view(-1, self.width, len(products) // self.width, self.width)
        whole = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        times *= self.width
        return whole.repeat_interleave(times, 0).repeat_interleave(times, 1) / times
