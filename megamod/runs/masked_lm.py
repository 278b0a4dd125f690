"""Pretraining of encoders: masked tokens or the retrieval of tokens, multiplexed or not."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertConfig

from megamod.args import DataArgs, ModelArgs, MuxArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.lm import Batch, DataBin
from megamod.data.masking import MaskedBatches, Masking, blocks_of, held_out_batches
from megamod.data.order import SAMPLERS, Temperature
from megamod.dist.process import rank as my_rank
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.evaluation.masked import score_masked
from megamod.evaluation.perplexity import share_of
from megamod.evaluation.plots import plot_curves
from megamod.files import write_json
from megamod.models.mux_configuration import PRESETS, MuxBertConfig
from megamod.runs.causal_lm import SHAPE
from megamod.runs.training import Recipe, Running, execute
from megamod.train import setup
from megamod.train.export import Card
from megamod.train.objectives import MaskedLM, masked_losses

GROUP = "text"  # by which the loss is logged


def pretrain(
    run: RunArgs,
    safety: SafetyArgs,
    model: ModelArgs,
    optim: OptimArgs,
    mux: MuxArgs,
    data_args: DataArgs,
) -> None:
    """Train an encoder, score it on held-out text, and say where everything is.

    Raises:
        UserError: for arguments or data that do not fit, before anything is written.
    """
    data = DataBin(data_args.data)
    domains = tuple(data_args.domains or data.domains)
    topology = DomainTopology(setup.started_world_size(), domains, Sharing.DENSE)
    rank, split = setup.started_rank(), data_args.eval_split
    config = encoder_config(model, mux, data, data_args.max_seq_length)
    masking = masking_of(data, mux)
    multiplexed = mux.num_instances > 1

    def batches(of: str, global_batch: int, micro_batch: int, part: int, parts: int):
        datasets = [data.split(domain, of) for domain in domains]
        lengths = [blocks_of(dataset, data_args.max_seq_length) for dataset in datasets]
        for domain, length in zip(domains, lengths, strict=True):
            if not length and of == "train":
                raise UserError(
                    f"--max_seq_length {data_args.max_seq_length}: domain {domain} has fewer train "
                    "tokens than one sequence"
                )
        kind = SAMPLERS[data_args.sampler]
        extra = (data_args.alpha,) if kind is Temperature else ()
        return MaskedBatches(
            datasets,
            kind([max(1, length) for length in lengths], run.seed, *extra),
            masking,
            block_size=data_args.max_seq_length,
            instances=mux.num_instances,
            micro_batch=micro_batch,
            global_batch=global_batch,
            rank=part,
            ranks=parts,
            seed=run.seed,
            prefix=getattr(config, "prefix_length", 0),
        )

    def held_out(part: int, parts: int) -> Iterator[Batch]:
        rows = max(1, run.per_device_eval_batch_size // mux.num_instances) * mux.num_instances
        whole = held_out_batches(batches(split, rows, rows, 0, 1), run.eval_batches or None)
        return share_of(whole, part, parts)

    last: dict[str, float] = {}

    def evaluate(running: Running, step: int) -> None:
        found = score_masked(
            running.engine.module,
            held_out(my_rank(), topology.world_size),
            lambda module, batch: masked_losses(
                module, batch, (batch["masked"], batch["positions"]), running.device, multiplexed
            ),
            running.device,
            dist.all_reduce,
        )
        for name, value in found.items():
            running.monitor.evaluated(step, {GROUP: value}, split, name)
        last.update(found)

    recipe = Recipe(
        config=config,
        topology=topology,
        data_digest=data.digest,
        tokenizer=data.path / "tokenizer",
        card=card(config, mux, data.digest),
        groups=(GROUP,),
        unit="tokens",
        make_batches=lambda global_batch: batches(
            "train", global_batch, run.per_device_train_batch_size, rank, topology.world_size
        ),
        make_model=lambda: build_encoder(config, run.seed, model.init_from),
        make_objective=lambda device: MaskedLM(device, multiplexed, mux.task_loss_coeff > 0),
        make_evaluate=lambda running: partial(evaluate, running),
    )
    done = execute(
        recipe,
        (run, safety, model, optim, mux, data_args),
        workers=data_args.dataloader_num_workers,
        checkpointing=model.gradient_checkpointing,
    )
    if done is None:
        return
    if not last:  # a run that was finished before is scored again
        evaluate(done, done.state.step)
    if rank == 0:
        done.monitor.close()
        write_json(done.output / "results.json", {"step": done.state.step, "split": split, **last})
        plot_curves(done.output / "metrics.jsonl", done.output / "loss.png")
        told = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
        print(f"{split} after {done.state.step} steps: {told}\nmodel {done.output / 'model'}")


def encoder_config(
    model: ModelArgs, mux: MuxArgs, data: DataBin, length: int
) -> MuxBertConfig | BertConfig:
    """Configuration of the encoder: a named size, or that of a folder.

    Raises:
        UserError: for an unknown size, or a model that does not fit the data or the flags.
    """
    sizes = PRESETS["mux_bert"]
    fields = dict(
        task_loss_coeff=mux.task_loss_coeff,
        retrieval_loss_coeff=mux.retrieval_loss_coeff,
        learn_muxing=mux.learn_muxing,
    )
    given = {name: getattr(model, name) for name in SHAPE if getattr(model, name) is not None}
    if (Path(model.model) / "config.json").is_file():
        if given:
            raise UserError(f"--{next(iter(given))} cannot change the model in {model.model}")
        config = AutoConfig.from_pretrained(model.model)
        instances = getattr(config, "num_instances", 1)
        if instances != mux.num_instances:
            raise UserError(
                f"--num_instances {mux.num_instances}: the model in {model.model} has {instances}"
            )
        for name, value in fields.items() if mux.num_instances > 1 else ():
            setattr(config, name, value)
    elif model.model not in sizes:
        raise UserError(
            f"--model {model.model!r} is no folder with config.json and none of {', '.join(sizes)}"
        )
    else:
        shape = sizes[model.model] | given | {"vocab_size": data.vocab_size}
        shape |= {"pad_token_id": data.pad_id, "max_position_embeddings": max(512, length)}
        try:
            if mux.num_instances == 1:
                config = BertConfig(**shape)
            else:
                config = MuxBertConfig(
                    **shape,
                    **fields,
                    num_instances=mux.num_instances,
                    muxing_variant=mux.muxing_variant,
                    demuxing_variant=mux.demuxing_variant,
                    num_hidden_demux_layers=mux.num_hidden_demux_layers,
                    cls_token_id=data.bos_id,
                )
        except ValueError as error:
            raise UserError(str(error)) from error
    if config.vocab_size != data.vocab_size or config.max_position_embeddings < length:
        raise UserError(
            f"--model {model.model} has a vocabulary of {config.vocab_size} and "
            f"{config.max_position_embeddings} positions; the data need {data.vocab_size} and "
            f"{length}"
        )
    return config


def masking_of(data: DataBin, mux: MuxArgs) -> Masking:
    """How tokens are masked, with the ids of the data's tokenizer.

    Raises:
        UserError: if the tokenizer has no [MASK].
    """
    tokenizer = AutoTokenizer.from_pretrained(data.path / "tokenizer")
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"--data {data.path}: its tokenizer has no mask token; preprocess with one of BERT"
        )
    special = (data.bos_id, data.eos_id, data.pad_id, tokenizer.mask_token_id)
    return Masking(
        tokenizer.mask_token_id,
        data.pad_id,
        special,
        data.vocab_size,
        probability=mux.mlm_probability,
        max_pad_tokens=mux.max_pad_tokens,
    )


def build_encoder(
    config: MuxBertConfig | BertConfig, seed: int, init_from: str | None
) -> nn.Module:
    """A masked LM with new weights, or with those of a folder as far as it has them."""
    torch.manual_seed(seed)
    if init_from is None:
        return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    if not (Path(init_from) / "config.json").is_file():
        raise UserError(f"--init_from {init_from}: there is no model (no config.json)")
    model, report = AutoModelForMaskedLM.from_pretrained(
        init_from, config=config, dtype=torch.float32, output_loading_info=True
    )
    for title, names in (("new", "missing_keys"), ("left out", "unexpected_keys")):
        if report[names]:
            setup.logger.info("--init_from: %s: %s", title, ", ".join(sorted(report[names])))
    return model


def card(config: MuxBertConfig | BertConfig, mux: MuxArgs, data_digest: str) -> Card:
    """The model card of an encoder."""
    kind = "multiplexed " if mux.num_instances > 1 else ""
    return Card(
        summary=f"A {kind}masked language model trained with megamod.",
        tags=("fill-mask", "data-multiplexing") if kind else ("fill-mask",),
        facts={"instances per forward pass": str(mux.num_instances), "data digest": data_digest},
        load="AutoModelForMaskedLM.from_pretrained(FOLDER)",
    )
