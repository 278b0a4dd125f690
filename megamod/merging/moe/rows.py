"""Rows of the routers of a mixture: one per layer and expert, from a generator or a file."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.moe.plan import MoePlan
from megamod.models.lm.moe_families import LAYERS

_TENSOR = "rows"  # name in a file of rows


@dataclass(frozen=True)
class RouterRows:
    """Rows of all routers and their origin.

    Attributes:
        rows: [L, E, D] float32.
        record: origin, for moe.json.
    """

    rows: Tensor
    record: dict[str, object] = field(default_factory=dict)


def initialise_router_rows(plan: MoePlan, seed: int) -> RouterRows:
    """Initialise the router rows of a mixture from a normal distribution.

    Its standard deviation is `initializer_range` of the mixture's configuration, or 0.02, the
    default of transformers. Every layer has a generator of its own, so rows do not depend on how
    many layers there are.

    Args:
        plan: plan of the mixture, for numbers of layers, experts and features.
        seed: seed of the generators.
    """
    spread = float(plan.config.get("initializer_range", 0.02))
    rows = torch.empty(plan.num_layers, plan.num_experts, plan.hidden_size)
    for layer, target in enumerate(rows):
        text = f"{seed}/{LAYERS}.{layer}.{plan.family.block}.{plan.family.row_name}"
        digest = hashlib.sha256(text.encode()).digest()
        number = int.from_bytes(digest[:8], "little", signed=True)
        target.normal_(0.0, spread, generator=torch.Generator().manual_seed(number))
    return RouterRows(rows, {"kind": "random", "seed": seed, "spread": spread})


def read_router_rows_file(plan: MoePlan, path: Path) -> RouterRows:
    """Read rows from the tensor `rows` [L, E, D] of a safetensors file, into float32.

    Args:
        plan: plan of the mixture, whose numbers L, E and D the tensor must have.
        path: value of --router_file, for messages too.
    Raises:
        UserError: if the file cannot be read or lacks the tensor; naming the shape, if it is
            another; naming layer and expert, if a row is zero or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_tensor(_TENSOR).float()
    except (OSError, SafetensorError) as error:
        raise UserError(f"--router_file {path}: holds no tensor {_TENSOR!r}: {error}") from error
    expected = (plan.num_layers, plan.num_experts, plan.hidden_size)
    if rows.shape != expected:
        raise UserError(
            f"--router_file {path}: {_TENSOR} has shape {list(rows.shape)}; layers, experts and "
            f"features of this model are {list(expected)}"
        )
    check_router_rows(rows, f"--router_file {path}")
    return RouterRows(rows, {"kind": "file", "path": str(path)})


def check_router_rows(rows: Tensor, origin: str) -> None:
    """Refuse router rows [L, E, D] if one of them is zero or not finite.

    Args:
        origin: origin of the rows, for the message.
    Raises:
        UserError: naming `origin`, layer and expert of the first such row.
    """
    bad = (~rows.isfinite()).any(-1) | (rows == 0).all(-1)
    if bad.any():
        layer, expert = bad.nonzero()[0].tolist()
        raise UserError(
            f"{origin}: the row of expert {expert} in layer {layer} is zero or not finite"
        )
