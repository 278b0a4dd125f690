"""Resolve the model that a command names: check its kind, convert it where that is possible.

The released checkpoints of MUX-PLM and DataMUX say `"model_type": "bert"`, so transformers loads a
stock BERT from them and drops the multiplexer. Every command therefore asks `resolve_model` first.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

import megamod  # noqa: F401  (makes our configurations known)
from megamod.convert import datamux
from megamod.convert.reading import INDEX_FILES, find_weight_file, list_shards
from megamod.convert.writing import write_converted_model
from megamod.errors import UserError, report_damage
from megamod.files import create_folder_atomically
from megamod.models.auto import resolve_model_folder
from megamod.states.config_file import check_model_fits_files, check_sizes, read_config_file
from megamod.states.hub import find_or_download_folder, is_hub_name
from megamod.states.tokenizer_files import copy_tokenizer
from megamod.states.weight_files import has_weights

logger = logging.getLogger(__name__)

FORMAT = 1  # raised when the converter writes something else, which makes cached folders stale
FAIRSEQ = (".pt", ".pth")  # endings of fairseq's checkpoints, for a hint in a message


@dataclass(frozen=True)
class ResolvedModel:
    """A checked model.

    Attributes:
        name: folder or hub name to load it from; for a released checkpoint, the converted folder.
        config: its configuration.
    """

    name: str
    config: PreTrainedConfig


def resolve_model(
    source: str,
    flag: str,
    accepts_type: Callable[[str], bool] = lambda model_type: True,
    needed_kind: str = "",
) -> ResolvedModel:
    """Check a model folder or hub name; convert a released checkpoint of MUX-PLM or DataMUX.

    A conversion is written to `megamod/converted` in the user's cache folder ($XDG_CACHE_HOME or
    ~/.cache), and used again while the files of the checkpoint do not change.

    Args:
        source: model folder or hub name.
        flag: option or key that named the source, for messages.
        accepts_type: returns True for a model type that the command can use; default: for any.
        needed_kind: the kind of model that is accepted, for the message; "": the message is silent.
    Raises:
        UserError: if there is no configuration that can be used, if its architecture is not that
            of its model type, if `accepts_type` refuses the type, or if the conversion fails.
    """
    where = f"{flag} {source}"
    fields = _read_config_fields(source, flag)
    original = datamux.find_original_class(fields)
    kind = datamux.ORIGINALS[original].model_type if original else fields.get("model_type")
    _check_fields(fields, kind, original, source, where)
    if not accepts_type(str(kind)):
        raise UserError(
            f"{where}: is a model of type {kind!r}{needed_kind and '; needed is '}{needed_kind}"
        )
    name = source if original is None else str(_convert_into_cache(source, flag))
    with report_damage(f"{where}: config.json cannot be used"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if Path(name).is_dir():
            check_model_fits_files(config.to_dict(), Path(name))  # with the defaults of the family
        return ResolvedModel(name, config)


def is_model_source(name: str) -> bool:
    """Return True for a folder with config.json and for a possible hub name OWNER/MODEL.

    The hub is not asked, and a hub name without an owner counts as none.
    """
    path = Path(name)
    return (path / "config.json").is_file() or (name.count("/") == 1 and not path.exists())


def may_have_weights(name: str) -> bool:
    """Return True for a folder with weights, whole or sharded, and for a name that is no folder.

    Such a name is taken as that of a model on the hub, which has weights.

    Raises:
        UserError: as `list_weight_files`, such as for a missing shard.
    """
    path = Path(name)
    return not path.is_dir() or has_weights(path)


def _is_foreign_type(kind: object) -> bool:
    """Return True unless `kind` is a model type of megamod: a stock type or an unknown one."""
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    return not known or CONFIG_MAPPING[kind].__module__.startswith("transformers.")


def _read_config_fields(source: str, flag: str) -> dict[str, object]:
    """Read the fields of config.json, from a folder or else from the hub.

    Args:
        source: model folder or hub name.
        flag: option or key that named the source, for messages.
    Raises:
        UserError: if there is no config.json, or one that cannot be used.
    """
    path, where = Path(source), f"{flag} {source}"
    if path.suffix in FAIRSEQ or (path.is_dir() and not (path / "config.json").is_file()):
        if path.is_file() or any(file.suffix in FAIRSEQ for file in path.glob("*")):
            raise UserError(
                f"{where}: is no model folder (no config.json); a checkpoint of fairseq becomes "
                f"one by `megamod convert --format fairseq_lm --input {source} --output_dir "
                "DIR`"
            )
        raise UserError(f"{where}: there is no model (no config.json)")
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"{where}: there is no such folder")
    if is_hub_name(source):
        path = find_or_download_folder(source, flag, weights=False)
    if path.is_dir():
        try:
            return read_config_file(path)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    with report_damage(f"{where}: no configuration there"):
        fields, _ = PreTrainedConfig.get_config_dict(source)
    check_sizes(fields, f"{where}: config.json")
    return fields


def _check_fields(
    fields: Mapping[str, object], kind: object, original: str | None, source: str, where: str
) -> None:
    """Raise UserError for a configuration that no class here or in transformers implements.

    Such are unknown types and classes, released checkpoints of CA-MTL, multiplexed models without
    the name of their class, and quantised weights. Our own types are not checked.

    Args:
        fields: fields of config.json.
        kind: model type.
        original: class of a released checkpoint, which is accepted; None: it is none.
        source, where: the model, and the flag with it, for messages.
    """
    if original is not None or not _is_foreign_type(kind):
        return
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{where}: config.json has model_type {kind!r}, which neither transformers nor megamod "
            "has; code in folders is never run"
        )
    if isinstance(fields.get("num_tasks"), int):
        raise UserError(
            f"{where}: is a released checkpoint of CA-MTL; convert it first, its tasks in order: "
            f"`megamod convert --format ca_mtl --input {source} --tasks A B --output_dir DIR`"
        )
    instances = fields.get("num_instances", 1)
    if instances != 1 or ("muxing_variant" in fields and "num_instances" not in fields):
        raise UserError(
            f"{where}: config.json has num_instances {instances}, but architectures names no "
            f"multiplexed model; name one of {', '.join(list(datamux.ORIGINALS)[:3])}, ... there"
        )
    for name in fields.get("architectures") or ():
        if not hasattr(transformers, str(name)):
            raise UserError(
                f"{where}: config.json names the class {name!r}, which neither transformers nor "
                "megamod has; code in folders is never run"
            )
    if fields.get("quantization_config"):
        raise UserError(f"{where}: its weights are quantised; dequantise them first")


def _convert_into_cache(source: str, flag: str) -> Path:
    """Convert a released checkpoint into a folder of the user's cache, unless it is there; return
    it.

    The folder's name is a digest of paths, sizes and times of the checkpoint's files.

    Args:
        source: folder or hub name of the checkpoint.
        flag: flag that named it, for messages.
    Raises:
        UserError: if the checkpoint cannot be converted or the cache cannot be written.
    """
    folder = resolve_model_folder(source, flag)
    stored = find_weight_file(folder)
    files = [folder / "config.json", stored]
    files += list_shards(stored) if stored.name in INDEX_FILES else []
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([FORMAT, stats]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    where = f"{flag} {source}"
    target = cache / "megamod" / "converted" / key
    if target.is_dir():
        return target
    try:
        converted = datamux.convert(folder)
        with create_folder_atomically(target) as new:
            write_converted_model(converted, new, "float32")
            copy_tokenizer(folder, new)
    except FileExistsError:  # another rank was faster
        return target
    except UserError as error:
        raise UserError(
            f"{where}: is a released checkpoint that cannot be converted: {error}"
        ) from error
    except OSError as error:
        raise UserError(
            f"{where}: its conversion cannot be kept in {cache} ({error.strerror}); convert it by "
            f"`megamod convert --format datamux --input {source} --output_dir DIR`"
        ) from error
    logger.info("%s: a released checkpoint, converted into %s", where, target)
    return target
