"""Tasks of a campaign: the programs of each job, and their state on disk.

OUT/forest.json            finished experts
OUT/seed/                  run of the seed
OUT/experts/DOMAIN/        run of an expert; OUT/experts/world/: all experts in one world
OUT/priors/DOMAIN.json     prior over the experts for a new domain
OUT/average/, OUT/evaluation/
OUT/logs/NAME.log          output of the programs of a job
OUT/jobs/NAME.lock         held by the job while it runs
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from megamod.args import LoraArgs
from megamod.btm.campaign import Campaign, Parsed
from megamod.errors import UserError
from megamod.flags import find_origin, format_flags
from megamod.schemas import read_json_object
from megamod.states.checkpoint_folder import list_checkpoints

FOLDER_SHAPE_FLAGS: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads")),
    "intermediate_size": None,
    "from_scratch": False,
}
"""Flags that shape a new model, with the values that a run needs to start from a folder.

The folder's config.json has the shape then.
"""
# Names of jobs and of folders below the output folder.
SEED, WORLD, AVERAGE, EVALUATION, PRIORS = "seed", "world", "average", "evaluation", "priors"


@dataclass(frozen=True)
class Stage:
    """One program to run.

    Attributes:
        title: one word for the progress table.
        program: file name in `megamod/commands`.
        arguments: command-line arguments.
        done: function that reads from disk if the program has finished.
        ranks: True if it runs on the slots of its job; False: one process on this machine.
    """

    title: str
    program: str
    arguments: tuple[str, ...]
    done: Callable[[], bool]
    ranks: bool = False


@dataclass(frozen=True)
class Task:
    """A job: programs that run in order on the job's slots.

    Attributes:
        name: name of its lock and log, and in the table.
        gpus: number of slots.
        stages: its programs, in order.
        folder: folder of its run; None: it has no metrics.
        last: last step of its run; 0 if it has no metrics.
    """

    name: str
    gpus: int
    stages: tuple[Stage, ...]
    folder: Path | None = None
    last: int = 0

    def find_next_stage(self) -> Stage | None:
        """Return the first program that has not finished; None once all have."""
        return next((stage for stage in self.stages if not stage.done()), None)


def make_seed_task(campaign: Campaign, parsed: Parsed, slot_count: int) -> Task:
    """Make the task that trains the seed, the dense model from which the first round branches.

    Args:
        parsed: arguments of the campaign, from which those of the program follow.
        slot_count: slots of the job.
    """
    folder, steps = campaign.output / SEED, campaign.seed_steps
    train = _make_train_stage(
        parsed,
        folder,
        steps,
        title="seed",
        stop_step=steps,
        domains=list(campaign.seed_domains),
        untie="none",
        **(vars(LoraArgs()) if campaign.adapters else {}),
    )
    return Task(SEED, slot_count, (train,), folder, steps)


def make_expert_task(campaign: Campaign, parsed: Parsed, round_index: int, domain: str) -> Task:
    """Make the task of an expert: estimate a prior, branch, train.

    In rounds after the first (`round_index` 0) a prior over the earlier experts is estimated and
    the expert branches from them. In the first round it branches from the seed; without a seed, or
    as an adapter, it is trained without branching.

    Args:
        parsed: arguments of the campaign, from which those of the programs follow.
        round_index: number of the expert's round, from 0.
        domain: domain of the expert, which also names the task.
    """
    folder, last = get_expert_folder(campaign, domain), campaign.get_last_step(round_index)
    prior = campaign.output / PRIORS / f"{domain}.json"
    branched = partial(_has_checkpoint, folder)
    stages: list[Stage] = []
    origin: tuple[str, ...] = ()
    if round_index:
        earlier = [name for round_ in campaign.rounds[:round_index] for name in round_]
        origin = ("--forest", str(campaign.output), "--experts", *earlier)
        estimate = (*origin, "--data", parsed[-1].data, "--domain", domain, "--estimate_only")
        estimate += ("--prior_sequences", str(parsed[0].prior_sequences))
        estimate += ("--max_seq_length", str(campaign.length), "--prior_output", str(prior))
        stages.append(
            Stage("prior", "eval_ensemble.py", estimate, lambda: prior.exists() or branched())
        )
        origin += ("--prior", str(prior))
        if parsed[0].topk is not None:
            origin += ("--topk", str(parsed[0].topk))
    elif campaign.seed_steps and not campaign.adapters:
        origin = _list_seed_arguments(campaign)
    changes = _make_seed_model_flags(campaign)
    if origin:
        arguments = ("branch", *origin, "--domain", domain, "--output_dir", str(folder))
        stages.append(Stage("branch", "forest.py", arguments, branched))
        changes["init_from"] = None  # the weights are in the checkpoint
    stages.append(
        _make_train_stage(
            parsed,
            folder,
            last,
            max_steps=last,
            global_batch_size=campaign.expert_batch,
            domains=[domain],
            untie="none",
            **changes,
        )
    )
    return Task(domain, parsed[0].gpus_per_expert, tuple(stages), folder, last)


def make_world_task(campaign: Campaign, parsed: Parsed) -> Task:
    """Make the task that trains all experts of the first round in one job of independent models.

    They are branched from the seed before, unless there is none or they are adapters. The job has
    the slots of all experts.

    Args:
        parsed: arguments of the campaign, from which those of the programs follow.
    """
    folder, domains = get_expert_folder(campaign, WORLD), campaign.rounds[0]
    stages: list[Stage] = []
    changes = _make_seed_model_flags(campaign)
    if campaign.seed_steps and not campaign.adapters:
        arguments = ("branch", "--one_world", *_list_seed_arguments(campaign), "--domain", *domains)
        arguments += ("--output_dir", str(folder))
        stages.append(Stage("branch", "forest.py", arguments, partial(_has_checkpoint, folder)))
        changes["init_from"] = None
    last = campaign.get_last_step(0)
    changes |= {"domains": list(domains), "untie": "all", "max_steps": last}
    stages.append(_make_train_stage(parsed, folder, last, **changes))
    gpus = parsed[0].gpus_per_expert * len(domains)
    return Task(WORLD, gpus, tuple(stages), folder, last)


def make_final_tasks(campaign: Campaign, parsed: Parsed) -> list[Task]:
    """Make the tasks that average (--average) and score (--evaluate) the forest, in this order.

    Without these flags the list is empty.

    Args:
        parsed: all arguments of megamod btm.
    """
    btm, data = parsed[0], parsed[-1]
    forest, average = ("--forest", str(campaign.output)), campaign.output / AVERAGE
    tasks = []
    if btm.average:
        merge = (*forest, "--merge_method", "linear", "--output_dir", str(average))
        stage = Stage("average", "merge.py", merge, (average / "config.json").exists)
        tasks.append(Task(AVERAGE, btm.gpus_per_expert, (stage,)))
    if btm.evaluate:
        mixed, plain = (campaign.output / EVALUATION / f"{n}.json" for n in ("mixture", "average"))
        common = ("--data", data.data, "--max_seq_length", str(data.max_seq_length))
        mix = (*forest, *common, "--domain", *campaign.domains, "--output", str(mixed))
        mix += ("--prior_sequences", str(btm.prior_sequences))
        stages = [Stage("mixture", "eval_ensemble.py", mix, mixed.exists)]
        if btm.average:
            score = ("--model", str(average), *common, "--domains", *campaign.domains)
            score += ("--output", str(plain))
            stages.append(Stage("scores", "eval_lm.py", score, plain.exists))
        tasks.append(Task(EVALUATION, btm.gpus_per_expert, tuple(stages)))
    return tasks


def get_expert_folder(campaign: Campaign, domain: str) -> Path:
    """Return the run folder of an expert, OUT/experts/DOMAIN; it need not exist."""
    return campaign.output / "experts" / domain


def has_finished(folder: Path, step: int) -> bool:
    """Return True if a run has ended at `step`: its scores are of that step, and it has a model.

    perplexity.json is written after OUT/model. Only the plots follow it; a run without them has
    ended all the same. A file that cannot be read counts as absent.

    Args:
        folder: output folder of the run.
        step: last step of the run.
    """
    try:
        scores = read_json_object(folder / "perplexity.json")
    except (OSError, UserError):
        return False
    return scores.get("step") == step and (folder / "model").is_dir()


def _has_checkpoint(folder: Path) -> bool:
    """Return True if the run in `folder` has a checkpoint; a branched one has it from the start."""
    return bool(list_checkpoints(folder / "checkpoints"))


def _make_seed_model_flags(campaign: Campaign) -> dict[str, object]:
    """Make the flags of megamod pretrain by which an adapter starts from the campaign's seed.

    The result maps names of flags to values; it is empty for experts that are whole models, or
    without a seed.
    """
    if not (campaign.adapters and campaign.seed_steps):
        return {}
    return {"model": str(campaign.output / SEED / "model"), "init_from": None} | FOLDER_SHAPE_FLAGS


def _list_seed_arguments(campaign: Campaign) -> tuple[str, ...]:
    """Return the arguments of megamod forest branch that select the last checkpoint of the seed."""
    return ("--parents", str(campaign.output / SEED), "--step", str(campaign.seed_steps))


def _make_train_stage(
    parsed: Parsed, folder: Path, last_step: int, title: str = "train", **changes: object
) -> Stage:
    """Make the stage that trains a run with megamod pretrain.

    Args:
        parsed: arguments of the campaign; those that are not defaults are passed on.
        folder: output folder of the run.
        last_step: step at which the stage is done.
        title: word for the progress table.
        changes: flags by name that take the place of those in `parsed`.
    """
    changes["output_dir"] = str(folder)
    arguments: list[str] = []
    for args in parsed[1:]:
        overrides = {f.name: changes[f.name] for f in fields(args) if f.name in changes}
        changed = replace(args, **overrides)
        for f in fields(args):
            if f.name in overrides or find_origin(args, f.name) != "default":
                arguments += format_flags({f.name: getattr(changed, f.name)})
    return Stage(
        title, "pretrain.py", tuple(arguments), partial(has_finished, folder, last_step), ranks=True
    )
