"""Experts of a forest in memory; members of a DEMix model and adapters of a seed share a module."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from megamod.errors import UserError
from megamod.models.lm.adapter import SEED, add_adapter, list_adapters, select_adapter
from megamod.models.lm.configuration import get_domains, get_untie, read_lm_config
from megamod.models.lm.load import LanguageModel, load_lm
from megamod.states.adapter import is_adapter, resolve_seed_folder
from megamod.states.forest import Expert, Forest


@dataclass(frozen=True)
class LoadedExpert:
    """An expert in memory: call `model(..., domain=member)`, also where member is None.

    Attributes:
        domain: domain of the expert in its forest.
        model: holds the expert, and maybe others.
        member: name of the expert in the model, see `prepare_expert`; None: the model is it.
    """

    domain: str
    model: LanguageModel
    member: str | None


def load_experts(
    forest: Forest, device: torch.device | str, only_domains: Sequence[str] | None = None
) -> Iterator[LoadedExpert]:
    """Yield the experts one after the other, in the order of the forest, their member selected.

    Experts of one DEMix model come as one module, read once and without other experts; so do
    adapters of one seed. A module is dropped after its last expert, so that a loop that keeps
    nothing holds one model at a time, if experts of one module follow each other.

    Args:
        device: where the modules are moved, in evaluation mode.
        only_domains: domains to load; None for all.
    Raises:
        UserError: if a domain of `only_domains` is not in the forest, a folder cannot be read, or a
            member or adapter does not fit its model.
    """
    for domain in only_domains or ():
        if domain not in forest.domains:
            raise UserError(
                f"{forest.path}: no expert of domain {domain!r}; "
                f"there are {', '.join(forest.domains)}"
            )
    selected = [
        expert for expert in forest.experts if only_domains is None or expert.domain in only_domains
    ]
    folders = [resolve_seed_folder(expert.path).resolve() for expert in selected]
    remaining_uses = Counter(folders)
    open_models: dict[Path, LanguageModel] = {}
    for expert, folder in zip(selected, folders, strict=True):
        if folder not in open_models:
            members = [e.member for e in selected if e.path.resolve() == folder and e.member]
            open_models[folder] = load_lm_for_scoring(folder, members).to(device)
        check_member(expert, open_models[folder].config)
        member = prepare_expert(open_models[folder], expert, selected)
        loaded = LoadedExpert(expert.domain, open_models[folder], member)
        if member is not None:
            loaded.model.set_domain(member)
        remaining_uses[folder] -= 1
        if not remaining_uses[folder]:
            del open_models[folder]
        yield loaded
        del loaded


class ModelReader:
    """Reads model folders for scoring, one after the other, and holds the one read last.

    Folders that follow each other and are adapters of one seed, or the seed, share its weights.

    Args:
        device: where the models are moved.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._content: tuple[Path, frozenset[str]] | None = None
        self._model: LanguageModel | None = None

    def read(self, folder: Path, members: Sequence[str] = ()) -> LanguageModel:
        """Read a model folder; for the folder of an adapter, its seed with the adapter selected.

        The model that was returned before may be the same object with another adapter selected.

        Args:
            members: domains whose experts to read; empty: all.
        Raises:
            UserError: if a folder cannot be read, or the adapter does not fit its seed.
        """
        seed = resolve_seed_folder(folder).resolve()
        content = (seed, frozenset(members))
        if content != self._content:
            self._model = self._content = None  # so that two models are never held at once
            self._model = load_lm_for_scoring(seed, members).to(self.device)
            self._content = content
        if is_adapter(folder):
            add_adapter(self._model, folder)
        elif list_adapters(self._model):
            select_adapter(self._model, SEED)
        return self._model


def load_lm_for_scoring(
    folder: Path, members: Sequence[str] | None = None, **kwargs: object
) -> LanguageModel:
    """Load a model folder for scoring, in evaluation mode.

    Args:
        folder: folder of a model, or of a LoRA adapter, which is put into its seed.
        members: domains whose experts to load; domains that the model does not have are skipped,
            and if none is left all experts are loaded.
        kwargs: passed to `from_pretrained`, such as dtype.
    Raises:
        UserError: as `load_lm`.
    """
    domains = get_domains(read_lm_config(folder))
    known = [domain for domain in members or () if domain in domains]
    return load_lm(folder, local_domains=known or None, **kwargs).eval()


def check_member(expert: Expert, config: PreTrainedConfig) -> None:
    """Raise UserError if the model of `config` lacks the expert's member, or needs one named."""
    has_experts, domains = get_untie(config) != "none", get_domains(config)
    if expert.member is not None and (not has_experts or expert.member not in domains):
        available = ", ".join(domains) if has_experts else "none, the model is dense"
        raise UserError(
            f"{expert.path}: no expert of domain {expert.member!r}; available: {available}"
        )
    if expert.member is None and has_experts:
        raise UserError(
            f"{expert.path}: holds experts; `member` must name one of {', '.join(domains)}"
        )


def prepare_expert(model: LanguageModel, expert: Expert, experts: Sequence[Expert]) -> str | None:
    """Add an expert to its model if it is an adapter; return the name that selects it there.

    An added adapter stays selected; each call adds it again. `SEED` selects the seed itself, if
    adapters of it are among the experts; otherwise the name is the expert's `member`, None if the
    expert is the whole model.

    Args:
        model: holds the expert, or is the seed of the adapter; changed in place.
        experts: all experts in use.
    Raises:
        UserError: as `add_adapter`.
    """
    if is_adapter(expert.path):
        return add_adapter(model, expert.path)
    folder = expert.path.resolve()
    is_seed = any(is_adapter(e.path) and resolve_seed_folder(e.path) == folder for e in experts)
    return SEED if is_seed else expert.member
