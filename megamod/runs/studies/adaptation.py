"""Adaptation in a study: an expert of a trained model is trained further on a novel domain.

Settings of a cell of language models, with `adapt_to` the name of a novel domain:
    adapt_method           feedforward or full
    adapt_steps            optimizer steps on the novel domain
    adapt_learning_rate    peak of their schedule

Rows: `start` and `adapted` on the training domains (what is forgotten), `novel_start` and
`novel_adapted` on the novel one.
"""

import shutil
from pathlib import Path

from megamod.args import RunArgs, SafetyArgs
from megamod.evaluation.perplexity import DENSE
from megamod.flags import format_flags, parse_args
from megamod.runs.pretrain.adapt_args import AdaptArgs, AdaptOptimArgs
from megamod.runs.studies.forest_scores import Losses, ScoredText, score_expert
from megamod.runs.studies.study_file import Settings
from megamod.schemas import read_checked_file
from megamod.states.config_file import read_config_file

SETTINGS = ("adapt_to", "adapt_method", "adapt_steps", "adapt_learning_rate")


def score_adaptation(
    model: Path, settings: Settings, seed: int, known: ScoredText, novel: ScoredText, output: Path
) -> tuple[Losses, Losses, str]:
    """Adapt an expert of a model folder (dense or DEMix), and compute its losses before and after.

    Args:
        model: the model folder, which is not changed.
        settings: those of `SETTINGS`, and the flags of the model's run.
        seed: seed of the run.
        known: text of the training domains.
        novel: text of the domain `adapt_to` alone.
        output: folder of the adaptation run; it is deleted before and after.
    Returns:
        losses in nats per token on the training domains and on the novel domain, each with the rows
        `start` and `adapted`, and the name of the expert that the adaptation started from.
    Raises:
        UserError: as `adapt`.
    """
    from megamod.runs.pretrain.adapt import adapt
    from megamod.runs.pretrain.adapt_start import RECORD, StartRecord

    shutil.rmtree(output, ignore_errors=True)
    apart = read_config_file(model)["untie"] != "none"
    batch = settings.get("global_batch_size") or settings["per_device_train_batch_size"]
    flags = {
        "forest" if apart else "model": str(model),
        "data": str(novel.databin),
        "domain": settings["adapt_to"],
        "method": settings["adapt_method"],
        "max_steps": settings["adapt_steps"],
        "learning_rate": settings["adapt_learning_rate"],
        "max_grad_norm": settings["max_grad_norm"],
        "per_device_train_batch_size": batch,
        "seed": seed,
        "output_dir": str(output),
        "eval_batches": 1,
        "report_to": "none",
        "logging_steps": settings["adapt_steps"],
    }
    words = format_flags(flags)
    adapt(*parse_args(RunArgs, SafetyArgs, AdaptOptimArgs, AdaptArgs, argv=words))
    start = DENSE
    if apart:
        start = read_checked_file(output / RECORD, StartRecord).start
    # With feedforward the result is the whole model with one more expert.
    grown = apart and settings["adapt_method"] == "feedforward"
    end = settings["adapt_to"] if grown else DENSE
    models = {"start": (model, start), "adapted": (output / "model", end)}
    on_known, on_novel = (
        {row: score_expert(*scored, text) for row, scored in models.items()}
        for text in (known, novel)
    )
    shutil.rmtree(output)
    return on_known, on_novel, start
