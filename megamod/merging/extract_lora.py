"""A LoRA adapter from the difference of two models, by singular value decomposition.

The difference of each linear layer's weight is replaced by its best approximation of the given
rank; everything else that differs (norms, biases, embeddings) is stored whole, as peft does with
`modules_to_save` and `bias`. With full rank, base and adapter give the other model.

Source: Hu et al. 2021 (LoRA); Eckart and Young 1936 for the best approximation.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.files import write_json
from megamod.merging.compatibility import check_configs_match
from megamod.merging.known_models import ModuleKind, map_modules_to_kinds
from megamod.merging.lora import PREFIX
from megamod.merging.naming import rename_to_template
from megamod.merging.tensors import TensorSource, describe_source
from megamod.states.forest import read_model_config
from megamod.states.output_folder import check_new_folder, create_new_folder
from megamod.states.stream import ModelFolder
from megamod.states.weight_files import ADAPTER_CONFIG, ADAPTER_FILE
from megamod.states.weights import write_tensors

_EXACT = 1024  # smaller side of a matrix up to which all singular values are computed
_SPARE = 16  # singular vectors that the randomised method computes besides, for accuracy


@dataclass(frozen=True)
class ExtractedAdapter:
    """An adapter that was written.

    Attributes:
        adapted_layers: number of linear layers that it adapts.
        whole_modules: names of the modules that it stores whole.
        explained_share: share of the squared norm of all differences of linear layers that its
            updates hold, from 0 to 1.
    """

    adapted_layers: int
    whole_modules: tuple[str, ...]
    explained_share: float

    def format_summary(self) -> str:
        """Format the adapted layers, the whole modules and the explained share as one line."""
        stored = f", {len(self.whole_modules)} modules stored whole" if self.whole_modules else ""
        return (
            f"{self.adapted_layers} linear layers adapted{stored}; the adapter holds "
            f"{self.explained_share:.2%} of the squared difference of linear layers"
        )


def extract_lora(
    base: Path, finetuned: Path, output: Path, rank: int, dtype: str | None = None
) -> ExtractedAdapter:
    """Write the adapter that turns one model into another, or into its best approximation of this
    rank; the folder appears whole or not at all.

    The adapter is held in memory, and one tensor of each model at a time.

    Args:
        base, finetuned: model folders of one architecture that transformers knows.
        output: new folder.
        rank: largest rank of an update.
        dtype: name of the dtype of torch that is stored, such as "bfloat16"; None: float32.
    Raises:
        UserError: if the models do not fit each other, are equal or of a type that transformers
            does not know, or `output` exists.
    """
    check_new_folder(output)
    with ExitStack() as stack:
        folders = [stack.enter_context(ModelFolder(path)) for path in (base, finetuned)]
        check_configs_match([Path(base), Path(finetuned)])
        first, second = rename_to_template(folders, 0).folders
        modules = map_modules_to_kinds(read_model_config(Path(base)))
        if modules is None:
            raise UserError(f"{base}: is of a type that transformers does not know, nor does peft")
        return _extract_adapter(
            first, second, modules, Path(output), rank, getattr(torch, dtype or "float32")
        )


def _extract_adapter(
    base: TensorSource,
    finetuned: TensorSource,
    modules: Mapping[str, ModuleKind],
    output: Path,
    rank: int,
    dtype: torch.dtype,
) -> ExtractedAdapter:
    """Factorise the changes of all linear layers, and write them as an adapter folder.

    Args:
        base, finetuned: the two models.
        modules: kinds of the base's modules by name, see `map_modules_to_kinds`.
        output: folder of the adapter, created.
        rank, dtype: of the adapter's matrices.
    Returns:
        numbers of modules and the share of the changes that the factors explain.
    Raises:
        UserError: if a changed tensor is in none of `modules`, has two shapes, or nothing differs.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole_modules: list[str] = []
    has_biases = transposed = False
    total_square = explained_square = 0.0
    for name, before, after in _iterate_changed_tensors(base, finetuned):
        module, _, part = name.rpartition(".")
        if module not in modules:
            raise UserError(
                f"{describe_source(base)}: stores {name}, which its class does not have; load "
                "and save it"
            )
        kind = "other" if modules[module].tied_modules else modules[module].kind
        if kind in ("linear", "conv1d") and part == "weight":
            difference = after.double() - before.double()
            out_by_in = difference.T if kind == "conv1d" else difference
            up, down = _compute_low_rank_factors(out_by_in, rank)
            total_square += float(difference.square().sum())
            explained_square += float(
                difference.square().sum() - (out_by_in - up @ down).square().sum()
            )
            ranks[module] = len(down)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down.to(dtype)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up.to(dtype)
            transposed = transposed or kind == "conv1d"
        elif kind in ("linear", "conv1d"):
            tensors[f"{PREFIX}{name}"] = after.to(dtype)
            has_biases = True
        elif module not in whole_modules:
            whole_modules.append(module)
    if not tensors and not whole_modules:
        raise UserError(
            f"{describe_source(base)} and {describe_source(finetuned)} have the same weights: "
            "no difference"
        )
    for module in list(whole_modules):
        for name in [n for n in base.tensors if n.rpartition(".")[0] == module]:
            for twin in (module, *modules[module].tied_modules):
                # Each of the tied modules gets a copy, or peft would change one of them only.
                whole_modules += [twin] * (twin not in whole_modules)
                if twin == module or name.endswith(".weight"):
                    tensors[f"{PREFIX}{twin}.{name.rpartition('.')[2]}"] = finetuned.read(name).to(
                        dtype
                    )
    for module in ranks:
        # peft has the original parameters of an adapted module under `base_layer`.
        key = f"{PREFIX}{module}.bias"
        if key in tensors:
            tensors[f"{PREFIX}{module}.base_layer.bias"] = tensors.pop(key)
    rank = max(ranks.values(), default=rank)
    smaller = {module: size for module, size in ranks.items() if size != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base.folder),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(whole_modules) or None,
        "bias": "all" if has_biases else "none",
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with create_new_folder(output) as folder:
        write_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, config)
    return ExtractedAdapter(
        len(ranks), tuple(whole_modules), explained_square / total_square if total_square else 1.0
    )


def _iterate_changed_tensors(
    base: TensorSource, finetuned: TensorSource
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, tensor of `base` and tensor of `finetuned` of each tensor that differs.

    Tensors are floating-point, in their stored dtypes; those that only one model has are skipped.

    Raises:
        UserError: naming a tensor of two shapes.
    """
    for name, spec in base.tensors.items():
        if spec.dtype.is_floating_point and name in finetuned.tensors:
            before, after = base.read(name), finetuned.read(name)
            if before.shape != after.shape:
                raise UserError(
                    f"{name} has shape {list(before.shape)} in {describe_source(base)}, "
                    f"{list(after.shape)} in {describe_source(finetuned)}"
                )
            if not torch.equal(before.double(), after.double()):
                yield name, before, after


def _compute_low_rank_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate a matrix [out, in] by the product of two factors [out, r] and [r, in].

    r is `rank`, or less for a smaller matrix. The approximation is the best in squared error; for
    large matrices nearly so, by a randomised method with a fixed seed. Each factor gets the square
    roots of the singular values.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT or 2 * rank > min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, rank + _SPARE, niter=4)
            right = right.T
    root = values[:rank].clamp(min=0).sqrt()
    return (left[:, :rank] * root).contiguous(), (root[:, None] * right[:rank]).contiguous()
