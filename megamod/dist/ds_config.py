"""Read a DeepSpeed JSON, check every key, and fill it from the run.

`"auto"` is a convention of the Trainer of transformers, which DeepSpeed itself does not resolve.
Here the JSON and the run become one configuration: a value set on one side only is used, values set
on both must agree, and defaults of the run give way to the JSON.
"""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from megamod.dist.ds_keys import (
    OPTIONAL_AUTO,
    REFUSED,
    REMOVED,
    REQUIRED,
    SCALARS,
    build_key_tree,
    load_block_models,
)
from megamod.dist.key_paths import (
    MISSING,
    get_by_key_path,
    iterate_values_by_key_path,
    remove_nulls,
    set_by_key_path,
)
from megamod.dist.scope import Sharing
from megamod.errors import UserError
from megamod.schemas import make_unique_keys_hook

TOTAL, MICRO, STEPS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
BUILT_IN = "the built-in configuration"  # names a missing file in messages
HALF = ("bf16", "fp16")  # blocks of the number formats of 16 bits

AUTO = {
    "bf16.enabled": False,
    "fp16.enabled": False,
    "fp16.loss_scale": 0,
    "fp16.initial_scale_power": 7,  # the DEMix release starts at 128
    "zero_optimization.stage": 1,
}
"""Values of "auto" for keys without a value of the run."""


class ResolvedConfig(NamedTuple):
    """Configuration of DeepSpeed, and the values that the run must use.

    Attributes:
        config: for `deepspeed.initialize`; without an optimizer, and without train_batch_size,
            which DeepSpeed derives from its data-parallel world (in BTM that of a domain).
        values: by key path, final values of all settings that both the run and the JSON can set:
            batch sizes, gradient_clipping, bf16.enabled, fp16.enabled,
            optimizer.params.{lr,betas,eps,weight_decay}.
    """

    config: dict[str, object]
    values: dict[str, object]


def resolve_ds_config(
    path: str | None,
    values: Mapping[str, object],
    origins: Mapping[str, str],
    *,
    allow_unknown: bool = False,
) -> ResolvedConfig:
    """Merge a DeepSpeed JSON and the values of the run into one configuration.

    Args:
        path: the JSON; None: no file, so that all values are those of `values`, or of `AUTO`.
        values: the run's values by key path, such as "optimizer.params.lr"; they replace "auto".
            The three batch sizes and gradient_clipping must be among them.
        origins: source of each value; one that is "default" or missing gives way to the JSON.
        allow_unknown: accept keys that are not in our table (DeepSpeed checks some blocks too).
    Raises:
        UserError: for syntax errors, for unknown, removed or refused keys, for an "auto" without a
            value, and for conflicts, all of them in one message.
    """
    name = path or BUILT_IN
    config = _read_json(Path(path)) if path else {"zero_optimization": {"stage": "auto"}}
    config = remove_nulls(config)
    _check_keys(name, config, build_key_tree(), allow_unknown)
    _check_refused_keys(name, config)
    _check_scalars(name, config)
    final = _merge_values(name, config, values, origins)
    auto = [where for where, value in iterate_values_by_key_path(config) if value == "auto"]
    auto = [where for where in auto if where not in OPTIONAL_AUTO]
    if auto:
        raise UserError(f'{name}: the run has no value for "auto" at {", ".join(auto)}')
    _check_optimizer(name, config.pop("optimizer", {}))
    _check_block_types(name, config)
    config.pop(TOTAL, None)
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    return ResolvedConfig(
        # The run passes an optimizer that is not one of DeepSpeed's.
        config | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        final,
    )


