"""Measured speeds that were published, beside the planner's own.

Average updates per second of dense, DEMix and Branch-Train-Merge training over those of the dense
model: Li et al. 2022 (Branch-Train-Merge, arXiv 2208.03306), as remembered of the paper's table,
which was not at hand: check there before citing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamod.args import ModelArgs
from megamod.dist.scope import Sharing
from megamod.planning.simulate import Curves, Point

SOURCE = "Li et al. 2022"


@dataclass(frozen=True)
class Published:
    """A size of the paper.

    Attributes:
        gpus: that all three were trained on.
        speed: updates per second over those of the dense model.
    """

    gpus: int
    speed: Mapping[Sharing, float]


def _of(gpus: int, dense: float, demix: float, btm: float) -> Published:
    return Published(gpus, {Sharing.DENSE: dense, Sharing.DEMIX: demix, Sharing.BTM: btm})


PUBLISHED = {
    "125m": _of(16, 1.00, 1.01, 1.05),
    "350m": _of(32, 1.00, 1.11, 1.23),
    "750m": _of(64, 1.00, 1.01, 1.27),
    "1.3b": _of(128, 1.00, 0.97, 1.33),
}


def published_of(model: ModelArgs) -> Published | None:
    """What the paper has on a model; None if it has no such size, or its shape is changed."""
    shape = (model.hidden_size, model.num_hidden_layers, model.intermediate_size)
    return PUBLISHED.get(model.model) if shape == (None, None, None) else None


def ratios(curves: Curves, gpus: int) -> dict[Sharing, tuple[float, float]]:
    """Simulated tokens per second over those of dense training on so many GPUs, by kind.

    Returns:
        with communication in the open, and hidden as far as it can be; a kind that has no point
        there (fewer GPUs than domains) is left out.
    """
    there = {kind: _at(points, gpus) for kind, points in curves.items()}
    dense = there[Sharing.DENSE]
    if dense is None:
        return {}
    return {
        kind: (point.slow / dense.slow, point.fast / dense.fast)
        for kind, point in there.items()
        if point is not None
    }


def markers(curves: Curves, published: Published) -> dict[Sharing, tuple[int, float]]:
    """GPUs, and tokens per second that DEMix and BTM would have by the published ratios.

    They are multiples of the simulated dense training on the paper's number of GPUs, with its
    communication in the open: only ratios were published that another cluster can be compared to.
    """
    dense = _at(curves[Sharing.DENSE], published.gpus)
    if dense is None:
        return {}
    return {
        kind: (published.gpus, ratio * dense.slow)
        for kind, ratio in published.speed.items()
        if kind is not Sharing.DENSE
    }


def _at(points: Sequence[Point], gpus: int) -> Point | None:
    return next((point for point in points if point.gpus == gpus), None)
