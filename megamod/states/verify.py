"""Find faults of runs, checkpoints, models and forests on disk.

Neither torch nor DeepSpeed is loaded, so that a check takes as long as reading the files. Functions
that yield results do so while they read; nothing on disk is changed.
"""

from collections.abc import Iterator
from pathlib import Path

from megamod.errors import UserError
from megamod.states.adapter import check_seed_weights, is_adapter, resolve_seed_folder
from megamod.states.checkpoint_folder import (
    LATEST,
    STATE,
    StateRecord,
    is_checkpoint,
    list_checkpoints,
    read_fragment_ranges,
)
from megamod.states.config_file import read_config_file
from megamod.states.forest import FILE, open_forest
from megamod.states.manifest import MANIFEST, find_file_faults
from megamod.states.model_folder import is_model_folder, list_model_folders
from megamod.states.weight_files import INDEX_FILE, read_index

CheckResult = tuple[str, list[str]]
"""Description of a checked group of files, and its faults, one sentence each."""


def check_path(path: Path) -> Iterator[CheckResult]:
    """Check all files of a forest, checkpoint, model, run or folder of models; yield a result each.

    Args:
        path: folder, or a forest.json. A data-bin is checked by `megamod.data.lm.verify`.
    Raises:
        UserError: if `path` holds none of these.
    """
    if path.name == FILE or (path / FILE).is_file():
        yield from check_forest(path)
    elif is_checkpoint(path):
        yield check_checkpoint(path)
    elif is_model_folder(path):
        yield check_model_files(path)
    else:
        reports = [*check_run(path)]
        if not reports:
            raise UserError(f"{path} holds no checkpoint, no model, no forest and no data-bin")
        yield from reports


def check_forest(path: Path) -> Iterator[CheckResult]:
    """Check a forest.json, the models and seeds of its experts, and checkpoints of their runs.

    Runs are the parent folders of the models, and the folders next to forest.json that have
    checkpoints.

    Args:
        path: forest.json, or its folder.
    """
    file = path if path.name == FILE else path / FILE
    try:
        opened = open_forest(file)
    except UserError as error:
        yield f"{file}: forest", [str(error)]
        return
    yield f"{file}: forest, {len(opened.experts)} experts", []
    folders = [expert.path for expert in opened.experts]
    for folder in dict.fromkeys([*folders, *map(resolve_seed_folder, folders)]):
        yield check_model_files(folder)
    runs = {expert.path.parent for expert in opened.experts}
    runs |= {folder.parent for folder in file.parent.glob("*/checkpoints")}
    for run in sorted(runs):
        yield from check_checkpoints(run / "checkpoints")


def check_run(path: Path) -> Iterator[CheckResult]:
    """Check the checkpoints of a run by rising step, and its models: one, or one per domain.

    Nothing is yielded for a folder that has neither.

    Args:
        path: folder of a run, of checkpoints, or of model folders.
    """
    for folder in (path, path / "checkpoints"):
        yield from check_checkpoints(folder)
    model = path / "model"
    if is_model_folder(model):
        yield check_model_files(model)
    for folder in (*list_model_folders(model), *list_model_folders(path)):
        if folder != model:
            yield check_model_files(folder)


def check_checkpoints(folder: Path) -> Iterator[CheckResult]:
    """Check the checkpoints of a folder by rising step, and the file that names the newest."""
    checkpoints = list_checkpoints(folder)
    yield from map(check_checkpoint, checkpoints)
    if (folder / LATEST).exists():
        name = (folder / LATEST).read_text(errors="replace").strip()
        names = [path.name for path in checkpoints]
        wrong = f"{folder / LATEST} names {name!r}; there are {', '.join(names) or 'none'}"
        yield f"{folder / LATEST}: {name}", [] if name in names else [wrong]


def check_checkpoint(path: Path) -> CheckResult:
    """Check the files of a checkpoint against its manifest, digests included.

    If they agree, the states and the headers of optimizer files must be readable, too: a manifest
    says only that the files are as they were written.
    """
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    faults = find_file_faults(path)
    if not faults:
        try:
            for file in files:
                if file.name == STATE:
                    StateRecord.read(file.parent)
            read_fragment_ranges(path)
        except UserError as error:
            faults = [str(error)]
    return f"{path}: checkpoint, {len(files)} files, {size:,} bytes", faults


def check_model_files(path: Path) -> CheckResult:
    """Check the files of a model in the folder `path`, or of an adapter and its seed.

    config.json must be readable, and weight files must open and hold the tensors of the index.
    Digests are compared if the folder has a manifest, which those of other programs lack. Only
    weights in safetensors are opened: a folder without them has a fault.

    Returns:
        a description of the model, and its faults, one sentence each.
    """
    from safetensors import SafetensorError, safe_open

    if is_adapter(path):
        return _check_adapter_files(path)
    faults: list[str] = []
    stored_in: dict[str, str] = {}
    index = path / INDEX_FILE
    try:
        if "model_type" not in read_config_file(path):
            faults.append(f"{path / 'config.json'} names no model_type")
        listed_in = read_index(path) if index.exists() else {}
    except UserError as error:
        return f"{path}: model", [str(error)]
    files = sorted(set(listed_in.values())) or ["model.safetensors"]
    for name in files:
        try:
            with safe_open(path / name, framework="np") as tensors:
                stored_in |= dict.fromkeys(tensors.keys(), name)
        except (OSError, SafetensorError) as error:
            faults.append(f"{path / name} cannot be opened: {error}")
    if listed_in and not faults:
        faults += [
            f"{index} and {listed_in.get(name, stored_in.get(name))} do not agree on {name}"
            for name in sorted(listed_in.keys() | stored_in.keys())
            if listed_in.get(name) != stored_in.get(name)
        ]
    if (path / MANIFEST).exists():
        faults += find_file_faults(path)
    return f"{path}: model, {len(files)} weight files, {len(stored_in)} tensors", faults


def _check_adapter_files(path: Path) -> CheckResult:
    """Check that an adapter can be opened, and that its seed has the weights it was trained on.

    `path` is the adapter's folder; digests are compared if it has a manifest. Returns a description
    and the faults, one sentence each.
    """
    try:
        seed = resolve_seed_folder(path)
        check_seed_weights(path)
    except UserError as error:
        return f"{path}: adapter", [str(error)]
    faults = find_file_faults(path) if (path / MANIFEST).exists() else []
    return f"{path}: adapter of {seed}", faults
