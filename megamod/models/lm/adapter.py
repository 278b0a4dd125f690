"""LoRA adapters of language models, in the classes and files of peft.

The layers of peft are put into the model in place, so its class, its loss and the names of its
other parameters stay. Several adapters can be in one model, which then holds its own weights once.
Source: Hu et al. 2021 (LoRA), section 4.1.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from megamod.errors import UserError
from megamod.files import write_json
from megamod.models.lm.hosts import find_layers_path
from megamod.nn.demix import select_domain
from megamod.states.adapter import SEED_DIGEST, read_adapter_config
from megamod.states.weight_files import ADAPTER_CONFIG, ADAPTER_FILE
from megamod.states.weights import write_tensors

NEW = "default"
"""Name in the model of an adapter that is trained, as in peft."""
SEED = "seed"
"""Name that selects no adapter: the model as it was before adapters were added."""
PREFIX = "base_model.model."
"""Prefix of tensor names in files of peft, before the names in the model."""


def make_lora_fields(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    seed_name: str = "",
) -> dict[str, object]:
    """Make the fields of the `LoraConfig` of a new adapter.

    Args:
        model: may be on the meta device.
        rank: r, the rank of the updates.
        alpha: updates are scaled by alpha / rank; None: 2 * rank.
        dropout: share of an update's inputs that is set to 0 in training.
        targets: names of linear layers, or their last parts; None: all of the decoder layers.
        seed_name: folder or hub name of the model that is adapted, written into the fields.
    Returns:
        fields by name; `target_modules` are names of the model's layers, or their last parts.
    Raises:
        UserError: if a target is no linear layer of the decoder layers, or these are not known.
    """
    layers = find_layers_path(model.config)
    if layers is None and targets is None:
        raise UserError(
            f"--lora_rank {rank}: the layers of a {model.config.model_type} are not known; name "
            "those to adapt with --lora_targets"
        )
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    head = model.get_output_embeddings()
    outside = {n for n, m in model.named_modules() if m is head}
    inside = [
        n for n in linear if n not in outside and n.startswith(f"{layers or ''}.".lstrip("."))
    ]
    selected = list(inside)
    for target in targets or ():
        if not any(f".{name}".endswith(f".{target}") for name in inside):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in inside}))
            raise UserError(
                f"--lora_targets {target}: is no linear layer of the blocks of this model; they "
                f"have {known}"
            )
    if targets is not None:
        endings = tuple(f".{target}" for target in targets)
        selected = [name for name in inside if f".{name}".endswith(endings)]
    short = {name.rpartition(".")[2] for name in selected}
    reached = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in short]
    return {
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": dropout,
        # Last parts of names, as people write them, where they select the same layers.
        "target_modules": sorted(short if reached == selected else selected),
        "fan_in_fan_out": isinstance(model.get_submodule(selected[0]), Conv1D),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": seed_name,
    }


def add_new_adapter(model: PreTrainedModel, fields: Mapping[str, object], seed: int = 0) -> None:
    """Put a new adapter, whose update is zero, into a model and freeze everything else.

    Args:
        model: changed in place.
        fields: fields of a `LoraConfig`, as `make_lora_fields` makes them.
        seed: seed of its first matrices; equal seeds give equal ones. torch's global generator is
            left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject_adapter(model, fields, NEW)


def add_adapter_without_storage(model: PreTrainedModel, fields: Mapping[str, object]) -> None:
    """Put an adapter without values into a model whose tensors have no storage; freeze the rest.

    The planner calls it under a fake-tensor mode, in which the adapter gets no storage either.

    Args:
        model: changed in place.
        fields: fields of a `LoraConfig`, as `make_lora_fields` makes them.
    """
    # peft moves new layers to the device of the model, which tensors without storage do not allow:
    # they are made outside the mode, on the meta device (low_cpu_mem_usage), and then replaced.
    with unset_fake_temporarily():
        _inject_adapter(model, fields, NEW, low_cpu_mem_usage=True)
    for key, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            path, _, name = key.rpartition(".")
            setattr(model.get_submodule(path), name, nn.Parameter(torch.empty(parameter.shape)))


def list_adapters(model: nn.Module) -> list[str]:
    """List the names of the adapters in a model."""
    return list(getattr(model, "peft_config", ()))


