"""Pretraining of anchored experts: checks, and the router rows that they start from.

The row of the anchor is the mean input of a layer's feed-forward on the seed's own text, that of an
expert the mean on its domain's text, each scaled to length 1. The seed alone computes them, so that
runs that share it and its text have the same anchor.
"""

import torch
from torch import Tensor, nn

from megamod.args import ModelArgs
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.merging.moe.configuration import build_moe_config
from megamod.merging.moe.rows import check_router_rows
from megamod.models.auto import resolve_model_folder
from megamod.models.lm.configuration import DemixConfig, get_untie, read_lm_config
from megamod.models.lm.moe_families import FEED_FORWARD, LAYERS
from megamod.runs.router_rows import compute_mean_inputs, read_databin_texts
from megamod.states.dense import make_dense_config

ROW_TOKENS = 65536  # of each domain's valid split, from the first one, that a row is measured on


def check_anchor_flags(model: ModelArgs, has_start: bool) -> None:
    """Refuse an anchor that no mixture can hold later; nothing is loaded.

    Args:
        model: flags; --anchor is set, and --model names the seed, which is to be the anchor.
        has_start: the run starts from weights, not from new ones.
    Raises:
        UserError: for new weights, a seed with experts, a seed of the project's own GPT or of a
            class that has no mixture, or an --anchor that is no data-bin.
    """
    folder = resolve_model_folder(model.model)
    where = f"--anchor {model.anchor}"
    if not has_start or folder is None:
        raise UserError(
            f"{where}: the anchor is a trained model, and this run draws new weights (--model "
            f"{model.model})"
        )
    config = read_lm_config(folder, "--model")
    if get_untie(config) != "none":
        raise UserError(
            f"{where}: {folder} has experts already, and an anchor is a dense model; leave the "
            "flag out to train them further"
        )
    if isinstance(config, DemixConfig):
        raise UserError(
            f"{where}: {folder} is a {config.model_type}, and only stock models have anchored "
            "experts; leave the flag out"
        )
    # Both are called for their errors alone; the numbers of experts are any that are allowed.
    build_moe_config(folder, make_dense_config(config.to_dict()), 2, 2)
    DataBin(model.anchor)


def set_anchor_rows(
    network: nn.Module, seed_text: DataBin, text: DataBin, length: int, batch: int
) -> None:
    """Compute and set the router rows of an anchored model whose experts are copies of the anchor.

    The model is run on a GPU if there is one; its device and mode are those of before afterwards.

    Args:
        network: model of a rank, which may hold some of the domains only; their rows [D] of each
            layer and those of the anchor are set in place.
        seed_text: the anchor's row is the mean over its domains, each with the same weight.
        text: data-bin with the domains of the experts.
        length: tokens per sequence.
        batch: sequences per forward pass.
    Raises:
        UserError: if a text is shorter than one sequence or has other ids than the model's, or a
            row is zero or not finite.
    """
    blocks = [layer.get_submodule(FEED_FORWARD) for layer in network.get_submodule(LAYERS)]
    held = list(blocks[0].experts)
    device = next(network.parameters()).device
    training = network.training
    network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    network.set_domain(held[0])  # all experts are the anchor still

    def compute_mean_states(databin: DataBin, domain: str) -> Tensor:
        """Compute the mean inputs [L, D] of the L layers' feed-forwards on a domain's valid split.

        Raise UserError if the split is shorter than one sequence.
        """
        ids = read_databin_texts(databin, [domain], ROW_TOKENS, network.config, where)[domain].ids
        sequences = ids[: len(ids) // length * length].view(-1, length)
        if not len(sequences):
            raise UserError(
                f"{where}: {domain} has {len(ids)} tokens in its valid split, fewer than one "
                f"sequence of {length}"
            )
        return compute_mean_inputs(network, FEED_FORWARD, sequences, batch)

    where = f"--anchor {seed_text.path}"
    anchor = torch.stack(
        [compute_mean_states(seed_text, domain) for domain in seed_text.domains]
    ).mean(0)
    where = f"--data {text.path}"
    rows = {domain: compute_mean_states(text, domain) for domain in held}
    check_router_rows(torch.stack([anchor, *rows.values()], dim=1), "--anchor")
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            block.anchor_row.copy_(anchor[layer] / anchor[layer].norm())
            for domain, expert in block.experts.items():
                expert.row.copy_(rows[domain][layer] / rows[domain][layer].norm())
    network.to(device).train(training)
    if len(held) > 1:
        for block in blocks:
            block.domain = None  # each batch chooses
