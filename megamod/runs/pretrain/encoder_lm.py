"""Pretraining of encoders, multiplexed or not: masked, replaced, retrieved tokens; distillation."""

from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from megamod.args import DataArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.convert.sources import is_model_source, resolve_model
from megamod.data.batches import BatchDivision
from megamod.data.lm.batches import Batch
from megamod.data.lm.databin import DataBin
from megamod.data.lm.masking import (
    MaskedBatches,
    count_full_blocks,
    iterate_masked_eval_batches,
)
from megamod.data.lm.pretraining import LmData
from megamod.dist.process import get_rank as my_rank
from megamod.dist.process import read_launcher_rank, read_launcher_world_size, sum_over_ranks
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.evaluation.encoder_lm import score_encoder
from megamod.evaluation.held_out_data import check_tokenizer_matches
from megamod.evaluation.perplexity import select_rank_share
from megamod.evaluation.plots import plot_training_curves
from megamod.files import write_json
from megamod.flags import find_origin, refuse_values_without_effect
from megamod.models import build
from megamod.models.build import FAMILIES, LOSSES
from megamod.models.presets import SHAPE
from megamod.runs.pretrain.encoder_start import (
    build_initial_encoder,
    find_weight_source,
    load_teacher,
)
from megamod.runs.pretrain.encoder_vocabulary import DataVocabulary, make_masking
from megamod.runs.training import ActiveRun, RunSpec, execute_run
from megamod.train.encoder_objective import (
    ComputeLosses,
    EncoderObjective,
    compute_distillation_losses,
    compute_masked_lm_losses,
    compute_replaced_token_losses,
)
from megamod.train.export import Card

GROUP = "text"  # name of the only loss in the log
ITEM_FIELDS = {
    "masked_lm": ("masked", "positions"),
    "replaced_token": ("tokens", "positions", "masked", "readable"),
    "distillation": ("unpadded",),
}
"""By --objective the fields of a batch with the number of items of each sum in the loss, which
these numbers, summed over a step, divide; see `item_fields` of `EncoderObjective`."""

_CARDS = {
    "masked_lm": ("masked language model", "fill-mask", "AutoModelForMaskedLM"),
    "replaced_token": ("discriminator of replaced tokens", "electra", "AutoModelForPreTraining"),
    "distillation": ("encoder with the states of a stock one", "feature-extraction", "AutoModel"),
}
"""By --objective what a model card calls the model, its tag, and the class that loads it."""

STRUCTURE = (
    *("muxing_variant", "demuxing_variant", "num_hidden_demux_layers", "unmixed_layers"),
    "generator",
)
"""Flags of a multiplexed model's parts, which cannot differ from those of a model to start from."""


