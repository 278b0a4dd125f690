"""Muon, by DeepSpeed: orthogonalized momentum for hidden matrices, AdamW for everything else.

Source: Jordan et al. 2024 (Muon). A matrix moves against the orthogonal factor of its momentum,
approximated by five Newton-Schulz iterations, times sqrt(max(1, rows / columns)).
"""

import inspect
from collections.abc import Sequence

import deepspeed.runtime.zero.muon.muon_optimizer as optimizer_module
import deepspeed.runtime.zero.muon.original_muon as update_module
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

MOMENTUM = 0.95  # of the original implementation, with Nesterov's look-ahead


class Muon(MuonWithAuxAdam):
    """DeepSpeed's optimizer; a step without any gradient, one that is skipped, changes nothing."""

    def step(self, *args: object, **more: object) -> object:
        """Update the weights as `MuonWithAuxAdam.step`, unless no parameter has a gradient.

        Arguments are those of that method.
        """
        gradients = (p.grad for group in self.param_groups for p in group["params"])
        if all(gradient is None for gradient in gradients):
            return None
        return super().step(*args, **more)


def make_muon(
    groups: list[dict[str, object]], scale: float, weight_decay: float, adamw: dict[str, object]
) -> Muon:
    """Make Muon for the groups with `use_muon`, AdamW for the others.

    On a CPU, DeepSpeed's update is replaced by its uncompiled functions in float32, for the whole
    process.

    Args:
        groups: parameter groups, each with `use_muon`; their settings are set in place, except a
            `weight_decay` that they have.
        scale: learning rate of Muon as a multiple of AdamW's; `set_learning_rate` applies it.
        weight_decay: decoupled weight decay of both.
        adamw: further arguments of `torch.optim.AdamW`, `betas` and `eps`.
    """
    if not torch.accelerator.is_available():
        _use_uncompiled_update()
    for group in groups:
        group.setdefault("weight_decay", weight_decay)
        if group["use_muon"]:
            group |= {"momentum": MOMENTUM, "rate_scale": scale}
        else:
            group |= adamw
    return Muon(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={**adamw, "fused": True}
    )


def _use_uncompiled_update() -> None:
    """Replace DeepSpeed's compiled update of Muon by the uncompiled functions, in float32.

    Compiling it on a CPU takes a minute. In half precision, which DeepSpeed selects by the
    accelerator, the sums depend on the processor's instructions: a run would not go on the same on
    another machine.
    """
    names: Sequence[str] = ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz")
    for name in (*names, "muon_update"):
        setattr(update_module, name, inspect.unwrap(getattr(update_module, name)))
    update_module.ns_compute_dtype = lambda method="gram": torch.float32
    optimizer_module.muon_update = update_module.muon_update