def apply_sharing_rules(config: dict[str, object], sharing: Sharing | str, world_size: int) -> None:
    """Refuse settings that do not work with a sharing; set those it requires.

    Args:
        config: a resolved configuration; changed in place.
        sharing: parameters that domains share, also by value: "dense", "demix" or "btm".
        world_size: ranks of the run.
    Raises:
        UserError: for a combination that DeepSpeed refuses or silently trains wrongly.
    """
    sharing = Sharing(sharing)
    zero = config["zero_optimization"]
    stage = zero["stage"]
    half = [name for name in HALF if config.get(name, {}).get("enabled")]
    if len(half) == 2:
        raise UserError("bf16 and fp16 are both enabled; enable one of them")
    if stage == 0 and half:
        raise UserError(
            f"{half[0]} with ZeRO stage 0 is not supported; use stage 1: the arithmetic is the "
            "same, and its optimizer state can be saved and resharded"
        )
    if stage == 0 and sharing is Sharing.BTM:
        raise UserError(
            "independent models (--untie all) with ZeRO stage 0 are not supported, because the "
            "norm would be taken over all domains; use stage 1, 2 or 3"
        )
    if sharing is Sharing.DEMIX and stage not in (1, 2):
        raise UserError(
            f"a model with experts (--untie {{feedforward, ...}}) cannot use ZeRO stage {stage}, "
            "with which DeepSpeed trains experts wrongly; use stage 1 or 2"
        )
    if stage == 1 and half == ["bf16"] and _get_grad_accum_dtype(config) == "fp32":
        raise UserError(
            "bf16 with ZeRO stage 1 cannot accumulate gradients in fp32, because that state cannot "
            "be resharded; use stage 2, or remove data_types.grad_accum_dtype"
        )
    if sharing is Sharing.DEMIX and stage == 2:
        for key in ("contiguous_gradients", "reduce_scatter"):
            if zero.get(key) is False:
                raise UserError(
                    f"experts with ZeRO stage 2 need zero_optimization.{key} true; remove the key"
                )
    _check_offload(zero)
    copies = int(zero.get("zero_hpz_partition_size", 1))
    if copies < 1 or world_size % copies:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size {copies} does not divide the "
            f"{world_size} ranks"
        )
    if sharing is Sharing.DEMIX:
        # Ranks of a domain are consecutive, as in `DomainTopology`.
        config["use_data_before_expert_parallelism"] = True


def get_offload_device(zero: Mapping[str, object], state_kind: str) -> str:
    """Return the device that a state is offloaded to: "none", "cpu" or "nvme".

    Args:
        zero: the block zero_optimization.
        state_kind: "optimizer" or "param".
    """
    return str((zero.get(f"offload_{state_kind}") or {}).get("device", "none"))


def _check_offload(zero: Mapping[str, object]) -> None:
    """Raise UserError for offloading that the ZeRO stage or this project does not support.

    `zero` is the block zero_optimization.
    """
    where = "zero_optimization.offload_"
    optimizer, parameters = get_offload_device(zero, "optimizer"), get_offload_device(zero, "param")
    if optimizer != "none" and zero["stage"] == 0:
        raise UserError(f"{where}optimizer needs ZeRO stage 1, 2 or 3; the file has stage 0")
    if optimizer == "nvme" and zero["stage"] != 3:
        raise UserError(
            f"{where}optimizer.device nvme needs ZeRO stage 3; the file has stage {zero['stage']}; "
            "use stage 3, or device cpu"
        )
    if parameters != "none" and zero["stage"] != 3:
        raise UserError(
            f"{where}param needs ZeRO stage 3; the file has stage {zero['stage']}; remove it"
        )
    if parameters == "nvme":
        raise UserError(f"{where}param.device nvme is not supported; use cpu, or remove the block")
    if optimizer == "nvme" and not zero["offload_optimizer"].get("nvme_path"):
        raise UserError(f'{where}optimizer.nvme_path is missing: a folder, or "auto"')


def _read_json(path: Path) -> dict[str, object]:
    """Read the JSON object in the file `path`.

    Raise UserError if it cannot be read, for doubled keys, for constants such as NaN, and for
    content that is no object.
    """

    def refuse_constant(word: str) -> None:
        """Raise UserError for the constant `word`: NaN or an infinity, which JSON does not have."""
        raise UserError(f"{path}: {word} is not a number of JSON")

    try:
        config = json.loads(
            path.read_bytes().decode("utf-8-sig"),
            object_pairs_hook=make_unique_keys_hook(str(path)),
            parse_constant=refuse_constant,
        )
    except OSError as error:
        raise UserError(f"DeepSpeed file {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}, {where}: not JSON: {error.msg}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, not a JSON object")
    return config


