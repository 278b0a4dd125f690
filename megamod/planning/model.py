"""Model of a job on the meta device: parameters by name, and the cost of one pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    ElectraConfig,
    PreTrainedConfig,
)

from megamod.args import ModelArgs, MuxArgs
from megamod.dist.scope import Sharing, domain_of_name
from megamod.errors import UserError
from megamod.models.auto import lm_config
from megamod.models.lm.flops import active_parameters, flops_per_token
from megamod.models.lm.load import lm_class
from megamod.models.mux.configuration import PRESETS, MuxBertConfig, MuxElectraConfig
from megamod.planning.activations import Pass, measure
from megamod.planning.job import Job, Vocabulary
from megamod.train.objectives import masked_losses, replaced_losses

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Network:
    """Parameters and FLOPs of a job's model.

    Attributes:
        job: the job that trains it.
        config: configuration of the whole model, with all domains.
    """

    job: Job
    config: PreTrainedConfig

    @cached_property
    def module(self) -> nn.Module:
        """The part of the model that a rank holds, on the meta device."""
        with torch.device("meta"):
            return self.build(self.config)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each trained parameter that a rank holds, by name."""
        return {n: p.numel() for n, p in self.module.named_parameters() if p.requires_grad}

    @cached_property
    def frozen(self) -> int:
        """Elements of the frozen parameters that a rank holds."""
        return sum(p.numel() for p in self.module.parameters() if not p.requires_grad)

    @property
    def shared(self) -> int:
        """Parameters shared by all domains."""
        return self.frozen + sum(
            size for name, size in self.sizes.items() if domain_of_name(name) is None
        )

    @property
    def per_expert(self) -> int:
        """Parameters of one domain's expert; 0 in a model without experts."""
        held = self.job.topology.domains_of(0)
        return (self.per_rank - self.shared) // len(held)

    @property
    def per_rank(self) -> int:
        """Parameters that a rank holds."""
        return self.frozen + sum(self.sizes.values())

    @property
    def active(self) -> int:
        """Parameters that a token passes through, without the table of positions."""
        return round(sum(active_parameters(self.config, self.module)))

    @property
    def total(self) -> int:
        """Parameters of all models that the job trains."""
        domains = len(self.job.topology.domains)
        if self.job.topology.sharing is Sharing.BTM:
            return domains * self.per_rank
        return self.shared + domains * self.per_expert

    @cached_property
    def flops_per_token(self) -> float:
        """Operations of a training step per token, recomputing not counted.

        Of causal language models by the formula of the trainer's MFU. Encoders predict some of the
        tokens only, so theirs are counted: matrix products and attention of one pass.
        """
        if self.job.mux.objective == "causal_lm":
            return flops_per_token(self.config, self.module, self.job.data.max_seq_length)
        rows = self.job.mux.num_instances
        cost = self.run(rows, checkpointing=False)
        return cost.flops / (rows * self.job.data.max_seq_length)

    def run(self, micro_batch: int, *, checkpointing: bool) -> Pass:
        """One micro-batch through the model, forward and backward."""
        return measure(
            self.config,
            self.build,
            partial(self._loss, micro_batch),
            precision=self.job.setting.precision,
            checkpointing=checkpointing,
            chosen=self.chosen,
        )

    def build(self, config: PreTrainedConfig) -> nn.Module:
        """The part that a rank holds of a model with this configuration."""
        if self.job.mux.objective == "causal_lm":
            demix = self.job.topology.sharing is Sharing.DEMIX
            held = self.job.topology.domains_of(0)
            module = lm_class(config)(config, held if demix else None)
            if demix:
                module.set_domain(held[0])
            return module
        if isinstance(config, MuxElectraConfig):
            config.architectures = ["MuxElectraForReplacedTokens"]
        return _KINDS[self.job.mux.objective].from_config(config)

    @property
    def chosen(self) -> float:
        """Share of the tokens that the head scores: retrieval asks for every position."""
        mux = self.job.mux
        every = mux.objective == "causal_lm" or mux.retrieval_loss_coeff > 0
        return 1.0 if every else mux.mlm_probability

    def _loss(self, micro_batch: int, module: nn.Module) -> Tensor:
        length, mux = self.job.data.max_seq_length, self.job.mux
        ids = torch.zeros(micro_batch, length, dtype=torch.int64)
        if mux.objective == "causal_lm":
            return module(ids, position_ids=ids, shift_labels=ids, num_items_in_batch=1.0).loss
        slots = ids[: micro_batch // mux.num_instances]
        names = ("masked", "positions", "tokens", "readable")
        batch = {"input_ids": ids, "labels": ids, "random_ids": ids, "slots": slots, "mask_id": 0}
        batch |= dict.fromkeys(names, 1)
        device = torch.device("cpu")
        if mux.objective == "masked_lm":
            losses = masked_losses(module, batch, (1.0, 1.0), device, mux.num_instances > 1)
        else:
            losses = replaced_losses(module, batch, (1.0,) * 4, device, self.config)
        return losses["loss"]


_KINDS = {"masked_lm": AutoModelForMaskedLM, "replaced_token": AutoModelForPreTraining}


def network_of(job: Job) -> Network:
    """The model that a job would train.

    Raises:
        UserError: for a model that does not exist, or does not fit the data.
    """
    if job.mux.objective != "causal_lm":
        config = encoder_config(job.model, job.mux, job.vocabulary, job.data.max_seq_length)
        return Network(job, config)
    untie = "none" if job.topology.sharing is not Sharing.DEMIX else job.model.untie
    tokens = job.vocabulary
    config = lm_config(
        job.model.model,
        vocab_size=tokens.size,
        special_ids=dict(bos_token_id=tokens.bos, pad_token_id=tokens.pad, eos_token_id=tokens.eos),
        domains=job.topology.domains,
        untie=untie,
        max_positions=job.data.max_seq_length,
        attn_implementation=job.model.attn_implementation,
        overrides={name: getattr(job.model, name) for name in SHAPE},
    )
    return Network(job, config)


def encoder_config(
    model: ModelArgs, mux: MuxArgs, tokens: Vocabulary, length: int
) -> PreTrainedConfig:
    """Configuration of an encoder of a named size, as pretraining makes it.

    Raises:
        UserError: for an unknown size, or fields that do not fit each other.
    """
    electra = mux.objective == "replaced_token"
    sizes = PRESETS["mux_electra" if electra else "mux_bert"]
    if model.model not in sizes:
        raise UserError(f"--model {model.model!r}: plans of encoders start from {', '.join(sizes)}")
    given = {n: getattr(model, n) for n in SHAPE if getattr(model, n) is not None}
    shape = sizes[model.model] | given | {"vocab_size": tokens.size}
    if "hidden_size" in given and "embedding_size" in shape:
        shape["embedding_size"] = min(shape["embedding_size"], given["hidden_size"])
    shape |= {"pad_token_id": tokens.pad, "max_position_embeddings": max(512, length)}
    if mux.num_instances == 1:
        return (ElectraConfig if electra else BertConfig)(**shape)
    shape |= _multiplexed(mux, tokens)
    if electra:
        shape |= _generator(mux, shape) | {"mask_token_id": tokens.mask}
    try:
        return (MuxElectraConfig if electra else MuxBertConfig)(**shape)
    except ValueError as error:
        raise UserError(str(error)) from error


def _multiplexed(mux: MuxArgs, tokens: Vocabulary) -> dict[str, object]:
    names = (
        *("task_loss_coeff", "retrieval_loss_coeff", "learn_muxing", "num_instances"),
        *("muxing_variant", "demuxing_variant", "num_hidden_demux_layers"),
    )
    return {name: getattr(mux, name) for name in names} | {"cls_token_id": tokens.bos}


def _generator(mux: MuxArgs, shape: Mapping[str, int]) -> dict[str, object]:
    fields: dict[str, object] = dict(
        generator=mux.generator,
        gen_loss_weight=mux.gen_loss_weight,
        disc_loss_weight=mux.disc_loss_weight,
    )
    if mux.generator != "none":
        heads = max(1, round(shape["num_attention_heads"] * mux.generator_size))
        fields["generator_config"] = dict(
            hidden_size=shape["hidden_size"] // shape["num_attention_heads"] * heads,
            num_attention_heads=heads,
            intermediate_size=max(1, round(shape["intermediate_size"] * mux.generator_size)),
        )
    return fields
