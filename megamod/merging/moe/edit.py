"""Changes of single experts of a mixture on disk; all other experts keep their bits.

A new mixture is written, streamed: without an expert (`drop`), with another model's feed-forwards
in place of an expert's (`upgrade`), or with another router row (`refresh`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamod.errors import UserError
from megamod.merging.model_folder import write_files_besides_weights
from megamod.merging.moe.configuration import find_moe_family, read_moe_config
from megamod.merging.moe.record import (
    ExpertRecord,
    MoeRecord,
    read_moe_record,
    write_moe_card,
    write_moe_record,
)
from megamod.merging.tensors import TensorSource, describe_source, have_same_bits
from megamod.models.lm.moe_families import LAYERS, MoeFamily
from megamod.states.forest import Expert, read_model_config
from megamod.states.output_folder import check_disk_space, create_new_folder
from megamod.states.stream import (
    ModelFolder,
    TensorSpec,
    iterate_pieces,
    plan_shards,
    write_streamed_tensors,
)
from megamod.states.token_ids import check_same_token_ids


@dataclass(frozen=True)
class OpenMixture:
    """An open mixture on disk.

    Attributes:
        source: its weights; `config`: its config.json; `record`: its moe.json.
    """

    source: ModelFolder
    config: dict[str, object]
    family: MoeFamily
    record: MoeRecord

    @property
    def folder(self) -> Path:
        """Path of the folder of the mixture."""
        return self.source.folder


def open_mixture(folder: Path, stack: ExitStack) -> OpenMixture:
    """Open a mixture until the stack is closed.

    Raises:
        UserError: if the folder holds none, or moe.json does not fit config.json.
    """
    config, family = read_moe_config(folder)
    record = read_moe_record(folder)
    if config.get(family.count) != len(record.experts):
        raise UserError(
            f"{folder}: config.json has {config.get(family.count)} experts, moe.json "
            f"{len(record.experts)}"
        )
    return OpenMixture(stack.enter_context(ModelFolder(folder)), config, family, record)


def drop_expert(
    folder: Path, domain: str, output: Path, *, keep_influence: bool, shard_bytes: int
) -> str:
    """Write a mixture without the expert of a domain; the original does not change.

    A router that selects as many experts per token as there were selects all that remain.

    Args:
        folder: folder of the mixture; `output`: new folder, complete or absent.
        domain: domain of the expert, the value of --drop.
        keep_influence: allow mixtures whose other weights depend on the expert.
        shard_bytes: size above which weights are split into several files.
    Returns:
        an explanation of how the weights that remain depend on the expert; "": they do not.
    Raises:
        UserError: if there is no such expert, it is the only one or the anchor, or other weights
            depend on it without `keep_influence`; or `output` exists or does not fit on the disk.
    """
    with ExitStack() as stack:
        mixture = open_mixture(folder, stack)
        record, number = mixture.record, mixture.record.find_expert_number(domain, folder)
        count = len(record.experts)
        if count == 1:
            raise UserError(f"--drop {domain}: is the only expert of {folder}")
        if record.shared == "asserted" and number == 0:
            raise UserError(f"--drop {domain}: is the anchor of the other experts of {folder}")
        influence = _explain_expert_influence(record)
        if influence and not keep_influence:
            raise UserError(
                f"--drop {domain}: {influence}; remove it from the forest and convert again, or "
                "give --keep_influence"
            )
        others = [index for index in range(count) if index != number]
        family, config = mixture.family, dict(mixture.config)
        config[family.count] = count - 1
        config[family.experts_per_token] = min(config[family.experts_per_token], count - 1)
        experts = tuple(record.experts[index] for index in others)
        router = dict(record.router)
        if router.get("kind") == "calibrated":
            router |= _remove_from_router_record(router, number, domain)
            if router["centre"]:
                influence = influence or "the rows of the others are centred with its row"
        changed = record.model_copy(update={"experts": experts, "router": router})
        _write_mixture(mixture, output, others, {}, config, changed, shard_bytes)
    return influence


def _explain_expert_influence(record: MoeRecord) -> str:
    """Explain why weights other than an expert's own depend on it; "": they do not.

    `record` is that of the mixture.
    """
    if record.router.get("trained"):
        return f"it was trained with the others ({record.router['trained']})"
    if record.shared == "averaged":
        return "the weights outside of feed-forwards are averages that contain it"
    return ""


def _remove_from_router_record(
    router: Mapping[str, object], number: int, domain: str
) -> dict[str, object]:
    """Return the entries "texts" and "own_first" of a calibrated router's record without an expert.

    Args:
        number: number of the expert; `domain`: its name.
    """
    texts = {name: text for name, text in router["texts"].items() if name != domain}
    shares = [[s for n, s in enumerate(row) if n != number] for row in router["own_first"]]
    return {"texts": texts, "own_first": shares}


def upgrade_expert(
    folder: Path, domain: str, expert: Expert, output: Path, *, shard_bytes: int
) -> None:
    """Write a mixture with the feed-forwards of another model as the expert of a domain.

    Router rows stay. The original does not change.

    Args:
        folder: folder of the mixture; `output`: new folder, complete or absent.
        domain: domain of the expert that is replaced.
        expert: model, or expert of a DEMix model, whose feed-forwards are copied.
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: if no expert has that domain, or the model is of another family, shape or
            vocabulary, or, where experts share the other weights, has others; or `output` exists or
            does not fit on the disk.
    """
    with ExitStack() as stack:
        mixture = open_mixture(folder, stack)
        record, number = mixture.record, mixture.record.find_expert_number(domain, folder)
        model = stack.enter_context(ModelFolder(expert.path, expert.member))
        dense = read_model_config(expert.path)
        kind = dense.get("host", dense.get("model_type"))
        if find_moe_family(expert.path, dense | {"model_type": kind})[0] != record.model_type:
            raise UserError(f"--path {expert.path}: is a {kind}, {folder} a {record.model_type}")
        check_same_token_ids(folder, expert.path)
        if record.shared != "averaged":
            _check_same_shared(mixture, model)
        order: list[int | ModelFolder] = list(range(len(record.experts)))
        order[number] = model
        experts = list(record.experts)
        experts[number] = ExpertRecord(
            domain=domain,
            path=str(expert.path),
            member=expert.member,
            weight=None,
            digest=model.compute_digest(),
            data_digest=expert.data_digest,
        )
        changed = record.model_copy(update={"experts": tuple(experts)})
        _write_mixture(mixture, output, order, {}, mixture.config, changed, shard_bytes)


def _check_same_shared(mixture: OpenMixture, model: ModelFolder) -> None:
    """Refuse a model whose weights outside of feed-forwards differ from the mixture's.

    Raises:
        UserError: naming the model and the first tensor that differs.
    """
    for name in mixture.source.tensors:
        if name in model.tensors and not have_same_bits(mixture.source, name, model, name):
            raise UserError(
                f"--path {describe_source(model)}: {name} differs from {mixture.folder}, whose "
                "experts share all but their feed-forwards"
            )


def refresh_router_rows(
    folder: Path,
    domain: str,
    rows: Tensor,
    router: Mapping[str, object],
    output: Path,
    *,
    shard_bytes: int,
) -> None:
    """Write a mixture with other router rows, one per layer, for the expert of a domain.

    The original does not change.

    Args:
        folder: folder of the mixture; `output`: new folder, complete or absent.
        domain: domain of the expert.
        rows: [L, D] of the expert, any dtype; `router`: their origin, for moe.json.
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: if the folder holds no mixture, none of its experts has that domain, or `output`
            exists or does not fit on the disk.
    """
    with ExitStack() as stack:
        mixture = open_mixture(folder, stack)
        record, number = mixture.record, mixture.record.find_expert_number(domain, folder)
        refreshed = {**record.router.get("refreshed", {}), domain: dict(router)}
        router = {**record.router, "refreshed": refreshed}
        changed = record.model_copy(update={"router": router})
        order = list(range(len(record.experts)))
        _write_mixture(mixture, output, order, {number: rows}, mixture.config, changed, shard_bytes)


def _write_mixture(
    mixture: OpenMixture,
    output: Path,
    order: Sequence[int | ModelFolder],
    rows: Mapping[int, Tensor],
    config: Mapping[str, object],
    record: MoeRecord,
    shard_bytes: int,
) -> None:
    """Write a changed mixture into a new folder, streamed, with its configuration and moe.json.

    Args:
        order: for each expert of the result its number in the mixture, or another dense model.
        rows: new router rows [L, D] by number of the expert in the result.
        config, record: content of config.json and of moe.json.
        shard_bytes: size above which weights are split into several files.
    Raises:
        UserError: if `output` exists, the disk is too small, or a dense model does not fit.
    """
    tensors = dict(_plan_tensors(mixture, order, rows))
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    check_disk_space(output, sum(spec.nbytes for spec in specs.values()))
    with create_new_folder(output) as folder:
        write_streamed_tensors(
            folder,
            plan_shards(specs, shard_bytes),
            specs,
            lambda name: tensors[name].iterate_pieces(),
        )
        write_files_besides_weights(mixture.folder, mixture.folder, folder, config)
        write_moe_record(folder, record)
        write_moe_card(folder, record)


@dataclass(frozen=True)
class _Segment:
    """Consecutive elements of a stored tensor, or values that are in memory.

    Attributes:
        source, name, start, count: `count` elements of a stored tensor, from `start` on.
        values: elements in memory, used in place of stored ones; None: read those.
    """

    source: TensorSource | None
    name: str
    start: int
    count: int
    values: Tensor | None = None


@dataclass(frozen=True)
class _EditedTensor:
    """A tensor of the result, segment after segment."""

    spec: TensorSpec
    segments: tuple[_Segment, ...]

    def iterate_pieces(self) -> Iterator[Tensor]:
        """Yield the elements in order, in contiguous pieces of the tensor's dtype."""
        for part in self.segments:
            if part.values is not None:
                yield part.values.to(self.spec.dtype).contiguous()
                continue
            stored = part.source.tensors[part.name].dtype
            for start, stop in iterate_pieces(part.count, stored.itemsize):
                buffer = torch.empty(stop - start, dtype=stored)
                part.source.read_into(part.name, part.start + start, buffer)
                yield buffer.to(self.spec.dtype)


