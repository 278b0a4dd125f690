"""Pretraining of causal language models: dense, with domain experts (DEMix), independent (BTM)."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.lm.databin import DataBin
from megamod.data.lm.pretraining import LmData
from megamod.dist.process import read_launcher_rank, read_launcher_world_size, sum_over_ranks
from megamod.dist.scope import Sharing, parse_sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.evaluation.held_out_data import check_tokenizer_matches
from megamod.evaluation.perplexity import DENSE, DomainEvaluation, select_own_scores
from megamod.evaluation.perplexity_report import write_perplexity_report
from megamod.models.auto import (
    check_document_masking,
    find_start_folder,
    make_lm_config,
    resolve_model_folder,
)
from megamod.models.lm.adapter import add_new_adapter, make_lora_fields
from megamod.models.lm.configuration import HOST_TYPE, DemixConfig, LmConfig, get_domains, get_untie
from megamod.models.lm.feed_forward import freeze_all_but_experts
from megamod.models.lm.flops import compute_flops_per_token
from megamod.models.lm.load import LanguageModel, build_lm, select_lm_class
from megamod.models.lm.routing import freeze_all_but_routers, is_sparse_moe
from megamod.models.presets import SHAPE
from megamod.runs.pretrain.anchor import check_anchor_flags, set_anchor_rows
from megamod.runs.pretrain.mixture import check_mixture_flags, read_expert_domains, write_mixture
from megamod.runs.training import ActiveRun, RunSpec, execute_run
from megamod.states.adapter import compute_seed_digest
from megamod.states.tokenizer_files import list_tokenizer_files
from megamod.train.export import Card
from megamod.train.objectives import CausalLMObjective, MixtureLMObjective

logger = logging.getLogger(__name__)


def pretrain_causal_lm(
    run: RunArgs,
    safety: SafetyArgs,
    model: ModelArgs,
    lora: LoraArgs,
    optim: OptimArgs,
    data_args: DataArgs,
) -> None:
    """Train, score every expert on every domain, write the scores into OUT; collective.

    Rank 0 prints the scores. With --print_groups nothing is trained.

    Args:
        run, data_args: their `output_dir` and `data` must be set.
        safety, model, lora, optim: flags of the same groups of megamod pretrain.
    Raises:
        UserError: for arguments, data or ranks that do not fit, before anything is written.
        PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    data = LmData(
        data_args.data,
        domains=data_args.domains,
        block_size=data_args.max_seq_length,
        domain_token=data_args.domain_token,
        verify=data_args.verify_data,
        share=(read_launcher_rank(), read_launcher_world_size()),
    )
    sharing = parse_sharing(model.untie)
    topology = DomainTopology(read_launcher_world_size(), data.domains, sharing)
    rank, apart = read_launcher_rank(), sharing is not Sharing.DENSE
    held = topology.get_rank_domains(rank)
    config = make_lm_config(
        model.model,
        vocab_size=data.vocab_size,
        special_ids=data.special_ids,
        domains=data.domains,
        untie=model.untie,
        max_positions=data_args.max_seq_length,
        attn_implementation=model.attn_implementation,
        overrides={name: getattr(model, name) for name in SHAPE},
        vocab_multiple=model.vocab_multiple,
        anchored=model.anchor is not None,
    )
    start = find_start_folder(model.model, model.init_from, model.from_scratch, config)
    stock = list_stock_files(model.model, config, data)
    if start is not None:
        check_tokenizer_matches(start[0], data.databin, start[1])
    lora.check_model_flags(model)
    adapter = None if lora.lora_rank is None else make_adapter_fields(model, lora, config, start)
    if adapter is not None and optim.optim != "adamw":
        raise UserError(
            f"--optim {optim.optim} trains whole matrices, and --lora_rank {lora.lora_rank} only "
            "their low-rank updates; give one of the two"
        )
    log_start(model, start, config)
    if data_args.mask_documents:
        check_document_masking(config)
    check_mixture_flags(model, config)
    if model.anchor is not None:
        check_anchor_flags(model, start is not None)
    choose, split = sharing is Sharing.DEMIX, data_args.eval_split
    for name in dict.fromkeys(("train", split)):
        data.open_split_of_every_domain(name)

    def make_model() -> LanguageModel:
        """Build the model or this rank's part of it; weights that the run does not train are
        frozen.
        """
        network = build_lm(
            config,
            seed=run.seed,
            init_from=start[0] if start else None,
            local_domains=held if choose else None,
            flag=start[1] if start else "",
        )
        if adapter is not None:
            add_new_adapter(network, adapter, run.seed)
        if data_args.mask_documents:
            network.document_end = data.special_ids["eos_token_id"]
        if model.train == "router":
            freeze_all_but_routers(network)
        if getattr(config, "anchored", False):
            freeze_all_but_experts(network)
        if model.anchor is not None:
            seed_text, rows = DataBin(model.anchor), run.per_device_eval_batch_size
            set_anchor_rows(network, seed_text, data.databin, data.block_size, rows)
        return network

    def make_objective(device: torch.device) -> CausalLMObjective:
        """Make the next-token loss, for a mixture of experts with the load-balance loss added."""
        if is_sparse_moe(config):
            experts = read_expert_domains(model.model, config)
            return MixtureLMObjective(data.domains, device, model.router_aux_loss_coef, experts)
        return CausalLMObjective(data.domains, device, choose)

    seed = None if adapter is None else compute_seed_digest(start[0])
    spec = RunSpec(
        config=config,
        topology=topology,
        data_digest=data.digest,
        tokenizer=None if stock else data.tokenizer_folder,
        companions=stock,
        card=make_lm_card(config, sharing, data.digest, adapter),
        seed_digest=seed,
        settings={} if seed is None else {"seed weights": seed},
        groups=data.domains,
        unit="tokens",
        make_batches=lambda division: data.build_train_batches(
            replace(
                division,
                rank=topology.get_rank_in_group(rank),
                ranks=len(topology.get_domain_ranks(held[0])),
            ),
            sampler=data_args.sampler,
            alpha=data_args.alpha,
            seed=run.seed,
            local_domains=held if apart else None,
        ),
        make_model=make_model,
        make_objective=make_objective,
        make_evaluate=lambda running: partial(
            log_own_perplexity, make_evaluation(running, data, topology, run, split), running, split
        ),
        flops_per_token=lambda module: compute_flops_per_token(config, module, data.block_size),
        write_model=partial(write_mixture, model) if is_sparse_moe(config) else None,
        tokens_per_sample=data.block_size,
    )
    done = execute_run(
        spec,
        (run, safety, model, lora, optim, data_args),
        workers=data_args.dataloader_num_workers,
        checkpointing=model.gradient_checkpointing,
        compiled=model.torch_compile,
    )
    if done is None:
        return
    matrix = make_evaluation(done, data, topology, run, split)()
    if rank == 0:
        done.monitor.close()
        print(write_perplexity_report(done.output, matrix, split, done.state.step))