def _check_keys(name: str, block: dict, known: dict, allow_unknown: bool, parent: str = "") -> None:
    """Raise UserError for a removed or unknown key, a block in place of a value, or the reverse.

    Args:
        name: the file, for messages.
        block: a block of the configuration, with all blocks in it.
        known: the tree of its keys, see `build_key_tree`.
        allow_unknown: let unknown keys pass.
        parent: key path of the block, with a dot at its end; "" at the top.
    """
    for key, value in block.items():
        where = f"{parent}{key}"
        if where in REMOVED:
            raise UserError(f"{name}: DeepSpeed has no {where} any more; {REMOVED[where]}")
        if key not in known:
            if allow_unknown:
                continue
            nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0)[0]
            raise UserError(
                f"{name}: unknown key {where}; the nearest is {parent}{nearest} "
                "(--allow_unknown_ds_keys lets it pass)"
            )
        inner = known[key]
        if isinstance(inner, dict):
            if not isinstance(value, dict):
                raise UserError(f"{name}: {where} is {value!r}, not a block in braces")
            _check_keys(name, value, inner, allow_unknown, f"{where}.")
        elif inner is None and isinstance(value, dict):
            raise UserError(f"{name}: {where} is a block, but it must be a single value")


def _check_refused_keys(name: str, config: dict) -> None:
    """Raise UserError for a key of `REFUSED` that is not off, or a wrong value of `REQUIRED`.

    `name` is the DeepSpeed file, for messages, and `config` its content.
    """
    for where, advice in REFUSED.items():
        value = get_by_key_path(config, where)
        if isinstance(value, dict) and value.get("enabled", value.get("device")) in (False, "none"):
            continue
        if value is not MISSING and value not in (False, {}):
            raise UserError(f"{name}: {where} cannot be used here: {advice}")
    for where, (needed, why) in REQUIRED.items():
        value = get_by_key_path(config, where)
        if value not in (MISSING, needed):
            raise UserError(f"{name}: {where} is {value!r}, but {why}")


def _check_scalars(name: str, config: dict) -> None:
    """Raise UserError for a top-level value of a wrong type or range, or any huge integer.

    Huge is an absolute value of 2^62 or more, at any depth of `config`, the content of the
    DeepSpeed file `name`.
    """
    for key, value in iterate_values_by_key_path(config):
        if type(value) is int and abs(value) >= 2**62:
            raise UserError(f"{name}: {key} is {value!r:.60}, which no size or interval can be")
    for key, kind in SCALARS.items():
        value = config.get(key, "auto")
        if value == "auto":
            continue
        right = type(value) is kind or (kind is float and type(value) is int)
        # Integers are sizes and intervals; floats are factors and norms.
        if (
            not right
            or (kind is int and value < 1)
            or (kind is float and not 0 <= value < math.inf)
        ):
            least = {int: ", 1 or more", float: ", 0 or more"}.get(kind, "")
            raise UserError(f"{name}: {key} is {value!r}; it must be a {kind.__name__}{least}")


def _merge_values(
    name: str, config: dict, values: Mapping[str, object], origins: Mapping[str, str]
) -> dict[str, object]:
    """Merge the values of the run into `config`, and return the final values.

    Args:
        name: the file, for messages.
        config: content of the file; changed in place: "auto" and missing values are filled.
        values, origins: see `resolve_ds_config`.
    Returns:
        `ResolvedConfig.values`.
    Raises:
        UserError: listing all values of the file and the run that disagree.
    """
    conflicts = []
    batch = _resolve_batch_sizes(name, config, values, origins, conflicts)
    merged = {**AUTO, **values, **batch}
    shared = [where for where in values if not where.startswith("zero_optimization.")]
    for where, value in merged.items():
        file_value = get_by_key_path(config, where)
        if where not in batch and file_value not in (MISSING, "auto"):
            origin = origins.get(where, "default")
            if origin != "default" and file_value != value:
                conflicts.append(f"{where} is {file_value} in {name}, {value} from {origin}")
            if where in values:
                merged[where] = file_value
        elif file_value == "auto" or (where in shared and value is not False):
            set_by_key_path(config, where, value)
    if conflicts:
        raise UserError(
            f'{name} and the run disagree; change one of each pair, or write "auto" in the file: '
            + "; ".join(conflicts)
        )
    final = {where: merged[where] for where in shared}
    for key, value in config.get("optimizer", {}).get("params", {}).items():
        if key != "torch_adam":  # the run chooses the class of AdamW
            final[f"optimizer.params.{key}"] = value
    return final | {
        f"{kind}.enabled": get_by_key_path(config, f"{kind}.enabled") is True for kind in HALF
    }


