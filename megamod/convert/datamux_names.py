"""Names and shapes of the tensors of multiplexed models: ours, and the releases' names for them."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from megamod.errors import UserError
from megamod.models.mux import bert, electra, generator, roberta
from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig

Head = Literal["mlm", "sequence", "token", "discriminator", "wrapper"]
"""Kind of a model's head; "wrapper" is ELECTRA's discriminator, possibly with a generator."""
Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor by our name."""
FAMILIES = {"mux_bert": "bert", "mux_electra": "electra", "mux_roberta": "roberta"}
"""Model types, and the prefix of the encoder's names."""

_CONFIGURATIONS = {
    config.model_type: config for config in (MuxBertConfig, MuxElectraConfig, MuxRobertaConfig)
}
# Encoders without a head, by model type.
_BARE = {"mux_bert": bert.MuxBertModel, "mux_electra": electra.MuxElectraModel}
_SOME_IDS = dict(cls_token_id=0, mask_token_id=0, prefix_fill_token_id=0)  # no shape depends on ids
# All our classes of multiplexed models, by name.
_CLASSES = {
    name: kind
    for module in (bert, electra, generator, roberta)
    for name, kind in vars(module).items()
    if name.startswith("Mux")
}


class TensorTable(NamedTuple):
    """Tensors that a checkpoint of a multiplexed model stores.

    Attributes:
        shapes: shape of each tensor by our name.
        optional: our names of the tensors that a checkpoint may lack, with the reason.
        aliases: further names of the originals for the same tensors, as prefixes: a key that starts
            with a key of this mapping is our name after replacing the prefix by the value.
    """

    shapes: Shapes
    optional: dict[str, str]
    aliases: dict[str, str]


def build_tensor_table(head: Head, class_name: str, config: Mapping[str, object]) -> TensorTable:
    """Build the table of the tensors of a model, without allocating any.

    Args:
        head: kind of the model's head.
        class_name: name of our model class.
        config: fields of our config.json.
    Raises:
        UserError: if the configuration class refuses `config`.
    """
    coefficient = config.get("retrieval_loss_coeff", 0)
    # Released classifiers keep the retrieval head; ours have one only if its loss counts.
    tensors = _list_parameter_shapes(
        _CLASSES[class_name], {**config, "retrieval_loss_coeff": coefficient or 1.0}
    )
    optional: dict[str, str] = {}
    if head == "mlm":
        bare_shapes = _list_parameter_shapes(_BARE[config["model_type"]], config)
        unused = {n: shape for n, shape in bare_shapes.items() if n.startswith("demultiplexer.")}
        optional = dict.fromkeys(unused, "not used by a masked language model")
        tensors |= unused
    elif head in ("sequence", "token") and not coefficient:
        reason = "not used while retrieval_loss_coeff is 0"
        optional = {name: reason for name in tensors if name.startswith("retrieval_head.")}
    return TensorTable(tensors, optional, _map_aliases(head, config))


def _list_parameter_shapes(kind: type[PreTrainedModel], fields: Mapping[str, object]) -> Shapes:
    """List the shapes of a model's parameters by name, tied ones once; nothing is allocated.

    Args:
        kind: model class.
        fields: fields of our config.json.
    Raises:
        UserError: if the configuration class refuses `fields`.
    """
    values = {name: value for name, value in fields.items() if name != "model_type"} | _SOME_IDS
    values["prefix_first_token_id"] = values["num_instances"]
    try:
        with torch.device("meta"):
            model = kind(_CONFIGURATIONS[fields["model_type"]](**values))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"config.json: {' '.join(str(error).split())}") from error
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _map_aliases(head: Head, config: Mapping[str, object]) -> dict[str, str]:
    """Map prefixes of the originals' further names to ours; see `TensorTable.aliases`.

    Args:
        head: kind of the model's head; "wrapper" for a discriminator with its generator.
        config: fields of our config.json.
    """
    family, demux = config["model_type"], config["demuxing_variant"]
    words = f"{FAMILIES[family]}.embeddings.word_embeddings.weight"
    aliases: dict[str, str] = {}
    if demux == "index_pos":
        for module in ("demultiplexer", "retrieval_head"):
            aliases[f"{module}.demux_module."] = "demux_module."
    if demux != "index_pos" or family == "mux_electra":
        aliases["retrieval_head.bias"] = "retrieval_head.decoder.bias"
    if family == "mux_bert":
        aliases["retrieval_head.decoder.weight"] = words
    if family == "mux_roberta" and head == "token" and demux == "index":
        aliases["demultiplexer.bias"] = "demultiplexer.decoder.bias"
    if head == "wrapper" and config.get("generator", "none") != "none":
        aliases |= _map_generator_aliases(config, words)
    return aliases


def _map_generator_aliases(config: Mapping[str, object], words: str) -> dict[str, str]:
    """Map prefixes of further names of the generator's tensors to ours.

    Args:
        config: fields of our config.json, with `generator` and `generator_config`.
        words: our name of the discriminator's word embeddings, which the generator may share.
    """
    fields = {**config, **(config.get("generator_config") or {})}
    width = config.get("embedding_size", config["hidden_size"])
    shares_embeddings = fields.get("embedding_size", fields["hidden_size"]) == width
    if config["generator"] == "multiplexed":
        inner = _map_aliases("mlm", fields)
        aliases = {f"generator.{name}": f"generator.{to}" for name, to in inner.items()}
    elif fields.get("tie_word_embeddings", True):
        prefix = "" if shares_embeddings else "generator."
        aliases = {"generator.generator_lm_head.weight": f"{prefix}{words}"}
    else:
        aliases = {}
    if shares_embeddings:
        aliases["generator.electra.embeddings."] = "electra.embeddings."
    return aliases
