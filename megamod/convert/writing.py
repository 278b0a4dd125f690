"""Write a converted model as a folder that `from_pretrained` reads."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import megamod  # noqa: F401  (makes our configurations known)
from megamod.convert import ConvertedModel
from megamod.errors import UserError
from megamod.states.weights import is_finite, write_index, write_weights


def write_converted_model(converted: ConvertedModel, folder: Path, dtype: str) -> None:
    """Write config.json and the weight files into `folder`, with an index if there are experts.

    Nothing is written before all tensors are checked.

    Args:
        converted: the model; it does not change.
        folder: an existing folder.
        dtype: name of the element type that all tensors are stored in, such as "float32".
    Raises:
        UserError: if transformers refuses the configuration, such as a name that cannot be a
            domain, or if a tensor has values that are not finite in `dtype`.
    """
    fields = dict(converted.config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, StrictDataclassError) as error:
        origin = "--domains" if "domains" in fields else "config.json"
        raise UserError(f"{origin}: {' '.join(str(error).split())}") from error
    config.dtype = getattr(torch, dtype)
    state = {name: tensor.to(config.dtype) for name, tensor in converted.state.items()}
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise UserError(f"{name} holds values that are not finite in {dtype}")
    config.save_pretrained(folder)
    has_experts = fields.get("untie", "none") != "none"
    write_weights(folder, state, has_experts=has_experts)
    if has_experts:
        write_index(folder, state, sum(tensor.nbytes for tensor in state.values()))
