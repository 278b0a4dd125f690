"""Permutation groups of a model: features that are permuted together, and the weights involved.

The features of a group may have any order on which the weights that produce them and the weights
that read them agree. The rest of this package works on these groups and knows no architecture.
Source: Verma and Elbayad 2024 (Merging text transformer models from different initializations).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.merging.alignment.expert_groups import expand_groups_over_experts
from megamod.merging.alignment.families import FAMILIES, Family, Head
from megamod.merging.alignment.groups import Hook, PermutationGroup, TensorAxis

Shapes = Mapping[str, Sequence[int]]
"""Shapes of the tensors of a model by name."""


@dataclass(frozen=True)
class Symmetry:
    """The permutation groups of a model, in the order of its computation.

    Attributes:
        groups: by name.
        family: module names of the architecture.
        tied: tensor -> tensor that it shares storage with.
        unknown: names of tensors whose role in the model is not known.
        domains: domains of a model with experts; empty: it has none.
        output_heads: output heads of the model.
        tensors: names of all tensors that are stored.
    """

    groups: Mapping[str, PermutationGroup]
    family: Family
    tied: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    output_heads: tuple[Head, ...] = ()
    tensors: frozenset[str] = frozenset()

    def select_groups(self, *families: str) -> list[PermutationGroup]:
        """Return the groups of these families, in the order of the computation."""
        return [group for group in self.groups.values() if group.family in families]


def find_symmetry(config: Mapping[str, object], shapes: Shapes, *, qk: bool = False) -> Symmetry:
    """Find the permutation groups of a model, from names and shapes alone.

    Args:
        config: its configuration, as in config.json.
        shapes: shapes of all its floating-point tensors, as they are stored.
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
    _check_required_fields(family, config)
    dense = {convert_to_dense_name(name): name for name in shapes}
    prefix = family.prefix if any(name.startswith(family.prefix) for name in dense) else ""
    names = _ModuleNames(family, prefix, {name: tuple(shapes[raw]) for name, raw in dense.items()})
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
            if names.may_have_tensor(alias)
        }
    output_heads = _find_output_heads(names)
    readers = _list_output_readers(names, output_heads)
    groups: list[PermutationGroup] = []
    if family.residual:
        groups.append(_make_embedding_group(names))
    for layer in range(layers):
        groups += _make_layer_groups(names, layer, layers, (heads, key_heads), qk, readers)
    groups += [names.make_head_group(head, reader) for head, reader in output_heads if reader]
    expanded = expand_groups_over_experts(groups, tied, shapes)
    grouped_tensors = {axis.tensor for group in expanded for axis in group.axes}
    unknown = tuple(
        name
        for name in shapes
        if name not in grouped_tensors and not convert_to_dense_name(name).endswith(family.free)
    )
    domains = tuple(dict.fromkeys(d for name in shapes if (d := parse_expert_domain(name))))
    for group in expanded:
        _check_group_shapes(group, shapes, tied)
    return Symmetry(
        {group.name: group for group in expanded},
        family,
        {alias: source for alias, source in tied.items() if source in shapes},
        unknown,
        domains,
        tuple(head for head, _ in output_heads),
        frozenset(shapes),
    )


def _check_required_fields(family: Family, config: Mapping[str, object]) -> None:
    """Refuse a configuration `config` that the family's names do not describe.

    Raises:
        UserError: naming the field with another value than the required one.
    """
    for key, required in family.required:
        value = config.get(key, required)
        if value != required:
            raise UserError(f"config.json: {key} is {value!r}; only {required!r} can be aligned")


