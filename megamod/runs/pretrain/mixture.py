"""Pretraining of a mixture of experts (a stock class, not DEMix): checks, domains of the experts,
the model folder.
"""

from pathlib import Path

import torch.distributed as dist

from megamod.args import MIXTURE_FLAGS, ModelArgs
from megamod.dist.process import check_peers
from megamod.flags import refuse_values_without_effect
from megamod.merging.moe.layout import split_fused_experts
from megamod.merging.moe.record import FILE, read_moe_record, write_moe_record
from megamod.models.auto import resolve_model_folder
from megamod.models.lm.configuration import LmConfig
from megamod.models.lm.moe_families import MOE_FAMILIES
from megamod.models.lm.routing import check_router_training, is_sparse_moe
from megamod.train.export import ModelExport


def check_mixture_flags(model: ModelArgs, config: LmConfig) -> None:
    """Refuse flags of mixtures for another model, and a router that gets no gradient.

    Args:
        model: flags of the model.
        config: configuration of the model that --model names.
    Raises:
        UserError: naming the flag.
    """
    if not is_sparse_moe(config):
        reason = f"--model {model.model} is no mixture of experts; to_moe.py makes one"
        refuse_values_without_effect(model, MIXTURE_FLAGS, reason)
    elif model.train == "router":
        check_router_training(f"--train router: --model {model.model}", config)


def read_expert_domains(model: str, config: LmConfig) -> list[str]:
    """Read the domains of a mixture's experts from its moe.json.

    Without moe.json the experts are named by their numbers from 0, as text.

    Args:
        model: value of --model, a folder or hub name.
        config: configuration of that model.
    Raises:
        UserError: if moe.json is malformed.
    """
    folder = resolve_model_folder(model)
    if folder is not None and (folder / FILE).is_file():
        return read_moe_record(folder).domains
    count = getattr(config, MOE_FAMILIES[config.model_type].count)
    return [str(number) for number in range(count)]


def write_mixture(model: ModelArgs, export: ModelExport, folder: Path) -> None:
    """Write a trained mixture with a tensor per expert, as its stock class reads it; collective.

    It gets the moe.json of the mixture that training started from, if there is one, with an entry
    about the training of the router.

    Args:
        model: flags, whose --model is the mixture that training started from.
        export: writes the model as it is in memory, where the experts of a layer are one tensor.
        folder: exists and is empty.
    """
    export(folder)
    check_peers()
    if dist.get_rank() > 0:
        return
    start = resolve_model_folder(model.model)
    # Independent models (--untie all) have a folder per domain.
    for config in (*folder.glob("config.json"), *folder.glob("*/config.json")):
        split_fused_experts(config.parent)
        if start is not None and (start / FILE).is_file():
            record = read_moe_record(start)
            router = {**record.router, "trained": model.train}
            write_moe_record(config.parent, record.model_copy(update={"router": router}))
