"""Operations of a training step per token, for MFU and plans."""

from torch import nn

from megamod.dist.scope import parse_expert_domain
from megamod.models.lm.configuration import LmConfig, get_untie
from megamod.models.lm.hosts import HOSTS

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields with the number of experts in a layer; the configuration of a stock mixture has one."""
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
"""The same for the number of experts that a token passes through."""


def compute_flops_per_token(config: LmConfig, module: nn.Module, sequence_length: int) -> float:
    """Compute the floating-point operations of one token in training.

    It is 6 N + 12 sum over layers of (heads x head size x span); frozen weights count 4 instead of
    6. N counts the parameters that take part in a matrix product for one token; the span of a layer
    is `sequence_length`, or its attention window if that is shorter.

    Args:
        config, module: configuration of the model, and the model, which may be on the meta device.
        sequence_length: in tokens.
    Source: Chowdhery et al. 2022, appendix B.
    """
    trained, frozen = count_active_parameters(config, module)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return (
        6.0 * trained
        + 4.0 * frozen
        + 12.0 * heads * size * sum(_list_attention_spans(config, sequence_length))
    )


def count_active_parameters(config: LmConfig, module: nn.Module) -> tuple[float, float]:
    """Count the trained and the frozen parameters that one token is multiplied with.

    Not counted: learned positions, an input embedding that is a matrix of its own (both are
    lookups), and the experts that a token does not pass through. Experts of a stock mixture count
    by the share that a token passes through, so numbers may be fractions.

    Args:
        config: configuration of the model.
        module: the model; of its domain experts only the first counts.
    """
    excluded_ids = {id(weight) for weight in _find_lookup_tables(config, module)}
    share, has_experts = _compute_active_expert_share(config), get_untie(config) != "none"
    first_domain, counts = None, {True: 0.0, False: 0.0}
    for name, parameter in module.named_parameters():
        domain = parse_expert_domain(name) if has_experts else None
        first_domain = first_domain or domain
        if id(parameter) in excluded_ids or domain not in (None, first_domain):
            continue
        part = share if not has_experts and parse_expert_domain(name) else 1.0
        counts[parameter.requires_grad] += part * parameter.numel()
    return counts[True], counts[False]


def _find_lookup_tables(config: LmConfig, module: nn.Module) -> list[nn.Parameter]:
    """Find the tables of a model that are read by row and take part in no matrix product.

    These are learned positions, and in a stock model the input embedding unless the output matrix
    is tied to it.
    """
    tables = [p for name, p in module.named_parameters() if ".positions." in name]
    host = HOSTS.get(getattr(config, "host", config.model_type))
    if host is not None:
        if host.positions is not None:
            tables.append(module.get_submodule(host.positions).weight)
        if module.get_input_embeddings().weight is not module.get_output_embeddings().weight:
            tables.append(module.get_input_embeddings().weight)
    return tables


def _compute_active_expert_share(config: LmConfig) -> float:
    """Compute the share of a mixture's expert tensors that a token passes through; 1 if dense.

    `config` names the number of experts, and of those per token.
    """
    experts, active = (
        next((getattr(config, name) for name in names if getattr(config, name, None)), None)
        for names in (EXPERTS, ACTIVE_EXPERTS)
    )
    return active / experts if experts and active else 1.0


def _list_attention_spans(config: LmConfig, length: int) -> list[int]:
    """List the span of each layer in tokens: `length`, or the attention window if shorter.

    `config` has the window and the kinds of layers.
    """
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [length] * layers
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = kinds or ["sliding_attention"] * layers
    windowed_kinds = ("sliding_attention", "local")
    return [min(length, window) if kind in windowed_kinds else length for kind in kinds]
