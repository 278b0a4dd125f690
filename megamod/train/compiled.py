"""The blocks of a model compiled by torch; names of weights stay as they are."""

import os
import shutil
from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megamod.errors import UserError
from megamod.nn.demix import domain_experts
from megamod.nn.encoder import EncoderLayer
from megamod.nn.transformer import DecoderBlock

BLOCKS = (DecoderBlock, EncoderLayer, GradientCheckpointingLayer)
"""What a model is a stack of: ours, and those of transformers."""


def check_stage(config: Mapping[str, object]) -> None:
    """Refuse what blocks cannot be compiled with.

    Args:
        config: DeepSpeed's, resolved.
    Raises:
        UserError: for ZeRO stage 3.
    """
    if config["zero_optimization"]["stage"] == 3:
        raise UserError(
            "--torch_compile with ZeRO stage 3: weights are gathered around every single layer, "
            "which cuts blocks into pieces; use stage 1 or 2, or leave --torch_compile out"
        )


def check_compiler(device: str) -> None:
    """See that what is compiled for the processor can be compiled on this machine.

    Args:
        device: type of the device that trains.
    Raises:
        UserError: if that is "cpu" and there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--torch_compile: the C++ compiler {compiler} is not on this machine; install it, "
            "name another one in CXX, or leave --torch_compile out"
        )


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Have every block of a model compiled when it is first called, forward and backward.

    Blocks of one shape share what was compiled. Each module compiles its own call, so that nothing
    is wrapped and no weight gets another name. Domains are chosen outside of what is compiled: a
    block is cut where its expert is called, so that domains share the code too. Dropout draws other
    masks than without, as fixed by seed and step.

    Args:
        model: before an engine is made of it; changed in place.
        backend: of `torch.compile`.
    Returns:
        the number of blocks.
    """
    for group in domain_experts(model):
        group.forward = torch.compiler.disable(group.forward)
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(backend=backend)
        for group in domain_experts(block):
            for expert in group.experts.values():
                expert.compile(backend=backend)
    return len(blocks)
