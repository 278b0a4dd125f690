"""One expert of a model with experts as an ordinary dense model folder."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megamod.files import link_file, write_json
from megamod.states.forest import HOST_TYPE, read_model_config
from megamod.states.manifest import MANIFEST
from megamod.states.stream import ModelFolder, write_streamed_tensors
from megamod.states.weights import DENSE_FILE


def make_dense_config(
    config: Mapping[str, object], domains: Sequence[str] | None = None
) -> dict[str, object]:
    """Make the fields of config.json of a dense model with the sizes of a model with experts.

    A stock model with experts becomes one of its stock type and class. Other fields are copied.

    Args:
        config: fields of config.json; not changed.
        domains: training domains of the dense model; None: those of `config`. Without effect for
            stock models, whose configurations have no field for them.
    """
    config = dict(config)
    if config.get("model_type") == HOST_TYPE:
        config["model_type"] = config.pop("host")
        classes = config.get("architectures") or []
        config["architectures"] = [name.removeprefix("Demix") for name in classes]
        for field in ("domains", "untie", "anchored"):
            config.pop(field, None)
    elif config.get("model_type") == "demix":
        config["untie"] = "none"
        config.pop("domain", None)
        if domains is not None:
            config["domains"] = list(domains)
    return config


def write_dense_model(
    source: Path, member: str | None, folder: Path, skipped_names: Sequence[str] = ()
) -> list[Path]:
    """Write a model, or one expert of it, as a dense model folder; return its files, sorted.

    The weights are one model.safetensors: a hard link to that of the source where it is the same.
    Further files of the source, such as those of the tokenizer, are copied; manifest and subfolders
    are not.

    Args:
        source: model folder.
        member: domain of the expert; None for a model without experts.
        folder: an existing empty folder; incomplete after an error.
        skipped_names: names of further files of the source that are not copied.
    Raises:
        UserError: if config.json, weights or the member are missing or malformed.
        OSError: if something cannot be written.
    """
    source, folder = Path(source), Path(folder)
    config = read_model_config(source)
    with ModelFolder(source, member) as model:
        if member is None and [file.name for file in model.files] == [DENSE_FILE]:
            link_file(source / DENSE_FILE, folder / DENSE_FILE)
        else:
            files = {DENSE_FILE: list(model.tensors)}
            write_streamed_tensors(folder, files, model.tensors, lambda name: [model.read(name)])
        if member is not None:
            config = make_dense_config(config)
            if config["model_type"] == "demix":
                config["tie_word_embeddings"] = "lm_head.weight" not in model.tensors
    write_json(folder / "config.json", config)
    for file in source.iterdir():
        is_weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        names = ("config.json", MANIFEST, *skipped_names)
        if file.is_file() and not is_weights and file.name not in names:
            shutil.copyfile(file, folder / file.name)
    return sorted(file for file in folder.iterdir() if file.is_file())
