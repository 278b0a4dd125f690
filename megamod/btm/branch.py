"""A new expert's first checkpoint, made from the checkpoints of its parents.

`branch` writes RUN/checkpoints/step-N, from which `launchers/pretrain.py --output_dir RUN` goes on
like any interrupted run. With one parent the optimizer, its step and hence the place in the
learning-rate schedule are kept, and only the data begin anew; the average of several parents, or a
parent without an optimizer, begins at step 0 with a fresh one.

Source: Li et al. 2022 (Branch-Train-Merge), section 3.1, and its release for what is kept.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megamod.btm.grown import RECORD
from megamod.btm.parents import Source
from megamod.dist.scope import dense_name, domain_of_name
from megamod.errors import UserError
from megamod.files import atomic_folder, sha256, write_json
from megamod.merging.average import average_folders
from megamod.states.forest import Parent, read_config
from megamod.states.grow import link_or_copy
from megamod.states.manifest import MANIFEST, list_checkpoints
from megamod.states.stream import ModelFolder, write_stream
from megamod.states.weights import DENSE_FILE, read_weights, write_tensors

SCHEDULE = ("max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps")
"""Settings that a branched run must share with its parent: they say where the schedule stands."""

_LEFT_BEHIND = (MANIFEST, "state.json", "config.json", "README.md", "merge.json", RECORD)


def branch(
    sources: Sequence[Source],
    weights: Sequence[float],
    domains: Sequence[str],
    run: Path,
    *,
    one_world: bool = False,
    learning_rate: float | None = None,
) -> Path:
    """Write the first checkpoint of an expert, and branch.json with where it came from.

    Args:
        sources: one parent, or several to be averaged.
        weights: of the parents in the average.
        domains: the new expert's domain; several only in one world.
        run: folder of the run to begin.
        one_world: lay the checkpoint out for independent models of one job (`--untie all`).
        learning_rate: peak of the new run's schedule; None: the parent's. The place in the schedule
            stays.
    Returns:
        the checkpoint.
    Raises:
        UserError: if the run has begun already, or the parents do not fit.
    """
    run = Path(run)
    if list_checkpoints(run / "checkpoints"):
        raise UserError(f"--output_dir {run}: has checkpoints already; a branch begins a new run")
    if len(domains) != 1 and not one_world:
        raise UserError(f"--domain: one expert has one domain, not {', '.join(domains)}")
    kept = len(sources) == 1 and sources[0].step is not None
    step = sources[0].step if kept else 0
    final = run / "checkpoints" / f"step-{step}"
    total = math.fsum(weights)
    parents = [
        asdict(Parent(str(one.model.absolute()) + (f" ({one.member})" if one.member else ""), w))
        for one, w in zip(sources, (float(weight) / total for weight in weights), strict=True)
    ]
    with _untouched_on_failure(final.parent), atomic_folder(final) as folder:
        base = folder / ".start"
        _start_model(sources, weights, base)
        state = _state_of(sources[0]) if kept else _fresh_state()
        if kept and learning_rate is not None:
            state["settings"]["learning_rate"] = learning_rate
        for number, domain in enumerate(domains):
            place = folder / domain if one_world else folder
            prefix = f"{domain}:" if one_world else ""
            place.mkdir(exist_ok=True)
            _write_model(base, place, domain)
            write_json(place / "state.json", state)
            if kept:
                _keep_optimizer(sources[0], folder, number, prefix)
                _check_complete(sources[0], base, folder, prefix)
            else:
                _fresh_optimizer(base, folder / f"optimizer-{number}.safetensors", prefix)
        shutil.rmtree(base)
        _write_manifest(folder)
        # Before the checkpoint has its name: there is none whose parents are not known.
        write_json(run / RECORD, {"format": 1, "parents": parents, "start_update": step})
    return final


@contextmanager
def _untouched_on_failure(folder: Path) -> Iterator[None]:
    """Folders that were made on the way to `folder` go again if the block fails."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except BaseException:
        for one in made:
            with suppress(OSError):  # there may be something in it by now
                one.rmdir()
        raise


