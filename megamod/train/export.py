"""Export of an engine's model as a folder that `from_pretrained` reads.

Dense and DEMix runs write one folder; independent models (BTM) write one folder per domain.
"""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from megamod.dist.process import (
    check_peers,
    fail_together,
    make_tensor_for_collectives,
    sum_over_ranks,
)
from megamod.dist.scope import Sharing, parse_expert_domain
from megamod.dist.topology import DomainTopology
from megamod.errors import PolicyStop
from megamod.files import sync_folder, sync_tree
from megamod.models.lm.adapter import list_adapters, write_adapter
from megamod.states.manifest import write_model_manifests
from megamod.states.weights import find_non_finite_weight, write_index, write_weights
from megamod.train.expert_parallel import gather_experts, list_expert_names, map_to_stock_names
from megamod.version import __version__

logger = logging.getLogger(__name__)

# README.md of a model folder; `base` is empty or a further line of its header.
TEMPLATE = """---
library_name: {library}{base}
license: unknown
tags: [{tags}]
---
{summary}

{facts}

Load it with `{load}`.
The resolved run is in `run.yaml` beside this file or in the run's folder.
"""


@dataclass(frozen=True)
class Card:
    """Content of the README.md of a model folder.

    Attributes:
        summary: one sentence about the model.
        tags: for search on a hub.
        facts: further lines, by name.
        load: expression that loads the model.
        stock: True for a model that transformers loads without megamod.
        seed: seed of an adapter, the folder or hub name of its seed; None: a whole model.
    """

    summary: str
    tags: tuple[str, ...]
    facts: Mapping[str, str]
    load: str
    stock: bool = False
    seed: str | None = None

    def format_text(self) -> str:
        """Format the model card, the content of README.md in Markdown."""
        facts = "\n".join(
            f"- {name}: {value}" for name, value in {**self.facts, "megamod": __version__}.items()
        )
        library = "transformers" if self.stock else "megamod"
        return TEMPLATE.format(
            library=library if self.seed is None else "peft",
            base="" if self.seed is None else f"\nbase_model: {json.dumps(self.seed)}",
            tags=", ".join(self.tags),
            summary=self.summary,
            facts=facts,
            load=self.load if self.stock else f"import megamod; {self.load}",
        )


