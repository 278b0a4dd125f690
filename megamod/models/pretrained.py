"""Load pretrained weights, and refuse those that do not belong to the model.

transformers fills absent tensors with random numbers, drops unknown ones and prints a table. Here a
model that would lack more than a tenth of its encoder, or ignore tensors that no model of its type
has, is an error.
"""

from collections.abc import Iterable, Mapping

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from megamod.errors import UserError, report_damage
from megamod.states.layer_names import find_layer_prefix, split_at_layer_number
from megamod.states.weights import check_finite

MAX_MISSING = 0.1  # largest share of the stock encoder's elements that a file may lack
MAX_FOREIGN = 0.02  # largest share of a file's tensors with foreign names; two are always allowed
STOCK_TYPES = {
    "ca_mtl": "bert",
    "mux_bert": "bert",
    "mux_electra": "electra",
    "mux_roberta": "roberta",
}
"""Model type of transformers whose encoder each of our types contains."""


class CheckedLoading(PreTrainedModel):
    """Base of our encoders: `from_pretrained` checks that a file has most of their weights."""

    @classmethod
    def from_pretrained(cls, source: object, *args: object, **kwargs: object) -> object:
        """Load as `PreTrainedModel` does; also takes the folder of a bare stock encoder.

        Args:
            source: folder or hub name.
        Returns:
            the model; with `output_loading_info` the model and transformers' loading report.
        Raises:
            UserError: if more than a tenth of the stock encoder's weights is missing, or one has
                another shape.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        check_missing_weights(model, report, str(source))
        return (model, report) if wants_report else model


def load_pretrained(
    auto: type, source: str, flag: str, **options: object
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Load a model in float32, and refuse weights of another kind of model.

    Args:
        auto: an Auto class or model class of transformers, or a class of ours.
        source: folder or hub name.
        flag: option or key that named the source, for messages.
        options: further arguments of `from_pretrained`.
    Returns:
        the model and transformers' loading report.
    Raises:
        UserError: if it cannot be loaded or has weights that are not finite; as
            `check_missing_weights`, `check_foreign_weights` and `check_all_layers_used`.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # the report is checked instead of printed
    try:
        with report_damage(f"{flag} {source}: cannot be loaded"):
            model, report = auto.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except UserError as error:  # of our own classes, which do not know the flag
        text = str(error)
        raise UserError(text if text.startswith(flag) else f"{flag} {text}") from error
    finally:
        logging.set_verbosity(before)
    check_missing_weights(model, report, f"{flag} {source}")
    check_foreign_weights(model, report, f"{flag} {source}")
    check_all_layers_used(model, report["unexpected_keys"], f"{flag} {source}")
    check_finite(model.named_parameters(), f"{flag} {source}")
    return model, report


def check_missing_weights(
    model: PreTrainedModel, report: Mapping[str, Iterable], source: str
) -> None:
    """Refuse a model whose encoder has weights drawn at random because the file lacks them.

    Args:
        report: loading report of `from_pretrained`.
        source: beginning of the message: the weights, and the option that named them.
    Raises:
        UserError: if more than a tenth of the elements that a stock encoder has are missing, or one
            of its tensors has another shape in the file.
    """
    missing, mismatched = set(report["missing_keys"]), report["mismatched_keys"]
    if not missing and not mismatched:
        return
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    stock = list_backbone_names(model) & sizes.keys()
    for name, stored, expected in sorted(mismatched):
        if name in stock:
            raise UserError(
                f"{source}: {name} has shape {tuple(stored)}, in this model {tuple(expected)}"
            )
    absent = missing & stock
    share = sum(sizes[name] for name in absent) / max(1, sum(sizes[name] for name in stock))
    if share > MAX_MISSING:
        raise UserError(
            f"{source}: lacks {share:.0%} of the encoder of {type(model).__name__}, such as "
            f"{min(absent)}; these weights are those of another model"
        )


def check_all_weights_loaded(report: Mapping[str, Iterable], source: str) -> None:
    """Refuse a model that is used as it is and has weights drawn at random, a head for example.

    Args:
        report: loading report of `from_pretrained`.
        source: beginning of the message.
    Raises:
        UserError: if a single weight is missing or of another shape.
    """
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of its weights are missing or of another shape, such as "
            f"{min(missing)}; train it first"
        )


def check_all_layers_used(model: PreTrainedModel, unused: Iterable[str], source: str) -> None:
    """Refuse weights of a deeper model: a configuration of fewer layers would cut it silently.

    Args:
        unused: names of the file's tensors that the model does not have.
        source: beginning of the message.
    Raises:
        UserError: if one of `unused` is in a layer beside those of the model, or the model has no
            layers.
    """
    prefix = f"{model.base_model_prefix}."
    layers = {find_layer_prefix(name.removeprefix(prefix)) for name in model.state_dict()} - {""}
    lists = {split_at_layer_number(layer)[0] for layer in layers}
    for name in sorted(unused):
        layer = find_layer_prefix(name.removeprefix(prefix))
        if not layer or layer in layers:
            continue
        # A list that the model lacks may be that of a head, unless no layer is left at all.
        if not lists or split_at_layer_number(layer)[0] in lists:
            raise UserError(
                f"{source}: config.json does not describe all layers of the weights, such as {name}"
            )


def check_foreign_weights(
    model: PreTrainedModel, report: Mapping[str, Iterable], source: str
) -> None:
    """Refuse weights of a model that has parts which no model of this type has.

    A type that transformers has no classes for passes, as nothing is known about its parts.

    Args:
        report: loading report of `from_pretrained`.
        source: beginning of the message.
    Raises:
        UserError: if more than two of the file's tensors, and more than `MAX_FOREIGN` of them, have
            names that no stock class of this type has.
    """
    unused = set(report["unexpected_keys"])
    if not unused:
        return
    known = list_stock_names(model.config)
    if not known:  # a registered type of somebody else, with nothing to compare with
        return
    # A head may be left out; a part of another kind of encoder may not.
    foreign = {name for name in unused if not _is_known_name(name, known)}
    total = len(model.state_dict()) - len(set(report["missing_keys"])) + len(unused)
    if len(foreign) > max(2, MAX_FOREIGN * total):
        raise UserError(
            f"{source}: {len(foreign)} of its {total} tensors, such as {min(foreign)}, are not "
            f"part of a {model.config.model_type} model; megamod convert makes a folder of its own "
            "kind"
        )


def list_backbone_names(model: PreTrainedModel) -> set[str]:
    """List the tensors of the stock encoder by their names in the model, without its pooler.

    For a type that transformers has no encoder for, list all names that begin with the model's base
    prefix; none if it has no such part. A name need not be one of the model's.
    """
    prefix, stock = model.base_model_prefix, make_stock_config(model.config)
    start = f"{prefix}." if isinstance(getattr(model, prefix or " ", None), nn.Module) else ""
    names = _list_tensor_names(_find_stock_classes(stock, ("AutoModel",)), stock)
    if not names:
        return {name for name in model.state_dict() if start and name.startswith(start)}
    return {f"{start}{name}" for name in names if "pooler" not in name}


def list_stock_names(config: PreTrainedConfig) -> set[str]:
    """List the names of the tensors in checkpoints of a model type, by any stock class.

    The classes are those of `config.architectures` and of three Auto classes; the set is empty for
    a type that none of them knows.
    """
    stock = make_stock_config(config)
    classes = {getattr(transformers, name, None) for name in config.architectures or ()}
    autos = ("AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedLM")
    return _list_tensor_names(classes | _find_stock_classes(stock, autos), stock)


def _find_stock_classes(stock: PreTrainedConfig, autos: Iterable[str]) -> set[type]:
    """Find the classes that some Auto classes map a configuration to.

    Args:
        stock: configuration of a class of transformers.
        autos: names of Auto classes in transformers.
    """
    classes: set[type] = set()
    for auto in autos:
        # Looked up late: importing the Auto classes registers our models, which import this module.
        kinds = getattr(transformers, auto)._model_mapping.get(type(stock), ())
        classes |= set(kinds) if isinstance(kinds, (tuple, list)) else {kinds}
    return classes


def _list_tensor_names(classes: Iterable[type | None], stock: PreTrainedConfig) -> set[str]:
    """List the names of all tensors of these classes; no memory is allocated.

    Entries that are no class, or a class of another configuration than `stock`, are passed over.
    """
    names: set[str] = set()
    with torch.device("meta"):
        for kind in classes:
            if isinstance(kind, type) and getattr(kind, "config_class", None) is type(stock):
                names |= set(kind(stock).state_dict())
    return names


def make_stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make the configuration of the stock encoder inside a model of `STOCK_TYPES`.

    For every other type return `config` itself.
    """
    if config.model_type not in STOCK_TYPES:
        return config
    stock = transformers.AutoConfig.for_model(STOCK_TYPES[config.model_type])
    for name in type(stock).__annotations__:
        if hasattr(config, name) and name != "model_type":
            setattr(stock, name, getattr(config, name))
    return stock


def _is_known_name(name: str, known: set[str]) -> bool:
    """Return True if a tensor's name in a file is in `known`, the names of the stock classes.

    Names of old files pass too: `gamma` and `beta` of norms, and buffers of positions.
    """
    plain = name.replace("LayerNorm.gamma", "LayerNorm.weight")
    plain = plain.replace("LayerNorm.beta", "LayerNorm.bias")
    return plain in known or plain.endswith("position_ids")
