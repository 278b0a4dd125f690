"""Layers in the names of tensors, such as `encoder.layer.3.output.bias`. This needs no torch."""

import re

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d{1,6})(?:\.|$)")


def split_at_layer_number(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name at its layer number: `h.`, 3, `.attn.weight`.

    The number of the layer is the first number among the parts of the name. None if there is none.
    """
    match = _LAYER_NUMBER.search(name)
    return None if match is None else (name[: match.start(1)], int(match[1]), name[match.end(1) :])


def find_layer_prefix(name: str) -> str:
    """Return the name of a tensor up to the number of its layer and a dot, such as `h.3.`.

    "" for a tensor outside of layers, and for one that is itself an entry of a list, `scales.3`.
    """
    parts = split_at_layer_number(name)
    return name[: len(name) - len(parts[2]) + 1] if parts and parts[2] else ""