def pretrain_encoder(
    run: RunArgs,
    safety: SafetyArgs,
    model: ModelArgs,
    optim: OptimArgs,
    mux: MuxArgs,
    data_args: DataArgs,
) -> None:
    """Train an encoder, score it on held-out text, write OUT/results.json and print the scores.

    Collective. With --print_groups nothing is trained.

    Args:
        run, data_args: their `output_dir` and `data` must be set.
        safety, model, optim, mux: flags of the same groups of megamod pretrain.
    Raises:
        UserError: for arguments or data that do not fit, before anything is written.
        PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    data = LmData(
        data_args.data,
        domains=data_args.domains,
        block_size=data_args.max_seq_length,
        domain_token=False,
        verify=data_args.verify_data,
        share=(read_launcher_rank(), read_launcher_world_size()),
    )
    topology = DomainTopology(read_launcher_world_size(), data.domains, Sharing.DENSE)
    rank, split = read_launcher_rank(), data_args.eval_split
    config = build_encoder_config(model, mux, data.databin, data.block_size)
    start = find_weight_source(model, config)
    if start is not None and (folder := Path(astuple(start)[0])).is_dir():
        check_tokenizer_matches(folder, data.databin, start.flag)
    teacher = load_teacher(model, mux, config, data.databin)
    masking = make_masking(data.databin, mux)
    shown = "task_loss" if mux.task_loss_coeff > 0 else "retrieval_loss"
    item_fields = ITEM_FIELDS[mux.objective]
    batches = partial(
        data.build_masked_batches,
        masking=masking,
        sampler=data_args.sampler,
        alpha=data_args.alpha,
        seed=run.seed,
        instances=mux.num_instances,
        prefix=0 if teacher is not None else getattr(config, "prefix_length", 0),
    )
    rows = max(1, run.per_device_eval_batch_size // mux.num_instances) * mux.num_instances
    held_out_rows = batches(split, division=BatchDivision(rows, rows, 0, 1))
    _check_held_out_fills_a_pass(held_out_rows, split)

    def iterate_held_out(part: int, parts: int) -> Iterator[Batch]:
        """Yield every parts-th held-out batch from number `part` on."""
        return select_rank_share(
            iterate_masked_eval_batches(held_out_rows, run.eval_batches or None), part, parts
        )

    last: dict[str, float] = {}

    def evaluate(running: ActiveRun, step: int) -> None:
        """Score the model on the held-out split after `step` steps; collective.

        The scores are logged by the monitor of the run `running`, and set in `last`.
        """
        losses = make_loss_function(mux, config, running.device, teacher)
        scores = score_encoder(
            running.engine.module,
            iterate_held_out(my_rank(), topology.world_size),
            lambda module, batch: losses(module, batch, [batch[name] for name in item_fields]),
            running.device,
            sum_over_ranks,
            perplexity=mux.objective == "masked_lm",
        )
        for name, value in scores.items():
            running.monitor.log_scores(step, {GROUP: value}, split, name)
        last.update(scores)

    spec = RunSpec(
        config=config,
        topology=topology,
        data_digest=data.digest,
        tokenizer=data.databin.path / "tokenizer",
        card=_make_encoder_card(mux, data.digest),
        groups=(GROUP,),
        unit="tokens",
        make_batches=lambda division: batches("train", division=division),
        make_model=lambda: build_initial_encoder(config, run.seed, start, mux.objective),
        make_objective=lambda device: EncoderObjective(
            make_loss_function(mux, config, device, teacher), item_fields, shown
        ),
        make_evaluate=lambda running: partial(evaluate, running),
    )
    done = execute_run(
        spec,
        (run, safety, model, optim, mux, data_args),
        workers=data_args.dataloader_num_workers,
        checkpointing=model.gradient_checkpointing,
        compiled=model.torch_compile,
    )
    if done is None:
        return
    if not last:  # a finished run is scored again
        evaluate(done, done.state.step)
    if rank == 0:
        done.monitor.close()
        write_json(done.output / "results.json", {"step": done.state.step, "split": split, **last})
        plot_training_curves(done.output / "metrics.jsonl", done.output / "loss.png")
        text = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
        print(f"{split} after {done.state.step} steps: {text}\nmodel {done.output / 'model'}")


def make_loss_function(
    mux: MuxArgs,
    config: PreTrainedConfig,
    device: torch.device,
    teacher: PreTrainedModel | None = None,
) -> ComputeLosses:
    """Make the function that computes the losses of a batch for --objective.

    Args:
        mux: flags of the objective and its weights.
        config: configuration of the model.
        device: device of the model, to which batches are moved.
        teacher: of distillation, see `load_teacher`.
    Returns:
        a function of the model, a batch and the divisors of the loss's sums, in the order of
            `ITEM_FIELDS`.
    """
    if teacher is not None:
        cls = config.cls_token_id
        return partial(
            compute_distillation_losses, device=device, teacher=teacher, cls_token_id=cls
        )
    if mux.objective == "masked_lm":
        return partial(compute_masked_lm_losses, device=device, multiplexed=mux.num_instances > 1)
    return partial(
        compute_replaced_token_losses,
        device=device,
        config=config,
        discriminator_weight=mux.disc_loss_weight,
    )


def build_encoder_config(
    model: ModelArgs, mux: MuxArgs, data: DataBin, length: int
) -> PreTrainedConfig:
    """Build the configuration of the encoder that --model names: a preset, folder or hub name.

    Args:
        model: flags of the model.
        mux: flags of objective and multiplexing.
        data: data-bin, whose vocabulary the model must have.
        length: tokens per sequence.
    Raises:
        UserError: for an unknown size, or a model that does not fit the data or the flags.
    """
    changes = {name: getattr(model, name) for name in SHAPE}
    if is_model_source(model.model):
        changed = next((name for name, value in changes.items() if value is not None), None)
        if changed is not None:
            raise UserError(f"--{changed} cannot change the model {model.model}")
        config = _read_source_config(model.model, mux, data)
    else:
        config = build.make_encoder_config(model.model, changes, mux, DataVocabulary(data), length)
    build.set_dropout(config, mux.dropout)
    if config.vocab_size != data.vocab_size or config.max_position_embeddings < length:
        raise UserError(
            f"--model {model.model} has a vocabulary of {config.vocab_size} and "
            f"{config.max_position_embeddings} positions; the data need {data.vocab_size} and "
            f"{length}"
        )
    prefix = getattr(config, "prefix_length", 0)
    if prefix >= length:
        raise UserError(
            f"--max_seq_length {length}: a prefix for {mux.num_instances} instances takes the "
            f"place of {prefix} tokens and leaves none"
        )
    return config


def _check_held_out_fills_a_pass(batches: MaskedBatches, split: str) -> None:
    """Check before the first step that the held-out split fills one forward pass.

    Args:
        batches: batches of the split, which is not read.
        split: its name, for the message.
    Raises:
        UserError: naming the split and the sequences that it has and needs.
    """
    blocks = sum(count_full_blocks(dataset, batches.block_size) for dataset in batches.datasets)
    if blocks < batches.instances:
        raise UserError(
            f"--eval_split {split}: {blocks} sequences of --max_seq_length {batches.block_size}, "
            f"but a forward pass takes --num_instances {batches.instances}"
        )


def _read_source_config(source: str, mux: MuxArgs, data: DataBin) -> PreTrainedConfig:
    """Read the configuration of a model that training starts from.

    With --num_instances above 1 that of a stock encoder becomes multiplexed; that of a multiplexed
    model gets the loss weights of the flags.

    Args:
        source: model folder, or hub name OWNER/MODEL.
        mux: flags of objective and multiplexing.
        data: data-bin to train on.
    Raises:
        UserError: if it is of another family, or contradicts the flags or the data.
    """
    family = FAMILIES[mux.objective]
    stock = family.removeprefix("mux_")
    kind = family if mux.num_instances > 1 else stock
    config = resolve_model(
        source,
        "--model",
        (kind, stock).__contains__,
        f"{kind!r} for --objective {mux.objective} with --num_instances {mux.num_instances}",
    ).config
    if config.model_type != kind:
        return build.make_multiplexed_config_from_stock(config, mux, DataVocabulary(data))
    instances = getattr(config, "num_instances", 1)
    if mux.num_instances != instances:
        raise UserError(f"--num_instances {mux.num_instances}: the model {source} has {instances}")
    if mux.num_instances > 1:
        _check_flags_fit_multiplexed_model(source, config, mux, data)
        for name in (*LOSSES, "gen_loss_weight", "disc_loss_weight"):
            if hasattr(config, name):
                setattr(config, name, getattr(mux, name))
    return config


def _check_flags_fit_multiplexed_model(
    source: str, config: PreTrainedConfig, mux: MuxArgs, data: DataBin
) -> None:
    """Check that the flags which the user gave agree with a multiplexed model to start from.

    For replaced_token its [MASK] must also be that of the data.

    Args:
        source: model folder or hub name, for messages.
        config: configuration of that model, which is multiplexed.
        mux: flags of objective and multiplexing.
        data: data-bin to train on.
    Raises:
        UserError: naming the flag and the model.
    """
    for name in STRUCTURE:
        held = getattr(config, name, "none")
        if find_origin(mux, name) != "default" and getattr(mux, name) != held:
            raise UserError(
                f"--{name} {getattr(mux, name)}: cannot change the model {source}, which has {held}"
            )
    refuse_values_without_effect(mux, ("generator_size",), f"the model {source} has its size")
    if mux.objective == "replaced_token" and config.mask_token_id != DataVocabulary(data).mask:
        raise UserError(
            f"--model {source}: its mask_token_id {config.mask_token_id} is not the "
            f"{DataVocabulary(data).mask} of the tokenizer in --data {data.path}"
        )


def _make_encoder_card(mux: MuxArgs, data_digest: str) -> Card:
    """Make the model card of an encoder: objective, instances per pass, digest of its data.

    Args:
        mux: flags of objective and multiplexing.
        data_digest: digest of the data-bin.
    """
    kind = "multiplexed " if mux.num_instances > 1 else ""
    what, tag, auto = _CARDS[mux.objective]
    return Card(
        summary=f"A {kind}{what} trained with megamod.",
        tags=(tag, "data-multiplexing") if kind else (tag,),
        facts={"instances per forward pass": str(mux.num_instances), "data digest": data_digest},
        load=f"{auto}.from_pretrained(FOLDER)",
    )
