"""torch.compile of the blocks of a model; names of weights do not change."""

import os
import shutil
from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megamod.errors import UserError
from megamod.nn.demix import iterate_domain_experts
from megamod.nn.encoder import EncoderLayer
from megamod.nn.transformer import DecoderBlock

BLOCKS = (DecoderBlock, EncoderLayer, GradientCheckpointingLayer)
"""Classes of blocks: ours, and that of transformers."""


def check_compile_stage(config: Mapping[str, object]) -> None:
    """Check that the ZeRO stage allows compiled blocks.

    Args:
        config: resolved DeepSpeed configuration.
    Raises:
        UserError: for ZeRO stage 3, and for expert parallelism.
    """
    if "expert_parallel" in config:
        raise UserError(
            "--torch_compile with expert_parallel: ranks exchange tokens inside of each block; "
            "leave one of the two out"
        )
    if config["zero_optimization"]["stage"] == 3:
        raise UserError(
            "--torch_compile with ZeRO stage 3: weights are gathered around every single layer, "
            "which cuts blocks into pieces; use stage 1 or 2, or leave --torch_compile out"
        )


def check_compiler(device: str) -> None:
    """Check that this machine has a compiler for the device.

    Args:
        device: type of the training device.
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
    """Compile every block of a model at its first call, forward and backward.

    Blocks of one shape share the compiled code. Modules are not wrapped, so weights keep their
    names. The graph of a block breaks where its expert is called, so that domains share the code
    too. Dropout masks differ from those without compilation, but are fixed by seed and step.

    Args:
        model: not yet in an engine; changed in place.
        backend: backend of `torch.compile`.
    Returns:
        the number of blocks.
    """
    for group in iterate_domain_experts(model):
        group.forward = torch.compiler.disable(group.forward)
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.compile(backend=backend)
        for group in iterate_domain_experts(block):
            for expert in group.experts.values():
                expert.compile(backend=backend)
    return len(blocks)