@dataclass(frozen=True)
class _ModuleNames:
    """Names and shapes of a model's modules, under the names of a dense model.

    Attributes:
        prefix: prefix of the backbone's names in this model; "" if they have none.
        shapes: shapes of all tensors.
    """

    family: Family
    prefix: str
    shapes: Shapes

    def may_have_tensor(self, tensor: str) -> bool:
        """Return True if the model has this tensor, which need not be stored, as it may be tied.

        It does if a tensor of the module around it is stored. A matrix outside of modules, such as
        `lm_head.weight`, does if it is stored, or the backbone has a prefix and no classifier.
        """
        stem = ".".join(tensor.split(".")[:-2])
        if not stem:
            # If it is not stored, only the prefix of the backbone marks a language model.
            others = (f"{reader}.weight" in self.shapes for reader in ("score", "classifier"))
            return tensor in self.shapes or (bool(self.prefix) and not any(others))
        return any(name.startswith(f"{stem}.") for name in self.shapes)

    def has_module(self, module: str) -> bool:
        """Return True if the model has a weight of the module with this name."""
        return f"{module}.weight" in self.shapes

    def list_produced_axes(
        self, module: str, start: int = 0, part: str = "features", role: str = ""
    ) -> list[TensorAxis]:
        """List the tensor axes along which a linear layer produces features: weight and bias.

        Args:
            module: name of the layer.
            start, part, role: see `TensorAxis`.
        """
        dim = 1 if self.family.transposed else 0
        axes = [TensorAxis(f"{module}.weight", dim, start, part, role)]
        if f"{module}.bias" in self.shapes:
            axes.append(TensorAxis(f"{module}.bias", 0, start, part, role))
        return axes

    def list_widening_modules(self, layer: str) -> list[str]:
        """List the modules that produce the feed-forward features of a layer: `widen`, and `gate`
        if the family has one.

        Args:
            layer: prefix of the layer's names.
        """
        parts = (self.family.widen, *((self.family.gate,) if self.family.gate else ()))
        return [layer + part for part in parts]

    def list_read_axes(self, module: str, role: str = "stream") -> list[TensorAxis]:
        """List the axes along which the linear layer `module` reads features: one, of its weight.

        Only layers of the backbone are stored transposed, those of heads never; `role` is that of
        the features.
        """
        inside = module.startswith(self.prefix) and self.prefix
        dim = 0 if self.family.transposed and inside else 1
        return [TensorAxis(f"{module}.weight", dim, role=role)]

    def list_scaled_axes(self, module: str) -> list[TensorAxis]:
        """List the tensor axes along which the norm `module` scales and shifts features.

        They are those of its gain, and of its bias if it has one.
        """
        axes = [TensorAxis(f"{module}.weight", 0, role="gain")]
        if f"{module}.bias" in self.shapes:
            axes.append(TensorAxis(f"{module}.bias", 0, role="shift"))
        return axes

    def get_axis_length(self, tensor: str, axis: int) -> int:
        """Return the length of a tensor's axis.

        Raises:
            UserError: if there is no such tensor.
        """
        if tensor not in self.shapes:
            raise UserError(f"{tensor} is missing, which alignment needs")
        return self.shapes[tensor][axis]

    def make_head_group(self, head: Head, reader: str) -> PermutationGroup:
        """Make the permutation group of an output head: the features of its dense module.

        Args:
            reader: module that reads them.
        Raises:
            UserError: if the weight of the dense module is missing.
        """
        dense = self.find_head_module_name(head)
        out = [TensorAxis(f"{dense}.weight", 0), TensorAxis(f"{dense}.bias", 0)]
        out += self.list_scaled_axes(head.norm) if head.norm else []
        size = self.get_axis_length(f"{dense}.weight", 0)
        into = [TensorAxis(f"{reader}.weight", 1)]
        return _make_group(head.name, "head", size, None, out, into, [Hook(reader, "input")])

    def find_head_module_name(self, head: Head) -> str:
        """Return the name of a head's dense module: inside the backbone if it is there, else
        outside.
        """
        inside = self.prefix + head.dense
        return inside if self.has_module(inside) else head.dense


