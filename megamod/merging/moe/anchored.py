"""Anchored models as parts of a mixture: their frozen tensors compared, their rows collected."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.moe.plan import MoePlan
from megamod.merging.moe.rows import RouterRows, check_router_rows
from megamod.merging.tensors import have_same_bits
from megamod.models.lm.moe_families import FEED_FORWARD, LAYERS
from megamod.states.forest import read_model_config
from megamod.states.stream import ANCHOR, ROW, ModelFolder

NAME = "anchor"
"""Name of the anchor among the experts of a mixture."""


def is_anchored(folder: Path) -> bool:
    """Return True for the folder of a model whose experts compute beside an anchor."""
    return bool(read_model_config(folder).get("anchored"))


def read_trained_router_rows(plan: MoePlan) -> RouterRows:
    """Read the router rows of anchored experts and of their anchor, in the order of the experts.

    Args:
        plan: plan of a mixture, one of whose models is read as the anchor itself (a model without
            `member`).
    Raises:
        UserError: naming the first tensor of the anchor that differs, and both folders; or layer
            and expert of a row that is zero or not finite.
    """
    inputs = plan.dense.recipe.inputs
    with ExitStack() as stack:
        folders = {
            path: stack.enter_context(ModelFolder(path))
            for path in dict.fromkeys(model.path for model in inputs)
        }
        _check_same_anchor(list(folders.values()))
        columns = []
        for model in inputs:
            inner = NAME if model.member is None else f"experts.{model.member}"
            separator = "_" if model.member is None else "."
            columns.append(list(_iterate_rows(folders[model.path], plan, inner + separator + ROW)))
    rows = torch.stack([torch.stack(column) for column in columns], dim=1).float()
    check_router_rows(rows, str(inputs[0].path))
    return RouterRows(rows, {"kind": "anchored"})


def _iterate_rows(folder: ModelFolder, plan: MoePlan, name: str) -> Iterator[Tensor]:
    """Yield one expert's router row [D] of each layer, in the stored dtype.

    Args:
        folder, plan: an anchored model, and the plan, which has the number of layers.
        name: name of the row's tensor in a feed-forward, such as `experts.law.row` or `anchor_row`.
    """
    for layer in range(plan.num_layers):
        yield folder.read(f"{LAYERS}.{layer}.{FEED_FORWARD}.{name}")


def _check_same_anchor(folders: Sequence[ModelFolder]) -> None:
    """Refuse models whose anchors, rows included, are not the same bits.

    Raises:
        UserError: naming the first tensor that differs, and both folders.
    """
    first, *others = folders
    names = [n for n in first.tensors if f".{ANCHOR}." in n or n.endswith(f".{ANCHOR}_{ROW}")]
    for name in names:
        for other in others:
            if not have_same_bits(first, name, other, name):
                raise UserError(
                    f"{name} differs between {first.folder} and {other.folder}: their experts were "
                    "trained beside different anchors"
                )
