"""Features that have one permutation, and where in the weights they are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A group's features within a tensor: so many entries along `axis`, from `start` on.

    Attributes:
        part: "features": all of the group's; "queries": as many, but heads move as a whole; "keys":
            the same for the fewer heads of keys; "values": features of these.
    """

    tensor: str
    axis: int
    start: int = 0
    part: str = "features"


@dataclass(frozen=True)
class Hook:
    """Where a group's features can be seen: `size` columns of a module's input or output."""

    module: str
    side: str  # "input" or "output"
    start: int = 0


@dataclass(frozen=True)
class Group:
    """Features that have one permutation.

    Attributes:
        name: for example layer.3.ffn; for a domain's expert layer.3.ffn.law.
        family: "ff", "attn", "qk" (within-head features of queries and keys), "res" or "head".
        size: number of features.
        heads: number of attention heads they are divided into; None if they are not. Of heads of
            keys, where several heads of queries share one.
        queries: how many do.
        out: what makes the features, or works on each of them alone; `into`: what reads them.
        hooks: where they are seen. What is seen at several is added up.
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
        """Everything that is permuted."""
        return (*self.out, *self.into)

    @property
    def width(self) -> int:
        """Features of one attention head."""
        return self.size // ((self.heads or 1) * self.queries)

    def length(self, slot: Slot) -> int:
        """Number of entries along the axis of a slot."""
        return self.size if slot.part in ("features", "queries") else self.size // self.queries

    def index(self, slot: Slot, permutation: Tensor) -> Tensor:
        """What a permutation of the features [size] does to the entries of a slot [length]."""
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
        """[size, size], what each pair of features adds where pairs of entries of a slot are known.

        Args:
            products: [length, length] of the entries. Its sum over pairs of `index` is that of the
                result over pairs of the permutation.
        """
        if slot.part == "features":
            return products
        times = 1 if slot.part == "queries" else self.queries
        if slot.part == "values":
            place = torch.arange(self.size)
            place = place // (self.width * times) * self.width + place % self.width
            return products[place][:, place] / times
        blocks = products.view(-1, self.width, len(products) // self.width, self.width)
        whole = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        times *= self.width
        return whole.repeat_interleave(times, 0).repeat_interleave(times, 1) / times
