"""Which features of a model may be permuted together, and which weights that concerns.

Features of a group come in any order as long as those that make them and those that read them agree
on it. Everything else in this package is written in these terms and knows no architecture.
Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megamod.dist.scope import MARK, dense_name, domain_of_name
from megamod.errors import UserError
from megamod.merging.alignment.families import FAMILIES, Family, Head
from megamod.merging.alignment.groups import Group, Hook, Slot

Shapes = Mapping[str, Sequence[int]]
"""Shapes of a model's tensors by name."""


@dataclass(frozen=True)
class Symmetry:
    """The groups of one model, in the order of its computation.

    Attributes:
        groups: by name.
        tied: tensor -> the one it shares storage with.
        unknown: tensors whose part in the model is not known.
        domains: of a model with experts.
        output_heads: those the model has.
    """

    groups: Mapping[str, Group]
    tied: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    output_heads: tuple[Head, ...] = ()

    def of(self, *families: str) -> list[Group]:
        """The groups of these families."""
        return [group for group in self.groups.values() if group.family in families]


def symmetry_of(config: Mapping[str, object], shapes: Shapes, *, qk: bool = False) -> Symmetry:
    """The groups of a model.

    Args:
        config: its configuration, as in config.json.
        shapes: of all of its tensors.
        qk: whether queries and keys have a permutation of their own within heads.
    Raises:
        UserError: if the architecture is not known, or a tensor is missing or of a shape that does
            not fit the configuration.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model_type {kind!r}: cannot be aligned; known are {known}")
    family = FAMILIES[kind]
    dense = {dense_name(name): name for name in shapes}
    prefix = family.prefix if any(name.startswith(family.prefix) for name in dense) else ""
    names = _Names(family, prefix, {name: tuple(shapes[own]) for name, own in dense.items()})
    counts = [config.get(key) for key in (family.layers, family.heads)]
    for key, count in zip((family.layers, family.heads), counts, strict=True):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"config.json: {key} is {count!r}, not a positive number")
    layers, heads = counts
    if family.rotary and qk:
        raise UserError(
            f"align.qk: features of queries and keys of a {kind} cannot be permuted within heads, "
            "as they are rotated by their places; leave it out"
        )
    key_heads = config.get(family.key_heads or family.heads) or heads
    if not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads:
        raise UserError(f"config.json: {family.key_heads} is {key_heads!r}; {heads} heads share it")
    tied = {}
    if config.get("tie_word_embeddings", family.ties):
        tied = {
            alias: prefix + source if prefix + source in dense else source
            for alias, source in family.tied
            if names.may_have(alias)
        }
    output_heads, readers = _output(names)
    groups: list[Group] = []
    if family.residual:
        groups.append(_first_residual(names))
    for layer in range(layers):
        groups += _layer(names, layer, layers, (heads, key_heads), qk, readers)
    groups += [names.head_group(head, reader) for head, reader in output_heads if reader]
    every = _spread(groups, tied, shapes)
    touched = {slot.tensor for group in every for slot in group.slots}
    unknown = tuple(
        name
        for name in shapes
        if name not in touched and not dense_name(name).endswith(family.free)
    )
    domains = tuple(dict.fromkeys(d for name in shapes if (d := domain_of_name(name))))
    for group in every:
        _check(group, shapes, tied)
    return Symmetry(
        {group.name: group for group in every},
        {alias: source for alias, source in tied.items() if source in shapes},
        unknown,
        domains,
        tuple(head for head, _ in output_heads),
    )


@dataclass(frozen=True)
class _Names:
    """Slots of modules, by the names they have in a dense model."""

    family: Family
    prefix: str
    shapes: Shapes

    def may_have(self, tensor: str) -> bool:
        """Whether a tensor that may be tied belongs to this model."""
        stem = ".".join(tensor.split(".")[:-2])
        if not stem:
            # Without its storage only the backbone's prefix tells a language model from others.
            others = (f"{reader}.weight" in self.shapes for reader in ("score", "classifier"))
            return tensor in self.shapes or (bool(self.prefix) and not any(others))
        return any(name.startswith(f"{stem}.") for name in self.shapes)

    def has(self, module: str) -> bool:
        """Whether the module has a weight."""
        return f"{module}.weight" in self.shapes

    def made_by(self, module: str, start: int = 0, part: str = "features") -> list[Slot]:
        """What a dense layer makes."""
        slots = [Slot(f"{module}.weight", 1 if self.family.transposed else 0, start, part)]
        if f"{module}.bias" in self.shapes:
            slots.append(Slot(f"{module}.bias", 0, start, part))
        return slots

    def widened(self, layer: str) -> list[str]:
        """What reads the residual stream in front of a feed-forward network, and makes its
        features."""
        parts = (self.family.widen, *((self.family.gate,) if self.family.gate else ()))
        return [layer + part for part in parts]

    def read_by(self, module: str) -> list[Slot]:
        """What a dense layer reads. Heads are never stored transposed."""
        inside = module.startswith(self.prefix) and self.prefix
        return [Slot(f"{module}.weight", 0 if self.family.transposed and inside else 1)]

    def scaled_by(self, module: str) -> list[Slot]:
        """What a norm works on."""
        slots = [Slot(f"{module}.weight", 0)]
        if f"{module}.bias" in self.shapes:
            slots.append(Slot(f"{module}.bias", 0))
        return slots

    def size(self, tensor: str, axis: int) -> int:
        """Length of an axis.

        Raises:
            UserError: if there is no such tensor.
        """
        if tensor not in self.shapes:
            raise UserError(f"{tensor} is missing; there is no aligning without it")
        return self.shapes[tensor][axis]

    def head_group(self, head: Head, reader: str) -> Group:
        """The group of a model's output head."""
        dense = self.head_module(head)
        out = [Slot(f"{dense}.weight", 0), Slot(f"{dense}.bias", 0)]
        out += self.scaled_by(head.norm) if head.norm else []
        size = self.size(f"{dense}.weight", 0)
        into = [Slot(f"{reader}.weight", 1)]
        return _group(head.name, "head", size, None, out, into, [Hook(reader, "input")])

    def head_module(self, head: Head) -> str:
        """Name of the head's dense module: within the backbone, or outside."""
        inside = self.prefix + head.dense
        return inside if self.has(inside) else head.dense


