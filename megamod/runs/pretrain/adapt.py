"""Adaptation of an expert to a new domain; the result joins its forest.

Source: Gururangan et al. 2022 (DEMix), section 6: domain-adaptive pretraining of the expert that
suits the new text best; with `feedforward` it becomes a further expert and the others stay
unchanged.
"""

import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megamod.args import OptimArgs, RunArgs, SafetyArgs
from megamod.data.lm.pretraining import LmData
from megamod.dist.process import check_peers, gather_texts, join_process_group
from megamod.dist.scope import Sharing
from megamod.dist.topology import DomainTopology
from megamod.errors import UserError
from megamod.evaluation.perplexity import select_own_scores
from megamod.evaluation.perplexity_report import write_perplexity_report
from megamod.evaluation.plots import read_metrics
from megamod.files import hash_file, sync_folder, write_json
from megamod.models.lm.flops import compute_flops_per_token
from megamod.runs.pretrain.adapt_args import AdaptArgs
from megamod.runs.pretrain.adapt_start import (
    RECORD,
    AdaptationStart,
    build_dense_config,
    build_dense_model,
    compute_weights_digest,
    estimate_expert_weights,
    make_start_record,
    open_domain_data,
    open_forest_of_candidates,
    select_start_expert,
)
from megamod.runs.pretrain.causal_lm import log_own_perplexity, make_evaluation
from megamod.runs.training import ActiveRun, RunSpec, execute_run
from megamod.states.checkpoint_folder import TrainState
from megamod.states.forest import FILE, Expert, Forest, Parent, check_forest_writable, edit_forest
from megamod.states.grow import add_expert
from megamod.states.weights import read_weights
from megamod.train.export import Card, ModelExport
from megamod.train.objectives import CausalLMObjective


def adapt(run: RunArgs, safety: SafetyArgs, optim: OptimArgs, args: AdaptArgs) -> None:
    """Select the start, train, publish OUT/model and add it to the forest; collective.

    A forest that has the expert of this run already is left as it is, and nothing is trained. A
    run that stops before --max_steps does not join the forest. OUT/start.json records the start;
    rank 0 prints scores.

    Args:
        run, safety, optim: flags of training.
        args: its `domain`, `data`, and `forest` or `model` must be set.
    Raises:
        UserError: for an unknown start, domains or a vocabulary that do not fit, or a domain that
            the forest has already; then nothing is written. Also if the forest got such an expert
            during the training.
        PolicyStop, Interrupted: see `megamod.train.loop.train`.
    """
    output = Path(run.output_dir).absolute()
    forest = open_forest_of_candidates(args)
    if args.domain in forest.domains:
        existing = forest.experts[forest.domains.index(args.domain)]
        if existing.path.resolve() != (output / "model").resolve():
            raise UserError(
                f"--domain {args.domain}: {forest.path} has an expert of that name already, "
                f"{existing.path}"
            )
        print(f"{forest.path} has the expert {args.domain} of this run already: {existing.path}")
        return
    if forest.path.is_file():
        check_forest_writable(forest.path)
    data = open_domain_data(args, forest)
    device = join_process_group(safety.dist_timeout)
    batch_size = run.per_device_eval_batch_size
    start = select_start_expert(
        forest,
        args,
        output,
        safety.resume,
        partial(estimate_expert_weights, forest, data, args.prior_sequences, batch_size, device),
    )
    topology = DomainTopology(dist.get_world_size(), data.domains, Sharing.DENSE)
    finished = execute_run(
        _build_run_spec(run, args, forest, data, start, topology),
        (run, safety, optim, args),
        workers=args.dataloader_num_workers,
        checkpointing=args.gradient_checkpointing,
    )
    if finished is None:
        return
    matrix = make_evaluation(finished, data, topology, run, args.eval_split)()
    if dist.get_rank() == 0:
        finished.monitor.close()
        step = finished.state.step
        print(write_perplexity_report(finished.output, matrix, args.eval_split, step, args.domain))
        before, after = (
            _read_start_perplexity(finished.output, args.domain),
            select_own_scores(matrix)[args.domain],
        )
        if before is not None:
            print(
                f"{args.domain}: {args.eval_split} perplexity {before:.2f} under "
                f"{start.expert.domain}, {after.perplexity:.2f} after adaptation"
            )
        if finished.state.step < run.max_steps:
            print(
                f"stopped at step {finished.state.step}: {args.domain} joins the forest at the end"
            )
        else:
            expert = _make_expert(run, args, data, start, finished.state, output)
            print(add_to_forest(args, forest, start.expert, expert, output))


