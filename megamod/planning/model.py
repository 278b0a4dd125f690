"""Model of a job on the meta device: parameters by name, and the cost of one pass."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
)

from megamod.dist.scope import Sharing, parse_expert_domain
from megamod.errors import UserError
from megamod.models.auto import make_lm_config, resolve_model_folder
from megamod.models.build import FAMILIES, build_encoder, make_encoder_config
from megamod.models.lm.adapter import add_adapter_without_storage, make_lora_fields
from megamod.models.lm.configuration import read_lm_config
from megamod.models.lm.flops import compute_flops_per_token, count_active_parameters
from megamod.models.lm.load import select_lm_class
from megamod.models.presets import PRESETS, SHAPE
from megamod.planning.activations import PassCost, measure_pass
from megamod.planning.job import Job
from megamod.train.encoder_objective import compute_masked_lm_losses, compute_replaced_token_losses
from megamod.train.hidden_matrices import mark_hidden_matrices


@dataclass(frozen=True)
class Network:
    """Parameters and FLOPs of a job's model.

    Attributes:
        job: the job that trains it.
        config: configuration of the whole model, with all domains.
    """

    job: Job
    config: PreTrainedConfig

    @property
    def trains_adapter(self) -> bool:
        """True if an adapter alone is trained; its seed need not exist yet."""
        return self.job.lora.lora_rank is not None

    @cached_property
    def rank_module(self) -> nn.Module:
        """The part of the model that a rank holds, on the meta device."""
        with torch.device("meta"):
            return self.build_rank_module(self.config)

    @cached_property
    def trained_sizes(self) -> dict[str, int]:
        """Elements of each trained parameter that a rank holds, by name."""
        return {n: p.numel() for n, p in self.rank_module.named_parameters() if p.requires_grad}

    @cached_property
    def muon_names(self) -> frozenset[str]:
        """Names of the hidden matrices, if the job trains with Muon; else empty."""
        if not self.job.setting.muon:
            return frozenset()
        mark_hidden_matrices(self.rank_module)
        return frozenset(n for n, p in self.rank_module.named_parameters() if p.use_muon)

    @cached_property
    def frozen_sizes(self) -> dict[str, int]:
        """Elements of each frozen parameter that a rank holds, by name."""
        return {n: p.numel() for n, p in self.rank_module.named_parameters() if not p.requires_grad}

    @property
    def frozen_parameters(self) -> int:
        """Elements of the frozen parameters that a rank holds."""
        return sum(self.frozen_sizes.values())

    @property
    def shared_parameters(self) -> int:
        """Parameters that a rank holds and that all domains share, frozen ones included."""
        return self.frozen_parameters + sum(
            size for name, size in self.trained_sizes.items() if parse_expert_domain(name) is None
        )

    @property
    def parameters_per_expert(self) -> int:
        """Parameters of one domain's expert, without shared ones; 0 in a model without experts."""
        held = self.job.topology.get_rank_domains(0)
        return (self.parameters_per_rank - self.shared_parameters) // len(held)

    @property
    def parameters_per_rank(self) -> int:
        """Number of parameters that a rank holds, trained and frozen."""
        return self.frozen_parameters + sum(self.trained_sizes.values())

    @property
    def parameters_per_token(self) -> int:
        """Parameters that a token passes through, without the table of positions."""
        return round(sum(count_active_parameters(self.config, self.rank_module)))

    @property
    def total_parameters(self) -> int:
        """Parameters of all domains together, over all ranks: shared ones count once.

        With independent models (BTM) each domain counts a whole one; adapters count their frozen
        seed once.
        """
        domains = len(self.job.topology.domains)
        if self.job.topology.sharing is Sharing.BTM:
            if self.trains_adapter:  # of one seed
                return self.frozen_parameters + domains * sum(self.trained_sizes.values())
            return domains * self.parameters_per_rank
        return self.shared_parameters + domains * self.parameters_per_expert

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs of a training step per token, without recomputation.

        For a causal language model they follow the formula of the trainer's MFU. An encoder
        predicts some of the tokens only, so its matrix products and attention are counted in one
        pass of one instance group.
        """
        if self.job.mux.objective == "causal_lm":
            return compute_flops_per_token(
                self.config, self.rank_module, self.job.data.max_seq_length
            )
        rows = self.job.mux.num_instances
        cost = self.measure_pass(rows, checkpointing=False)
        return cost.flops / (rows * self.job.data.max_seq_length)

    def measure_pass(self, micro_batch: int, *, checkpointing: bool) -> PassCost:
        """Measure a forward and backward pass of one micro-batch in the precision of the job.

        Args:
            micro_batch: sequences.
            checkpointing: recompute blocks in the backward pass.
        """
        return measure_pass(
            self.config,
            self.build_rank_module,
            partial(self._compute_loss, micro_batch),
            precision=self.job.setting.precision,
            checkpointing=checkpointing,
            mask_density=self.mask_density,
        )

    def build_rank_module(self, config: PreTrainedConfig) -> nn.Module:
        """Build the part that rank 0 holds of a model with the configuration `config`.

        That is the whole model, except experts of other ranks. A blank adapter is added if the job
        trains one. Weights are on torch's default device.
        """
        if self.job.mux.objective == "causal_lm":
            demix = self.job.topology.sharing is Sharing.DEMIX
            held = self.job.topology.get_rank_domains(0)
            module = select_lm_class(config)(config, held if demix else None)
            if demix:
                module.set_domain(held[0])
            if self.trains_adapter:
                add_adapter_without_storage(
                    module, make_lora_fields(module, **self.job.lora.settings)
                )
            return module
        return build_encoder(config, self.job.mux.objective)

    @property
    def scored_share(self) -> float:
        """Share of the tokens that the head scores.

        It is 1 for causal language models and with retrieval, else `mlm_probability`.
        """
        mux = self.job.mux
        every = mux.objective == "causal_lm" or mux.retrieval_loss_coeff > 0
        return 1.0 if every else mux.mlm_probability

    @property
    def mask_density(self) -> float:
        """Fraction of True elements of the boolean masks that select rows in a pass.

        The masks select tokens that the head scores, and in a mixture of the project's own GPT the
        tokens of one expert, evenly loaded.
        """
        if self.config.model_type == "demix_moe":
            return 1 / self.config.num_experts
        return self.scored_share

    def _compute_loss(self, micro_batch: int, module: nn.Module) -> Tensor:
        """Compute the job's training loss, a scalar, on a micro-batch whose token ids are 0.

        `micro_batch` is its number of sequences; `module` is a result of `build_rank_module`.
        """
        length, mux = self.job.data.max_seq_length, self.job.mux
        ids = torch.zeros(micro_batch, length, dtype=torch.int64)
        if mux.objective == "causal_lm":
            return module(ids, position_ids=ids, shift_labels=ids, num_items_in_batch=1.0).loss
        first_group = ids[: micro_batch // mux.num_instances]
        names = ("masked", "positions", "tokens", "readable")
        batch = {
            "input_ids": ids,
            "labels": ids,
            "random_ids": ids,
            "retrieved_instances": first_group,
            "mask_id": 0,
        }
        batch |= dict.fromkeys(names, 1)
        device = torch.device("cpu")
        if mux.objective == "masked_lm":
            losses = compute_masked_lm_losses(
                module, batch, (1.0, 1.0), device, mux.num_instances > 1
            )
        else:
            losses = compute_replaced_token_losses(module, batch, (1.0,) * 4, device, self.config)
        return losses["loss"]


def build_network(job: Job) -> Network:
    """Build the `Network` of the model that a job would train: its configuration, no weights yet.

    The configuration is that of the run: preset or folder in --model, with the job's flags,
    vocabulary and domains.

    Raises:
        UserError: for a model that does not exist, or does not fit the data.
    """
    if job.mux.objective == "distillation":
        raise UserError(
            "--objective distillation: plan masked_lm with the same flags; the teacher's weights "
            "come on top, and an N-th of its activations"
        )
    if job.mux.objective != "causal_lm":
        sizes = PRESETS[FAMILIES[job.mux.objective]]
        if job.model.model not in sizes:
            raise UserError(
                f"--model {job.model.model!r}: plans of encoders start from {', '.join(sizes)}"
            )
        changes = {name: getattr(job.model, name) for name in SHAPE}
        length = job.data.max_seq_length
        config = make_encoder_config(job.model.model, changes, job.mux, job.vocabulary, length)
        return Network(job, config)
    untie = "none" if job.topology.sharing is not Sharing.DEMIX else job.model.untie
    size, special_ids = _find_vocabulary(job)
    config = make_lm_config(
        job.model.model,
        vocab_size=size,
        special_ids=special_ids,
        domains=job.topology.domains,
        untie=untie,
        max_positions=job.data.max_seq_length,
        attn_implementation=job.model.attn_implementation,
        overrides={name: getattr(job.model, name) for name in SHAPE},
        vocab_multiple=job.model.vocab_multiple,
    )
    return Network(job, config)


def _find_vocabulary(job: Job) -> tuple[int, dict[str, int | None]]:
    """Find the size of the vocabulary, and its special ids by name ("bos_token_id", ...).

    They are those of the job, read from the data-bin or assumed; but if they are assumed and
    --model is a folder, those of its configuration.
    """
    tokens, names = job.vocabulary, ("bos_token_id", "pad_token_id", "eos_token_id")
    folder = resolve_model_folder(job.model.model)
    if not tokens.assumed or folder is None:
        ids = (tokens.bos, tokens.pad, tokens.eos)
        return tokens.size, dict(zip(names, ids, strict=True))
    config = read_lm_config(folder, "--model")
    ids = {name: getattr(config, name) for name in names}
    if isinstance(ids["eos_token_id"], list):
        ids["eos_token_id"] = ids["eos_token_id"][0]
    return config.vocab_size, ids
