"""Permutation groups of a model with experts, from those of a dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megamod.dist.scope import EXPERTS_COMPONENT, convert_to_dense_name, parse_expert_domain
from megamod.merging.alignment.groups import Hook, PermutationGroup, TensorAxis


def expand_groups_over_experts(
    groups: Sequence[PermutationGroup], tied: dict[str, str], shapes: Mapping[str, Sequence[int]]
) -> list[PermutationGroup]:
    """Expand the groups of a dense model to those of a model with experts, under its names.

    Features inside an expert are a group per expert, named GROUP.DOMAIN; features that experts
    share stay one group. Groups of a model without experts are returned as they are.

    Args:
        tied: tensor -> tensor that it shares storage with; changed to the names of experts.
        shapes: shapes of the tensors as they are stored.
    """
    named: dict[str, list[str]] = {}
    for name in shapes:
        named.setdefault(convert_to_dense_name(name), []).append(name)
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
    expanded = []
    for group in groups:
        tensors = [name for axis in group.axes for name in named.get(axis.tensor, [axis.tensor])]
        domains = list(dict.fromkeys(parse_expert_domain(name) for name in tensors))
        if group.family == "res" or None in domains:
            expanded.append(_make_expert_group(group, named, None))
            continue
        expanded += [
            replace(_make_expert_group(group, named, domain), name=f"{group.name}.{domain}")
            for domain in domains
        ]
    return expanded


def _make_expert_group(
    group: PermutationGroup, named: Mapping[str, list[str]], domain: str | None
) -> PermutationGroup:
    """Return a group of a dense model under the tensor and module names of one expert.

    Args:
        named: names in the model with experts, by the name in a dense model.
        domain: domain of the expert; None: all experts and the shared weights.
    """

    def list_expert_tensors(tensor: str) -> list[str]:
        """List the stored names of a dense model's tensor that belong to the expert."""
        names = named.get(tensor, [tensor])
        return [n for n in names if domain is None or parse_expert_domain(n) == domain]

    def rename_axes(dense: Sequence[TensorAxis]) -> tuple[TensorAxis, ...]:
        """Return the axes of the expert's tensors for those of a `dense` model.

        A tensor that each expert has gives several.
        """
        return tuple(
            replace(axis, tensor=name)
            for axis in dense
            for name in list_expert_tensors(axis.tensor)
        )

    def rename_hooks(dense: Sequence[Hook]) -> tuple[Hook, ...]:
        """Return the hooks of the expert's modules for those of a `dense` model."""
        return tuple(
            replace(hook, module=name.removesuffix(".weight"))
            for hook in dense
            for name in list_expert_tensors(f"{hook.module}.weight")
        )

    return replace(
        group,
        producing_axes=rename_axes(group.producing_axes),
        reading_axes=rename_axes(group.reading_axes),
        hooks=rename_hooks(group.hooks),
        projections=rename_hooks(group.projections),
    )
