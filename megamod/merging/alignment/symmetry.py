"""Permutation groups of a model: features that are permuted together, and the weights involved.

The features of a group may have any order on which the weights that produce them and the weights
that read them agree. The rest of this package works on these groups and knows no architecture.
Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megamod.dist.scope import EXPERTS_COMPONENT, parse_expert_domain, to_dense_name
from megamod.errors import UserError
from megamod.merging.alignment.families import FAMILIES, Family, Head
from megamod.merging.alignment.groups import Group, Hook, Slot

Shapes = Mapping[str, Sequence[int]]
"""Shapes of the tensors of a model by name."""


@dataclass(frozen=True)
class Symmetry:
    """The permutation groups of a model, in the order of its computation.

    Attributes:
        groups: by name.
        tied: tensor -> tensor that it shares storage with.
        unknown: tensors whose role in the model is not known.
        domains: of a model with experts.
        output_heads: of the model.
    """

    groups: Mapping[str, Group]
    tied: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    output_heads: tuple[Head, ...] = ()

    def of(self, *families: str) -> list[Group]:
        """Groups of these families."""
        return [group for group in self.groups.values() if group.family in families]


def symmetry_of(config: Mapping[str, object], shapes: Shapes, *, qk: bool = False) -> Symmetry:
    """Find the permutation groups of a model.

    Args:
        config: its configuration, as in config.json.
        shapes: of all its tensors.
        qk: permute queries and keys within heads separately from values.
    Raises:
        UserError: if the architecture is not known, or a tensor is missing or does not fit the
            configuration.
    """
    kind = config.get("host", config.get("model_type"))
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model_type {kind!r}: cannot be aligned; known are {known}")
    family = FAMILIES[kind]
    dense = {to_dense_name(name): name for name in shapes}
    prefix = family.prefix if any(name.startswith(family.prefix) for name in dense) else ""
    names = _Names(family, prefix, {name: tuple(shapes[raw]) for name, raw in dense.items()})
    counts = [config.get(key) for key in (family.layers, family.heads)]
    for key, count in zip((family.layers, family.heads), counts, strict=True):
        if not isinstance(count, int) or count < 1:
            raise UserError(f"config.json: {key} is {count!r}, not a positive number")
    layers, heads = counts
    if family.rotary and qk:
        raise UserError(
            f"align.qk: features of queries and keys of a {kind} cannot be permuted within heads, "
            "as rotary embeddings fix their order; leave it out"
        )
    key_heads = config.get(family.key_heads or family.heads) or heads
    if not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads:
        raise UserError(
            f"config.json: {family.key_heads} is {key_heads!r}; it must divide {heads} heads"
        )
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
        if name not in touched and not to_dense_name(name).endswith(family.free)
    )
    domains = tuple(dict.fromkeys(d for name in shapes if (d := parse_expert_domain(name))))
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
    """Slots of modules, under the names of a dense model."""

    family: Family
    prefix: str
    shapes: Shapes

    def may_have(self, tensor: str) -> bool:
        """True if a tensor that may be tied belongs to this model."""
        stem = ".".join(tensor.split(".")[:-2])
        if not stem:
            # If it is not stored, only the prefix of the backbone marks a language model.
            others = (f"{reader}.weight" in self.shapes for reader in ("score", "classifier"))
            return tensor in self.shapes or (bool(self.prefix) and not any(others))
        return any(name.startswith(f"{stem}.") for name in self.shapes)

    def has(self, module: str) -> bool:
        """True if the module has a weight."""
        return f"{module}.weight" in self.shapes

    def made_by(self, module: str, start: int = 0, part: str = "features") -> list[Slot]:
        """Slots of the features that a dense layer produces."""
        slots = [Slot(f"{module}.weight", 1 if self.family.transposed else 0, start, part)]
        if f"{module}.bias" in self.shapes:
            slots.append(Slot(f"{module}.bias", 0, start, part))
        return slots

    def widened(self, layer: str) -> list[str]:
        """Modules that read the residual stream and produce the feed-forward features."""
        parts = (self.family.widen, *((self.family.gate,) if self.family.gate else ()))
        return [layer + part for part in parts]

    def read_by(self, module: str) -> list[Slot]:
        """Slots of the features that a dense layer reads. Heads are never stored transposed."""
        inside = module.startswith(self.prefix) and self.prefix
        return [Slot(f"{module}.weight", 0 if self.family.transposed and inside else 1)]

    def scaled_by(self, module: str) -> list[Slot]:
        """Slots of the features that a norm scales."""
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
            raise UserError(f"{tensor} is missing, which alignment needs")
        return self.shapes[tensor][axis]

    def head_group(self, head: Head, reader: str) -> Group:
        """Permutation group of an output head."""
        dense = self.head_module(head)
        out = [Slot(f"{dense}.weight", 0), Slot(f"{dense}.bias", 0)]
        out += self.scaled_by(head.norm) if head.norm else []
        size = self.size(f"{dense}.weight", 0)
        into = [Slot(f"{reader}.weight", 1)]
        return _group(head.name, "head", size, None, out, into, [Hook(reader, "input")])

    def head_module(self, head: Head) -> str:
        """Name of the dense module of a head, inside or outside of the backbone."""
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
    """Heads with the module that reads each, and slots that read the last hidden states."""
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
        exists = names.has(module) or (alias and names.may_have(f"{module}.weight"))
        if exists and module not in taken:
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
    """Slots that read the residual stream before the attention of a layer."""
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
        counts: numbers of query heads and of key heads.
        readers: slots that read the last hidden states.
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
        raise UserError(f"{mixed}.weight: {size} features cannot be split into {heads} heads")
    fused = query == key
    starts = (0, size, 2 * size) if fused else (0, 0, 0)
    parts = ("queries", "keys", "values") if family.rotary else ("features",) * 3
    projections = zip((query, key, value), starts, parts, strict=True)
    produced = [names.made_by(*projection) for projection in projections]
    out = [*produced[0], *produced[1]]
    hook = Hook(mixed, "input")
    into = names.read_by(mixed)
    groups = []
    if qk:
        hooks = [Hook(key, "output", starts[1]), Hook(query, "output", starts[0])]
        groups.append(_group(f"layer.{layer}.qk", "qk", size, heads, out, [], hooks))
        out = []
    out += produced[2]
    attention = _group(f"layer.{layer}.attn", "attn", size, key_heads, out, into, [hook])
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
    following_readers = readers if last else _projections(names, layer + 1, stream)
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
                following_readers,
            ),
        )
    )
    return [*groups, middle, feed_forward, end]


def _spread(groups: Sequence[Group], tied: dict[str, str], shapes: Shapes) -> list[Group]:
    """Groups under the names of a model with experts: one group per expert for its features."""
    named: dict[str, list[str]] = {}
    for name in shapes:
        named.setdefault(to_dense_name(name), []).append(name)
    if all(names == [name] for name, names in named.items()):
        return list(groups)
    # Heads of single domains are tied, if at all, to tables of single domains.
    for alias, source in list(tied.items()):
        tables = {d: name for name in named.get(source, []) if (d := parse_expert_domain(name))}
        if tables:
            del tied[alias]
            module = alias.removesuffix(".weight")
            heads = {
                f"{module}.{EXPERTS_COMPONENT}.{domain}.weight": name
                for domain, name in tables.items()
            }
            tied |= heads
            named[alias] = list(heads)
    spread = []
    for group in groups:
        tensors = [name for slot in group.slots for name in named.get(slot.tensor, [slot.tensor])]
        domains = list(dict.fromkeys(parse_expert_domain(name) for name in tensors))
        if group.family == "res" or None in domains:
            spread.append(_renamed(group, named, None))
            continue
        spread += [
            replace(_renamed(group, named, domain), name=f"{group.name}.{domain}")
            for domain in domains
        ]
    return spread


def _renamed(group: Group, named: Mapping[str, list[str]], domain: str | None) -> Group:
    """The group under the names of one expert; None: of all experts and the shared weights."""

    def names_of(tensor: str) -> list[str]:
        names = named.get(tensor, [tensor])
        return [n for n in names if domain is None or parse_expert_domain(n) == domain]

    def slots(dense: Sequence[Slot]) -> tuple[Slot, ...]:
        return tuple(replace(slot, tensor=name) for slot in dense for name in names_of(slot.tensor))

    hooks = tuple(
        replace(hook, module=name.removesuffix(".weight"))
        for hook in group.hooks
        for name in names_of(f"{hook.module}.weight")
    )
    return replace(group, out=slots(group.out), into=slots(group.into), hooks=hooks)


def _check(group: Group, shapes: Shapes, tied: Mapping[str, str]) -> None:
    for slot in group.slots:
        shape = shapes.get(slot.tensor, shapes.get(tied.get(slot.tensor, "")))
        if shape is None:
            raise UserError(f"{slot.tensor} is missing, which {group.name} needs")
        if slot.axis >= len(shape) or shape[slot.axis] < slot.start + group.length(slot):
            raise UserError(
                f"{slot.tensor} has shape {list(shape)}; {group.name} needs {group.length(slot)} "
                f"features from {slot.start} on along axis {slot.axis}"
            )
