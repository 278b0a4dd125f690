"""MUX-BERT, MUX-ELECTRA and DataMUX-RoBERTa: checkpoints of the MUX-PLM and DataMUX releases.

    a folder with config.json, whose `architectures` names the original class, and
    model.safetensors, pytorch_model.bin or state.safetensors

Our models use the original names, except that tensors which the originals store under several names
are stored once, and that the discriminator of the ELECTRA wrapper has no prefix.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamod.convert import NO_OPTIONS, ConvertedModel, ConvertOptions
from megamod.convert.datamux_names import FAMILIES, Head, build_tensor_table
from megamod.convert.reading import find_weight_file, read_checkpoint
from megamod.errors import UserError
from megamod.files import write_json
from megamod.states.config_file import check_model_fits_files, check_sizes, read_config_file
from megamod.states.weights import DENSE_FILE, read_weights, write_tensors

# Fields of config.json that are copied: those that a checkpoint must have, others of transformers,
# and those of the releases; _DEAD have no effect there.
_STOCK = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_STOCK += ("intermediate_size", "max_position_embeddings", "type_vocab_size")
_MORE = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
_MORE += ("layer_norm_eps", "pad_token_id", "embedding_size", "num_labels", "id2label", "label2id")
_MORE += ("problem_type", "bos_token_id", "eos_token_id")
_MUX = ("num_instances", "muxing_variant", "demuxing_variant", "num_hidden_demux_layers")
_MUX += ("gaussian_hadamard_norm", "binary_hadamard_epsilon", "learn_muxing", "task_loss_coeff")
_MUX += ("retrieval_loss_coeff", "retrieval_percentage")
_DEAD = ("head_temperature", "hierarchical_softmax_buckets", "use_hierarchical_softmax")
_DEAD += ("legacy_demuxing",)
_PREFIX = "discriminator."  # of the ELECTRA wrapper's discriminator, which has none here


@dataclass(frozen=True)
class Original:
    """Our model type, kind of head and name of our class for an original class."""

    model_type: str
    head: Head
    ours: str


ORIGINALS = {
    "MuxedBertForMaskedLM": Original("mux_bert", "mlm", "MuxBertForMaskedLM"),
    "MuxedElectraForMaskedLM": Original("mux_electra", "mlm", "MuxElectraForMaskedLM"),
    "MuxedElectraForPreTraining": Original(
        "mux_electra", "discriminator", "MuxElectraForPreTraining"
    ),
    "ELECTRAModel": Original("mux_electra", "wrapper", "MuxElectraForReplacedTokens"),
    **{
        f"Muxed{family}For{task}Classification": Original(
            f"mux_{family.lower()}", task.lower(), f"Mux{family}For{task}Classification"
        )
        for family in ("Bert", "Electra")
        for task in ("Sequence", "Token")
    },
    **{
        f"Roberta{task}ClassificationMuxed": Original(
            "mux_roberta", task.lower(), f"MuxRobertaFor{task}Classification"
        )
        for task in ("Sequence", "Token")
    },
}
"""Classes of the releases by name."""


def find_original_class(fields: Mapping[str, object]) -> str | None:
    """Return the first class of `architectures` that `ORIGINALS` has; None without one.

    Args:
        fields: fields of a config.json.
    """
    named = fields.get("architectures")
    named = named if isinstance(named, (list, tuple)) else [named]
    classes = [re.split(r"\W", str(name))[0] for name in named]
    return next((name for name in classes if name in ORIGINALS), None)


def convert(source: Path, options: ConvertOptions = NO_OPTIONS) -> ConvertedModel:
    """Read a checkpoint and rename its tensors to our names; their dtypes do not change.

    Args:
        source: folder as in the module docstring, or the weight file in it.
        options: `num_attention_heads` overrides config.json; `domains` has no effect.
    Raises:
        UserError: for a class that is unknown, a field that is missing or cannot be converted, and
            a tensor that is missing, of a wrong shape or no floating-point one, or that differs
            from one that it should equal.
    """
    source = Path(source)
    file = find_weight_file(source)
    settings, name = _read_settings(file.parent)
    original = ORIGINALS[name]
    checkpoint = read_checkpoint(file)
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in checkpoint.tensors.items()}
    full_keys = {key.removeprefix(_PREFIX): key for key in checkpoint.tensors}
    config, dropped, missing = _convert_settings(settings, original, options, file)
    if original.head == "wrapper":
        _add_generator_config(config, stored, missing, file)
    expected, optional, aliases = build_tensor_table(original.head, original.ours, config)
    state, used = {}, []
    for key, tensor in stored.items():
        if key in expected:
            state[key] = tensor
            used.append(full_keys[key])
    for key, tensor in stored.items():
        if key in expected:
            continue
        if target := _resolve_alias(key, aliases, expected):
            if target not in state:
                state[target] = tensor
                used.append(full_keys[key])
            elif not torch.equal(state[target], tensor):
                raise UserError(
                    f"{file}: {full_keys[key]} differs from {target}, but both must be equal"
                )
            else:
                dropped[full_keys[key]] = f"equal to {target}"
        elif key.endswith("position_ids"):
            dropped[full_keys[key]] = "counts from 0"
        else:
            dropped[full_keys[key]] = f"no tensor of {original.ours}"
    absent = [key for key in expected if key not in state]
    if required_absent := [key for key in absent if key not in optional]:
        raise UserError(
            f"{file}: {required_absent[0]} is missing (of {len(required_absent)} such keys)"
        )
    missing |= {key: optional[key] for key in absent}
    for key, tensor in state.items():
        if tuple(tensor.shape) != expected[key]:
            raise UserError(
                f"{file}: {key} has shape {tuple(tensor.shape)}, not {expected[key]} as the "
                "fields of config.json ask for"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {key} has dtype {tensor.dtype}, not one of weights")
    return ConvertedModel(config, state, used, dropped, missing)


def export(source: Path, folder: Path, options: ConvertOptions = NO_OPTIONS) -> list[Path]:
    """Write a model folder of ours in the keys of the releases, as safetensors and config.json.

    A tensor that a release stores under several names is written under each of them.

    Args:
        source: model folder.
        folder: existing folder that model.safetensors and config.json are written into.
        options: must not name domains.
    Returns:
        paths of the written files.
    Raises:
        UserError: if `source` is not a multiplexed model or has a tensor that the releases lack, or
            if `options` names domains.
    """
    if options.domains:
        raise UserError("--domains: a multiplexed model has no experts to choose from")
    try:
        config = read_config_file(source)
        class_name = config["architectures"][0]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{source}: is not a multiplexed model: {error!r}") from error
    name = next((name for name, to in ORIGINALS.items() if to.ours == class_name), None)
    if name is None:
        raise UserError(
            f"{source}: is of class {class_name!r}; exported are "
            f"{', '.join(sorted(to.ours for to in ORIGINALS.values()))}"
        )
    head = ORIGINALS[name].head
    state = read_weights(source)
    expected, _, aliases = build_tensor_table(head, class_name, config)
    tensors = {}
    for key, tensor in state.items():
        if key not in expected:
            raise UserError(f"{source}: {key} has no counterpart in {name}")
        for alias in (key, *_iterate_release_names(key, aliases)):
            tensors[alias] = tensor
    backbone = FAMILIES[config["model_type"]]
    positions = torch.arange(config["max_position_embeddings"])[None]
    tensors[f"{backbone}.embeddings.position_ids"] = positions
    if head == "wrapper":
        tensors = {
            key if key.startswith("generator.") else _PREFIX + key: tensor
            for key, tensor in tensors.items()
        }
    write_tensors(folder / DENSE_FILE, tensors, {"format": "pt"})
    fields = {key: config[key] for key in (*_STOCK, *_MORE, *_MUX) if key in config}
    fields |= {"model_type": backbone, "architectures": [name]}
    fields["learn_muxing"] = int(config.get("learn_muxing", 0))
    write_json(folder / "config.json", fields)
    return [folder / DENSE_FILE, folder / "config.json"]


def _resolve_alias(
    key: str, aliases: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Resolve a further name of the originals to our name of the tensor; None if it is no such
    name.

    Args:
        key: name in the checkpoint.
        aliases: see `TensorTable.aliases`.
        expected: shapes of all tensors of the model by our name.
    """
    for start, target in aliases.items():
        if key.startswith(start) and target + key.removeprefix(start) in expected:
            return target + key.removeprefix(start)
    return None