class ModelExport:
    """Callable that writes this rank's files of a model folder and returns them; collective.

    Rank 0 writes what all domains share; the lead of each domain writes its expert. Of a model with
    an adapter, the adapter alone is written.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        config: PreTrainedConfig,
        topology: DomainTopology,
        tokenizer: Path | None,
        run_file: Path,
        card: Card,
        companions: Sequence[Path] = (),
        seed_digest: str = "",
    ):
        """Prepare to write; nothing is written yet.

        Args:
            engine: engine of the model to write.
            config: configuration of the whole model, all domains; its `architectures` and `dtype`
                are set.
            topology: ranks and domains of the run.
            tokenizer: folder whose files are copied; None: no tokenizer.
            run_file: the run's recipe, copied.
            card: content of README.md.
            companions: further files to copy.
            seed_digest: digest of the weights that an adapter was trained on.
        """
        self.engine = engine
        self.config = config
        self.topology = topology
        self.tokenizer = tokenizer
        self.run_file = run_file
        self.card = card
        self.companions = companions
        self.seed_digest = seed_digest
        self.is_adapter = bool(list_adapters(engine.module))

    def __call__(self, folder: Path) -> list[Path]:
        """Write this rank's part of the model folder; collective.

        The first rank of a group writes its experts, rank 0 the shared weights and all other files.
        Of independent models (BTM) the first rank of each writes all of it, into a subfolder named
        as its domain.

        Args:
            folder: exists; files of these names are replaced.
        Returns:
            the files that this rank wrote.
        Raises:
            OSError: if one cannot be written, on the ranks where that is so.
        """
        rank, sharing = dist.get_rank(), self.topology.sharing
        is_lead = self.topology.is_group_lead(rank)
        state = self._gather_weights(keep_copies=rank == 0 or is_lead)
        if sharing is Sharing.BTM:
            domain = self.topology.get_rank_domains(rank)[0]
            config = copy.deepcopy(self.config)
            if hasattr(config, "domains"):  # stock configurations get no field of ours
                config.domains = [domain]
            return self._write_whole_model(folder / domain, config, state) if is_lead else []
        if sharing is Sharing.DENSE:
            return self._write_whole_model(folder, self.config, state) if rank == 0 else []
        local_tensors = {
            name: tensor
            for name, tensor in state.items()
            if (is_lead if parse_expert_domain(name) else rank == 0)
        }
        files = write_weights(folder, local_tensors, has_experts=True)
        if rank == 0:
            files += self._write_companion_files(folder, self.config) + self._write_expert_index(
                folder, state
            )
        return files

    def _gather_weights(self, keep_copies: bool) -> dict[str, Tensor]:
        """Gather weights by their names in the stock class, tied ones once; collective.

        Under ZeRO 3 they are gathered one by one and copied to the CPU. Experts that are spread
        over ranks are gathered at every stage, see `gather_experts`. Of a model with an adapter
        only the trained weights are gathered, without spread experts and buffers.

        Args:
            keep_copies: False on ranks that write nothing, which need no copies of what is
                gathered.
        Returns:
            tensors by name: buffers and the parameters themselves, but copies of what is gathered,
            or nothing of it without `keep_copies`.
        """
        state = {}
        is_unpartitioned = self.engine.zero_optimization_stage() < 3
        if not is_unpartitioned:
            # The last forward pass may have prefetched weights that were never used.
            self.engine.empty_partition_cache()
        module = self.engine.module
        names, experts = map_to_stock_names(module), list_expert_names(module)
        for path, parameter in module.named_parameters():
            if path in experts:
                continue
            name = names.get(path, path)
            if self.is_adapter and not parameter.requires_grad:
                continue
            if is_unpartitioned:
                state[name] = parameter
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep_copies:
                    state[name] = parameter.detach().cpu().clone()
        if self.is_adapter:
            return state
        return state | gather_experts(module, keep_copies) | _collect_persistent_buffers(module)

    def _write_expert_index(self, folder: Path, state: dict[str, Tensor]) -> list[Path]:
        """Write the index of all domains' weights into the folder; return its path.

        Args:
            state: weights of rank 0, whose first expert stands for those of all domains.
        """
        local_domain = self.topology.get_rank_domains(0)[0]
        names, size = [], 0
        for name, tensor in state.items():
            domain = parse_expert_domain(name)
            if domain in (None, local_domain):
                copies = self.topology.domains if domain else ("",)
                domain_component = f".{domain}."
                names += [
                    name.replace(domain_component, f".{copy}.", 1) if domain else name
                    for copy in copies
                ]
                size += tensor.numel() * tensor.element_size() * len(copies)
        return [write_index(folder, names, size)]

    def _write_whole_model(
        self, folder: Path, config: PreTrainedConfig, state: dict[str, Tensor]
    ) -> list[Path]:
        """Write a model without domain experts into a folder, created if needed; return the files.

        `state` maps names to weights. Of a model with an adapter: the adapter, without config.json.
        """
        folder.mkdir(exist_ok=True)
        if self.is_adapter:
            files = write_adapter(self.engine.module, state, self.seed_digest, folder)
            return files + self._copy_companions(folder)
        return write_weights(folder, state, has_experts=False) + self._write_companion_files(
            folder, config
        )

    def _write_companion_files(self, folder: Path, config: PreTrainedConfig) -> list[Path]:
        """Write configuration, tokenizer, model card and the run's recipe into a folder.

        Sets `architectures` and `dtype` of `config`. Returns the files.
        """
        config.architectures = [type(self.engine.module).__name__]
        config.dtype = next(self.engine.module.parameters()).dtype
        config.save_pretrained(folder)
        return [folder / "config.json", *self._copy_companions(folder)]

    def _copy_companions(self, folder: Path) -> list[Path]:
        """Copy tokenizer, recipe and further files into a folder, and write the model card.

        Returns the files.
        """
        vocabulary = sorted(self.tokenizer.iterdir()) if self.tokenizer else ()
        copies = [self.run_file, *(file for file in vocabulary if file.is_file())]
        copies += self.companions
        for file in copies:
            shutil.copyfile(file, folder / file.name)
        (folder / "README.md").write_text(self.card.format_text(), encoding="utf-8")
        return [folder / name for name in ("README.md", *(file.name for file in copies))]


def _collect_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Collect the buffers of a module's state dict by name; every rank holds them whole."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


def publish_model(export: Callable[[Path], object], folder: Path) -> None:
    """Write the final model folder, whole or not at all; collective.

    A folder of that name is replaced. Every model folder in it gets a manifest with the digests of
    its files, as a checkpoint has. It is written as `.NAME.tmp` beside it and then renamed, while
    the replaced one is `.NAME.old`, see `recover_model`.

    Args:
        export: a `ModelExport`, or another function that writes into a folder on every rank.
        folder: the model folder.
    Raises:
        UserError: on every rank, if one of them cannot write.
        PolicyStop: on every rank, if a weight is not finite: nothing is published then.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    bad = make_tensor_for_collectives([0.0])
    with fail_together():
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        check_peers()
        export(temporary)
        check_peers()
        if dist.get_rank() == 0 and (name := find_non_finite_weight(temporary)):
            logger.error("%s is not finite", name)
            shutil.rmtree(temporary)
            bad += 1
        sum_over_ranks(bad)
        if not bad and dist.get_rank() == 0:
            write_model_manifests(temporary)
            sync_tree(temporary)
            recover_model(folder)
            if folder.exists():
                folder.rename(_get_replaced_folder(folder))
            temporary.rename(folder)
            sync_folder(folder.parent)
            recover_model(folder)
    if bad:
        raise PolicyStop(f"the model holds weights that are not finite, so {folder} is not written")


def recover_model(folder: Path) -> None:
    """Bring back the model that `publish_model` was replacing when the process was killed.

    After its replacement by a new one it is deleted. One rank alone may call it.

    Args:
        folder: the model folder.
    """
    replaced = _get_replaced_folder(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(folder)


def _get_replaced_folder(folder: Path) -> Path:
    """Return the path of a model folder while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")