def _start_model(sources: Sequence[Source], weights: Sequence[float], base: Path) -> None:
    """The model all begins with, as a dense model folder."""
    if len(sources) > 1:
        # In float32, as the optimizer's masters are made of it.
        average_folders(
            [(one.model, one.member) for one in sources],
            weights,
            base,
            out_dtype="float32",
            origin="--weights",
        )
        return
    (one,) = sources
    base.mkdir()
    config = read_config(one.model)
    with ModelFolder(one.model, one.member) as held:
        if one.member is None and [file.name for file in held.files] == [DENSE_FILE]:
            link_or_copy(one.model / DENSE_FILE, base / DENSE_FILE)
        else:
            files = {DENSE_FILE: list(held.tensors)}
            write_stream(base, files, held.tensors, lambda name: [held.read(name)])
        if one.member is not None:
            tied = "lm_head.weight" not in held.tensors
            config |= {"untie": "none", "tie_word_embeddings": tied}
    write_json(base / "config.json", config)
    for file in one.model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not _is_left_behind(file):
            shutil.copyfile(file, base / file.name)


def _is_left_behind(file: Path) -> bool:
    return file.name in _LEFT_BEHIND or file.name.endswith(".index.json")


def _write_model(base: Path, place: Path, domain: str) -> None:
    for file in base.iterdir():
        if file.name not in ("config.json", "README.md", "merge.json"):
            link_or_copy(file, place / file.name)
    write_json(place / "config.json", read_config(base) | {"domains": [domain]})


def _state_of(source: Source) -> dict[str, object]:
    """A parent's state with the data at their beginning, and its schedule alone of its settings."""
    file = source.model / "state.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["state"] |= {"data_step": 0, "tokens": {}, "skipped": 0, "mean_loss": None}
    settings = {name: record["settings"].get(name) for name in SCHEDULE}
    return {**record, "settings": settings, "branched": True}


def _fresh_state() -> dict[str, object]:
    state = dict(step=0, data_step=0, tokens={}, skipped=0, mean_loss=None)
    return {
        "state": state,
        "optimizer_steps": 0.0,
        "loss_scaler": {},
        "settings": {},
        "branched": True,
        "world_size": 1,
    }


def _keep_optimizer(source: Source, folder: Path, number: int, prefix: str) -> None:
    """The parent's masters and moments under the new expert's names."""
    own = f"{source.world}:" if source.world else ""
    for place, file in enumerate(sorted(source.folder.glob("optimizer-*.safetensors"))):
        with safe_open(file, framework="pt") as tensors:
            starts = tensors.metadata() or {}
            names = {
                name: prefix + dense_name(name.removeprefix(own))
                for name in starts
                if name.startswith(own) and domain_of_name(name) in (None, source.member)
            }
            renamed = {
                f"{kind}/{new}": tensors.get_tensor(f"{kind}/{old}")
                for old, new in names.items()
                for kind in ("master", "exp_avg", "exp_avg_sq")
            }
        if renamed:
            write_tensors(
                folder / f"optimizer-{number}-{place}.safetensors",
                renamed,
                {new: starts[old] for old, new in names.items()},
            )


def _check_complete(source: Source, base: Path, folder: Path, prefix: str) -> None:
    """Refuse a parent that trained some of its weights only: the others have no optimizer."""
    sizes: dict[str, int] = {}
    for file in folder.glob("optimizer-*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.metadata() or {}:
                size = tensors.get_slice(f"master/{name}").get_shape()[0]
                sizes[name] = sizes.get(name, 0) + size
    for name, spec in ModelFolder(base).tensors.items():
        if spec.dtype.is_floating_point and sizes.get(prefix + name) != spec.numel:
            raise UserError(
                f"--parents {source.folder}: the optimizer holds {sizes.get(prefix + name, 0)} of "
                f"the {spec.numel} elements of {name}; to begin with a new optimizer, name the "
                "run's model folder"
            )


def _fresh_optimizer(base: Path, path: Path, prefix: str) -> None:
    """The weights as masters, with moments of zero."""
    tensors: dict[str, Tensor] = {}
    for name, weight in read_weights(base).items():
        if not weight.is_floating_point():
            continue
        master = weight.float().reshape(-1)
        tensors[f"master/{prefix}{name}"] = master
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}/{prefix}{name}"] = torch.zeros_like(master)
    names = {name.split("/", 1)[1] for name in tensors}
    write_tensors(path, tensors, dict.fromkeys(names, "0"))


def _write_manifest(folder: Path) -> None:
    files: Mapping[str, object] = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})
