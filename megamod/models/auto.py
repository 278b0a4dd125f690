"""From a name or folder to a model, new or loaded, holding the experts that a rank needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.dist.scope import dense_name, domain_of_name
from megamod.errors import UserError
from megamod.models.lm.configuration import PRESETS, DemixConfig
from megamod.models.lm.demix import DemixForCausalLM, initialise
from megamod.states.weights import read_weights, spread


def lm_config(
    model: str,
    *,
    vocab_size: int,
    special_ids: dict[str, int],
    domains: Sequence[str],
    untie: str,
    max_positions: int,
    attn_implementation: str,
    overrides: dict[str, int | None],
) -> DemixConfig:
    """Configuration of a language model to train.

    Args:
        model: a preset (`PRESETS`) or the folder of a model, whose shape is taken.
        special_ids: bos_token_id, pad_token_id and eos_token_id of the data.
        overrides: fields that replace the preset's, where not None.
    Raises:
        UserError: if the preset or folder is unknown, or does not fit the data.
    """
    given = {field: value for field, value in overrides.items() if value is not None}
    if model in PRESETS:
        shape = PRESETS[model] | given
    elif (Path(model) / "config.json").exists():
        if given:
            raise UserError(f"--{next(iter(given))} cannot change the model in {model}")
        config = DemixConfig.from_pretrained(model)
        if config.vocab_size != vocab_size or config.max_position_embeddings < max_positions:
            raise UserError(
                f"--model {model} has a vocabulary of {config.vocab_size} and "
                f"{config.max_position_embeddings} positions; the data need {vocab_size} and "
                f"{max_positions}"
            )
        max_positions = config.max_position_embeddings
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        shape = {name: getattr(config, name) for name in names}
    else:
        raise UserError(
            f"--model {model!r} is no folder with config.json and none of {', '.join(PRESETS)}"
        )
    try:
        return DemixConfig(
            **shape,
            **special_ids,
            vocab_size=vocab_size,
            domains=list(domains),
            untie="none" if untie == "all" else untie,
            max_position_embeddings=max_positions,
            attn_implementation=attn_implementation,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def build_lm(
    config: DemixConfig,
    *,
    seed: int,
    init_from: str | None = None,
    local_domains: Sequence[str] | None = None,
) -> DemixForCausalLM:
    """A language model with new weights, or with those of a folder.

    Args:
        seed: of the weights; equal seeds give equal shared weights whatever experts are held.
        init_from: a model folder. A dense one gives every expert the same start; one with experts
            must have all that are asked for.
        local_domains: the domains whose experts to hold; None for all.
    Raises:
        UserError: if the folder's weights do not fit.
    """
    model = DemixForCausalLM(config, local_domains)
    if init_from is None:
        initialise(model, seed)
        return model
    state = read_weights(Path(init_from))
    parameters = dict(model.named_parameters())
    if not all(name in state for name in parameters):
        state = spread(state, parameters)
    for name, parameter in parameters.items():
        if state[name].shape != parameter.shape:
            raise UserError(
                f"--init_from {init_from}: {dense_name(name)} has shape "
                f"{tuple(state[name].shape)}, the model needs {tuple(parameter.shape)}"
            )
        parameter.data.copy_(state[name])
    model.tie_weights()
    return model


def active_parameters(sizes: Mapping[str, int]) -> int:
    """Parameters that one token passes through: one expert of each kind, no position table.

    Args:
        sizes: elements of each parameter, by name.
    """
    one = next((domain for name in sizes if (domain := domain_of_name(name))), None)
    return sum(
        size
        for name, size in sizes.items()
        if domain_of_name(name) in (None, one) and "positions" not in name
    )
