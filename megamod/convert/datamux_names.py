"""Which tensors the multiplexed models have: names and shapes, from the fields of config.json."""

from collections.abc import Mapping
from typing import Literal

Head = Literal["mlm", "sequence", "token", "discriminator", "wrapper"]
Shapes = dict[str, tuple[int, ...]]
FAMILIES = {"mux_bert": "bert", "mux_electra": "electra", "mux_roberta": "roberta"}
"""Model types, and what the encoder's names begin with."""


def shapes(
    head: Head, config: Mapping[str, object]
) -> tuple[Shapes, dict[str, str], dict[str, str]]:
    """Tensors of a model.

    Args:
        config: fields of our config.json.
    Returns:
        name -> shape; of those that a checkpoint may lack, name -> what stands in for it; and how
        the originals call the same tensors in other places: what a name begins with there -> here.
    """
    family = config["model_type"]
    backbone = FAMILIES[family]
    size, layers = config["hidden_size"], config["num_hidden_demux_layers"]
    width = config.get("embedding_size", size) if family == "mux_electra" else size
    instances, demux = config["num_instances"], config["demuxing_variant"]
    found = _encoder(backbone, config, width)
    found |= _multiplexer(config, width)
    aliases: dict[str, str] = {}
    if demux == "index_pos":
        found |= _shared(instances, size, layers)
        aliases["demultiplexer.demux_module."] = aliases["retrieval_head.demux_module."] = (
            "demux_module."
        )
    if family != "mux_roberta":
        found |= _demultiplexer(demux, size)
    found |= _retrieval(demux, family, config)
    if demux != "index_pos" or family == "mux_electra":
        aliases["retrieval_head.bias"] = "retrieval_head.decoder.bias"
    if family == "mux_bert":
        words = f"{backbone}.embeddings.word_embeddings.weight"
        found.pop("retrieval_head.decoder.weight")
        aliases["retrieval_head.decoder.weight"] = words
    optional = _optional(head, found, config)
    found |= _head(head, family, config)
    if family == "mux_roberta" and head == "token" and demux == "index":
        aliases["demultiplexer.bias"] = "demultiplexer.decoder.bias"
    if head == "wrapper" and config.get("generator", "none") != "none":
        found |= _generator(config, aliases)
    return found, optional, aliases


def _optional(head: Head, found: Shapes, config: Mapping[str, object]) -> dict[str, str]:
    if head == "mlm":
        why = "not used by a masked language model"
        return {name: why for name in found if name.startswith("demultiplexer.")}
    if head in ("sequence", "token") and not config.get("retrieval_loss_coeff", 0):
        why = "not used while retrieval_loss_coeff is 0"
        return {name: why for name in found if name.startswith("retrieval_head.")}
    return {}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _block(name: str, size: int, inner: int) -> Shapes:
    found: Shapes = {}
    for part in ("query", "key", "value"):
        found |= _linear(f"{name}.attention.self.{part}", size, size)
    found |= _linear(f"{name}.attention.output.dense", size, size)
    found |= _norm(f"{name}.attention.output.LayerNorm", size)
    found |= _linear(f"{name}.intermediate.dense", size, inner)
    found |= _linear(f"{name}.output.dense", inner, size)
    return found | _norm(f"{name}.output.LayerNorm", size)


def _embeddings(name: str, config: Mapping[str, object], width: int) -> Shapes:
    return {
        f"{name}.word_embeddings.weight": (config["vocab_size"], width),
        f"{name}.position_embeddings.weight": (config["max_position_embeddings"], width),
        f"{name}.token_type_embeddings.weight": (config["type_vocab_size"], width),
        **_norm(f"{name}.LayerNorm", width),
    }


def _encoder(name: str, config: Mapping[str, object], width: int) -> Shapes:
    size, inner = config["hidden_size"], config["intermediate_size"]
    found = _embeddings(f"{name}.embeddings", config, width)
    if width != size:
        found |= _linear(f"{name}.embeddings_project", width, size)
    for layer in range(config["num_hidden_layers"]):
        found |= _block(f"{name}.encoder.layer.{layer}", size, inner)
    return found


def _multiplexer(config: Mapping[str, object], width: int) -> Shapes:
    variant, instances = config["muxing_variant"], config["num_instances"]
    orthogonal = str(variant).startswith("random_ortho")
    found: Shapes = {"instance_embedding": (instances, width, width)[: 3 if orthogonal else 2]}
    inner = config["intermediate_size"]
    if variant in ("gaussian_attention", "gaussian_attention_v2"):
        found |= _block("muxing_attention", width, inner)
    if variant == "gaussian_attention_v2":
        found |= _block("muxing_attention_2", width, inner)
    if variant == "gaussian_attention":
        found |= _linear("cross_instances_linear", width, width)
        found |= _norm("cross_instances_layernorm", width)
    return found