def _build_run_spec(
    run: RunArgs,
    args: AdaptArgs,
    forest: Forest,
    data: LmData,
    start: AdaptationStart,
    topology: DomainTopology,
) -> RunSpec:
    """Build the spec of a run that trains one expert, as a dense model, on the new domain.

    Collective, because all ranks need the digest of the start's weights, which rank 0 computes.

    Args:
        run, args: flags of training and of the adaptation.
        forest: the forest that the start was selected from.
        data: data of the new domain alone.
        start: the expert to start from.
        topology: ranks, with the new domain as the only one.
    Raises:
        UserError: as `build_dense_config`.
    """
    output, rank = Path(run.output_dir), dist.get_rank()
    config = build_dense_config(start.expert, args)
    digest = gather_texts(compute_weights_digest(start.expert) if rank == 0 else "")[0]

    def record_start() -> None:
        """Write OUT/start.json and say where the run starts from, on rank 0."""
        if rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / RECORD, make_start_record(forest, start, digest))
            print(f"starting from the expert {start.expert.domain}, {start.reason}", flush=True)

    def make_evaluate(running: ActiveRun) -> partial[None]:
        """Make the function that logs the perplexity on the new domain after some steps."""
        scores = make_evaluation(running, data, topology, run, args.eval_split)
        return partial(log_own_perplexity, scores, running, args.eval_split)

    return RunSpec(
        config=config,
        topology=topology,
        data_digest=data.digest,
        tokenizer=data.tokenizer_folder,
        card=_make_adapted_card(args, start, data.digest),
        groups=data.domains,
        unit="tokens",
        make_batches=lambda division: data.build_train_batches(
            division, sampler="balanced", alpha=1.0, seed=run.seed
        ),
        make_model=lambda: build_dense_model(start.expert, config, args.method),
        make_objective=lambda device: CausalLMObjective(data.domains, device, selects_expert=False),
        make_evaluate=make_evaluate,
        evaluates_start=True,  # for comparison with the adapted expert
        prepare_output=record_start,
        flops_per_token=lambda module: compute_flops_per_token(config, module, data.block_size),
        # The digest identifies the start, wherever its files are and however it was selected.
        settings={"start weights": digest, "start": start.expert.domain}
        | dict.fromkeys(("forest", "model", "prior", "prior_sequences")),
        write_model=(
            partial(write_model_with_new_expert, start.expert, args.domain)
            if _adds_expert(args, start)
            else None
        ),
    )


def write_model_with_new_expert(
    expert: Expert, domain: str, export: ModelExport, folder: Path
) -> None:
    """Write a copy of a model with experts, with the trained one added; collective.

    Args:
        expert: expert of a model with experts, from which the training started.
        domain: name of the new expert.
        export: writes the trained dense model.
        folder: exists and is empty.
    """
    dense = folder / ".dense"
    export(dense)
    check_peers()
    if dist.get_rank() == 0:
        add_expert(expert.path, folder, domain, expert.member, read_weights(dense))
        for file in dense.iterdir():
            # Model card, recipe and tokenizer. `add_expert` wrote weights and configuration.
            if not (folder / file.name).exists() and file.suffix != ".safetensors":
                file.rename(folder / file.name)
        shutil.rmtree(dense)
        sync_folder(folder)


