"""A forest of language models as one: each expert predicts, the posterior over experts mixes.

    p(x_t | x_<t) = sum_j w_j(t) p_j(x_t | x_<t),    w_j(t) from the prior and p_j(x_<t)

Experts are whole models (Branch-Train-Merge), adapters of a seed, or the domains of a DEMix model.
The weights follow the text: they are inferred from how well each expert predicted it so far.
Source: Gururangan et al. 2022 (DEMix), section 5; Li et al. 2022 (Branch-Train-Merge), section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from megamod.errors import UserError
from megamod.mixture.posterior import compute_token_weights, mix_log_probs
from megamod.models.calls import (
    BoundedGeneration,
    check_extra_arguments,
    format_output,
    select_logit_positions,
)
from megamod.models.lm.adapter import (
    add_uninitialised_adapter,
    list_adapter_fields,
    list_adapters,
)
from megamod.models.lm.configuration import (
    ADAPTERS,
    ForestConfig,
    make_part_config,
)
from megamod.models.lm.demix import DemixOutput
from megamod.models.lm.forest_cache import ExpertCache, fill_mask_and_positions, split_cache
from megamod.models.lm.forest_experts import check_member, load_lm_for_scoring, prepare_expert
from megamod.models.lm.load import LanguageModel, select_lm_class
from megamod.states.adapter import resolve_seed_folder
from megamod.states.forest import FILE, Forest, open_forest


@dataclass
class ForestOutput(DemixOutput):
    """`DemixOutput` plus the weights of the experts.

    Attributes:
        logits: [B, kept, V] float32, normalised: the logarithm of the mixed probabilities.
        log_weights: [E, B, L] float32, logarithms of the weights of the E experts in use, for
            predicting the token after each position.
    """

    log_weights: Tensor | None = None


class ForestForCausalLM(PreTrainedModel, BoundedGeneration, GenerationMixin):
    """The mixture of a forest's experts, for scoring and generation; experts are trained alone.

    The cache is the stock `DynamicCache`: the layers of one expert after the other, each followed
    by a layer of evidence (see `ExpertCache`). So whatever reorders, crops or selects a cache does
    it to the posterior too.

    Args:
        parts: the models that `config.parts` describes, with their adapters; None: new ones are
            built.
    Raises:
        ValueError: if the configuration names no experts, or its prior does not fit them.
        UserError: if `config.domain` has no expert.
    """

    config: ForestConfig
    _supports_sdpa = True
    _no_split_modules = ("DecoderBlock",)

    def __init__(self, config: ForestConfig, parts: Sequence[LanguageModel] | None = None):
        super().__init__(config)
        if not config.experts:
            raise ValueError(
                "the configuration names no experts: load the folder of a forest, or use "
                "ForestForCausalLM.from_experts"
            )
        if parts is None:
            configs = [make_part_config(fields) for fields in config.parts]
            for part in configs:
                part._attn_implementation = config._attn_implementation
            parts = [select_lm_class(part)(part) for part in configs]
            for part, fields in zip(parts, config.parts, strict=True):
                for name, adapter in fields.get(ADAPTERS, {}).items():
                    add_uninitialised_adapter(part, name, adapter)
        self.parts = nn.ModuleList(parts)
        self._tied_weights_keys = {
            f"parts.{number}.{tied}": f"parts.{number}.{source}"
            for number, part in enumerate(parts)
            for tied, source in part.all_tied_weights_keys.items()
        }
        self.set_prior(config.prior if config.domain is None else {str(config.domain): 1.0})
        self.post_init()
        if self._list_recurrent_parts():
            self.config.use_cache = self.generation_config.use_cache = False

    def _list_recurrent_parts(self) -> list[str]:
        """List the model types of parts with a recurrent state, which the cache does not hold."""
        return [part.config.model_type for part in self.parts if part._is_stateful]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table of the first part; the others have tables of their own."""
        return self.parts[0].get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """Return None: every part has an output matrix of its own."""

    @classmethod
    def from_experts(
        cls, forest: Forest, config: ForestConfig | None = None, **kwargs: object
    ) -> "ForestForCausalLM":
        """Build the model of an opened forest, in evaluation mode.

        Args:
            forest: experts, in the order that `domains` then has.
            config: how to mix; None for the defaults. Its experts are replaced by the forest's.
            kwargs: passed to `from_pretrained` of each expert, such as dtype and device_map.
        Raises:
            UserError: if a folder cannot be read, a member or adapter does not fit its model, or
                `config.domain` has no expert.
            ValueError: if the experts, or the prior, do not fit each other.
        """
        if config is not None and config._attn_implementation is not None:
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        seeds = [resolve_seed_folder(expert.path).resolve() for expert in forest.experts]
        folders = list(dict.fromkeys(seeds))
        parts = [load_lm_for_scoring(folder, **kwargs) for folder in folders]
        experts = []
        for expert, seed in zip(forest.experts, seeds, strict=True):
            part = folders.index(seed)
            check_member(expert, parts[part].config)
            member = prepare_expert(parts[part], expert, forest.experts)
            experts.append({"domain": expert.domain, "part": part, "member": member})
        fields = (config or ForestConfig()).to_diff_dict()
        for field in ("model_type", "transformers_version", "architectures"):
            fields.pop(field, None)
        fields |= {
            "parts": [_select_part_fields(part) for part in parts],
            "experts": experts,
        }
        merged = ForestConfig(**fields)
        merged.dtype = parts[0].dtype
        return cls(merged, parts).eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *args: object, config: ForestConfig | None = None, **kwargs: object
    ) -> "ForestForCausalLM":
        """Load a saved mixture, as `PreTrainedModel` does, or a forest.

        A folder with a forest.json is a forest: its experts are loaded from the folders listed
        there, as by `from_experts`.

        Args:
            folder: folder, or hub name of a saved mixture.
            args, kwargs: passed to `PreTrainedModel.from_pretrained`; `args` not for a forest.
            config: how to mix; None: as the folder's config.json says.
        Raises:
            UserError: if forest.json or a folder of an expert cannot be read; as `from_experts`.
            ValueError: if the experts, or the prior, do not fit each other.
        """
        if not (Path(folder) / FILE).is_file():
            return super().from_pretrained(folder, *args, config=config, **kwargs)
        if config is None:
            precision = {name: kwargs[name] for name in kwargs.keys() & {"dtype"}}
            config, kwargs = ForestConfig.from_pretrained(
                folder, return_unused_kwargs=True, **kwargs
            )
            kwargs |= precision
        return cls.from_experts(open_forest(Path(folder)), config, **kwargs)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains of the experts, in the order of the prior and of `log_weights`."""
        return tuple(expert["domain"] for expert in self.config.experts)

    @property
    def used_domains(self) -> tuple[str, ...]:
        """Domains of the experts that run, in the order of `log_weights`."""
        return tuple(self.domains[expert] for expert in self._select_experts()[0])

    def set_prior(self, prior: Sequence[float] | Mapping[str, float] | None) -> None:
        """Set the probabilities of the experts before any token is seen, in the configuration.

        A cache that was filled under another prior cannot be used with it.

        Args:
            prior: in the order of `domains`, or by domain (0 for a domain without an entry); None:
                equal probabilities.
        Raises:
            UserError: if there is no expert of a domain.
            ValueError: if it has another length than `domains`, a negative entry, or a sum that is
                not 1 within 1e-4.
        """
        if isinstance(prior, Mapping):
            unknown = sorted(set(prior) - set(self.domains))
            if unknown:
                raise UserError(
                    f"prior: no expert of domain {unknown[0]!r}; there are "
                    f"{', '.join(self.domains)}"
                )
            prior = [prior.get(domain, 0.0) for domain in self.domains]
        if prior is not None:
            prior = [float(weight) for weight in prior]
            fits = len(prior) == len(self.domains) and min(prior) >= 0
            if not (fits and abs(sum(prior) - 1) <= 1e-4):
                raise ValueError(
                    f"prior {prior}: needs {len(self.domains)} weights, none negative, that sum to "
                    "1 within 1e-4"
                )
        self.config.prior = prior

    def _select_experts(self) -> tuple[list[int], Tensor]:
        """Select the experts with a prior above 0, `topk` at most.

        Return their indices in ascending order, and their prior [E], normalised to sum 1. Raise
        ValueError if `topk` is set without a prior.
        """
        prior = self.config.prior
        count = len(self.domains)
        if self.config.topk and prior is None:
            raise ValueError(f"topk {self.config.topk} needs a prior; see set_prior")
        prior = [1 / count] * count if prior is None else prior
        selected = sorted(range(count), key=lambda expert: -prior[expert])[
            : self.config.topk or count
        ]
        selected = sorted(expert for expert in selected if prior[expert] > 0)
        weights = torch.tensor([prior[expert] for expert in selected], device=self.device)
        return selected, weights / weights.sum()

    def _select_part(self, expert_index: int) -> LanguageModel:
        """Return the model that holds an expert, after selecting that expert or adapter in it.

        Args:
            expert_index: position in `config.experts`.
        """
        entry = self.config.experts[expert_index]
        part = self.parts[entry["part"]]
        if entry["member"] is not None:
            part.set_domain(entry["member"])
        return part

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **more: object,
    ) -> ForestOutput | tuple:
        """Run all experts in use on `input_ids` [B, L], in turn, and mix their predictions.

        The weights of the experts are computed from `input_ids`; labels only say which predictions
        are scored. Arguments as in `DemixForCausalLM.forward`.

        Returns:
            `ForestOutput` (a tuple if `return_dict` is False): logits, with labels also the loss
            (nats, without gradient) and log-probabilities of the mixture; with `shift_labels` these
            without logits.
        Raises:
            ValueError: if the cache is of another kind than `DynamicCache()`, or has another number
                of layers than the experts in use need; if a cache is used and an expert has a
                recurrent state; if `topk` is set without a prior; or if the model does not take an
                argument of `more`.
        """
        shift_labels = more.pop("shift_labels", None)
        check_extra_arguments(self, more)
        wants_logits = shift_labels is None
        if labels is not None and wants_logits:
            logits_to_keep = 0
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and shift_labels is None
        if use_cache and (recurrent := self._list_recurrent_parts()):
            raise ValueError(
                f"use_cache: the cache of a forest does not hold the recurrent state of a "
                f"{recurrent[0]}; pass use_cache=False"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        experts, prior = self._select_experts()
        parts = [self.parts[self.config.experts[expert]["part"]] for expert in experts]
        expert_caches = split_cache(
            past_key_values, [part.config.num_hidden_layers for part in parts]
        )
        attention_mask, position_ids = fill_mask_and_positions(
            input_ids, attention_mask, position_ids, expert_caches[0], self.config.pad_token_id
        )
        hidden, token_log_probs, label_log_probs = self._run_experts(
            experts, expert_caches, input_ids, attention_mask, position_ids, shift_labels
        )
        log_weights = compute_token_weights(
            # Position t holds the log-probability of token t + 1: with it the weights for token
            # t + 2 are known.
            nn.functional.pad(token_log_probs[:, :, 1:], (0, 1)),
            prior,
            rule=self.config.rule,
            temperature=self.config.temperature,
            forgetting=self.config.forgetting,
            mask=attention_mask.bool() if attention_mask is not None else None,
        )[:, :, -input_ids.shape[1] :]

        output = ForestOutput(
            past_key_values=past_key_values if use_cache else None, log_weights=log_weights
        )
        if wants_logits:
            output["logits"] = self._mix_logits(experts, hidden, log_weights, logits_to_keep)
        if shift_labels is not None:
            counted = shift_labels != -100
            output["token_log_probs"] = mix_log_probs(log_weights, label_log_probs).where(
                counted, 0.0
            )
            if num_items_in_batch is None:
                num_items_in_batch = counted.sum().clamp(min=1)
            output["loss"] = -output["token_log_probs"].sum() / num_items_in_batch
        return format_output(self, output, return_dict)

    def _run_experts(
        self,
        expert_indices: Sequence[int],
        expert_caches: Sequence[ExpertCache],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        shift_labels: Tensor | None,
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Run the experts in use, without logits, and add their evidence to the caches.

        Args:
            expert_indices: positions in `config.experts`.
            expert_caches: caches of the same experts, in the same order.
            input_ids, position_ids: [B, L], the new tokens.
            attention_mask: [B, S], cached tokens included; None if all are real.
            shift_labels: [B, L], the token to score after each position, -100 for none; or None.
        Returns:
            The states before the output matrix, [B, L, D] of each expert; the log-probability of
            each token so far after those before it [E, B, S], 0 for the first; and with labels
            that of each label [E, B, L].
        """
        cached_length, length = expert_caches[0].get_seq_length(), input_ids.shape[1]
        # Targets of the positions: the tokens that follow, or other tokens that labels name.
        following = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            following = shift_labels.where(shift_labels != -100, following)
        real_tokens = torch.ones_like(input_ids)
        if attention_mask is not None:
            real_tokens = attention_mask[:, cached_length:]
        hidden, token_log_probs, label_log_probs = [], [], []
        for expert, expert_cache in zip(expert_indices, expert_caches, strict=True):
            part = self._select_part(expert)
            states = part.compute_hidden_states(
                input_ids, attention_mask, position_ids, expert_cache
            )
            rows, targets = states, following
            if cached_length:  # the last cached position predicts the first token of this pass
                rows = torch.cat([expert_cache.get_last_states(), states], dim=1)
                targets = torch.cat([input_ids[:, :1], following], dim=1)
            if shift_labels is None:  # nothing is known yet of what follows the last token
                rows, targets = rows[:, :-1], targets[:, :-1]
            log_probs = part.score_states(rows, targets)[1]
            if shift_labels is not None:
                label_log_probs.append(log_probs[:, -length:])
                log_probs = log_probs[:, :-1]
            log_probs = log_probs if cached_length else nn.functional.pad(log_probs, (1, 0))
            token_log_probs.append(expert_cache.add_evidence(states, log_probs, real_tokens))
            hidden.append(states)
        return (
            hidden,
            torch.stack(token_log_probs),
            torch.stack(label_log_probs) if label_log_probs else None,
        )

    def _mix_logits(
        self,
        expert_indices: Sequence[int],
        hidden: Sequence[Tensor],
        log_weights: Tensor,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Compute the log-probabilities of the mixture, log sum_j w_j softmax_j: [B, kept, V].

        Experts are computed one after the other: at most two tensors of that size exist at a time.

        Args:
            expert_indices: positions in `config.experts`.
            hidden: states before the output matrix, [B, L, D] of each of these experts.
            log_weights: [E, B, L], logarithms of w_j.
            logits_to_keep: see `select_logit_positions`; V is the smallest vocabulary of all parts.
        """
        mixed = None
        for number, expert in enumerate(expert_indices):
            logits = (
                self._select_part(expert)
                .compute_logits(select_logit_positions(hidden[number], logits_to_keep))
                .float()
            )
            # Output matrices may be padded; the rows that all experts have are those of tokens.
            log_probs = logits.log_softmax(-1)[..., : self.config.vocab_size]
            weighted = (
                log_probs + select_logit_positions(log_weights[number], logits_to_keep)[..., None]
            )
            mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted, out=mixed)
        return mixed


def _select_part_fields(part: LanguageModel) -> dict:
    """Return the fields of a part's configuration for `config.parts`, its adapters included."""
    left_out = ("transformers_version", "architectures")
    changed = part.config.to_diff_dict().items()
    fields = {name: value for name, value in changed if name not in left_out}
    return fields | ({ADAPTERS: list_adapter_fields(part)} if list_adapters(part) else {})