def make_adapter_fields(
    model: ModelArgs, lora: LoraArgs, config: LmConfig, start: tuple[Path, str] | None
) -> dict[str, object]:
    """Make the fields of the `LoraConfig` of the adapter that a run trains; load no weights.

    Args:
        model: flags of the model, for the name of the seed.
        lora: --lora_rank is set.
        config: configuration of the seed.
        start: folder of the seed and the flag that named it, see `find_start_folder`; None: there
            are no weights.
    Raises:
        UserError: if there is no seed with weights, or the targets are none of its layers.
    """
    if start is None:
        raise UserError(
            f"--lora_rank {lora.lora_rank} adapts the weights of a seed, and this run draws new "
            f"ones (--model {model.model}): name the folder or hub name of a trained model"
        )
    named = model.init_from or model.model
    with torch.device("meta"):
        seed = select_lm_class(config)(config)
    name = str(Path(named).absolute()) if Path(named).exists() else named
    return make_lora_fields(seed, seed_name=name, **lora.settings)


def list_stock_files(model: str, config: LmConfig, data: LmData) -> list[Path]:
    """List the files of a stock model's folder that are copied next to its trained weights.

    They are its tokenizer, or without one that of the data (with a warning), and its generation
    settings. Empty for named sizes and models of type demix.

    Args:
        model: value of --model.
        config: configuration of that model.
        data: the training data, whose tokenizer must be that of the model.
    Raises:
        UserError: if the data were made with another tokenizer than the model's.
    """
    folder = resolve_model_folder(model)
    if folder is None or config.model_type == DemixConfig.model_type:
        return []
    words, settings = list_tokenizer_files(folder), folder / "generation_config.json"
    files = [*words, *([settings] if settings.is_file() else [])]
    if not words:
        logger.warning(
            "--model %s holds no tokenizer, so nothing says that it reads the ids of %s",
            model,
            data.databin.path,
        )
        vocabulary = sorted(data.tokenizer_folder.iterdir()) if data.tokenizer_folder else ()
        return [*files, *(file for file in vocabulary if file.is_file())]
    theirs = data.databin.tokenizer_digest
    if theirs is not None and load_tokenizer(folder).digest != theirs:
        raise UserError(
            f"--data {data.databin.path} was made with another tokenizer than that of "
            f"--model {model}: "
            f"make it with megamod preprocess --tokenizer {model}"
        )
    return files