def _make_group(
    name: str,
    family: str,
    size: int,
    heads: int | None,
    out: Iterable[TensorAxis],
    into: Iterable[TensorAxis],
    hooks: Iterable[Hook],
) -> PermutationGroup:
    """Make a group from its parts; see `PermutationGroup` for the fields.

    Args:
        name, family, size, heads: see `PermutationGroup`.
        out: axes that produce the features; `into`: axes that read them.
        hooks: where the features are observed.
    """
    return PermutationGroup(name, family, size, heads, tuple(out), tuple(into), tuple(hooks))


def _find_output_heads(names: _ModuleNames) -> list[tuple[Head, str | None]]:
    """Find the output heads of a model: those of its family whose dense module it has.

    Args:
        names: of the modules of the model.
    Returns:
        each head, and the module that reads its features; None: no module does.
    """
    aliases = {alias for alias, _ in names.family.tied}
    heads = []
    for head in names.family.output_heads:
        if names.has_module(names.find_head_module_name(head)):
            # A tied output matrix need not be stored.
            readers = (r for r in head.readers if names.has_module(r) or f"{r}.weight" in aliases)
            heads.append((head, next(readers, None)))
    return heads


def _list_output_readers(
    names: _ModuleNames, output_heads: Sequence[tuple[Head, str | None]]
) -> list[TensorAxis]:
    """List the axes that read the last hidden states: of output heads, then of other modules.

    Another module is an output matrix, for example; those that read the features of a head are not
    among them.

    Args:
        names: of the modules of the model.
        output_heads: see `_find_output_heads`.
    """
    family = names.family
    modules = [names.find_head_module_name(head) for head, _ in output_heads]
    after_heads = {reader for _, reader in output_heads}
    for reader in family.readers:
        module = names.prefix + reader if names.has_module(names.prefix + reader) else reader
        tied = any(alias == f"{module}.weight" for alias, _ in family.tied)
        exists = names.has_module(module) or (tied and names.may_have_tensor(f"{module}.weight"))
        if exists and module not in after_heads:
            modules.append(module)
    return [TensorAxis(f"{module}.weight", 1, role="stream") for module in modules]


def _make_embedding_group(names: _ModuleNames) -> PermutationGroup:
    """Make the group of the residual stream before the first layer of the model with these names.

    Raises:
        UserError: if its norm is missing.
    """
    family, prefix = names.family, names.prefix
    out = [
        TensorAxis(f"{prefix}{table}.weight", 1, role="stream")
        for table in family.tables
        if names.has_module(prefix + table)
    ]
    norm = f"{prefix}{family.layer.format(0)}{family.norms[0]}"
    if not family.pre_norm:
        norm = prefix + family.outer_norm
    size = names.get_axis_length(f"{norm}.weight", 0)
    into = _list_attention_readers(names, 0)
    hook = Hook(norm, "input" if family.pre_norm else "output")
    return _make_group(
        "res.emb", "res", size, None, out + names.list_scaled_axes(norm), into, [hook]
    )


def _list_attention_readers(names: _ModuleNames, layer: int) -> list[TensorAxis]:
    """List the axes that read the residual stream for the attention of a layer.

    They are those of the query, key and value matrices, or of the one matrix for all three.
    """
    family = names.family
    stem = names.prefix + family.layer.format(layer)
    modules = dict.fromkeys((family.query, family.key, family.value))
    return [axis for module in modules for axis in names.list_read_axes(stem + module)]