def _group(
    name: str,
    family: str,
    size: int,
    heads: int | None,
    out: Iterable[Slot],
    into: Iterable[Slot],
    hooks: Iterable[Hook],
) -> Group:
    return Group(name, family, size, heads, tuple(out), tuple(into), tuple(hooks))


def _output(names: _Names) -> tuple[list[tuple[Head, str | None]], list[Slot]]:
    """Heads, each with the module that reads it, and what reads the last hidden states."""
    family, heads, into = names.family, [], []
    for head in family.output_heads:
        dense = names.head_module(head)
        if names.has(dense):
            aliases = [alias for alias, _ in family.tied]
            reader = next(
                (
                    reader
                    for reader in head.readers
                    if names.has(reader) or f"{reader}.weight" in aliases
                ),
                None,
            )
            heads.append((head, reader))
            into.append(Slot(f"{dense}.weight", 1))
    taken = {reader for _, reader in heads}
    for reader in family.readers:
        module = names.prefix + reader if names.has(names.prefix + reader) else reader
        alias = any(alias == f"{module}.weight" for alias, _ in family.tied)
        there = names.has(module) or (alias and names.may_have(f"{module}.weight"))
        if there and module not in taken:
            into.append(Slot(f"{module}.weight", 1))
    return heads, into


def _first_residual(names: _Names) -> Group:
    family, prefix = names.family, names.prefix
    out = [
        Slot(f"{prefix}{table}.weight", 1) for table in family.tables if names.has(prefix + table)
    ]
    norm = f"{prefix}{family.layer.format(0)}{family.norms[0]}"
    if not family.pre_norm:
        norm = prefix + family.outer_norm
    size = names.size(f"{norm}.weight", 0)
    into = _projections(names, 0, size)
    hook = Hook(norm, "input" if family.pre_norm else "output")
    return _group("res.emb", "res", size, None, out + names.scaled_by(norm), into, [hook])


def _projections(names: _Names, layer: int, size: int) -> list[Slot]:
    """What reads the residual stream in front of a layer's attention."""
    family = names.family
    stem = names.prefix + family.layer.format(layer)
    modules = dict.fromkeys((family.query, family.key, family.value))
    return [slot for module in modules for slot in names.read_by(stem + module)]


