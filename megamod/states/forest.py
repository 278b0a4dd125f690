"""forest.json: the experts, their model folders, and the models they were branched from.

    {"format": 1, "experts": [{"domain": "law", "path": "law/model", "member": null,
      "parents": [{"path": "seed/checkpoints/step-350", "weight": 1.0}], "seed": 1,
      "start_update": 350, "updates": 700, "tokens": 89600, "gpus": 1,
      "data_digest": "...", "config_digest": "..."}]}

Paths below the folder of forest.json are relative to it, others are absolute. `path` is the folder
of a model or of a LoRA adapter. `member` is null for a whole model; for an expert of a DEMix model
it is the domain of the expert in that model.

Source: Li et al. 2022 (Branch-Train-Merge), section 2, for what a forest is.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pydantic import BeforeValidator

from megamod.errors import UserError, name_origin, shorten
from megamod.files import write_json
from megamod.names import check_name
from megamod.schemas import Items, Schema, read_checked_file
from megamod.states.adapter import check_seed_weights, resolve_seed_folder
from megamod.states.config_file import read_config_file
from megamod.states.model_folder import is_model_folder, list_model_folders
from megamod.states.token_ids import check_same_token_ids
from megamod.states.tokenizer_files import (
    copy_tokenizer,
    find_tokenizer_folder,
    list_tokenizer_files,
)
from megamod.states.weight_files import has_weights

FILE = "forest.json"
MODEL_TYPE = "demix_forest"
"""`model_type` of config.json in the folder of a forest.json."""
HOST_TYPE = "demix_host"
"""`model_type` of a stock model with experts per domain."""


class Parent(Schema):
    """A model that an expert's first weights came from, with its share in their average.

    Attributes:
        path: place of the model, as in the file; it may be gone by now.
        weight: its share in the average.
    """

    path: str
    weight: float


def _parse_path(value: object) -> Path:
    """Return a value of `path` as a path; raise ValueError, for pydantic, if it is no text."""
    if not isinstance(value, str | Path):
        raise ValueError(f"{shorten(value)} is not text")
    return Path(value)


class Expert(Schema):
    """One expert of a forest.

    Attributes:
        domain: its name in the forest.
        path: folder of the model or LoRA adapter; absolute, once read by `open_forest`.
        member: its domain in the DEMix model of that folder; None for a whole model.
        parents: the models it was branched from; empty if from scratch or unknown.
        seed: seed of its run; None: unknown.
        start_update: step at which it branched.
        updates: its finished steps, those of its parent up to then included.
        tokens: target tokens it was trained on itself.
        gpus: ranks it was trained on.
        data_digest, config_digest: digests of its data-bin and of the settings of its run; None:
            unknown.
    """

    domain: str
    path: Annotated[Path, BeforeValidator(_parse_path)]
    member: str | None = None
    parents: Items[Parent] = ()
    seed: int | None = None
    start_update: int = 0
    updates: int = 0
    tokens: int = 0
    gpus: int = 1
    data_digest: str | None = None
    config_digest: str | None = None


class _ForestFile(Schema):
    """Schema of forest.json."""

    format: Literal[1]
    experts: Items[Expert]


@dataclass(frozen=True)
class Forest:
    """A forest of checked experts.

    Attributes:
        path: its forest.json, or the folder of a forest without one.
        experts: in the order of the file.
    """

    path: Path
    experts: tuple[Expert, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the experts, in their order."""
        return tuple(expert.domain for expert in self.experts)


def open_forest(path: str | Path) -> Forest:
    """Open a forest: a forest.json, or a folder that holds a forest.

    A folder holds the forest of its forest.json. A DEMix model folder is a forest whose experts are
    its members. A folder with a model folder per domain (independent models of one job) is a forest
    of whole models, in alphabetical order. A run's folder stands for the `model` folder in it.

    Weights are not read. The seed of an adapter may be downloaded.

    Raises:
        UserError: if there is no expert, if a name is repeated, if a model folder or a member is
            missing or malformed, or if vocabularies differ. Messages name `path` as the value of
            --forest.
    """
    path = Path(path).absolute()
    file = path / FILE if path.is_dir() else path
    if not file.is_file() and (path / "model").is_dir():
        path = path / "model"
    if file.is_file():
        experts = _read_experts(file)
    elif is_model_folder(path):
        experts = _list_demix_experts(path)
    else:
        experts = [Expert(domain=folder.name, path=folder) for folder in list_model_folders(path)]
    if not experts:
        raise UserError(
            f"--forest {path}: holds no expert; name a forest.json, a folder that has one, a DEMix "
            "model folder, or a folder with a model folder per domain"
        )
    _check_experts(experts, path)
    return Forest(file if file.is_file() else path, tuple(experts))


