"""What each job has to do next. The only state is what lies on the disk.

OUT/forest.json            experts that are ready
OUT/seed/                  run of the seed
OUT/experts/DOMAIN/        run of an expert; OUT/experts/world/ of all of them in one world
OUT/priors/DOMAIN.json     how much each expert counts for a new domain
OUT/average/, OUT/evaluation/
OUT/logs/NAME.log          what the programs of a job wrote
OUT/jobs/NAME.lock         held by the job while it lives
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from megamod.btm.recipe import Campaign, Parsed
from megamod.flags import Arguments, origin_of
from megamod.states.manifest import list_checkpoints

SEED, WORLD, AVERAGE, EVALUATION, PRIORS = "seed", "world", "average", "evaluation", "priors"


@dataclass(frozen=True)
class Stage:
    """One program to run.

    Attributes:
        title: what it does, in a word.
        launcher: name of its file in the folder of launchers.
        arguments: of that program.
        done: looks at the disk and says whether it need not run any more.
        ranks: True if it runs on the slots of its job; else it is one process of this machine.
    """

    title: str
    launcher: str
    arguments: tuple[str, ...]
    done: Callable[[], bool]
    ranks: bool = False


@dataclass(frozen=True)
class Task:
    """A job: programs that follow each other, on slots of their own.

    Attributes:
        name: of lock and log, and in the table.
        gpus: slots.
        stages: its programs, in order.
        folder: of its run; None: it has no metrics.
        last: step that its run ends at.
    """

    name: str
    gpus: int
    stages: tuple[Stage, ...]
    folder: Path | None = None
    last: int = 0

    def next_stage(self) -> Stage | None:
        """What is to be run now; None once all is done."""
        return next((stage for stage in self.stages if not stage.done()), None)


def seed_task(campaign: Campaign, parsed: Parsed, gpus: int) -> Task:
    """Train the dense model that all experts of the first round branch from."""
    folder, steps = campaign.output / SEED, campaign.seed_steps
    train = _train_stage(
        parsed,
        folder,
        steps,
        title="seed",
        stop_step=steps,
        domains=list(campaign.seed_domains),
        untie="none",
    )
    return Task(SEED, gpus, (train,), folder, steps)


def expert_task(campaign: Campaign, parsed: Parsed, number: int, domain: str) -> Task:
    """Branch and train the expert of a domain of round `number`."""
    folder, last = expert_folder(campaign, domain), campaign.last_step(number)
    prior = campaign.output / PRIORS / f"{domain}.json"
    branched = partial(_has_checkpoint, folder)
    stages: list[Stage] = []
    origin: tuple[str, ...] = ()
    if number:
        before = [name for round_ in campaign.rounds[:number] for name in round_]
        origin = ("--forest", str(campaign.output), "--experts", *before)
        estimate = (*origin, "--data", parsed[-1].data, "--domain", domain, "--estimate_only")
        estimate += ("--prior_sequences", str(parsed[0].prior_sequences))
        estimate += ("--max_seq_length", str(campaign.length), "--prior_output", str(prior))
        stages.append(
            Stage("prior", "eval_ensemble.py", estimate, lambda: prior.exists() or branched())
        )
        origin += ("--prior", str(prior))
        if parsed[0].topk is not None:
            origin += ("--topk", str(parsed[0].topk))
    elif campaign.seed_steps:
        origin = _from_seed(campaign)
    changes: dict[str, object] = {}
    if origin:
        arguments = ("branch", *origin, "--domain", domain, "--output_dir", str(folder))
        stages.append(Stage("branch", "forest.py", arguments, branched))
        changes["init_from"] = None  # the weights are in the checkpoint
    stages.append(
        _train_stage(
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


def world_task(campaign: Campaign, parsed: Parsed) -> Task:
    """Train all experts side by side, in one world of independent models."""
    folder, domains = expert_folder(campaign, WORLD), campaign.rounds[0]
    stages: list[Stage] = []
    changes: dict[str, object] = {}
    if campaign.seed_steps:
        arguments = ("branch", "--one_world", *_from_seed(campaign), "--domain", *domains)
        arguments += ("--output_dir", str(folder))
        stages.append(Stage("branch", "forest.py", arguments, partial(_has_checkpoint, folder)))
        changes["init_from"] = None
    last = campaign.total_steps
    stages.append(_train_stage(parsed, folder, last, domains=list(domains), untie="all", **changes))
    gpus = parsed[0].gpus_per_expert * len(domains)
    return Task(WORLD, gpus, tuple(stages), folder, last)


def final_tasks(campaign: Campaign, parsed: Parsed) -> list[Task]:
    """Average and score the forest, one after the other."""
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


def expert_folder(campaign: Campaign, name: str) -> Path:
    """Run folder of an expert."""
    return campaign.output / "experts" / name


def finished(folder: Path, step: int) -> bool:
    """True if a run has ended at `step`: its scores are the last thing that it writes."""
    try:
        scores = json.loads((folder / "perplexity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return scores.get("step") == step and (folder / "model").is_dir()


def _has_checkpoint(folder: Path) -> bool:
    return bool(list_checkpoints(folder / "checkpoints"))


def _from_seed(campaign: Campaign) -> tuple[str, ...]:
    return ("--parents", str(campaign.output / SEED), "--step", str(campaign.seed_steps))


def _train_stage(
    parsed: Parsed, folder: Path, last: int, title: str = "train", **changes: object
) -> Stage:
    """launchers/pretrain.py with flags for whatever is not a default, and for `changes`."""
    changes["output_dir"] = str(folder)
    words: list[str] = []
    for args in parsed[1:]:
        own = {f.name: changes[f.name] for f in fields(args) if f.name in changes}
        changed = replace(args, **own)
        for f in fields(args):
            if f.name in own or origin_of(args, f.name) != "default":
                words += _flag(changed, f.name)
    return Stage(title, "pretrain.py", tuple(words), partial(finished, folder, last), ranks=True)


def _flag(args: Arguments, name: str) -> list[str]:
    value = getattr(args, name)
    if value is None:
        return [f"--{name}", "none"]
    if isinstance(value, list):
        return [f"--{name}", *value]
    return [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
