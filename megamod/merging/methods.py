"""The merge methods: all of them in `METHODS`, with their parameters.

A method is called once for each tensor. It gets that tensor as every model has it, and gives the
elements of the merged one in order, in as many pieces as it likes. Pieces fit the processor's
cache, so that memory does not grow with the models; methods that need a sum, a norm or a rank over
the whole tensor go through it more than once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from megamod.merging import by_statistics, elementwise, spherical, task_vectors
from megamod.merging.tensors import Blend


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        function: see the head of this module.
        per_model: names of the parameters that every model has, with their defaults; None: it must
            be given.
        overall: the same for parameters of the whole merge.
        base: what the base is: "none", one of the models like any other; "optional" or "needed",
            the one that the others are compared with.
        models: the least and the largest number of models besides such a base.
        common_rows: whether of unequal vocabularies what is common is merged, and not what the
            base has.
    """

    function: Callable[[Blend], Iterator[Tensor]]
    per_model: Mapping[str, float | None] = field(default_factory=dict)
    overall: Mapping[str, float | bool | None] = field(default_factory=dict)
    base: str = "needed"
    models: tuple[int, int] = (1, 10**6)
    common_rows: bool = True


_compared = partial(Method, common_rows=False)
_TAU = {"weight": None, "density": 1.0}
_SUM = {"normalize": False, "lambda": 1.0, "rescale": False, "rescale_by_density": False}
_DROP = _SUM | {"rescale": True}

METHODS = {
    "linear": Method(elementwise.linear, {"weight": None}, {"normalize": True}, base="none"),
    "slerp": Method(spherical.slerp, overall={"t": None}, models=(1, 1)),
    "nuslerp": Method(
        spherical.nuslerp,
        {"weight": None},
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        base="optional",
        models=(2, 2),
    ),
    "task_arithmetic": _compared(task_vectors.task_arithmetic, {"weight": None}, _SUM),
    "ties": _compared(task_vectors.ties, _TAU, _SUM | {"normalize": True}),
    "dare_linear": _compared(task_vectors.dare_linear, _TAU, _DROP),
    "dare_ties": _compared(task_vectors.dare_ties, _TAU, _DROP),
    "breadcrumbs": _compared(task_vectors.breadcrumbs, _TAU | {"gamma": 0.01}, _SUM),
    "breadcrumbs_ties": _compared(task_vectors.breadcrumbs_ties, _TAU | {"gamma": 0.01}, _SUM),
    "della": _compared(task_vectors.della, _TAU | {"epsilon": 0.15}, _DROP | {"normalize": True}),
    "della_linear": _compared(task_vectors.della_linear, _TAU | {"epsilon": 0.15}, _DROP),
    "model_stock": _compared(
        task_vectors.model_stock, overall={"filter_wise": False}, models=(2, 10**6)
    ),
    "passthrough": Method(elementwise.passthrough, {"scale": 1.0}, base="none", models=(1, 1)),
    "fisher": Method(by_statistics.fisher, {"weight": 1.0}, {"floor": 1e-8}, base="none"),
    "regmean": Method(by_statistics.regmean, {"weight": 1.0}, {"alpha": 0.9}, base="none"),
}

PARAMETERS = tuple(
    sorted({name for one in METHODS.values() for name in (*one.per_model, *one.overall)})
)
"""Parameters of any method: a recipe may give those of others, without effect."""