def resolve_forest_path(path: str | Path) -> Path:
    """Return the absolute path of a forest.json, which need not exist.

    A path that ends in .json is the file itself, any other is the folder that holds it.
    """
    path = Path(path).absolute()
    return path if path.suffix == ".json" else path / FILE


def find_expert_index(experts: list[Expert], domain: str, forest: str | Path) -> int:
    """Find the index of a domain's expert in `experts`.

    Args:
        domain: value of --domain.
        forest: the user's path of the forest, for messages.
    Raises:
        UserError: if no expert has this domain.
    """
    names = [expert.domain for expert in experts]
    if domain not in names:
        raise UserError(
            f"--domain: {forest} has no expert of domain {domain!r}; there are {', '.join(names)}"
        )
    return names.index(domain)


def check_new_expert(path: str | Path, expert: Expert, replaced: str | None = None) -> None:
    """Refuse an expert that cannot be added to a forest; nothing is written.

    Args:
        path: see `resolve_forest_path`.
        expert: the new expert.
        replaced: domain of the expert that `expert` replaces, the value of --domain; None: it is
            added to all others.
    Raises:
        UserError: if weights of the expert are missing, if it is an adapter whose seed has other
            weights now, if there is no expert `replaced`, or if the resulting forest would be
            refused as in `open_forest`.
    """
    file = resolve_forest_path(path)
    for folder in dict.fromkeys((expert.path, resolve_seed_folder(expert.path))):
        if not has_weights(folder):
            raise UserError(f"{folder}: there are no weights in it")
    check_seed_weights(expert.path)
    experts = _read_experts(file) if file.exists() else []
    if replaced is not None:
        del experts[find_expert_index(experts, replaced, path)]
    _check_experts([*experts, expert], file)


def check_forest_writable(path: str | Path) -> None:
    """Check that this process may write in the folder of a forest.json; nothing is written.

    Args:
        path: see `resolve_forest_path`.
    Raises:
        UserError: if the folder cannot be written.
    """
    file = resolve_forest_path(path)
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file}: its folder cannot be written, so no expert can be added")


@contextmanager
def edit_forest(path: str | Path) -> Iterator[list[Expert]]:
    """Yield the experts of a forest.json as a list, which the block changes in place.

    The list of an absent file is empty. Its folder is created if needed, and other editors wait,
    also those of other processes. When the block ends, the experts are checked as in `open_forest`
    and the file is replaced whole. The folder also gets a config.json and the tokenizer of an
    expert, if it has none. If the block or the check raises, forest.json does not change.

    Args:
        path: see `resolve_forest_path`.
    Raises:
        UserError: if the file is malformed, or the changed experts are refused.
        OSError: if the folder cannot be written.
    """
    file = resolve_forest_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        experts = _read_experts(file) if file.exists() else []
        yield experts
        _check_experts(experts, file)
        for stale in file.parent.glob(f".{file.name}.*.tmp"):
            stale.unlink()  # of an editor that was killed: while the lock is held nobody writes
        if not (file.parent / "config.json").exists():
            # Makes the folder one that AutoModelForCausalLM.from_pretrained reads.
            write_json(file.parent / "config.json", {"model_type": MODEL_TYPE})
        for expert in experts:  # they share one tokenizer: the first that has it is enough
            copy_tokenizer(find_tokenizer_folder(expert.path), file.parent)
        record = {"format": 1, "experts": [_serialise_expert(e, file.parent) for e in experts]}
        write_json(file, record)


def _read_experts(file: Path) -> list[Expert]:
    """Read the experts of a forest.json, with absolute paths; UserError if it is malformed."""
    return [
        expert.model_copy(update={"path": (file.parent / expert.path).absolute()})
        for expert in read_checked_file(file, _ForestFile).experts
    ]


