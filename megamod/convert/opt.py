"""Export to the OPT class of transformers, to run a model of ours without megamod.

OPT is the same decoder (learned positions after two extra rows, pre-norm, biases everywhere) but
does not scale its embeddings. The factor is multiplied into the embedding matrix, which then cannot
be tied to the output matrix. The exported model stores both, and is larger by one of them.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megamod.convert import NO_OPTIONS, ConvertOptions
from megamod.dist.scope import parse_expert_domain
from megamod.errors import UserError
from megamod.files import write_json
from megamod.states.config_file import read_config_file
from megamod.states.weights import DENSE_FILE, extract_expert_weights, read_weights, write_tensors

# Names of tensors outside of blocks and inside of one: ours -> OPT's.
_OUTSIDE = {
    "model.embeddings.positions.weight": "model.decoder.embed_positions.weight",
    "model.final_norm.weight": "model.decoder.final_layer_norm.weight",
    "model.final_norm.bias": "model.decoder.final_layer_norm.bias",
}
_INSIDE = {
    **{f"attention.{which}_proj": f"self_attn.{which}_proj" for which in ("q", "k", "v", "out")},
    "attention_norm": "self_attn_layer_norm",
    "feed_forward.fc1": "fc1",
    "feed_forward.fc2": "fc2",
    "feed_forward_norm": "final_layer_norm",
}
_TOKENS, _OUTPUT = "model.embeddings.tokens.weight", "lm_head.weight"
_NORM_EPS = 1e-5  # OPT's classes have no field for it
# Fields of config.json that have the same name there.
_FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_FIELDS += ("max_position_embeddings", "bos_token_id", "pad_token_id", "eos_token_id")


def export(source: Path, folder: Path, options: ConvertOptions = NO_OPTIONS) -> list[Path]:
    """Write a dense model, an ELM or one expert of a DEMix model for `OPTForCausalLM`.

    Logits equal those of our model, if padded inputs come with an attention mask: OPT does not
    derive one from the padding ids. Weights keep their dtype.

    Args:
        source: model folder.
        folder: existing folder that model.safetensors and config.json are written into.
        options: `domains` names the expert of a model with experts; empty for a dense model.
    Returns:
        paths of the written files.
    Raises:
        UserError: if `source` is not a language model of ours, if `options` does not name one
            expert, or names one of a dense model, if the epsilon of the norms is not that of OPT,
            or if scaled embeddings are not finite.
    """
    config = _read_config(source)
    state = _select_dense_weights(read_weights(source), config["untie"], options.domains, source)
    layers = config["num_hidden_layers"]
    names = {**_OUTSIDE}
    for layer in range(layers):
        for ours, theirs in _INSIDE.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{ours}.{kind}"] = (
                    f"model.decoder.layers.{layer}.{theirs}.{kind}"
                )
    expected = {*names, _TOKENS}
    if differing := sorted((state.keys() - {_OUTPUT}) ^ expected):
        problem = "unexpected" if differing[0] in state else "missing"
        raise UserError(f"{source}: {differing[0]} is {problem} in a language model")
    tensors = {names[name]: state[name] for name in names}
    tensors["lm_head.weight"] = state.get(_OUTPUT, state[_TOKENS])
    tensors["model.decoder.embed_tokens.weight"] = _scale_embeddings(state[_TOKENS], source)
    write_tensors(folder / DENSE_FILE, tensors, {"format": "pt"})
    write_json(folder / "config.json", _make_opt_config(config, state[_TOKENS].dtype))
    return [folder / DENSE_FILE, folder / "config.json"]


def _read_config(source: Path) -> dict[str, object]:
    """Read config.json of our causal language model.

    Raise UserError for another model type, a missing field, or another norm epsilon than OPT's.
    """
    config = read_config_file(source)
    if config.get("model_type") != "demix":
        raise UserError(f"{source}: model_type is {config.get('model_type')!r}; needed is 'demix'")
    missing = [n for n in (*_FIELDS, "untie", "intermediate_size") if n not in config]
    if missing:
        raise UserError(
            f"{source}: is not a language model of megamod: config.json has no {missing[0]}"
        )
    eps = config.get("layer_norm_eps", _NORM_EPS)
    if eps != _NORM_EPS:
        raise UserError(f"{source}: layer_norm_eps is {eps}; OPT has {_NORM_EPS} and nothing else")
    return config


def _select_dense_weights(
    state: Mapping[str, Tensor], untie: str, domains: tuple[str, ...], source: Path
) -> Mapping[str, Tensor]:
    """Select the weights of a dense model: all of them, or the shared ones with one expert's.

    Args:
        state: weights of the whole model.
        untie: field of config.json; "none" for a model without experts.
        domains: the expert; empty for a model without experts.
        source: model folder, for messages.
    Raises:
        UserError: if `domains` does not name one expert, or names one where there are none.
    """
    if untie == "none":
        if domains:
            raise UserError(f"--domains: {source} has no experts to choose from")
        return state
    experts = ", ".join(sorted({d for name in state if (d := parse_expert_domain(name))}))
    if len(domains) != 1:
        raise UserError(
            f"--domains: name one of the experts of {source}, which are {experts}; OPT holds one"
        )
    return extract_expert_weights(state, domains[0])


def _scale_embeddings(tokens: Tensor, source: Path) -> Tensor:
    """Multiply the embeddings by sqrt(D), the factor that our model applies in each forward pass.

    The product is rounded to the dtype of the weights, as in our model.

    Args:
        tokens: [V, D] matrix of token embeddings.
        source: model folder, for the message.
    Raises:
        UserError: if the product is not finite.
    """
    scaled = math.sqrt(tokens.shape[1]) * tokens
    if not torch.isfinite(scaled).all():
        raise UserError(f"{source}: scaled embeddings are not finite in {tokens.dtype}")
    return scaled


def _make_opt_config(config: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Make the fields of OPT's config.json from those of our model.

    Args:
        config: fields of our config.json, checked by `_read_config`.
        dtype: element type of the weights.
    """
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        **{name: config[name] for name in _FIELDS},
        "ffn_dim": config["intermediate_size"],
        "word_embed_proj_dim": config["hidden_size"],
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
        "activation_function": "gelu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