def _shared(instances: int, size: int, layers: int) -> Shapes:
    found: Shapes = {"demux_module.demux_instance_embedding": (instances, size)}
    for layer in range(1, layers + 1):
        inputs = 2 * size if layer == 1 else size
        found |= _linear(f"demux_module.dense_{layer}", inputs, size)
        found |= _norm(f"demux_module.layer_norm_{layer}", size)
    return found


def _demultiplexer(demux: object, size: int) -> Shapes:
    if demux == "index_pos":
        return _linear("demultiplexer.pre_decoder", size, size) | _norm(
            "demultiplexer.pre_decoder_layer_norm", size
        )
    return _linear("demultiplexer.dense", 2 * size, size) | _norm("demultiplexer.layer_norm", size)


def _retrieval(demux: object, family: object, config: Mapping[str, object]) -> Shapes:
    size = config["hidden_size"]
    found = _linear("retrieval_head.decoder", size, config["vocab_size"])
    if demux == "index_pos":
        found |= _linear("retrieval_head.pre_decoder", size, size)
        return found | _norm("retrieval_head.pre_decoder_layer_norm", size)
    if demux == "index":
        found |= _linear("retrieval_head.dense", 2 * size, size)
        return found | _norm("retrieval_head.layer_norm", size)
    found |= _per_instance("retrieval_head.demux_module", config["num_instances"], size)
    found |= _linear("retrieval_head.dense_pre_vocab", size, size)
    return found | _norm("retrieval_head.layer_norm_pre_vocab", size)


def _per_instance(name: str, instances: int, size: int) -> Shapes:
    found: Shapes = {}
    for instance in range(instances):
        found |= _linear(f"{name}.dense_{instance}", size, size)
        found |= _norm(f"{name}.layer_norm_{instance}", size)
    return found


def _head(head: Head, family: object, config: Mapping[str, object]) -> Shapes:
    size = config["hidden_size"]
    labels = config.get("num_labels") or len(config.get("id2label") or ()) or 2
    if head in ("discriminator", "wrapper"):
        name = "discriminator_predictions"
        return _linear(f"{name}.dense", size, size) | _linear(f"{name}.dense_prediction", size, 1)
    if head == "mlm":
        return {}
    if family == "mux_roberta":
        return _legacy_head(head, config, labels)
    if family == "mux_electra" and head == "sequence":
        return _linear("classifier.dense", size, size) | _linear(
            "classifier.out_proj", size, labels
        )
    return _linear("classifier", size, labels)


def _legacy_head(head: Head, config: Mapping[str, object], labels: int) -> Shapes:
    size, name = config["hidden_size"], "demultiplexer"
    if config["demuxing_variant"] == "index":
        found = _demultiplexer("index", size)
        if head == "token":
            return found | _linear(f"{name}.decoder", size, labels)
    else:
        found = _per_instance(f"{name}.demux_module", config["num_instances"], size)
        found |= _norm(f"{name}.layernorm_presoftmax", size)
    found |= _linear(f"{name}.dense_before_out_proj", size, size)
    return found | _linear(f"{name}.out_proj", size, labels)


def _generator(config: Mapping[str, object], aliases: dict[str, str]) -> Shapes:
    """Tensors of the generator in a wrapper; its other names are added to `aliases`."""
    own = {**config, **(config.get("generator_config") or {})}
    width = own["embedding_size"]
    shared = width == config.get("embedding_size", config["hidden_size"])
    if config["generator"] == "plain":
        found = _encoder("electra", own, width)
        found |= _linear("generator_predictions.dense", own["hidden_size"], width)
        found |= _norm("generator_predictions.LayerNorm", width)
        found["generator_lm_head.bias"] = (own["vocab_size"],)
        if own.get("tie_word_embeddings", True):
            place = "" if shared else "generator."
            words = f"{place}electra.embeddings.word_embeddings.weight"
            aliases["generator.generator_lm_head.weight"] = words
        else:
            found["generator_lm_head.weight"] = (own["vocab_size"], width)
    else:
        found, _, inner = shapes("mlm", own)
        found = {k: v for k, v in found.items() if not k.startswith("demultiplexer.")}
        aliases |= {f"generator.{name}": f"generator.{to}" for name, to in inner.items()}
    if shared:
        found = {k: v for k, v in found.items() if not k.startswith("electra.embeddings.")}
        aliases["generator.electra.embeddings."] = "electra.embeddings."
    return {f"generator.{name}": shape for name, shape in found.items()}