def _iterate_release_names(key: str, aliases: Mapping[str, str]) -> Iterator[str]:
    """Yield the further names under which a release may store one of our tensors.

    Args:
        key: our name of the tensor.
        aliases: see `TensorTable.aliases`.
    """
    for start, target in aliases.items():
        if key.startswith(target):
            yield start + key.removeprefix(target)


def _read_settings(folder: Path) -> tuple[dict[str, object], str]:
    """Read config.json of a checkpoint of the releases.

    The wrapper of the releases nests the fields under `config` and has the class in `case`.

    Args:
        folder: folder of the checkpoint.
    Returns:
        the fields, and the original class that they name, a key of `ORIGINALS`.
    Raises:
        UserError: if the file is malformed or names no such class.
    """
    path = folder / "config.json"
    settings = read_config_file(folder)
    try:
        if isinstance(settings.get("config"), dict):
            settings = settings["config"] | {"architectures": [settings.get("case", "")]}
            check_sizes(settings, str(path))
            check_model_fits_files(settings, folder)
        named = settings["architectures"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: does not name the class of the model in `architectures`"
        ) from error
    name = find_original_class(settings)
    if name is None:
        raise UserError(
            f"{path}: architectures names {', '.join(map(str, named)) or 'nothing'}; converted are "
            "ELECTRAModel and the classes MuxedBertFor..., MuxedElectraFor..., Roberta...Muxed"
        )
    return settings, name


