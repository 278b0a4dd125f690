"""Published BERT checkpoints: MultiBERTs, old LayerNorm names, sharded files, finetuned heads.

The result is a stock model of transformers in safetensors, every tied matrix stored once. The head
is read from the weights; the head of next-sentence prediction is dropped.
"""

import re
from pathlib import Path

import torch

from megamod.convert import NO_OPTIONS, ConvertedModel, ConvertOptions
from megamod.convert.datamux import find_original_class
from megamod.convert.reading import find_weight_file, read_checkpoint
from megamod.errors import UserError, report_damage
from megamod.models.pretrained import MAX_FOREIGN
from megamod.states.config_file import read_config_file

# Old and current last parts of names; first parts of the encoder's names without prefix; all names
# of an encoder; names of the tied tensors.
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_INSIDE = ("embeddings.", "encoder.", "pooler.")
_ENCODER = (
    r"bert\.(embeddings\.(word|position|token_type)_embeddings\.weight|embeddings\.LayerNorm\.\w+"
    r"|pooler\.dense\.\w+|encoder\.layer\.\d+\.(attention\.self\.(query|key|value)"
    r"|attention\.output\.(dense|LayerNorm)|intermediate\.dense|output\.(dense|LayerNorm))\.\w+)"
)
_WORDS = "bert.embeddings.word_embeddings.weight"
_TIED = "cls.predictions.decoder.weight"
_TWINS = {_TIED: _WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"}


def convert(source: Path, options: ConvertOptions = NO_OPTIONS) -> ConvertedModel:
    """Read a checkpoint and rename its tensors to the current names of transformers.

    A few tensors that belong to no BERT are dropped and reported. A matrix or bias that equals the
    one it is tied to is dropped, too. Dtypes do not change.

    Args:
        source: folder with config.json and a file of `WEIGHT_FILES` or `INDEX_FILES`, or that file.
        options: without effect.
    Raises:
        UserError: if config.json is not that of a BERT, if too many tensors belong to no BERT
            (more than two, and more than the share `MAX_FOREIGN`), or if word embeddings are
            missing or of another shape than config.json says.
    """
    file = find_weight_file(Path(source))
    path, config = file.parent / "config.json", read_config_file(file.parent)
    with report_damage(f"{path}: cannot be read as that of a BERT"):
        kind = config.get("model_type", "bert")
        rows, size = int(config["vocab_size"]), int(config["hidden_size"])
    if kind != "bert":
        raise UserError(f"{path}: model_type is {kind!r}, not 'bert'")
    if original := find_original_class(config):
        raise UserError(f"{path}: names the class {original}; use --format datamux")
    stored = read_checkpoint(file).tensors
    state, used, dropped, foreign = {}, [], {}, []
    for key, tensor in stored.items():
        name = _convert_to_current_name(key)
        if name.endswith("position_ids"):
            dropped[key] = "counts from 0"
        elif name.startswith("cls.seq_relationship."):
            dropped[key] = "head of next-sentence prediction"
        elif _is_bert_tensor(name):
            state[name] = tensor
            used.append(key)
        else:
            dropped[key] = "not part of a BERT with one head"
            foreign.append(key)
    if len(foreign) > max(2, MAX_FOREIGN * len(stored)):
        raise UserError(
            f"{file}: {len(foreign)} of its {len(stored)} tensors, such as {min(foreign)}, are no "
            "part of a BERT; use --format datamux or --format ca_mtl"
        )
    words = state.get(_WORDS)
    if words is None or tuple(words.shape) != (rows, size):
        problem = "missing" if words is None else f"of shape {tuple(words.shape)}"
        raise UserError(f"{file}: {_WORDS} is {problem}, config.json says {rows} x {size}")
    for name, source_of in _TWINS.items():
        twin = state.get(name)
        if twin is not None and source_of in state and torch.equal(twin, state[source_of]):
            del state[name]
            key = next(key for key in used if _convert_to_current_name(key) == name)
            used.remove(key)
            dropped[key] = f"the same as {source_of}"
    fields = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return ConvertedModel(
        {**fields, "model_type": "bert", **_make_head_fields(state, config)}, state, used, dropped
    )


def _is_bert_tensor(name: str) -> bool:
    """Return True for a tensor of BERT's encoder or of one of its heads."""
    if name.startswith(("cls.predictions.", "classifier.")):
        return True
    return re.fullmatch(_ENCODER, name) is not None


def _convert_to_current_name(key: str) -> str:
    """Rename a key of any version of transformers to the current name.

    LayerNorm's `gamma` and `beta` are `weight` and `bias` now, and the encoder has the prefix
    "bert.".
    """
    name = key.removeprefix("module.")
    for old, new in _OLD.items():
        name = name.replace(old, new)
    return f"bert.{name}" if name.startswith(_INSIDE) else name


def _make_head_fields(
    state: dict[str, torch.Tensor], config: dict[str, object]
) -> dict[str, object]:
    """Make the fields of config.json for the head in the weights, or for a bare encoder.

    Args:
        state: tensors by current names.
        config: fields of the original config.json, for the names of labels, and for a classifier
            of tokens or of sequences.
    """
    if "classifier.weight" in state:
        count = len(state["classifier.weight"])
        named = str((config.get("architectures") or [""])[0])
        kind = "Token" if "Token" in named else "Sequence"
        labels = config.get("id2label")
        if not isinstance(labels, dict) or len(labels) != count:
            labels = {str(number): f"LABEL_{number}" for number in range(count)}
        return {
            "architectures": [f"BertFor{kind}Classification"],
            "id2label": labels,
            "label2id": {name: int(number) for number, name in labels.items()},
        }
    if "cls.predictions.bias" not in state:
        return {"architectures": ["BertModel"]}
    return {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": _TIED not in state}