def _resolve_batch_sizes(
    name: str,
    config: Mapping[str, object],
    values: Mapping[str, object],
    origins: Mapping[str, str],
    conflicts: list[str],
) -> dict[str, int]:
    """Compute the three batch sizes: total = micro-batch x accumulation x ranks.

    A size of the file or of a flag is fixed; the others follow from it, or are the run's defaults.

    Args:
        name: the file, for messages.
        config: content of the file.
        values, origins: see `resolve_ds_config`.
        conflicts: changed in place: a sentence is appended for each size that file and flag set
        differently.
    Returns:
        the sizes by key.
    Raises:
        UserError: if the fixed sizes contradict each other, and `conflicts` is empty.
    """
    fixed, source = {}, {}
    for key in (TOTAL, MICRO, STEPS):
        file_value, origin = config.get(key, "auto"), origins.get(key, "default")
        if file_value != "auto" and origin != "default" and file_value != values[key]:
            conflicts.append(f"{key} is {file_value} in {name}, {values[key]} from {origin}")
        if file_value != "auto":
            fixed[key], source[key] = file_value, name
        elif origin != "default":
            fixed[key], source[key] = values[key], origin
    ranks = values[TOTAL] // (values[MICRO] * values[STEPS])
    micro = fixed.get(MICRO, values[MICRO])
    if TOTAL not in fixed:
        steps = fixed.get(STEPS, values[STEPS])
        return {TOTAL: micro * steps * ranks, MICRO: micro, STEPS: steps}
    steps = fixed.get(STEPS, fixed[TOTAL] // (micro * ranks))
    if not conflicts and micro * steps * ranks != fixed[TOTAL]:
        accumulation = f" x {steps} micro-batches ({source[STEPS]})" if STEPS in fixed else ""
        raise UserError(
            f"{TOTAL} {fixed[TOTAL]} ({source[TOTAL]}) is not "
            f"{'' if accumulation else 'a multiple of '}"
            f"{micro} sequences ({source.get(MICRO, 'default')}){accumulation} x {ranks} ranks"
        )
    return {TOTAL: fixed[TOTAL], MICRO: micro, STEPS: steps}


def _check_optimizer(name: str, block: dict) -> None:
    """Raise UserError for an optimizer other than AdamW, or hyperparameters out of range.

    The run constructs AdamW itself, with the values of `block`, the content of "optimizer" in the
    DeepSpeed file `name`; "Adam" counts as AdamW.
    """
    kind = block.get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        raise UserError(
            f"{name}: optimizer.type is {kind!r}; the run trains with AdamW, or with --optim muon"
        )
    for key, value in block.get("params", {}).items():
        numbers = value if key == "betas" and isinstance(value, list) else [value]
        if key != "torch_adam" and not all(
            type(n) in (int, float) and 0 <= n < math.inf for n in numbers
        ):
            raise UserError(f"{name}: optimizer.params.{key} is {value!r}; give a number from 0")
        if key == "betas" and (len(numbers) != 2 or max(numbers) >= 1):
            raise UserError(
                f"{name}: optimizer.params.betas is {value!r}; give two numbers below 1"
            )


def _check_block_types(name: str, config: dict) -> None:
    """Raise UserError for a block that DeepSpeed's pydantic model refuses.

    Stage and `enabled`, which these models would convert, must have the exact type. `config` is the
    content of the DeepSpeed file `name`.
    """
    exact = {"zero_optimization.stage": int, "bf16.enabled": bool, "fp16.enabled": bool}
    for where, kind in exact.items():
        value = get_by_key_path(config, where)
        if value is not MISSING and type(value) is not kind:
            raise UserError(f"{name}: {where} is {value!r}; it must be a {kind.__name__}")
    for where, model in load_block_models().items():
        block = get_by_key_path(config, where)
        if block is MISSING:
            continue
        try:
            model(**block)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([where, *map(str, first["loc"])])
            raise UserError(f"{name}: {key} is {first['input']!r}: {first['msg']}") from error
        except AssertionError as error:
            raise UserError(f"{name}: {where}: {error}") from error


def _get_grad_accum_dtype(config: Mapping) -> object:
    """Return data_types.grad_accum_dtype, such as "fp32"; None if it is not set."""
    return (config.get("data_types") or {}).get("grad_accum_dtype")