def _convert_settings(
    settings: Mapping[str, object], original: Original, options: ConvertOptions, file: Path
) -> tuple[dict[str, object], dict[str, str], dict[str, str]]:
    """Convert the fields of an original config.json to ours.

    Args:
        settings: the original fields.
        original: our counterpart of the original class.
        options: see `convert`.
        file: weight file beside config.json, for messages.
    Returns:
        fields of our config.json; and as in `ConvertedModel`, the fields that are dropped, with the
        reason, and those that are missing, with their default.
    Raises:
        UserError: for fields that are missing or cannot be converted.
    """
    path = file.parent / "config.json"
    present = {key: value for key, value in settings.items() if value is not None}
    if options.num_attention_heads is not None:
        present["num_attention_heads"] = options.num_attention_heads
    if lacking := [name for name in (*_STOCK, "num_instances") if name not in present]:
        raise UserError(f"{path}: {lacking[0]} is missing")
    for name in (*_STOCK, "num_instances", "num_hidden_demux_layers"):
        value = present.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} is {value!r}, not a number of at least 1")
    for name, needed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if present.get(name, needed) != needed:
            raise UserError(
                f"{path}: {name} is {present[name]!r}; only {needed!r} can be converted"
            )
    fields = {key: present[key] for key in (*_STOCK, *_MORE, *_MUX) if key in present}
    if original.model_type != "mux_electra":
        fields.pop("embedding_size", None)
    missing = {
        f"config.json: {name}": f"{value!r}, the default of the release"
        for name, value in (
            ("muxing_variant", "gaussian_hadamard"),
            ("demuxing_variant", "index"),
            ("num_hidden_demux_layers", 2),
        )
        if name not in present
    }
    defaults = {"muxing_variant": "gaussian_hadamard", "demuxing_variant": "index"}
    if original.model_type == "mux_electra":
        defaults["embedding_size"] = present["hidden_size"]
    fields = defaults | {"num_hidden_demux_layers": 2} | fields
    dropped = {f"config.json: {name}": "without effect" for name in _DEAD if name in present}
    head = {"model_type": original.model_type, "architectures": [original.ours]}
    return head | fields, dropped, missing


def _add_generator_config(
    config: dict[str, object], stored: Mapping[str, Tensor], missing: dict[str, str], file: Path
) -> None:
    """Add the generator of a wrapper to `config` (`generator`, `generator_config`), if it has one.

    Sizes are those of the stored weights. The number of heads, which no weight shows, is set so
    that a head is as wide as in the discriminator, and noted in `missing`.

    Args:
        config: fields of our config.json; changed in place.
        stored: tensors of the checkpoint by name, without the prefix of the discriminator.
        missing: see `ConvertedModel`; changed in place.
        file: weight file of the checkpoint, for messages.
    Raises:
        UserError: if the feed-forward of the generator's first layer is missing or no matrix.
    """
    layers = [re.match(r"generator\.electra\.encoder\.layer\.(\d{1,4})\.", key) for key in stored]
    numbers = [int(layer[1]) for layer in layers if layer]
    if not numbers:
        return
    multiplexed = any(key.startswith("generator.retrieval_head.") for key in stored)
    config["generator"] = "multiplexed" if multiplexed else "plain"
    key = "generator.electra.encoder.layer.0.intermediate.dense.weight"
    inner = stored.get(key)
    if inner is None or inner.dim() != 2:
        raise UserError(f"{file}: {key} is missing, or not a matrix")
    size = inner.shape[1]
    width = stored.get("generator.electra.embeddings_project.weight")
    heads = max(1, size * config["num_attention_heads"] // config["hidden_size"])
    config["generator_config"] = {
        "num_hidden_layers": 1 + max(numbers),
        "hidden_size": size,
        "intermediate_size": inner.shape[0],
        "embedding_size": size if width is None else width.shape[1],
        "num_attention_heads": heads,
    }
    # Where the release shares embeddings it may leave the generator its own matrix of tokens.
    matrix = stored.get("generator.generator_lm_head.weight")
    words = [
        stored.get(f"{p}electra.embeddings.word_embeddings.weight") for p in ("generator.", "")
    ]
    words = words[0] if words[0] is not None else words[1]
    if matrix is not None and words is not None and not torch.equal(matrix, words):
        config["generator_config"]["tie_word_embeddings"] = False
    missing["config.json: generator"] = (
        f"{heads} attention heads of the discriminator's width; the rest from its tensors"
    )
