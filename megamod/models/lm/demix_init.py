"""Initial weights of the causal language model."""

import torch
from torch import Tensor, nn

from megamod.models.lm.configuration import DemixConfig
from megamod.nn.attention import SelfAttention
from megamod.nn.encoder import was_loaded_from_file
from megamod.nn.sparse import Router
from megamod.nn.transformer import Embeddings, FeedForward


def initialise_module_weights(
    module: nn.Module, config: DemixConfig, generator: torch.Generator | None
) -> None:
    """Initialise one module as fairseq does, in place, if fairseq initialises modules of its class.

    Attention, feed-forwards, routers, embeddings and norms have one, for all their parameters;
    another module is left as it is. The embedding of padding is 0, unless it was loaded from a
    file.

    Args:
        config: configuration of the model, for its hidden size.
        generator: None for torch's global one.
    """
    if isinstance(module, SelfAttention):
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5, generator=generator)
            _fill_uniform(projection.bias, projection.in_features, generator)
        nn.init.xavier_uniform_(module.out_proj.weight, generator=generator)
        nn.init.zeros_(module.out_proj.bias)
    elif isinstance(module, FeedForward):
        for linear in (module.fc1, module.fc2):
            _fill_uniform(linear.weight, linear.in_features, generator)
            _fill_uniform(linear.bias, linear.in_features, generator)
    elif isinstance(module, Router):
        _fill_uniform(module.weight, config.hidden_size, generator)
    elif isinstance(module, Embeddings):
        for table in (module.tokens, module.positions):
            nn.init.normal_(table.weight, std=config.hidden_size**-0.5, generator=generator)
            if not was_loaded_from_file(table.weight):
                nn.init.zeros_(table.weight[table.padding_idx])
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _fill_uniform(tensor: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    """Fill a weight or bias in place as torch.nn.Linear does: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    nn.init.uniform_(tensor, -bound, bound, generator=generator)
