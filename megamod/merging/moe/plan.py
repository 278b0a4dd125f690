"""The plan of a conversion: for each tensor of the mixture, where its elements come from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.merge import iterate_merged_tensor
from megamod.merging.moe.configuration import build_moe_config, find_moe_family
from megamod.merging.plan import MergePlan
from megamod.merging.tensors import describe_source, have_same_bits, iterate_stored_pieces
from megamod.models.lm.moe_families import LAYERS, MoeFamily
from megamod.states.forest import read_model_config
from megamod.states.stream import TensorSpec, plan_shards


@dataclass(frozen=True)
class MoeTensor:
    """Origin of one tensor of a mixture: one of these, or none for zeros.

    Attributes:
        shared: name of the tensor of the merged dense model that it equals.
        copies: tensors whose elements follow one another in it: number of the expert, and name in
            its model.
        layer: number of the layer whose router rows it holds.
    """

    shared: str | None = None
    copies: tuple[tuple[int, str], ...] = ()
    layer: int | None = None


@dataclass(frozen=True)
class MoePlan:
    """A conversion that was checked and can be carried out while its folders are open.

    Attributes:
        dense: plan of the merged dense model.
        kind: model type of the mixture.
        family: names and fields of its class.
        shared: origin of the tensors outside of feed-forwards: "averaged", "asserted" (bit-equal in
            all models) or "one model" (the experts are those of one DEMix model).
        tensors, specs: origins and specifications of the mixture's tensors, by name; `files`: names
            of the tensors in each file.
        config: content of its config.json.
    """

    dense: MergePlan
    kind: str
    family: MoeFamily
    shared: str
    tensors: dict[str, MoeTensor]
    specs: dict[str, TensorSpec]
    files: dict[str, list[str]]
    config: dict[str, object]

    @property
    def num_experts(self) -> int:
        """Number E of experts."""
        return len(self.dense.folders)

    @property
    def num_layers(self) -> int:
        """Number L of layers, all of them sparse."""
        return sum(tensor.layer is not None for tensor in self.tensors.values())

    @property
    def hidden_size(self) -> int:
        """Features D that a router reads."""
        return int(self.config["hidden_size"])

    @property
    def nbytes(self) -> int:
        """Bytes of the weights to write."""
        return sum(spec.nbytes for spec in self.specs.values())

    def format_summary(self) -> str:
        """Format type, experts and size of the mixture, one line each."""
        per_token = self.config[self.family.experts_per_token]
        lines = [
            f"{self.kind} of {self.num_experts} experts, {per_token} per token; "
            f"other weights: {self.shared}"
        ]
        lines += [
            f"  {number}  {model.domain}  {model}"
            for number, model in enumerate(self.dense.recipe.inputs)
        ]
        count = sum(spec.numel for spec in self.specs.values())
        lines.append(
            f"{len(self.specs)} tensors, {count:,} parameters, {self.nbytes:,} bytes in "
            f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        )
        return "\n".join(lines)


def make_moe_plan(
    dense: MergePlan, experts_per_token: int, *, anchor: bool, shard_bytes: int
) -> MoePlan:
    """Plan every tensor of a mixture; only headers are read, and with `anchor` shared weights.

    Args:
        dense: plan of the experts' average; its folders are open.
        experts_per_token: number of experts that the router selects for a token.
        anchor: require that tensors outside of feed-forwards are the same bits in all models.
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: if the family has no class of mixtures, a field or tensor has no counterpart in
            it, there are fewer experts than `experts_per_token`, or tensors differ with `anchor`.
    """
    folder = dense.folders[0].folder
    kind, family = find_moe_family(folder, dense.config)
    experts = len(dense.folders)
    if not 1 <= experts_per_token <= experts:
        raise UserError(
            f"--topk {experts_per_token}: there are {experts} experts, choose 1 to {experts}"
        )
    config = build_moe_config(folder, dense.config, experts, experts_per_token)
    inputs = dense.recipe.inputs
    feed_forward = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.{family.feed_forward}\.(.+)")
    tensors: dict[str, MoeTensor] = {}
    specs: dict[str, TensorSpec] = {}
    parts: dict[int, dict[str, str]] = {}
    for name, spec in dense.specs.items():
        match = feed_forward.fullmatch(name)
        if match is None:
            tensors[name], specs[name] = MoeTensor(shared=name), spec
        elif match[2] in family.parts:
            parts.setdefault(int(match[1]), {})[match[2]] = name
        else:
            raise UserError(f"{describe_source(dense.folders[0])}: {name} has no place in a {kind}")
    one_model = (
        all(model.member for model in inputs)
        and len({model.path for model in inputs}) == 1
        # Experts that are whole blocks or embeddings share less than a mixture does.
        and read_model_config(folder).get("untie", "").startswith("feedforward")
    )
    shared = "one model" if one_model else "asserted" if anchor else "averaged"
    for layer, names in sorted(parts.items()):
        for name, tensor, spec in _plan_layer(dense, family, layer, names):
            tensors[name], specs[name] = tensor, spec
    plan = MoePlan(
        dense=_plan_shared_as_copies(dense, tensors) if shared != "averaged" else dense,
        kind=kind,
        family=family,
        shared=shared,
        tensors=tensors,
        specs=specs,
        files=plan_shards(specs, shard_bytes),
        config=config,
    )
    if shared == "asserted":
        _check_shared_equal(plan)
    return plan


def _plan_layer(
    dense: MergePlan, family: MoeFamily, layer: int, names: Mapping[str, str]
) -> Iterator[tuple[str, MoeTensor, TensorSpec]]:
    """Yield (name, origin, specification) of the tensors of a layer's sparse block.

    They are those of the experts, those that are zero, and the router rows.

    Args:
        dense: plan of the experts' average.
        family: mixture class of transformers.
        layer: number of the layer, from 0.
        names: part of the feed-forward -> its name in the dense model.
    """
    block, experts = f"{LAYERS}.{layer}.{family.block}", range(len(dense.folders))
    some = dense.specs[names[family.parts[0]]]
    for target, parts in family.tensors.items():
        stored = [dense.tensor_plans[names[part]].sources for part in parts]
        pieces = {e: tuple((e, sources[e][1]) for sources in stored) for e in experts}
        specs = [dense.specs[names[part]] for part in parts]
        shape = (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:])
        if "{e}" in target:
            for e in experts:
                spec = TensorSpec(some.dtype, shape)
                yield f"{block}.{target.format(e=e)}", MoeTensor(copies=pieces[e]), spec
        else:
            copies = tuple(piece for e in experts for piece in pieces[e])
            spec = TensorSpec(some.dtype, (len(experts), *shape))
            yield f"{block}.{target}", MoeTensor(copies=copies), spec
    sizes = {"E": len(experts), "D": some.shape[1]}
    for name, shape in family.zeros.items():
        # Those with an entry per expert belong to the router, which computes in float32.
        dtype = torch.float32 if "E" in shape else some.dtype
        spec = TensorSpec(dtype, tuple(sizes.get(size, size) for size in shape))
        yield f"{LAYERS}.{layer}.{name}", MoeTensor(), spec
    dtype = torch.float32 if family.float_router else some.dtype
    rows = TensorSpec(dtype, (sizes["E"], sizes["D"]))
    yield f"{block}.{family.row_name}", MoeTensor(layer=layer), rows


def _plan_shared_as_copies(dense: MergePlan, tensors: Mapping[str, MoeTensor]) -> MergePlan:
    """Return the dense plan, changed so that tensors that experts share are copied from the first
    model and not averaged.

    Args:
        tensors: tensors of the mixture.
    """
    plans = dict(dense.tensor_plans)
    for tensor in tensors.values():
        if tensor.shared is not None:
            first = plans[tensor.shared].sources[0]
            plans[tensor.shared] = replace(
                plans[tensor.shared], sources=[first], lead_source=0, copied=True
            )
    return replace(dense, tensor_plans=plans)


def _check_shared_equal(plan: MoePlan) -> None:
    """Refuse a plan whose models' shared tensors are not the same bits; reads them in all models.

    Raises:
        UserError: naming the first tensor that differs, and two folders.
    """
    first, *others = plan.dense.folders
    for name, tensor in plan.tensors.items():
        if tensor.shared is None:
            continue
        for other in others:
            if not have_same_bits(first, name, other, name):
                raise UserError(
                    f"--anchor: {name} differs between {describe_source(first)} and "
                    f"{describe_source(other)}; experts of one anchor have trained feed-forwards "
                    "only"
                )


def compute_moe_tensor(plan: MoePlan, rows: Tensor, name: str) -> Iterator[Tensor]:
    """Yield the elements of one tensor of a mixture in order, in its dtype.

    A piece may be overwritten when the next one is requested.

    Args:
        plan: of the conversion.
        rows: [L, E, D] router rows of all layers.
        name: name of the tensor.
    Raises:
        UserError: if an averaged element is not finite.
    """
    tensor, spec = plan.tensors[name], plan.specs[name]
    if tensor.shared is not None:
        yield from iterate_merged_tensor(plan.dense, 0, tensor.shared)
    elif tensor.copies:
        for expert, stored in tensor.copies:
            for piece in iterate_stored_pieces(plan.dense.folders[expert], stored):
                yield piece.to(spec.dtype)
    elif tensor.layer is not None:
        yield rows[tensor.layer].to(spec.dtype).contiguous()
    else:
        yield torch.zeros(spec.shape, dtype=spec.dtype)
