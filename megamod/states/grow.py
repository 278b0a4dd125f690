"""Add an expert to a model folder with experts; existing tensors stay bit for bit."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megamod.dist.scope import EXPERTS_COMPONENT, convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.files import link_file, write_json
from megamod.states.forest import read_model_config
from megamod.states.stream import ModelFolder
from megamod.states.weight_files import read_index
from megamod.states.weights import (
    INDEX_FILE,
    is_sharded,
    read_weights,
    select_weight_file,
    write_tensors,
    write_weights,
)


def add_expert(
    source: Path,
    target: Path,
    domain: str,
    template_domain: str,
    dense_weights: Mapping[str, Tensor],
) -> None:
    """Write weight files, index and config.json of a model with experts plus one new expert.

    Weight files of the source get a second name (hard link) in the target if both are on one file
    system, else they are copied.

    Args:
        source: folder of a model with experts.
        target: existing folder to write into, with none of these files; incomplete after an error.
        domain: name of the new expert.
        template_domain: an expert of the source. The new expert has the same tensors, with the
            same shapes and element types.
        dense_weights: weights of the new expert, by their names in a dense model; they are
            converted to the stored element types. Other weights have no effect.
    Raises:
        UserError: if the source cannot be read, has no expert `template_domain`, or one named
            `domain` already, or `dense_weights` lacks a weight or has it in another shape.
        OSError: if something cannot be written.
    """
    source, target = Path(source), Path(target)
    source_model = ModelFolder(source)
    known_domains = list(
        dict.fromkeys(
            owner for name in source_model.tensors if (owner := parse_expert_domain(name))
        )
    )
    if domain in known_domains or template_domain not in known_domains:
        raise UserError(
            f"{source}: its experts are {', '.join(known_domains) or 'none'}; {domain!r} must "
            f"be new, and {template_domain!r} one of them"
        )
    added: dict[str, Tensor] = {}
    for name, spec in source_model.tensors.items():
        if parse_expert_domain(name) != template_domain:
            continue
        weight = dense_weights.get(convert_to_dense_name(name))
        if weight is None or tuple(weight.shape) != spec.shape:
            shape = "none" if weight is None else tuple(weight.shape)
            raise UserError(
                f"{source}: the new expert {domain} needs {convert_to_dense_name(name)} of shape "
                f"{spec.shape}, but its weights have {shape}"
            )
        added[
            name.replace(
                f"{EXPERTS_COMPONENT}.{template_domain}.", f"{EXPERTS_COMPONENT}.{domain}.", 1
            )
        ] = weight.to(spec.dtype)

    if is_sharded(source):
        listed = read_index(source)
        weight_map = {name: listed[name] for name in source_model.tensors}
        for file in source_model.files:
            link_file(file, target / file.name)
    else:
        # A single file would be read in place of the index, so its tensors are sorted into files.
        weight_map = {
            name: select_weight_file(name, has_experts=True) for name in source_model.tensors
        }
        write_weights(target, read_weights(source), has_experts=True)
    for name in added:
        weight_map[name] = select_weight_file(name, has_experts=True)
    # All tensors of one expert are in one file.
    write_tensors(target / select_weight_file(name, has_experts=True), added, {"format": "pt"})
    size = sum(spec.nbytes for spec in source_model.tensors.values())
    size += sum(tensor.nbytes for tensor in added.values())
    write_json(target / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config = read_model_config(source)
    write_json(target / "config.json", {**config, "domains": [*config["domains"], domain]})