def select_adapter_tensors(
    model: PreTrainedModel, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select the tensors of the trained adapter (`NEW`), under the names of peft's files.

    Args:
        model: has the adapter.
        state: parameters by their names in the model, those of the adapter at least.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(
        model, dict(state), adapter_name=NEW, save_embedding_layers=False
    )
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def write_adapter(
    model: PreTrainedModel, state: Mapping[str, Tensor], seed_digest: str, folder: Path
) -> list[Path]:
    """Write the trained adapter (`NEW`) as peft does; return its two files.

    Args:
        state: parameters by their names in the model, those of the adapter at least.
        seed_digest: fingerprint of the adapted model's weights, kept in the file's metadata.
        folder: exists; files of these names are replaced.
    """
    fields = list_adapter_fields(model)[NEW] | {"inference_mode": True}
    write_json(folder / ADAPTER_CONFIG, fields)
    metadata = {"format": "pt", SEED_DIGEST: seed_digest}
    write_tensors(folder / ADAPTER_FILE, select_adapter_tensors(model, state), metadata)
    return [folder / ADAPTER_CONFIG, folder / ADAPTER_FILE]


def add_adapter(model: PreTrainedModel, folder: Path) -> str:
    """Add the LoRA adapter in a folder to the model it was trained on, and select it.

    Args:
        model: changed in place; after an error it may have layers of the adapter.
        folder: folder of the adapter.
    Returns:
        the name that `select_adapter` takes: "adapter_0", "adapter_1", ...
    Raises:
        UserError: if files are missing or damaged, the adapter is no LoRA, does not fit the model,
            or changes more than its decoder layers.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    name = f"adapter_{len(list_adapters(model))}"
    fields = read_adapter_config(folder)
    if fields.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {fields.get('peft_type')!r}, not 'LORA'"
        )
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder}: has no {ADAPTER_FILE}; save the adapter as safetensors")
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_FILE}: cannot be opened: {error}") from error
    _check_adapted_layers(model, weights, folder)
    try:
        _inject_adapter(model, fields, name)
        report = set_peft_model_state_dict(model, weights, name)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the adapter does not fit its seed: {reason}") from error
    lost = [key for key in report.missing_keys if f".{name}." in key] + report.unexpected_keys
    if lost:
        raise UserError(f"{folder}: the adapter does not fit its seed, as {min(lost)} shows")
    select_adapter(model, name)
    return name


def add_uninitialised_adapter(
    model: PreTrainedModel, name: str, fields: Mapping[str, object]
) -> None:
    """Add an adapter to a model and select it; its weights are to be loaded afterwards.

    Args:
        model: changed in place.
        name: name of the adapter in the model.
        fields: fields of its `LoraConfig`.
    """
    _inject_adapter(model, fields, name)
    select_adapter(model, name)


def list_adapter_fields(model: PreTrainedModel) -> dict[str, dict[str, object]]:
    """List the JSON fields of each adapter's `LoraConfig`, by its name; the model must have one."""
    return {
        name: _convert_to_json_value(config.to_dict()) for name, config in model.peft_config.items()
    }


def select_adapter(model: PreTrainedModel, name: str) -> None:
    """Select the adapter that following calls use, and freeze it.

    Args:
        model: changed in place.
        name: as `add_adapter` returned it; `SEED`: no adapter.
    Raises:
        UserError: if the model has no adapter of that name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    known = list_adapters(model)
    if name not in (SEED, *known):
        raise UserError(f"no adapter {name!r} in the model; there are {', '.join(known)}")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            if layer.disable_adapters != (name == SEED):
                layer.enable_adapters(name != SEED)
            if name != SEED:
                layer.set_adapter(name, inference_mode=True)


def select_expert(model: PreTrainedModel, domain: str) -> None:
    """Select the expert that following calls use: an adapter, if the model has any, or a domain's.

    Args:
        domain: name of the domain, or of the adapter in the model, or `SEED`.
    Raises:
        UserError: if the model does not hold it.
    """
    if list_adapters(model):
        select_adapter(model, domain)
    else:
        select_domain(model, domain)


def _inject_adapter(
    model: PreTrainedModel, fields: Mapping[str, object], name: str, **options: bool
) -> None:
    """Add the layers of an adapter to a model, in place, under a name; their weights are new.

    Only the adapter's weights require gradients then.

    Args:
        fields: fields of the `LoraConfig`.
        options: further arguments of peft's `inject_adapter_in_model`.
    """
    from peft import PeftConfig, inject_adapter_in_model

    config = PeftConfig.from_peft_type(**{"peft_type": "LORA", **fields})
    with warnings.catch_warnings():
        # Several adapters in one model are intended.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, name, **options)
    model.train(model.training)  # the layers of an adapter begin with their dropout in effect
    for key, parameter in model.named_parameters():
        if ".lora_" in key:  # transformers would draw them anew when the model joins a forest
            parameter._is_hf_initialized = True


def _check_adapted_layers(
    model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path
) -> None:
    """Refuse an adapter that changes more than products with matrices of the decoder layers.

    Embeddings and output matrices have code of their own, and whole tensors would replace those of
    the seed for all of its adapters.

    Args:
        weights: the adapter's tensors, by their names in its file.
        folder: folder of the adapter, for messages.
    Raises:
        UserError: for such an adapter, and for one of layers that the model does not have.
    """
    start = f"{find_layers_path(model.config) or ''}.".lstrip(".")
    known = {name for name, _ in model.named_modules()}
    for key in weights:
        name = key.removeprefix(PREFIX)
        module, is_update, _ = name.partition(".lora_")
        if is_update and module not in known:
            raise UserError(
                f"{folder}: the adapter does not fit its seed: a {model.config.model_type} has no "
                f"layer {module}"
            )
        if not name.startswith(start) or not is_update or ".lora_embedding" in name:
            raise UserError(
                f"{folder}: the adapter changes {name}, which it cannot do beside other adapters "
                f"of its seed; merge it first: megamod merge --models {folder}"
            )


def _convert_to_json_value(value: object) -> object:
    """Convert a value to JSON: sets as sorted lists, enumerations by value."""
    if isinstance(value, Mapping):
        return {str(key): _convert_to_json_value(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)
