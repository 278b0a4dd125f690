"""Log-probabilities of a text under each expert of a forest, computed in one of two ways.

`SequentialScores` runs one expert after the other over the whole text and keeps [N, T]
log-probabilities in memory or in cache files, so that one process scores any number of experts.
`ParallelScores` loads all experts, spread over the ranks, and scores batch by batch; only
log-probabilities of target tokens are sent. Both give the same numbers.

Shapes: E experts, B sequences of a batch, N of a text, T targets of a sequence.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megamod.data.lm.blocks import IGNORE
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.evaluation.held_out_data import (
    HeldOut,
    find_document_end_id,
    iterate_held_out_batches,
    open_held_out_blocks,
    open_held_out_data,
)
from megamod.evaluation.perplexity import Batch
from megamod.files import hash_file, write_atomic
from megamod.models.lm.configuration import get_default_sequence_length, read_lm_config
from megamod.models.lm.forest_experts import LoadedExpert, load_experts
from megamod.progress import show_progress
from megamod.states.adapter import get_config_file, is_adapter, resolve_seed_folder
from megamod.states.forest import Expert, Forest
from megamod.states.stream import ModelFolder
from megamod.states.weight_files import ADAPTER_FILE

Scored = tuple[Tensor, Tensor]
"""Log-probabilities [E, B, T] float32 and a mask [B, T], False at padding."""


@dataclass(frozen=True)
class TextSelection:
    """The first `sequences` of a split of a domain; None: all."""

    domain: str
    split: str
    sequences: int | None = None


class Experts:
    """The experts of a forest, and the data as each of them reads it.

    Attributes:
        forest: the experts in use.
        held_out: the reading settings, with a `block_size`.
        data: the data-bin as each expert reads it, by its folder.
        domains: domains of the experts, in the order of the forest.
        document_ends: id at which attention of an expert stops, by its folder; None: at none.
    """

    def __init__(
        self,
        forest: Forest,
        held_out: HeldOut,
        device: torch.device,
        selected: Sequence[str] | None = None,
    ):
        """Check experts and data before any model is loaded.

        Args:
            forest: the forest, of which `selected` experts are used.
            held_out: the domains of the texts and the reading settings; its split is not used.
                Without `block_size`, the shortest default length of the experts applies to all.
            device: device that experts run on.
            selected: domains of the experts to use; None: all.
        Raises:
            UserError: if an expert or a text is missing, does not match the data, or experts would
                read different sequences.
        """
        for name in selected or ():
            if name not in forest.domains:
                raise UserError(
                    f"--experts: {forest.path} has no expert {name!r}; "
                    f"its experts are {', '.join(forest.domains)}"
                )
        experts = tuple(e for e in forest.experts if selected is None or e.domain in selected)
        self.forest, self.device = replace(forest, experts=experts), device
        self.domains = self.forest.domains
        configs = {expert.path: read_lm_config(expert.path, "--forest") for expert in experts}
        if held_out.block_size is None:
            shortest = min(get_default_sequence_length(config) for config in configs.values())
            held_out = replace(held_out, block_size=shortest)
        self.held_out = held_out
        self._masks: dict[TextSelection, Tensor] = {}
        data_domains = DataBin(held_out.path).domains
        for domain in held_out.domains:
            if domain not in data_domains:
                raise UserError(
                    f"--domain: {held_out.path} has no text of {domain!r}; "
                    f"its domains are {', '.join(data_domains)}"
                )
        self.data = {path: open_held_out_data(path, configs[path], held_out) for path in configs}
        self.document_ends = {
            path: find_document_end_id(path, configs[path], self.data[path], held_out)
            for path in configs
        }
        has_domain_tokens = {
            path: data.vocab_size > data.databin.vocab_size for path, data in self.data.items()
        }
        if len(set(has_domain_tokens.values())) > 1:
            listing = ", ".join(
                f"{path}: {'yes' if has else 'no'}" for path, has in has_domain_tokens.items()
            )
            raise UserError(
                "some experts have domain tokens and others do not, so their sequences differ; "
                f"pass --domain_token false ({listing})"
            )

    def load_target_masks(self, text: TextSelection) -> Tensor:
        """Return the mask [N, T] of a text, True at targets and False at padding.

        All experts have the same targets. Read from the data at the first call for a text, then
        from memory.

        Raises:
            UserError: if the data has no such text, or its files cannot be read.
        """
        if text not in self._masks:
            any_data = self.data[self.forest.experts[0].path]
            held_out = replace(self.held_out, split=text.split)
            blocks = open_held_out_blocks(any_data, held_out, text.domain)
            count = len(blocks) if text.sequences is None else min(len(blocks), text.sequences)
            lengths = blocks.count_targets(np.arange(count)) - (blocks.domain_token is not None)
            self._masks[text] = torch.arange(blocks.span) < torch.from_numpy(lengths)[:, None]
        return self._masks[text]

    def get_text_bytes(self, text: TextSelection) -> int:
        """Return the number of UTF-8 bytes of a whole split; 0 if unknown or for a part of one."""
        any_data = self.data[self.forest.experts[0].path]
        return any_data.get_text_bytes(text.domain, text.split) if text.sequences is None else 0

    def find_expert(self, domain: str) -> Expert:
        """Return the expert of a domain; raise ValueError if it is not among `domains`."""
        return self.forest.experts[self.domains.index(domain)]

    def iterate_loaded_experts(self, domains: Sequence[str]) -> Iterator[LoadedExpert]:
        """Yield the experts of these domains as models, one after the other.

        They come in the order of the forest, whatever that of `domains`; see `load_experts`.

        Raises:
            UserError: if a domain has no expert, or a folder cannot be read.
        """
        return load_experts(self.forest, self.device, domains) if domains else iter(())

    def iterate_log_probs(self, expert: LoadedExpert, text: TextSelection) -> Iterator[Tensor]:
        """Yield the log-probabilities of a text's targets, float32 on the CPU, batch by batch.

        A batch [B, T] has up to `held_out.batch_size` sequences; its rows match those of
        `load_target_masks`. Sets `document_end` of the model. Raises UserError if one is NaN.

        Args:
            expert: an expert from `iterate_loaded_experts`.
        """
        path = self.find_expert(expert.domain).path
        data = self.data[path]
        remaining, span = self.load_target_masks(text).shape
        for batch in iterate_held_out_batches(
            data, replace(self.held_out, split=text.split), text.domain
        ):
            if remaining <= 0:
                return
            rows = min(remaining, len(batch["labels"]))
            # Adapters of one seed share a module, and may be read in turn.
            expert.model.document_end = self.document_ends[path]
            yield _compute_batch_log_probs(expert, batch, rows, span, self.device)
            remaining -= rows


class ScoreSource(Protocol):
    """Source of the scores of texts under experts."""

    def prepare_scores(self, requests: Mapping[TextSelection, Sequence[str]]) -> None:
        """Announce texts and the domains of the experts to score them with.

        Optional: a source may compute these scores now, loading each expert once for all texts.

        Args:
            requests: domains of the experts, by text.
        """

    def iterate_batches(
        self, text: TextSelection, domains: Sequence[str], size: int
    ) -> Iterator[Scored]:
        """Yield the log-probabilities [E, B, T] and masks [B, T] of a text, batch by batch.

        Args:
            domains: domains of the E experts, in the order of the result.
            size: sequences B of a batch at most; the last, and with `ParallelScores` every one that
                ends a batch of the forward pass, may be smaller.
        """


class SequentialScores:
    """Scores of one expert after the other; the scores of all texts are stored."""

    def __init__(self, experts: Experts, cache_dir: Path | None = None):
        """Create the cache folder if there is to be one.

        Args:
            experts: experts and data.
            cache_dir: folder of cache files that later runs read; None: scores stay in memory.
        Raises:
            UserError: if the folder cannot be created.
        """
        self.experts, self.cache_dir = experts, cache_dir
        self._scores: dict[tuple[TextSelection, str], Tensor] = {}
        self._digests: dict[Path, str] = {}
        if cache_dir is not None:
            try:
                cache_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--cache_dir {cache_dir}: {error.strerror}") from error

    def prepare_scores(self, requests: Mapping[TextSelection, Sequence[str]]) -> None:
        """Compute the scores that are not stored yet, loading each expert once.

        With a cache folder they are read from its files, or written to new ones.

        Args:
            requests: domains of the experts to score each text with.
        Raises:
            UserError: if an expert cannot be loaded, or gives NaN.
        """
        missing: dict[str, list[TextSelection]] = {}
        for text, domains in requests.items():
            for domain in domains:
                is_stored = (text, domain) in self._scores
                if not is_stored and not self._load_cached_scores(text, domain):
                    missing.setdefault(domain, []).append(text)
        for expert in self.experts.iterate_loaded_experts(
            [d for d in self.experts.domains if d in missing]
        ):
            for text in missing[expert.domain]:
                title = f"{expert.domain} on {text.domain}, {text.split}"
                log_probs = self.experts.iterate_log_probs(expert, text)
                scores = torch.cat(list(show_progress(log_probs, title)))
                if self.cache_dir is None:
                    self._scores[text, expert.domain] = scores
                else:
                    cache_file = self._make_cache_path(text, expert.domain)
                    write_atomic(cache_file, save({"log_probs": scores}))
                    self._load_cached_scores(text, expert.domain)
            del expert

    def iterate_batches(
        self, text: TextSelection, domains: Sequence[str], size: int
    ) -> Iterator[Scored]:
        """Yield batches as `ScoreSource.iterate_batches`; scores not yet prepared are computed."""
        self.prepare_scores({text: domains})
        masks = self.experts.load_target_masks(text)
        rows = [self._scores[text, domain] for domain in domains]
        for start in range(0, len(masks), size):
            part = slice(start, start + size)
            yield torch.stack([row[part] for row in rows]), masks[part]

    def _load_cached_scores(self, text: TextSelection, domain: str) -> bool:
        """Load the scores of a text under the expert of `domain` from their cache file.

        Returns:
            True if they are in `_scores` now; False without a cache folder, and if the file is
            missing, damaged or of another shape.
        """
        if self.cache_dir is None:
            return False
        shape = self.experts.load_target_masks(text).shape
        try:
            with safe_open(self._make_cache_path(text, domain), framework="pt") as file:
                scores = file.get_tensor("log_probs")
        except (OSError, SafetensorError):
            return False
        if scores.shape != shape:
            return False
        self._scores[text, domain] = scores
        return True

    def _make_cache_path(self, text: TextSelection, domain: str) -> Path:
        """Make the path of the cache file of a text's scores under the expert of `domain`.

        Its name holds a digest of all that these numbers depend on, so data and weights are hashed.

        Raises:
            UserError: if a file of the expert is missing or damaged.
        """
        expert = self.experts.find_expert(domain)
        held_out, data = self.experts.held_out, self.experts.data[expert.path]
        prefix = data.databin.find_split_prefix(text.domain, text.split)
        inputs = {
            "text": asdict(text),
            "data": [
                self._compute_file_digest(prefix.with_name(f"{prefix.name}.{s}"))
                for s in ("bin", "idx")
            ],
            "special": data.special_ids,
            "block_size": held_out.block_size,
            "context_window": held_out.context_window,
            "domain_token": data.domain_tokens.get(held_out.force_domain_token or text.domain),
            "document_end": self.experts.document_ends[expert.path],
            "device": self.experts.device.type,
            "expert": [self._compute_file_digest(path) for path in list_expert_files(expert)],
            "member": expert.member,
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
        return self.cache_dir / f"{domain}-on-{text.domain}-{text.split}-{key}.safetensors"

    def _compute_file_digest(self, path: Path) -> str:
        """Return the SHA-256 of a file in hexadecimal, computed once per path."""
        if path not in self._digests:
            self._digests[path] = hash_file(path)
        return self._digests[path]


class ParallelScores:
    """Scores of all experts at once, each rank a part of them; collective with several ranks."""

    def __init__(self, experts: Experts):
        """Note the ranks of the default process group, if there is one; load nothing yet."""
        self.experts = experts
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._loaded: list[LoadedExpert] = []

    def prepare_scores(self, requests: Mapping[TextSelection, Sequence[str]]) -> None:
        """Do nothing, because scores are not stored."""

    def iterate_batches(
        self, text: TextSelection, domains: Sequence[str], size: int
    ) -> Iterator[Scored]:
        """Yield batches as `ScoreSource.iterate_batches`, the same on every rank; collective.

        Rank r loads experts r, r + ranks, and so on, and keeps them for the next call; a call with
        other `domains` replaces them.

        Raises:
            UserError: if an expert cannot be loaded, or gives NaN.
        """
        mine = list(domains)[self.rank :: self.ranks]
        if [expert.domain for expert in self._loaded] != mine:
            self._loaded = []
            by_domain = {
                expert.domain: expert for expert in self.experts.iterate_loaded_experts(mine)
            }
            self._loaded = [by_domain[domain] for domain in mine]
        masks = self.experts.load_target_masks(text)
        streams = [self.experts.iterate_log_probs(expert, text) for expert in self._loaded]
        bar = show_progress(None, f"{text.domain}, {text.split}", total=len(masks), unit="sequence")
        first = 0
        while first < len(masks):
            own_scores = [next(stream) for stream in streams]
            count = min(self.experts.held_out.batch_size, len(masks) - first)
            scores = self._gather_scores(own_scores, len(domains), count, masks.shape[1])
            for start in range(0, count, size):
                rows = slice(start, start + size)
                yield scores[:, rows], masks[first : first + count][rows]
            first += count
            bar.update(count)
        bar.close()

    def _gather_scores(self, ours: list[Tensor], experts: int, count: int, span: int) -> Tensor:
        """Gather the scores of all ranks into [E, B, T], on the CPU; collective.

        Args:
            ours: [B, T] of each expert of this rank.
            experts: number E of experts of all ranks.
            count: sequences B of the batch.
            span: targets T of a sequence.
        """
        if self.ranks == 1:
            return torch.stack(ours)
        rounds = -(-experts // self.ranks)
        mine = torch.zeros(rounds, count, span, device=self.experts.device)
        for row, scores in zip(mine, ours, strict=False):
            row.copy_(scores)
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine)
        # Experts were assigned to the ranks in turn, so their order is round by round.
        return torch.stack(parts, dim=1).flatten(0, 1)[:experts].cpu()


def list_expert_files(expert: Expert) -> list[Path]:
    """List configuration and weight files of an expert, without those of others in its folder.

    For an adapter these are the files of its seed, then its own two.

    Raises:
        UserError: if a file is missing or damaged.
    """
    seed, adapter = resolve_seed_folder(expert.path), expert.path
    files = [seed / "config.json", *ModelFolder(seed, expert.member).files]
    if is_adapter(adapter):
        files += [get_config_file(adapter), adapter / ADAPTER_FILE]
    return files


@torch.no_grad()
def _compute_batch_log_probs(
    expert: LoadedExpert, batch: Batch, rows: int, span: int, device: torch.device
) -> Tensor:
    """Run an expert on the first `rows` sequences of a batch; return its log-probabilities.

    Args:
        expert: the loaded model, and the name of its expert if it has several.
        batch: `input_ids` and `labels` [B, L], `attention_mask` perhaps; L may exceed `span`, as a
            sequence may start with context, which has no targets.
        rows: number of sequences that belong to the text.
        span: T, the most targets of a sequence.
        device: device of the model.
    Returns:
        [rows, T] float32 on the CPU: the targets of each sequence packed to the left, then 0.
    Raises:
        UserError: if a log-probability is NaN; -inf is allowed.
    """
    inputs, labels = batch["input_ids"][:rows].to(device), batch["labels"][:rows].to(device)
    mask = batch.get("attention_mask")
    output = expert.model(
        inputs,
        attention_mask=None if mask is None else mask[:rows].to(device),
        shift_labels=labels,
        domain=expert.member,
    )
    counted = labels != IGNORE
    scores = output.token_log_probs.new_zeros(rows, span, dtype=torch.float32)
    filled = torch.arange(span, device=device) < counted.sum(-1, keepdim=True)
    scores[filled] = output.token_log_probs[counted].float()
    if bool(scores.isnan().any()):
        raise UserError(
            f"the expert {expert.domain} gives probabilities that are not numbers; its weights may "
            "contain NaN or infinity"
        )
    return scores.cpu()