def _make_layer_groups(
    names: _ModuleNames,
    layer: int,
    layers: int,
    counts: tuple[int, int],
    qk: bool,
    readers: Sequence[TensorAxis],
) -> list[PermutationGroup]:
    """Make the groups of one layer, in the order of its computation.

    Args:
        names: of the modules of the model.
        layer, layers: number of the layer, and of all layers.
        counts: numbers of query heads and of key heads.
        qk: make a group of queries and keys of its own.
        readers: axes that read the last hidden states.
    Raises:
        UserError: if a tensor is missing, or features do not fit the heads.
    """
    family, (heads, key_heads) = names.family, counts
    stem = names.prefix + family.layer.format(layer)
    query, key, value, mixed, narrow = (
        stem + part
        for part in (family.query, family.key, family.value, family.mixed, family.narrow)
    )
    widen = names.list_widening_modules(stem)
    inputs = 0 if family.transposed else 1
    size = names.get_axis_length(f"{mixed}.weight", inputs)
    if size % heads:
        raise UserError(f"{mixed}.weight: {size} features cannot be split into {heads} heads")
    fused = query == key
    starts = (0, size, 2 * size) if fused else (0, 0, 0)
    parts = ("queries", "keys", "values") if family.rotary else ("features",) * 3
    roles = ("qk", "qk", "values")
    projections = zip((query, key, value), starts, parts, roles, strict=True)
    produced = [names.list_produced_axes(*projection) for projection in projections]
    out = [*produced[0], *produced[1]]
    hook = Hook(mixed, "input")
    into = names.list_read_axes(mixed, "values")
    groups = []
    if qk:
        hooks = [Hook(key, "output", starts[1]), Hook(query, "output", starts[0])]
        groups.append(_make_group(f"layer.{layer}.qk", "qk", size, heads, out, [], hooks))
        out = []
    out += produced[2]
    attention = _make_group(f"layer.{layer}.attn", "attn", size, key_heads, out, into, [hook])
    observed = zip((query, key, value), starts, strict=True)
    groups.append(
        replace(
            attention,
            queries_per_key=heads // key_heads,
            projections=tuple(Hook(module, "output", start) for module, start in observed),
        )
    )
    wide = names.get_axis_length(f"{narrow}.weight", inputs)
    # Features may change sign if their reader changes it too, but not before an activation: the
    # gate has one, what it multiplies has none.
    signs = ["sign", ""] if family.gate else [""]
    out = [
        axis
        for module, role in zip(widen, signs, strict=True)
        for axis in names.list_produced_axes(module, role=role)
    ]
    into, hooks = names.list_read_axes(narrow, signs[0]), [Hook(narrow, "input")]
    feed_forward = _make_group(f"layer.{layer}.ffn", "ff", wide, None, out, into, hooks)
    if not family.residual:
        return [*groups, feed_forward]
    last = layer == layers - 1
    after = [stem + norm for norm in family.norms]
    if family.pre_norm:
        following = names.prefix + family.layer.format(layer + 1) + family.norms[0]
        after = [after[1], names.prefix + family.outer_norm if last else following]
    stream = names.get_axis_length(f"{after[0]}.weight", 0)
    side = "input" if family.pre_norm else "output"
    following_readers = readers if last else _list_attention_readers(names, layer + 1)
    middle, end = (
        _make_group(f"res.{layer}.{name}", "res", stream, None, out, into, [Hook(norm, side)])
        for name, out, norm, into in (
            (
                "attn_ln",
                names.list_produced_axes(mixed, role="stream") + names.list_scaled_axes(after[0]),
                after[0],
                [axis for module in widen for axis in names.list_read_axes(module)],
            ),
            (
                "final_ln",
                names.list_produced_axes(narrow, role="stream") + names.list_scaled_axes(after[1]),
                after[1],
                following_readers,
            ),
        )
    )
    return [*groups, middle, feed_forward, end]


def _check_group_shapes(group: PermutationGroup, shapes: Shapes, tied: Mapping[str, str]) -> None:
    """Refuse a group whose tensors are missing or too small.

    Args:
        shapes: shapes of the model's tensors by name.
        tied: tensor -> tensor that is stored in its place.
    Raises:
        UserError: naming the tensor.
    """
    for axis in group.axes:
        shape = shapes.get(axis.tensor, shapes.get(tied.get(axis.tensor, "")))
        if shape is None:
            raise UserError(f"{axis.tensor} is missing, which {group.name} needs")
        if axis.dim >= len(shape) or shape[axis.dim] < axis.start + group.count_entries(axis):
            raise UserError(
                f"{axis.tensor} has shape {list(shape)}; {group.name} needs "
                f"{group.count_entries(axis)} "
                f"features from {axis.start} on along axis {axis.dim}"
            )