@dataclass(frozen=True)
class _Role:
    """Part of a tensor in a mixture.

    Attributes:
        kind: "shared", "expert" (of one expert), "experts" (of all, along the first axis) or
            "entries" (an entry or row of the router per expert).
        layer: number of the layer; None outside of sparse blocks.
        expert: number of the expert of an "expert".
        name: name of the tensor, for an "expert" with `{e}` in place of its number.
        parts: parts of a dense feed-forward that an expert's tensor is made of, one after the
            other.
    """

    kind: str
    name: str
    layer: int | None = None
    expert: int | None = None
    parts: tuple[str, ...] = ()


def _find_tensor_role(family: MoeFamily, name: str) -> _Role:
    """Find the part that a tensor has in a mixture of the family, by its name in the files.

    A tensor that is not one of experts or of the router is "shared".
    """
    in_layer = re.fullmatch(rf"({re.escape(LAYERS)}\.(\d+))\.(.+)", name)
    if in_layer is None:
        return _Role("shared", name)
    layer, path = int(in_layer[2]), in_layer[3]
    if path == f"{family.block}.{family.row_name}" or "E" in family.zeros.get(path, ()):
        return _Role("entries", name, layer)
    for template, parts in family.tensors.items():
        pattern = re.escape(f"{family.block}.{template}").replace(r"\{e\}", r"(\d+)")
        match = re.fullmatch(pattern, path)
        if match is not None and "{e}" in template:
            full = f"{in_layer[1]}.{family.block}.{template}"
            return _Role("expert", full, layer, int(match[1]), parts)
        if match is not None:
            return _Role("experts", name, layer, parts=parts)
    return _Role("shared", name)