def _layer(
    names: _Names,
    layer: int,
    layers: int,
    counts: tuple[int, int],
    qk: bool,
    readers: Sequence[Slot],
) -> list[Group]:
    """Groups of one layer, in the order of its computation.

    Args:
        counts: number of heads, and of those of keys and values.
    """
    family, (heads, key_heads) = names.family, counts
    stem = names.prefix + family.layer.format(layer)
    query, key, value, mixed, narrow = (
        stem + part
        for part in (family.query, family.key, family.value, family.mixed, family.narrow)
    )
    widen = names.widened(stem)
    inputs = 0 if family.transposed else 1
    size = names.size(f"{mixed}.weight", inputs)
    if size % heads:
        raise UserError(f"{mixed}.weight: {size} features are not divisible by {heads} heads")
    fused = query == key
    starts = (0, size, 2 * size) if fused else (0, 0, 0)
    parts = ("queries", "keys", "values") if family.rotary else ("features",) * 3
    places = zip((query, key, value), starts, parts, strict=True)
    made = [names.made_by(*place) for place in places]
    own = [*made[0], *made[1]]
    hook = Hook(mixed, "input")
    into = names.read_by(mixed)
    groups = []
    if qk:
        hooks = [Hook(key, "output", starts[1]), Hook(query, "output", starts[0])]
        groups.append(_group(f"layer.{layer}.qk", "qk", size, heads, own, [], hooks))
        own = []
    own += made[2]
    attention = _group(f"layer.{layer}.attn", "attn", size, key_heads, own, into, [hook])
    groups.append(replace(attention, queries=heads // key_heads))
    wide = names.size(f"{narrow}.weight", inputs)
    out = [slot for module in widen for slot in names.made_by(module)]
    into, hooks = names.read_by(narrow), [Hook(narrow, "input")]
    feed_forward = _group(f"layer.{layer}.ffn", "ff", wide, None, out, into, hooks)
    if not family.residual:
        return [*groups, feed_forward]
    last = layer == layers - 1
    after = [stem + norm for norm in family.norms]
    if family.pre_norm:
        following = names.prefix + family.layer.format(layer + 1) + family.norms[0]
        after = [after[1], names.prefix + family.outer_norm if last else following]
    stream = names.size(f"{after[0]}.weight", 0)
    side = "input" if family.pre_norm else "output"
    behind = readers if last else _projections(names, layer + 1, stream)
    middle, end = (
        _group(f"res.{layer}.{name}", "res", stream, None, out, into, [Hook(norm, side)])
        for name, out, norm, into in (
            (
                "attn_ln",
                names.made_by(mixed) + names.scaled_by(after[0]),
                after[0],
                [slot for module in widen for slot in names.read_by(module)],
            ),
            (
                "final_ln",
                names.made_by(narrow) + names.scaled_by(after[1]),
                after[1],
                behind,
            ),
        )
    )
    return [*groups, middle, feed_forward, end]


def _spread(groups: Sequence[Group], tied: dict[str, str], shapes: Shapes) -> list[Group]:
    """The same with the names of a model with experts, one group for each expert's own features."""
    named: dict[str, list[str]] = {}
    for name in shapes:
        named.setdefault(dense_name(name), []).append(name)
    if all(names == [name] for name, names in named.items()):
        return list(groups)
    # Heads that exist once per domain are tied, if at all, to tables that do as well.
    for alias, source in list(tied.items()):
        own = {domain: name for name in named.get(source, []) if (domain := domain_of_name(name))}
        if own:
            del tied[alias]
            module = alias.removesuffix(".weight")
            heads = {f"{module}.{MARK}.{domain}.weight": name for domain, name in own.items()}
            tied |= heads
            named[alias] = list(heads)
    spread = []
    for group in groups:
        own = [tensor for slot in group.slots for tensor in named.get(slot.tensor, [slot.tensor])]
        domains = list(dict.fromkeys(domain_of_name(tensor) for tensor in own))
        if group.family == "res" or None in domains:
            spread.append(_renamed(group, named, None))
            continue
        spread += [
            replace(_renamed(group, named, domain), name=f"{group.name}.{domain}")
            for domain in domains
        ]
    return spread


def _renamed(group: Group, named: Mapping[str, list[str]], domain: str | None) -> Group:
    """The group with the names of these experts; None for those of all, and of what is shared."""

    def own(tensor: str) -> list[str]:
        names = named.get(tensor, [tensor])
        return [n for n in names if domain is None or domain_of_name(n) == domain]

    def slots(given: Sequence[Slot]) -> tuple[Slot, ...]:
        return tuple(replace(slot, tensor=name) for slot in given for name in own(slot.tensor))

    hooks = tuple(
        replace(hook, module=name.removesuffix(".weight"))
        for hook in group.hooks
        for name in own(f"{hook.module}.weight")
    )
    return replace(group, out=slots(group.out), into=slots(group.into), hooks=hooks)


def _check(group: Group, shapes: Shapes, tied: Mapping[str, str]) -> None:
    for slot in group.slots:
        shape = shapes.get(slot.tensor, shapes.get(tied.get(slot.tensor, "")))
        if shape is None:
            raise UserError(f"{slot.tensor} is missing; there is no aligning {group.name} without")
        if slot.axis >= len(shape) or shape[slot.axis] < slot.start + group.length(slot):
            raise UserError(
                f"{slot.tensor} has shape {list(shape)}; {group.name} needs {group.length(slot)} "
                f"features from {slot.start} on along axis {slot.axis}"
            )