def add_to_forest(args: AdaptArgs, forest: Forest, start: Expert, new: Expert, output: Path) -> str:
    """Add the new expert to its forest, for rank 0 alone; return a sentence for the console.

    * --model: there is no forest, and nothing is written.
    * --forest names a forest.json, or a folder with one: the file is edited. If the new expert is
      in a copy of a model with experts, entries of that model become entries of the copy.
    * no forest.json, and the new expert is in such a copy: the copy is the forest, and nothing is
      written.
    * otherwise OUT/forest.json is written with the experts of --forest and the new one.

    An entry that an earlier attempt of this run made is replaced.

    Args:
        args: flags; --forest or --model is set.
        forest: opened from --forest before the training.
        start: expert that the adaptation started from.
        new: entry of the new expert.
        output: OUT, folder of the run.
    Raises:
        UserError: if the forest got another expert of that name in the meantime, or is refused by
            `edit_forest`.
    """
    if args.model is not None:
        return f"a model of its own: {new.path}"
    path = Path(args.forest)
    manifest = path / FILE if path.is_dir() else path
    if not manifest.is_file():
        if new.member is not None:
            return f"{new.domain} is an expert of {new.path}, with those it had"
        manifest = output / FILE
    with edit_forest(manifest) as experts:
        # An earlier attempt of this run may have added it.
        experts[:] = [e for e in experts or forest.experts if not _is_same_expert(e, new)]
        if any(expert.domain == new.domain for expert in experts):
            raise UserError(
                f"{manifest} got an expert {new.domain} during the training of this one, which is "
                f"in {new.path}"
            )
        if new.member is not None:
            # The copy holds the same experts, bit for bit: shared weights are read once.
            experts[:] = [_replace_path(expert, start.path, new.path) for expert in experts]
        experts.append(new)
    return f"{new.domain} is an expert of {manifest}"


def _adds_expert(args: AdaptArgs, start: AdaptationStart) -> bool:
    """Return True if the result is a further expert of the model that the start is an expert of.

    It is so with --method feedforward and a start that is one of several experts of a model;
    otherwise the result is a model of its own.
    """
    return args.method == "feedforward" and start.expert.member is not None


def _make_expert(
    run: RunArgs,
    args: AdaptArgs,
    data: LmData,
    start: AdaptationStart,
    state: TrainState,
    output: Path,
) -> Expert:
    """Make the forest entry of the finished expert, whose only parent is the start.

    Args:
        state: progress at the end of the training.
        output: OUT, folder of the run, with its `model`.
    """
    return Expert(
        domain=args.domain,
        path=output / "model",
        member=args.domain if _adds_expert(args, start) else None,
        parents=(Parent(path=str(start.expert.path), weight=1.0),),
        seed=run.seed,
        updates=state.step,
        tokens=sum(state.tokens.values()),
        gpus=dist.get_world_size(),
        data_digest=data.digest,
        config_digest=hash_file(output / "model" / "config.json"),
    )


def _is_same_expert(first: Expert, second: Expert) -> bool:
    """Return True if both entries have one domain and one folder."""
    return first.domain == second.domain and first.path.resolve() == second.path.resolve()


def _replace_path(expert: Expert, source: Path, target: Path) -> Expert:
    """Return the entry with the path `target` if its path is `source`, otherwise unchanged."""
    if expert.path.resolve() != source.resolve():
        return expert
    return expert.model_copy(update={"path": target})


def _read_start_perplexity(output: Path, domain: str) -> float | None:
    """Read the perplexity of the start on the new domain, per token; None if step 0 has none.

    Args:
        output: OUT of the run, whose metrics.jsonl has it.
        domain: the new domain.
    """
    records = read_metrics(output / "metrics.jsonl")
    scores = [r["perplexity"][domain] for r in records if r["step"] == 0 and "perplexity" in r]
    return scores[-1] if scores else None


def _make_adapted_card(args: AdaptArgs, start: AdaptationStart, data_digest: str) -> Card:
    """Make the model card of an adapted model.

    Args:
        args: flags, for the domain and the trained parts.
        start: expert that the adaptation started from.
        data_digest: digest of the data-bin.
    """
    facts = {
        "adapted to the domain": args.domain,
        "trained": "feed-forward networks" if args.method == "feedforward" else "everything",
        "start": f"{start.expert.domain}, {start.reason}",
        "data-bin digest": data_digest,
    }
    if _adds_expert(args, start):
        facts["choose the new expert with"] = f"`model.set_domain({args.domain!r})`"
        summary = "A language model with domain experts, one of them added by adaptation."
    else:
        summary = "A causal language model adapted to a domain with megamod."
    return Card(
        summary=summary,
        tags=("causal-lm", "adapted"),
        facts=facts,
        load="AutoModelForCausalLM.from_pretrained(FOLDER)",
    )
