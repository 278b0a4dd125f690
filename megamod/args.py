"""Settings of runs as small dataclasses, which `parse_args` fills.

Flags are spelled as in the Trainer of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from megamod.errors import UserError
from megamod.flags import (
    Arguments,
    option,
    refuse_values_without_effect,
    set_values,
)
from megamod.names import check_domain

# Help of flags that several commands have.
MASK_DOCUMENTS = "no attention across the ends of documents; auto: as each model was trained"
VERIFY_DATA = (
    "check of the token files against their digests before they are read: file sizes, a sample of "
    "blocks, or everything"
)


@dataclass
class RunArgs(Arguments):
    """Length, batch, logging and saving."""

    output_dir: str | None = option(None, "folder of this run: checkpoints, metrics, run.yaml")
    max_steps: int = option(1000, "optimizer steps of the whole run", least=0)
    stop_step: int | None = option(
        None,
        "stop after this step with a checkpoint; the schedule still ends at --max_steps",
        least=0,
    )
    per_device_train_batch_size: int = option(8, "sequences per rank and micro-batch", least=1)
    per_device_eval_batch_size: int = option(8, "sequences per rank and batch", least=1)
    gradient_accumulation_steps: int = option(1, "micro-batches per rank and step", least=1)
    global_batch_size: int | None = option(
        None, "sequences per step over all ranks; sets the accumulation", least=1
    )
    logging_steps: int = option(10, "steps between two lines of the log", least=1)
    eval_steps: int = option(0, "steps between evaluations; 0: only at the end", least=0)
    eval_batches: int = option(0, "batches per evaluation and domain; 0: the whole split", least=0)
    save_steps: int = option(0, "steps between checkpoints; 0: only at the end", least=0)
    save_total_limit: int | None = option(None, "checkpoints to keep; none: all", least=1)
    seed: int = option(1, "seed of weights, data order and dropout", least=0, most=2**32 - 1)
    precision: Literal["fp32", "bf16", "fp16"] | None = option(
        None, "number format of the model; none: that of the DeepSpeed file"
    )
    report_to: Literal["tensorboard", "wandb", "none"] = option(
        "tensorboard", "where loss curves are logged"
    )

    def __post_init__(self):
        """Check all fields; raise UserError for both flags that set the accumulation."""
        super().__post_init__()
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise UserError(
                f"--global_batch_size {self.global_batch_size} sets the accumulation, but "
                f"--gradient_accumulation_steps is {self.gradient_accumulation_steps}; "
                "give one of the two (accumulation 1 means unset)"
            )


@dataclass
class SafetyArgs(Arguments):
    """Start, resume, and policies for faults."""

    deepspeed: str | None = option(
        None,
        "DeepSpeed JSON; none: fp32, ZeRO 1 (0 for a dense model alone)",
        alias="deepspeed_config",
    )
    resume: str = option("auto", "auto: from the newest checkpoint, if any; none; or PATH of one")
    nonfinite: Literal["stop", "skip", "rollback"] = option(
        "stop", "policy for a step whose loss or gradient is not finite (fp16: always skip)"
    )
    max_nonfinite_steps: int = option(
        10,
        "steps of the last 100 that may be skipped or rolled back; with more the run stops with "
        "exit code 3 and publishes no model",
        least=0,
    )
    spike_factor: float = option(
        0.0, "a loss above this multiple of its running mean counts as not finite; 0: off", least=0
    )
    save_failure: Literal["continue", "stop"] = option(
        "continue", "policy if a checkpoint cannot be written"
    )
    dist_timeout: int = option(600, "seconds until a silent rank counts as lost", least=1)
    print_groups: bool = option(False, "print ranks, domains and groups, then exit")
    allow_unknown_ds_keys: bool = option(False, "accept unknown keys of the DeepSpeed JSON")

    def __post_init__(self):
        """Check all fields; raise UserError for a spike factor above 0 and up to 1, and for
        --allow_unknown_ds_keys without --deepspeed.
        """
        super().__post_init__()
        if 0 < self.spike_factor <= 1:
            raise UserError(f"--spike_factor: {self.spike_factor} is not 0 (off) or above 1")
        if self.deepspeed is None:
            refuse_values_without_effect(
                self, ("allow_unknown_ds_keys",), "there is no --deepspeed"
            )


@dataclass
class OptimArgs(Arguments):
    """AdamW or Muon and the schedule; the defaults are those of the DEMix release."""

    optim: Literal["adamw", "muon"] = option(
        "adamw",
        "muon: hidden matrices by Muon, embeddings, output head, norms and biases by AdamW; causal "
        "language models alone",
    )
    muon_learning_rate: float = option(
        0.02, "peak learning rate of Muon; --learning_rate is AdamW's", least=0
    )
    learning_rate: float = option(5e-4, "peak learning rate", least=0)
    lr_scheduler_type: Literal["linear", "constant", "cosine", "warmup_stable_decay"] = option(
        "linear",
        "after warm-up: linear or half a cosine to 0; constant; or constant, then linear to 0 in "
        "the last fifth of the steps",
    )
    warmup_ratio: float = option(0.08, "warm-up as a share of all steps", least=0, most=1)
    warmup_steps: int | None = option(None, "warm-up in steps, in place of the share", least=0)
    adam_beta1: float = option(0.9, "decay of the first moment", least=0, most=0.99999)
    adam_beta2: float = option(0.95, "decay of the second moment", least=0, most=0.99999)
    adam_epsilon: float = option(1e-7, "added to the root of the second moment", least=0)
    weight_decay: float = option(0.1, "decoupled weight decay", least=0)
    decay_norms_and_biases: bool = option(
        True, "weight decay of all parameters; false: of matrices alone"
    )
    max_grad_norm: float = option(0.1, "gradients are clipped to this norm; 0: off", least=0)

    def __post_init__(self):
        """Check all fields; raise UserError for flags without effect, or Muon with a rate of 0."""
        super().__post_init__()
        if self.warmup_steps is not None:
            steps = f"--warmup_steps is {self.warmup_steps}"
            refuse_values_without_effect(self, ("warmup_ratio",), steps)
        if self.optim == "adamw":
            refuse_values_without_effect(self, ("muon_learning_rate",), "--optim is adamw")
        elif not self.learning_rate:
            raise UserError(
                "--optim muon: --learning_rate is 0; both optimizers follow its schedule, so it "
                "must be above 0"
            )


@dataclass
class ModelArgs(Arguments):
    """Model, and the parts that its domains share."""

    model: str = option(
        "tiny",
        "tiny, 125m, 350m, 750m, 1.3b; or a model, its weights included, by folder or hub name",
        alias="model_name_or_path",
    )
    untie: Literal[
        "none", "feedforward", "feedforward_every_other", "feedforward_top",
        "transformer", "transformer_output", "input_output", "all",
    ] = option(
        "none", "parts of its own for each domain; none: dense, feedforward: DEMix, all: BTM"
    )  # fmt: skip
    init_from: str | None = option(
        None, "model folder whose weights start the run, in place of those of --model"
    )
    from_scratch: bool = option(False, "new weights in the shape of the folder in --model")
    vocab_multiple: int | None = option(
        None, "pad the vocabulary of a stock model that is drawn to a multiple of this", least=1
    )
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass")
    torch_compile: bool = option(False, "compile blocks with torch at the first step")
    attn_implementation: Literal["sdpa", "eager"] | None = option(
        None, "implementation of attention; none: sdpa where the model has it"
    )
    anchor: str | None = option(
        None,
        "with --untie feedforward: freeze the model as the anchor beside which each domain's "
        "expert computes; data-bin of the text it was trained on",
    )
    train: Literal["all", "router"] = option(
        "all", "weights that are trained; router: of a mixture of experts the router alone"
    )
    router_aux_loss_coef: float = option(
        0.01, "weight of the load-balance loss of a mixture of experts; 0: off", least=0
    )
    hidden_size: int | None = option(None, "width; none: that of the model", least=1)
    num_hidden_layers: int | None = option(None, "blocks; none: those of the model", least=1)
    num_attention_heads: int | None = option(None, "heads; none: those of the model", least=1)
    intermediate_size: int | None = option(
        None, "width of the feed-forward; none: that of the model", least=1
    )

    def __post_init__(self):
        """Check all fields; raise UserError for --anchor without --untie feedforward, and for a
        number of heads that does not divide the hidden size.
        """
        super().__post_init__()
        if self.anchor is not None and self.untie != "feedforward":
            raise UserError(
                f"--anchor {self.anchor}: anchored experts are feed-forwards of all layers; give "
                f"--untie feedforward, not {self.untie}"
            )
        width, heads = self.hidden_size, self.num_attention_heads
        if width is not None and heads is not None and width % heads:
            raise UserError(
                f"--hidden_size {width} is not a multiple of --num_attention_heads {heads}"
            )


@dataclass
class LoraArgs(Arguments):
    """LoRA adapter that is trained in place of the weights of a model."""

    lora_rank: int | None = option(
        None,
        "train a LoRA adapter of this rank, everything else frozen; none: all weights",
        least=1,
    )
    lora_alpha: int | None = option(
        None, "updates are scaled by this over the rank; none: twice the rank", least=1
    )
    lora_dropout: float = option(0.0, "dropout of the input of an adapter", least=0, most=0.9)
    lora_targets: list[str] | None = option(  # noqa: RUF009
        None, "names of the layers to adapt, such as q_proj; none: every linear layer of the blocks"
    )

    def __post_init__(self):
        """Check all fields; raise UserError for flags of an adapter without --lora_rank."""
        super().__post_init__()
        if self.lora_rank is None:
            names = [f.name for f in fields(self) if f.name != "lora_rank"]
            refuse_values_without_effect(self, names, "there is no --lora_rank")

    @property
    def settings(self) -> dict[str, object]:
        """Values by the names of the arguments of `make_lora_fields`, such as "rank"."""
        return {f.name.removeprefix("lora_"): getattr(self, f.name) for f in fields(self)}

    def check_model_flags(self, model: ModelArgs) -> None:
        """Refuse flags of a model that an adapter cannot have; without --lora_rank all pass.

        Raises:
            UserError: naming the flag of the model.
        """
        if self.lora_rank is None:
            return
        if model.untie not in ("none", "all"):
            raise UserError(
                f"--lora_rank {self.lora_rank}: an adapter is an expert of its own, which has no "
                f"parts per domain (--untie {model.untie}); give --untie none or all"
            )
        refuse_values_without_effect(model, ("train",), f"--lora_rank is {self.lora_rank}")


@dataclass
class MuxArgs(Arguments):
    """Encoders: objective, and instances per forward pass."""

    objective: Literal["causal_lm", "masked_lm", "replaced_token", "distillation"] = option(
        "causal_lm",
        "next token; encoders: masked tokens (MUX-BERT), replaced tokens (MUX-ELECTRA), or the "
        "hidden states of --teacher",
    )
    teacher: str | None = option(
        None,
        "distillation: stock BERT, by folder or hub name, whose states each instance learns; none: "
        "--model",
    )
    num_instances: int = option(
        1, "instances that share a forward pass; 1: the plain encoder of transformers", least=1
    )
    muxing_variant: str = option("gaussian_hadamard", "multiplexer; docs/multiplexing.md has all")
    demuxing_variant: Literal["index_pos", "index"] = option(
        "index_pos", "demultiplexer: RSA, or prefix tokens"
    )
    num_hidden_demux_layers: int = option(3, "layers of the RSA demultiplexer", least=2)
    learn_muxing: bool = option(False, "train the keys of the multiplexer")
    unmixed_layers: int = option(
        0, "first layers that each instance passes by itself, before the multiplexer", least=0
    )
    task_loss_coeff: float = option(1.0, "weight of the loss of masked or replaced tokens", least=0)
    retrieval_loss_coeff: float = option(
        0.0, "weight of the loss of retrieval; 1 with --task_loss_coeff 0 is the warm-up", least=0
    )
    dropout: float | None = option(
        None, "rate of all dropout, kept in the model; none: that of the model", least=0, most=0.9
    )
    mlm_probability: float = option(0.15, "share of tokens to predict", least=0, most=1)
    max_pad_tokens: int = option(
        0, "at most this many last tokens of a row become padding", least=0
    )
    generator: Literal["none", "plain", "multiplexed"] = option(
        "none", "source of replaced tokens (replaced_token): random, or a model trained jointly"
    )
    generator_size: float = option(
        0.25, "width of the generator as a share of the model's", least=0.01, most=1
    )
    gen_loss_weight: float = option(1.0, "weight of the generator's loss", least=0)
    disc_loss_weight: float = option(50.0, "weight of the discriminator's loss", least=0)

    def __post_init__(self):
        """Check all fields; raise UserError for objective, losses and generator that do not fit."""
        super().__post_init__()
        if self.objective == "distillation" and self.num_instances == 1:
            raise UserError(
                "--objective distillation with --num_instances 1: the states of one instance are "
                "those of the teacher already; give 2 or more"
            )
        if self.generator != "none" and (
            self.num_instances == 1 or self.objective != "replaced_token"
        ):
            raise UserError(
                f"--generator {self.generator} goes with --objective replaced_token and more than "
                "one instance"
            )
        if self.objective != "causal_lm" and not self.task_loss_coeff + self.retrieval_loss_coeff:
            raise UserError("--task_loss_coeff and --retrieval_loss_coeff are both 0")
        if self.retrieval_loss_coeff and self.num_instances == 1:
            raise UserError(
                f"--retrieval_loss_coeff {self.retrieval_loss_coeff}: with --num_instances 1 "
                "there is nothing to retrieve"
            )


@dataclass
class DataArgs(Arguments):
    """Data-bin, domains and sequences."""

    data: str | None = option(None, "data-bin folder written by megamod preprocess")
    domains: list[str] | None = option(  # noqa: RUF009
        None, "domains, in this order; none: all of the data-bin"
    )
    sampler: Literal["balanced", "unbalanced", "temperature"] = option(
        "balanced", "shares of domains: equal, by size, or by size to the power --alpha"
    )
    alpha: float = option(0.5, "power of --sampler temperature", least=0, most=1)
    max_seq_length: int = option(1024, "tokens per sequence", least=2)
    mask_documents: bool = option(False, "no attention across the ends of documents")
    domain_token: bool = option(False, "begin each sequence with the token of its domain")
    dataloader_num_workers: int = option(
        0, "processes that read data, per rank", least=0, most=1024
    )
    eval_split: Literal["valid", "test", "train"] = option("valid", "split of the evaluation")
    verify_data: Literal["size", "sample", "full"] = option("sample", VERIFY_DATA)

    def __post_init__(self):
        """Check all fields; raise UserError for flags that exclude each other, and for domains that
        are repeated or cannot be names.
        """
        super().__post_init__()
        if self.mask_documents and self.domain_token:
            raise UserError("--mask_documents would hide the token of --domain_token; give one")
        for name in self.domains or ():
            check_domain(name, "--domains")
            if self.domains.count(name) > 1:
                raise UserError(f"--domains: {name!r} is named twice")


MIXTURE_FLAGS = ("train", "router_aux_loss_coef")
"""Flags of `ModelArgs` that belong to mixtures of experts."""


def apply_deepspeed_values(
    run: RunArgs,
    optim: OptimArgs,
    values: Mapping[str, object],
    origin: str,
    domains_per_rank: int = 1,
) -> None:
    """Set fields of `run` and `optim`, in place, to the values of a resolved DeepSpeed JSON.

    Args:
        run: flags of length and batch.
        optim: flags of the optimizer.
        values: by key path, see `resolve_ds_config`.
        origin: origin of changed values for `find_origin`, such as "DeepSpeed FILE".
        domains_per_rank: domains of a rank; --gradient_accumulation_steps counts micro-batches per
            domain.
    Raises:
        UserError: for a value that the field does not allow, or that `domains_per_rank` does not
            divide.
    """
    precision = "bf16" if values["bf16.enabled"] else "fp16" if values["fp16.enabled"] else "fp32"
    values_by_field = {
        "per_device_train_batch_size": values["train_micro_batch_size_per_gpu"],
        "precision": precision,
        "max_grad_norm": values["gradient_clipping"],
        "learning_rate": values["optimizer.params.lr"],
        "adam_beta1": values["optimizer.params.betas"][0],
        "adam_beta2": values["optimizer.params.betas"][1],
        "adam_epsilon": values["optimizer.params.eps"],
        "weight_decay": values["optimizer.params.weight_decay"],
    }
    steps = values["gradient_accumulation_steps"]
    if steps % domains_per_rank:
        raise UserError(
            f"{origin}: gradient_accumulation_steps {steps} is not a multiple of the "
            f"{domains_per_rank} domains of a rank"
        )
    if run.global_batch_size is None:
        values_by_field["gradient_accumulation_steps"] = steps // domains_per_rank
    set_values(run, values_by_field, origin)
    set_values(optim, values_by_field, origin)
