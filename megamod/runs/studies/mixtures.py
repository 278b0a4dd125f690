"""Mixtures of experts in a study: the experts of a forest become one sparse model.

Settings of a cell of language models, with `mixture_router` random or calibrated, or with `anchor`:
    anchor                   true: train the experts beside the frozen seed, whose rows they bring
    mixture_topk             experts per token
    mixture_train            router or all: train it after the conversion; without it, it is not
    mixture_share            length of that training as a part of the steps of the whole run
    mixture_learning_rate    peak of its schedule

Row: `own`, the mixture on every domain.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from megamod.errors import UserError
from megamod.runs.studies.study_file import Settings
from megamod.runs.to_moe import MoeArgs, run_to_moe

SETTINGS = (
    *("anchor", "mixture_router", "mixture_topk", "mixture_train", "mixture_share"),
    "mixture_learning_rate",
)
CALIBRATION_TOKENS = 16384  # of each domain


def convert_experts(
    runs: Mapping[str, Path], settings: Settings, seed: int, databin: Path, output: Path
) -> Path:
    """Convert the experts of a forest to a mixture; return its folder `output`, which is replaced.

    Args:
        runs: folder of the run by domain.
        settings: those of `SETTINGS`.
        seed: seed of a random router.
        databin: with the experts' domains, whose valid splits calibrate the router.
    Raises:
        UserError: as `run_to_moe`.
    """
    router = settings["mixture_router"]
    flags = {
        "models": [str(folder / "model") for folder in runs.values()],
        "domains": list(runs),
        "topk": settings["mixture_topk"],
        "router": router,
        "num_threads": 1,
        "quiet": True,
        "output_dir": str(output),
    }
    if router == "random":
        flags["seed"] = seed
    elif router == "calibrated":
        flags |= {"calibration": [str(databin)], "calibration_tokens": CALIBRATION_TOKENS}
    shutil.rmtree(output, ignore_errors=True)
    run_to_moe(MoeArgs(**flags))
    return output


def make_training_flags(flags: Settings, settings: Settings, mixture: Path) -> Settings:
    """Return the flags of megamod pretrain that train a mixture in a cell.

    Args:
        flags: flags of the cell's other runs.
        settings: those of `SETTINGS`.
        mixture: folder of the mixture to start from.
    """
    steps = round(settings["mixture_share"] * flags["max_steps"])
    return flags | {
        "model": str(mixture),
        "train": settings["mixture_train"],
        "max_steps": steps,
        "learning_rate": settings["mixture_learning_rate"],
    }


def check_mixture_settings(where: str, settings: Settings) -> None:
    """Check that the settings of a mixture go together; without any there is nothing to check.

    Args:
        where: the cell, for the message.
    Raises:
        UserError: naming the cell.
    """
    names = [name for name in SETTINGS if settings.get(name) is not None]
    if not names:
        return
    needed = {"anchor" if settings.get("anchor") else "mixture_router", "mixture_topk"}
    if settings.get("mixture_train") is not None:
        needed |= {"mixture_train", "mixture_share", "mixture_learning_rate"}
    if set(names) != needed or settings.get("seed_share") is None:
        raise UserError(
            f"{where}: a mixture needs seed_share, mixture_topk and mixture_router or anchor, and "
            "for its training mixture_train, mixture_share and mixture_learning_rate"
        )