def _plan_tensors(
    mixture: OpenMixture, order: Sequence[int | ModelFolder], rows: Mapping[int, Tensor]
) -> Iterator[tuple[str, _EditedTensor]]:
    """Yield name and content of every tensor of the result; only headers are read.

    Args:
        order, rows: see `_write_mixture`.
    Raises:
        UserError: if a dense model in `order` does not fit the mixture.
    """
    source, count = mixture.source, len(mixture.record.experts)
    for name, spec in source.tensors.items():
        role = _find_tensor_role(mixture.family, name)
        dense = f"{LAYERS}.{role.layer}.{mixture.family.feed_forward}"
        if role.kind == "shared":
            yield name, _EditedTensor(spec, (_Segment(source, name, 0, spec.numel),))
        elif role.kind == "expert":
            for number, expert in enumerate(order if role.expert == 0 else ()):
                segments = _list_expert_segments(source, role, expert, dense, spec.numel)
                yield role.name.format(e=number), _EditedTensor(spec, segments)
        elif role.kind == "experts":
            segments = tuple(
                segment
                for expert in order
                for segment in _list_expert_segments(
                    source, role, expert, dense, spec.numel // count
                )
            )
            yield (
                name,
                _EditedTensor(TensorSpec(spec.dtype, (len(order), *spec.shape[1:])), segments),
            )
        else:
            size = spec.numel // count
            segments = tuple(
                _Segment(None, name, 0, size, rows[number][role.layer])
                if number in rows and size > 1
                # Another model's expert takes over the row of the one that it replaces.
                else _Segment(source, name, size * (e if isinstance(e, int) else number), size)
                for number, e in enumerate(order)
            )
            shape = (len(order), size) if size > 1 else (1, len(order))
            yield name, _EditedTensor(TensorSpec(spec.dtype, shape), segments)


def _list_expert_segments(
    source: ModelFolder, role: _Role, expert: int | ModelFolder, dense: str, size: int
) -> tuple[_Segment, ...]:
    """List the segments of one expert's tensor, of `size` elements.

    Args:
        source: the mixture.
        role: the tensor's place in a sparse block.
        expert: number in the mixture, or a dense model with the feed-forward at the path `dense`.
    Raises:
        UserError: if the dense model's tensors have another size.
    """
    if isinstance(expert, int):
        if role.kind == "expert":
            return (_Segment(source, role.name.format(e=expert), 0, size),)
        return (_Segment(source, role.name, size * expert, size),)
    names = [f"{dense}.{part}" for part in role.parts]
    missing = [name for name in names if name not in expert.tensors]
    if missing:
        raise UserError(f"--path {describe_source(expert)}: has no {missing[0]}")
    specs = [expert.tensors[name] for name in names]
    if sum(spec.numel for spec in specs) != size:
        raise UserError(
            f"--path {describe_source(expert)}: {names[0]} has shape {list(specs[0].shape)}, which "
            "does not fit the mixture"
        )
    return tuple(
        _Segment(expert, name, 0, spec.numel) for name, spec in zip(names, specs, strict=True)
    )
