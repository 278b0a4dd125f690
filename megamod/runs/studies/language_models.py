"""A cell of a study of kind `language_models`: dense, DEMix or Branch-Train-Merge on domains.

A cell trains through the same functions as megamod pretrain and megamod forest, in this
process, in a folder named after its flags: runs that two cells have in common (the seed of a forest
is the beginning of a dense run) are made once, and an interrupted cell resumes.

Settings are flags of megamod pretrain, and
    seed_share             train a forest, with a seed of so large a part of the steps
    expert_learning_rate   peak of the experts' schedule, whose place is that of the seed
    random_split           train the experts on a random split of the text (a control)
    strangers              in place of a seed the average of models trained on the domains from
                           seeds of their own, aligned by this method of `align:`
    strangers_refine_steps with the method orthogonal
    score_split            "test", or "valid" where settings are searched
    score_novel            score domains that nothing was trained on as well
    family                 model type of a stock family, in place of `model`; with the shape flags
    adapt_to, ...          adapt an expert of the run, see `adaptation`
    anchor, mixture_topk, ...   turn the forest into a mixture of experts, see `mixtures`
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megamod.args import DataArgs, LoraArgs, ModelArgs, OptimArgs, RunArgs, SafetyArgs
from megamod.btm.branch import write_branch_checkpoint
from megamod.btm.forest_entry import make_forest_entry, read_branch_record
from megamod.btm.parents import find_parent
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.evaluation.perplexity import DENSE
from megamod.evaluation.plots import read_metrics
from megamod.flags import format_flags, parse_args
from megamod.merging.merge import average_folders, merge
from megamod.merging.recipe import build_weighted_recipe
from megamod.models.lm.configuration import get_untie, read_lm_config
from megamod.models.presets import SHAPE
from megamod.runs.studies import adaptation, mixtures
from megamod.runs.studies.forest_scores import (
    Losses,
    ScoredText,
    score_expert,
    score_forest,
)
from megamod.runs.studies.parameter_counts import count_parameters
from megamod.runs.studies.records import Figures, compute_json_digest
from megamod.runs.studies.study_file import Cell, Settings, Study
from megamod.runs.studies.texts import StudyText, open_study_text
from megamod.runs.studies.work_folders import wait_for_folder_lock
from megamod.states.checkpoint_folder import StateRecord, list_checkpoints, parse_checkpoint_step
from megamod.states.forest import edit_forest, open_forest

OWN_SETTINGS = (
    *("seed_share", "expert_learning_rate", "random_split", "score_split", "score_novel"),
    *("strangers", "strangers_refine_steps"),
    *("family", *adaptation.SETTINGS, *mixtures.SETTINGS),
)
"""Settings of a cell that are not passed on as flags of megamod pretrain (its --anchor is a folder,
here true or false); `extras` are their values, None if not set."""
_CALIBRATION_BYTES = 100_000  # of each domain's training text, to align strangers on
QUARTERS = 4  # a dense run keeps a checkpoint after each, which a forest can branch off


def run_language_model_cell(
    study: Study, cell: Cell, inputs: Path, work: Path
) -> tuple[Figures, dict[str, object]]:
    """Train the cell's runs that are not finished in `work`, then score its models.

    Args:
        inputs: folder of the inputs, with a folder `domains`.
        work: folder of the study's data-bins and runs, which stay there for other cells.
    Returns:
        the figures, and the digest of the data.
    Raises:
        UserError: for settings that are missing or do not go together.
    """
    spec = study.file.text
    text = open_study_text(spec, inputs, work)
    extras = {name: cell.settings.get(name) for name in OWN_SETTINGS}
    flags = {k: v for k, v in cell.settings.items() if k not in extras} | {"seed": cell.seed}
    if not isinstance(flags.get("max_steps"), int):
        raise UserError(f"{study.name}, {cell.name}: max_steps is missing")
    mixtures.check_mixture_settings(f"{study.name}, {cell.name}", extras)
    if extras["family"] is not None:
        flags = write_stock_config(extras["family"], flags, DataBin(text.training_bin), work)
    if extras["seed_share"] is None:
        runs = {"": train_unless_done(flags, text.training_bin, work)}
    else:
        runs = train_forest(flags, extras, text, work)
    tokens = _count_tokens(flags, runs, extras)
    seconds = sum(map(_sum_training_seconds, runs.values()))
    if extras["mixture_topk"] is not None:
        runs = {"": make_mixture(flags, extras, runs, text, work)}
        if extras["mixture_train"] is not None:
            tokens += _count_tokens(flags, runs, {"seed_share": None})
            seconds += _sum_training_seconds(runs[""])
    models = [folder / "model" for folder in runs.values()]
    scored = ScoredText(text.training_bin, spec.domains, extras["score_split"] or "test")
    details = {"parameters": count_parameters(models), "tokens": tokens}
    details["training_seconds"] = round(seconds, 1)
    if extras["adapt_to"] is not None:
        novel = ScoredText(text.novel_bin, [extras["adapt_to"]], scored.split)
        settings = {**flags, **extras}
        output = work / f"adapted-{compute_json_digest({**settings, 'text': text.digest})}"
        known, unseen, start = adaptation.score_adaptation(
            models[0], settings, cell.seed, scored, novel, output
        )
        scores = {row: _average_scores(losses, scored) for row, losses in known.items()}
        scores |= {f"novel_{row}": _average_scores(losses, novel) for row, losses in unseen.items()}
        details |= {"losses": known, "novel": unseen, "start": start}
        return Figures(scores, details), {"text": text.digest}
    rows, more = _compute_losses(runs, scored, work)
    if extras["seed_share"] and extras["mixture_topk"] is None:
        rows["seed"] = score_expert(_train_seed(flags, extras, text, work), DENSE, scored)
    scores = {row: _average_scores(losses, scored) for row, losses in rows.items()}
    details |= {"losses": rows, **more}
    if extras["score_novel"]:
        unseen = ScoredText(text.novel_bin, spec.novel, "test")
        rows, more = _compute_losses(runs, unseen, work)
        scores |= {f"novel_{row}": _average_scores(losses, unseen) for row, losses in rows.items()}
        details["novel"] = {"losses": rows, **more}
    return Figures(scores, details), {"text": text.digest}


def train_unless_done(
    flags: Settings, databin: Path, work: Path, *, stop: int | None = None
) -> Path:
    """Train to step `stop` (None: to the end) unless that is done; return the run's folder.

    It is in `work`, named after the flags and the text. Other processes that need it wait.

    Args:
        flags: flags of megamod pretrain, without those that only affect logging and saving.
        databin: folder of the data-bin to train on.
    Raises:
        UserError: as `pretrain_causal_lm`.
    """
    folder = work / f"run-{compute_json_digest({**flags, 'text': DataBin(databin).digest})}"
    with wait_for_folder_lock(folder):
        _train_in_folder(flags, databin, folder, stop)
    return folder


def train_forest(
    flags: Settings, extras: Mapping[str, object], text: StudyText, work: Path
) -> dict[str, Path]:
    """Train a seed and its experts, each with its part of the batch; return their runs by domain.

    Runs that are in `work` already are continued or kept. With the setting `anchor` each expert
    trains beside the frozen seed, and with `strangers` from an average, both with a schedule of
    their own.

    Args:
        flags: flags of megamod pretrain.
        extras: settings of `OWN_SETTINGS`.
    Raises:
        UserError: if the experts cannot share the batch, or there is no seed to be the anchor.
    """
    databin = text.random_bin if extras["random_split"] else text.training_bin
    domains, batch = DataBin(databin).domains, flags["per_device_train_batch_size"]
    if batch % len(domains):
        raise UserError(
            f"per_device_train_batch_size {batch} is not a multiple of the {len(domains)} experts"
        )
    seed_steps = _count_seed_steps(flags, extras)
    if extras["anchor"] and not seed_steps:
        raise UserError("anchor: true needs a seed: give seed_share above 0")
    seed, strangers = None, None
    if extras["strangers"]:
        strangers = train_and_average_strangers(flags, extras, text, work)
    elif seed_steps:
        seed = train_unless_done(flags, text.training_bin, work, stop=seed_steps)
    rate = extras["expert_learning_rate"] or flags["learning_rate"]
    runs = {}
    for domain in domains:
        expert_flags = flags | {
            "domains": [domain],
            "per_device_train_batch_size": batch // len(domains),
            "learning_rate": rate,
        }
        if strangers is not None:
            expert_flags["max_steps"] = flags["max_steps"] - seed_steps
            expert_flags["model"] = str(strangers)
            expert_flags = {k: v for k, v in expert_flags.items() if k not in SHAPE}
        seed_identity = {"text": DataBin(databin).digest, "seed_steps": seed_steps}
        seed_identity["seed_rate"] = flags["learning_rate"] if seed_steps else None
        if extras["anchor"]:
            model = find_parent(seed, step=seed_steps).model
            expert_flags |= {
                "model": str(model),
                "untie": "feedforward",
                "anchor": str(text.training_bin),
                "max_steps": flags["max_steps"] - seed_steps,
            }
        folder = work / f"expert-{compute_json_digest({**expert_flags, **seed_identity})}"
        with wait_for_folder_lock(folder):
            branched = seed is not None and not extras["anchor"]
            if branched and not list_checkpoints(folder / "checkpoints"):
                source = find_parent(seed, step=seed_steps)
                write_branch_checkpoint([source], [1.0], [domain], folder, learning_rate=rate)
            _train_in_folder(expert_flags, databin, folder)
        runs[domain] = folder
    return runs


def train_and_average_strangers(
    flags: Settings, extras: Mapping[str, object], text: StudyText, work: Path
) -> Path:
    """Train a model on each domain from a seed of its own ("stranger"), align and average them.

    Args:
        flags: flags of megamod pretrain; each model trains for the steps of a forest's seed.
        extras: settings of `OWN_SETTINGS`; `strangers` is set.
        text: text of the study.
    Returns:
        the folder of the average in `work`, which is kept.
    Raises:
        UserError: as `merge`, such as for an alignment that does not exist.
    """
    domains, steps = text.domains, _count_seed_steps(flags, extras)
    batch = flags["per_device_train_batch_size"] // len(domains)
    runs = []
    for number, domain in enumerate(domains):
        stranger = {"domains": [domain], "per_device_train_batch_size": batch, "max_steps": steps}
        stranger["seed"] = flags["seed"] * len(domains) + number
        runs.append(train_unless_done({**flags, **stranger}, text.training_bin, work))
    align: dict[str, object] = {"method": extras["strangers"]}
    if extras["strangers"] != "identity":
        align["calibration"] = {"path": str(text.write_excerpts(_CALIBRATION_BYTES))}
    if extras["strangers_refine_steps"]:
        align["refine_steps"] = extras["strangers_refine_steps"]
    folder = work / f"strangers-{compute_json_digest([[run.name for run in runs], align])}"
    with wait_for_folder_lock(folder):
        if not folder.exists():
            sources = [(run / "model", None) for run in runs]
            recipe = build_weighted_recipe(sources, [1.0] * len(runs))
            merge(replace(recipe, align=align, origin="strangers"), folder, quiet=True)
    return folder


def _train_seed(flags: Settings, extras: Mapping[str, object], text: StudyText, work: Path) -> Path:
    """Train the model that a forest's experts start from, unless `work` has it; return its folder.

    It is the seed, or with `strangers` an average. Arguments are those of `train_forest`.
    """
    if extras["strangers"]:
        return train_and_average_strangers(flags, extras, text, work)
    steps = _count_seed_steps(flags, extras)
    return find_parent(
        train_unless_done(flags, text.training_bin, work, stop=steps), step=steps
    ).model


def write_stock_config(family: str, flags: Settings, databin: DataBin, work: Path) -> Settings:
    """Write the configuration of a stock family in the shape of the flags, with tied embeddings.

    Args:
        family: model type of transformers.
        flags: flags of a cell's runs.
        databin: training text, for the size of the vocabulary.
        work: folder that gets the configuration, in a folder of its own.
    Returns:
        the flags of its runs: `model`, this folder, in place of those of the shape.
    Raises:
        UserError: if transformers knows no such family.
    """
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        raise UserError(f"family {family!r} is no model type of transformers")
    shape = {name: flags[name] for name in SHAPE if name in flags}
    config = CONFIG_MAPPING[family](
        **shape,
        **databin.special_ids,
        num_key_value_heads=shape.get("num_attention_heads"),
        vocab_size=databin.vocab_size,
        max_position_embeddings=flags["max_seq_length"],
        tie_word_embeddings=True,
    )
    folder = work / f"{family}-{compute_json_digest(config.to_dict())}"
    config.save_pretrained(folder)
    return {name: value for name, value in flags.items() if name not in shape} | {
        "model": str(folder)
    }


def make_mixture(
    flags: Settings,
    extras: Mapping[str, object],
    runs: Mapping[str, Path],
    text: StudyText,
    work: Path,
) -> Path:
    """Convert a forest's runs to a mixture in `work`; train it if the setting mixture_train asks.

    Args:
        flags: flags of megamod pretrain of the cell.
        extras: settings of `OWN_SETTINGS`.
        runs: folders of the experts' runs, by domain.
        text: text of the study, which calibrates and trains the router.
    Returns:
        a folder whose `model` is the mixture.
    """
    databin, settings = text.training_bin, {k: extras[k] for k in mixtures.SETTINGS}
    identity = {"runs": [folder.name for folder in runs.values()], **settings}
    folder = work / f"mixture-{compute_json_digest(identity | {'seed': flags['seed']})}"
    with wait_for_folder_lock(folder):
        start = mixtures.convert_experts(runs, extras, flags["seed"], databin, folder / "model")
        if extras["mixture_train"] is None:
            return folder
        trained = folder / "trained"
        _train_in_folder(mixtures.make_training_flags(flags, extras, start), databin, trained)
    return trained


def _train_in_folder(flags: Settings, databin: Path, folder: Path, stop: int | None = None) -> None:
    """Train in `folder` to step `stop` (None: to the end), from its last checkpoint on.

    A run that has this step already is left as it is. Flags that only affect evaluation, logging
    and saving are added to `flags`.
    """
    steps = [parse_checkpoint_step(path) for path in list_checkpoints(folder / "checkpoints")]
    last = flags["max_steps"] if stop is None else stop
    if last in steps and (stop is not None or (folder / "model" / "config.json").is_file()):
        return
    from megamod.runs.pretrain.causal_lm import pretrain_causal_lm

    expert = (folder / "branch.json").exists()
    several = expert or flags.get("untie", "none") != "none"
    extra = {
        "data": str(databin),
        "output_dir": str(folder),
        "stop_step": stop,
        # Scores are made from the saved model; this evaluation is for the log alone.
        "eval_batches": 1,
        "per_device_eval_batch_size": 4,
        "report_to": "none",
        "logging_steps": max(1, flags["max_steps"] // 10),
        "save_steps": 0 if expert else flags["max_steps"] // QUARTERS,
        "save_total_limit": 1 if several else None,
    }
    kinds = (RunArgs, SafetyArgs, ModelArgs, LoraArgs, OptimArgs, DataArgs)
    pretrain_causal_lm(*parse_args(*kinds, argv=format_flags({**flags, **extra})))


def _compute_losses(
    runs: Mapping[str, Path], scored: ScoredText, work: Path
) -> tuple[Losses, dict[str, object]]:
    """Return the losses by row, and further details of a forest; empty for a dense model.

    A forest of several runs has the row `average`, too, the mean of all weights. Temporary folders
    in `work` are deleted.

    Args:
        runs: folders by domain; the only run of a dense, DEMix or sparse model has the domain "".
        scored: the text to score.
    """
    models = {domain: folder / "model" for domain, folder in runs.items()}
    if list(runs) == [""]:
        if get_untie(read_lm_config(models[""])) == "none":
            return {"own": score_expert(models[""], DENSE, scored)}, {}
        losses = score_forest(open_forest(models[""]), scored)
    else:
        folder = work / f"forest-{compute_json_digest([folder.name for folder in runs.values()])}"
        with wait_for_folder_lock(folder):
            shutil.rmtree(folder, ignore_errors=True)
            with edit_forest(folder) as experts:
                experts += [make_forest_entry(run, domain) for domain, run in runs.items()]
            losses = score_forest(open_forest(folder), scored)
            sources = [(model, None) for model in models.values()]
            average_folders(sources, [1 / len(sources)] * len(sources), folder / "average")
            losses.rows["average"] = score_expert(folder / "average", DENSE, scored)
            shutil.rmtree(folder)
    best = min(losses.experts, key=lambda name: sum(losses.experts[name].values()))
    losses.rows["best_expert"] = losses.experts[best]
    more = {"experts": losses.experts, "without": losses.without, "priors": losses.priors}
    return losses.rows, {**more, "best_expert": best}


def _average_scores(losses: Mapping[str, float], scored: ScoredText) -> dict[str, float]:
    """Compute means over domains: `perplexity` per token, and `bits_per_byte` of the text.

    Args:
        losses: nats per token, by domain.
        scored: the text, for its numbers of tokens and bytes.
    """
    databin = DataBin(scored.databin)
    bits, perplexities = [], []
    for domain, loss in losses.items():
        # Each token is predicted once, the eos of each document among them.
        tokens = len(databin.open_split(domain, scored.split).tokens)
        bits.append(loss * tokens / math.log(2) / databin.get_text_bytes(domain, scored.split))
        perplexities.append(math.exp(loss))
    return {
        "perplexity": sum(perplexities) / len(perplexities),
        "bits_per_byte": sum(bits) / len(bits),
    }


def _count_tokens(flags: Settings, runs: Mapping[str, Path], extras: Mapping[str, object]) -> int:
    """Count the target tokens that all runs of a cell were trained on, the seed's once.

    Args:
        flags: flags of megamod pretrain, for the batch and length of the seed.
        runs: folders of the runs by domain.
        extras: its `seed_share` counts; None: there is no seed.
    """
    total = 0
    for folder in runs.values():
        newest = list_checkpoints(folder / "checkpoints")[-1]
        total += sum(StateRecord.read(newest).state.tokens.values())
    if extras["seed_share"] is not None:
        total += (
            _count_seed_steps(flags, extras)
            * flags["per_device_train_batch_size"]
            * flags["max_seq_length"]
        )
    return total


def _count_seed_steps(flags: Settings, extras: Mapping[str, object]) -> int:
    """Return the number of steps of a forest's seed: its share of --max_steps."""
    return round(extras["seed_share"] * flags["max_steps"])


def _sum_training_seconds(run: Path) -> float:
    """Sum the seconds of a run's training steps from its metrics, without steps of its parent."""
    branched = read_branch_record(run)
    before = branched.start_update if branched else 0
    seconds = 0.0
    for record in read_metrics(run / "metrics.jsonl"):
        if "step_ms" in record:
            seconds += record["step_ms"] / 1000 * (record["step"] - before)
            before = record["step"]
    return seconds
