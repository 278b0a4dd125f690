"""CA-MTL: checkpoints of the release, folders with config.json and pytorch_model.bin.

The variant, the longest sequence and the number of labels are read from the weights; the names of
the tasks are an option (`domains`), in the order of the ids. Names differ for the heads, which are
one tensor here, and for the last block of "base", whose parts the release calls new_....
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megamod.convert import NO_OPTIONS, ConvertedModel, ConvertOptions
from megamod.convert.reading import find_weight_file, read_checkpoint
from megamod.errors import UserError
from megamod.files import write_json
from megamod.states.config_file import read_config_file
from megamod.states.weights import DENSE_FILE, read_weights, write_tensors

# Fields of config.json that are copied: those that a checkpoint must have, and others.
_STOCK = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_STOCK += ("intermediate_size", "max_position_embeddings", "type_vocab_size")
_MORE = ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
_MORE += ("layer_norm_eps", "pad_token_id")
_HEAD = re.compile(r"decoders\.(\d{1,4})\.model\.(weight|bias)")
_NEW = ("attention", "intermediate", "output")  # parts of the last block that are called new_...


def convert(source: Path, options: ConvertOptions = NO_OPTIONS) -> ConvertedModel:
    """Read a checkpoint and rename its tensors to our names.

    A head with one output becomes a regression task, any other head a sequence task.

    Args:
        source: folder with config.json and weights, or the weight file in it.
        options: `domains` are the names of the tasks in the order of their ids; empty: task0,
            task1 and so on.
    Raises:
        UserError: for a file or a field of config.json that is missing, a head or a matrix that is
            missing or misshapen, or another number of names than of heads.
    """
    file = find_weight_file(Path(source))
    path, settings = file.parent / "config.json", read_config_file(file.parent)
    fields = {name: settings[name] for name in (*_STOCK, *_MORE) if name in settings}
    if lacking := [name for name in _STOCK if name not in fields]:
        raise UserError(f"{path}: {lacking[0]} is missing")
    stored = read_checkpoint(file).tensors
    last = fields["num_hidden_layers"] - 1
    state, used, dropped = {}, [], {}
    heads: dict[tuple[int, str], Tensor] = {}
    for key, tensor in stored.items():
        if head := _HEAD.fullmatch(key):
            heads[int(head[1]), head[2]] = tensor
            used.append(key)
        elif key.startswith("bert.") and not key.endswith("position_ids"):
            state[_rename_to_ours(key, last)] = tensor
            used.append(key)
        else:
            dropped[key] = "counts from 0" if key.endswith("position_ids") else "no part of CA-MTL"
    sizes = _stack_heads(state, heads, fields["hidden_size"], file)
    tasks = list(options.domains) or [f"task{number}" for number in range(len(sizes))]
    if len(tasks) != len(sizes):
        raise UserError(
            f"--tasks {' '.join(tasks)}: {len(tasks)} names of tasks, the checkpoint has "
            f"{len(sizes)} heads"
        )
    variant, length = _detect_variant_and_length(state, settings, file)
    config = {
        "model_type": "ca_mtl",
        "architectures": ["CaMtlForMultiTask"],
        **fields,
        "variant": variant,
        "max_seq_length": length,
        "tasks": tasks,
        "task_kinds": ["regression" if size == 1 else "sequence" for size in sizes],
        "task_labels": [[str(n) for n in range(size)] if size > 1 else [] for size in sizes],
    }
    missing = {} if options.domains else {"names of the tasks": f"{', '.join(tasks)} (--tasks)"}
    return ConvertedModel(config, state, used, dropped, missing)


def export(source: Path, folder: Path, options: ConvertOptions = NO_OPTIONS) -> list[Path]:
    """Write a model folder of ours in the release's keys.

    Names of tasks and labels are not written, because the release does not store them.

    Args:
        source: model folder.
        folder: existing folder that model.safetensors and config.json are written into.
        options: without effect.
    Returns:
        paths of the written files.
    Raises:
        UserError: if `source` is not a CA-MTL model, or has heads for labels of tokens.
    """
    config = read_config_file(source)
    if config.get("model_type") != "ca_mtl":
        raise UserError(f"{source}: is of type {config.get('model_type')!r}, not ca_mtl")
    if "token" in config["task_kinds"]:
        raise UserError(f"{source}: the release has no heads for labels of tokens")
    state, base = read_weights(source), config["variant"] == "base"
    last = config["num_hidden_layers"] - 1
    tensors = {
        (_rename_to_release(key, last) if base else key): tensor
        for key, tensor in state.items()
        if key.startswith("bert.")
    }
    for task, labels in enumerate(config["task_labels"]):
        for kind in ("weight", "bias"):
            rows = state[f"heads.{kind}"][task, : len(labels) or 1]
            tensors[f"decoders.{task}.model.{kind}"] = rows.contiguous()
    write_tensors(folder / DENSE_FILE, tensors, {"format": "pt"})
    fields = {name: config[name] for name in (*_STOCK, *_MORE) if name in config}
    fields |= {"model_type": "bert", "num_tasks": len(config["tasks"])}
    write_json(folder / "config.json", fields | {"max_seq_length": config["max_seq_length"]})
    return [folder / DENSE_FILE, folder / "config.json"]


def _rename_to_ours(key: str, last_layer: int) -> str:
    """Rename a key of the release to ours: parts of its last block lose the prefix new_.

    Args:
        key: name of a tensor in the release's checkpoint.
        last_layer: index of the last block.
    """
    start = f"bert.encoder.layer.{last_layer}.new_"
    return key.replace(start, start.removesuffix("new_"), 1) if key.startswith(start) else key


def _rename_to_release(key: str, last_layer: int) -> str:
    """Rename a key of ours to the release's: conditioned parts of its last block get the prefix
    new_.

    Args:
        key: name of a tensor in our model.
        last_layer: index of the last block.
    """
    start = f"bert.encoder.layer.{last_layer}."
    part = key.removeprefix(start).split(".")[0]
    if key.startswith(start) and part in _NEW:
        return f"{start}new_{key.removeprefix(start)}"
    return key


def _stack_heads(
    state: dict[str, Tensor], heads: Mapping[tuple[int, str], Tensor], hidden_size: int, file: Path
) -> list[int]:
    """Stack the heads of all T tasks into `state`; return the number of outputs of each head.

    Adds heads.weight [T, L, hidden_size] and heads.bias [T, L] in float32, where L is the largest
    number of outputs; smaller heads are filled with zeros.

    Args:
        state: tensors by our names; changed in place.
        heads: tensors by task number and "weight" [outputs, hidden_size] or "bias" [outputs].
        file: the checkpoint, for messages.
    Raises:
        UserError: if there is no head, or one is missing or misshapen.
    """
    count = 1 + max((task for task, _ in heads), default=-1)
    for task in range(count):
        for kind, shape in (("weight", 2), ("bias", 1)):
            head = heads.get((task, kind))
            if head is None or head.dim() != shape or (shape == 2 and head.shape[1] != hidden_size):
                raise UserError(f"{file}: decoders.{task}.model.{kind} is missing or misshapen")
    if not count:
        raise UserError(f"{file}: has no head (decoders.0.model.weight)")
    sizes = [len(heads[task, "bias"]) for task in range(count)]
    state["heads.weight"] = torch.zeros(count, max(sizes), hidden_size)
    state["heads.bias"] = torch.zeros(count, max(sizes))
    for task, rows in enumerate(sizes):
        state["heads.weight"][task, :rows] = heads[task, "weight"]
        state["heads.bias"][task, :rows] = heads[task, "bias"]
    return sizes


def _detect_variant_and_length(
    state: Mapping[str, Tensor], settings: Mapping[str, object], file: Path
) -> tuple[str, int]:
    """Detect the variant ("plain", "base" or "large") and the longest sequence in tokens.

    Both are read from the weights, except the longest sequence of "plain", which no weight shows.

    Args:
        state: tensors of the checkpoint by its keys.
        settings: fields of its config.json; `max_seq_length`, else 128, is the length of "plain".
        file: the checkpoint, for messages.
    Raises:
        UserError: if the matrix that shows the length is missing.
    """
    if "bert.task_type_embeddings.weight" not in state:
        return "plain", int(settings.get("max_seq_length", 128))
    name = "bert.encoder.layer.0.attention.self.random_weight_matrix"
    if name not in state:
        raise UserError(f"{file}: {name} is missing")
    large = any(key.startswith("bert.encoder.adapter_layer.0.") for key in state)
    return "large" if large else "base", len(state[name])