def log_start(model: ModelArgs, start: tuple[Path, str] | None, config: LmConfig) -> None:
    """Log the folder and flag that the first weights come from, or that they are new.

    A warning says that the weights of a DEMix model of --model are used, because earlier versions
    used its shape alone.

    Args:
        model: flags of the model.
        start: folder of the weights and the flag that named it; None: new weights.
        config: configuration of the model.
    """
    if start is None:
        logger.info("new weights in the shape of %s", model.model)
        return
    folder, flag = start
    logger.info("the run starts from the weights of %s (%s)", folder, flag)
    if flag == "--model" and config.model_type == DemixConfig.model_type:
        logger.warning(
            "--model %s: its weights are taken, where earlier versions took the shape alone; "
            "--from_scratch draws new ones",
            model.model,
        )


def make_evaluation(
    running: ActiveRun, data: LmData, topology: DomainTopology, run: RunArgs, split: str
) -> DomainEvaluation:
    """Make the evaluation that computes the perplexity of the run's model or experts on a split.

    A call of it is collective: each rank scores its share of the batches, and with experts only
    those that it holds. Bytes of text are counted only if --eval_batches does not limit the split.

    Args:
        running: the run, whose module is scored.
        data: domains and their held-out splits.
        topology: ranks and the domains that each holds.
        run: batch size and --eval_batches.
        split: name of the split to score.
    """
    rank, apart = dist.get_rank(), topology.sharing is not Sharing.DENSE
    held = topology.get_rank_domains(rank)
    return DomainEvaluation(
        model=running.engine.module,
        experts=topology.domains if apart else (DENSE,),
        scorable=held if apart else (DENSE,),
        takes_domain=topology.sharing is Sharing.DEMIX,
        domains=data.domains,
        batches=lambda domain: data.iterate_eval_batches(
            domain, split, run.per_device_eval_batch_size, run.eval_batches
        ),
        count_bytes=lambda domain: 0 if run.eval_batches else data.get_text_bytes(domain, split),
        part=topology.get_rank_in_group(rank),
        parts=len(topology.get_domain_ranks(held[0])),
        device=running.device,
        reduce=sum_over_ranks,
    )


def log_own_perplexity(
    evaluate: DomainEvaluation, running: ActiveRun, split: str, step: int
) -> None:
    """Compute and log the perplexity of each domain under its own expert; collective.

    Without experts it is that under the one model.

    Args:
        evaluate: see `make_evaluation`.
        running: the run, whose monitor logs the scores.
        split: name of the split that `evaluate` scores.
        step: finished steps.
    """
    scores = select_own_scores(evaluate(own_only=True))
    running.monitor.log_scores(step, {d: s.perplexity for d, s in scores.items()}, split)


def make_lm_card(
    config: LmConfig,
    sharing: Sharing,
    data_digest: str,
    adapter: Mapping[str, object] | None = None,
) -> Card:
    """Return the model card of a language model, or of its adapter.

    Args:
        config: configuration of the model.
        sharing: parts that domains share in training.
        data_digest: digest of the training data.
        adapter: fields of its `LoraConfig`; None: the model is whole.
    """
    facts = {
        "domains, in order": ", ".join(get_domains(config)) or "none named",
        "parts held per domain": get_untie(config),
        "data-bin digest": data_digest,
    }
    if get_untie(config) != "none":
        facts["choose an expert with"] = "`model.set_domain(NAME)`"
    stock = not isinstance(config, DemixConfig) and config.model_type != HOST_TYPE
    if adapter is not None:
        facts = {"rank": str(adapter["r"]), "scaled by": f"{adapter['lora_alpha']} / rank", **facts}
        seed = str(adapter["base_model_name_or_path"])
        return Card(
            summary=f"A LoRA adapter of {seed}, trained with megamod.",
            tags=("lora", "causal-lm", sharing.value),
            facts=facts,
            load="peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)",
            stock=stock,
            seed=seed,
        )
    return Card(
        summary=f"A causal language model trained with megamod, sharing: {sharing.value}.",
        tags=("causal-lm", sharing.value),
        facts=facts,
        load="AutoModelForCausalLM.from_pretrained(FOLDER)",
        stock=stock,
    )