def _serialise_expert(expert: Expert, folder: Path) -> dict[str, object]:
    """Make the entry of an expert in the forest.json of `folder`, an absolute path; paths below it
    become relative.
    """
    return {
        **expert.model_dump(),
        "path": _make_relative(str(expert.path), folder),
        "parents": [
            {"path": _make_relative(parent.path, folder), "weight": parent.weight}
            for parent in expert.parents
        ],
    }


def _make_relative(path: str, folder: Path) -> str:
    """Make a path relative to `folder` if it is below it, so that both can be moved together.

    Any other path is normalised only.
    """
    plain = Path(os.path.normpath(path))
    return str(plain.relative_to(folder)) if plain.is_relative_to(folder) else str(plain)


def _list_demix_experts(folder: Path) -> list[Expert]:
    """List the experts of a DEMix model folder; empty if its config.json describes a forest.

    Raises:
        UserError: if it is one dense model.
    """
    config = read_model_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        return []
    if config.get("untie", "none") == "none":
        raise UserError(
            f"--forest {folder}: is one dense model; a forest is a DEMix model, a forest.json, or "
            "a folder with a model folder per domain"
        )
    return [Expert(domain=domain, path=folder, member=domain) for domain in config["domains"]]


def _check_experts(experts: list[Expert], where: Path) -> None:
    """Raise UserError unless names are unique, models and members exist, and vocabularies agree.

    Reads config.json and the tokenizer files of every expert.

    Args:
        experts: all experts of the forest.
        where: the forest's folder or file, for messages.
    """
    names = [expert.domain for expert in experts]
    for name in names:
        check_name(name, f"{where}, domain")
        if names.count(name) > 1:
            raise UserError(f"{where}: domain {name!r} is listed twice")
    sizes: dict[int, str] = {}
    compares_sizes = False
    for expert in experts:
        with name_origin(f"{where}: {expert.domain}"):
            config = read_model_config(expert.path)
        has_experts = config.get("untie", "none") != "none"
        if has_experts and expert.member not in config["domains"]:
            raise UserError(
                f"{where}: {expert.domain} is member {expert.member!r} of {expert.path}; the "
                f"members there are {', '.join(config['domains'])}"
            )
        if expert.member is not None and not has_experts:
            raise UserError(
                f"{where}: {expert.domain} is member {expert.member!r} of {expert.path}, which is "
                "one dense model"
            )
        sizes.setdefault(config.get("vocab_size"), expert.domain)
        # Stock models pad their vocabularies, so their tokenizers are compared below; without one
        # only the size can be compared.
        has_tokenizer = bool(list_tokenizer_files(find_tokenizer_folder(expert.path)))
        compares_sizes |= config.get("model_type") == "demix" or not has_tokenizer
    if len(sizes) > 1 and compares_sizes:
        listed = ", ".join(f"{size} of {name}" for size, name in sizes.items())
        raise UserError(f"{where}: the experts have different vocabularies: {listed}")
    folders = list(dict.fromkeys(find_tokenizer_folder(expert.path) for expert in experts))
    for folder in folders[1:]:
        check_same_token_ids(folders[0], folder)


def read_model_config(folder: Path) -> dict[str, object]:
    """Read config.json of a model folder; of the seed, if `folder` holds a LoRA adapter.

    The seed may be downloaded.

    Raises:
        UserError: as `resolve_seed_folder` and `read_config_file`, or if a model with experts does
            not name its domains.
    """
    config = read_config_file(resolve_seed_folder(folder))
    domains = config.get("domains")
    named = isinstance(domains, list) and all(isinstance(domain, str) for domain in domains)
    if config.get("untie", "none") != "none" and not (named and domains):
        raise UserError(f"{folder}/config.json: domains is {domains!r}, not a list of names")
    return config


def raise_wrong_member(subject: str, domains: Sequence[str], member: str | None) -> NoReturn:
    """Raise UserError for a --member that is missing (None) or is none of `domains`.

    Args:
        subject: beginning of the message: the folder, with the flag that names it, and its kind.
    """
    wrong = "" if member is None else f", not {member!r}"
    raise UserError(f"{subject}; --member must be one of {', '.join(domains)}{wrong}")
