"""Table of the merge methods and their parameters, filled by the decorator `method`.

A method is a function from a `MergeTensor` (one tensor, as every model has it) to the elements of
the merged tensor, in order, in pieces of any size. It is called once per tensor. Pieces fit into
the cache of the processor, so memory does not grow with the models; a method that needs a sum, norm
or rank over the whole tensor reads it more than once.

To add a method, write one file in this package; it is imported with the others:

    @method("halfway", per_model={"weight": 1.0}, models=(1, 1))
    def halfway(target: MergeTensor) -> Iterator[Tensor]:
        ...
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megamod.merging.tensors import MergeTensor

MergeFunction = Callable[[MergeTensor], Iterator[Tensor]]
"""Yields the elements of the merged tensor in order, in pieces of any shape and floating-point
dtype. A piece may be overwritten when the next one is requested. It runs in any thread."""


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        function: from one tensor of all models to pieces of the merged one.
        per_model: parameters of each model and their defaults; None: required.
        overall: parameters of the whole merge and their defaults; None: required.
        base: role of the base model: "none" (a model like the others), or the model that the others
            are compared with, "optional" or "needed".
        models: smallest and largest number of models besides the one they are compared with.
        common_rows: with vocabularies of unequal size, merge the rows that all models have; False:
            those that the base has.
    """

    function: MergeFunction
    per_model: Mapping[str, float | None] = field(default_factory=dict)
    overall: Mapping[str, float | bool | None] = field(default_factory=dict)
    base: str = "needed"
    models: tuple[int, int] = (1, 10**6)
    common_rows: bool = True


METHODS: dict[str, Method] = {}
"""All methods by their name in recipes."""


def method(name: str, **fields: object) -> Callable[[MergeFunction], MergeFunction]:
    """Make a decorator that enters a function into `METHODS`, and returns it unchanged.

    Args:
        name: name of the method in recipes; a method of that name is replaced.
        fields: attributes of `Method`.
    """

    def register_function(function: MergeFunction) -> MergeFunction:
        """Enter the function into `METHODS` under the name of the method."""
        METHODS[name] = Method(function, **fields)
        return function

    return register_function


def list_method_parameters() -> tuple[str, ...]:
    """List the parameters of all methods, sorted; a recipe may contain any of them."""
    names = {name for entry in METHODS.values() for name in (*entry.per_model, *entry.overall)}
    return tuple(sorted(names))
