"""Values in nested blocks of a JSON object, by dotted key paths such as `optimizer.params.lr`."""

from collections.abc import Iterator, Mapping

MISSING = object()
"""Result of `get_by_key_path` for a path without a value."""


def remove_nulls(value: object) -> object:
    """Return a copy of a block without keys whose value is null, which means that they are not set.

    Blocks inside lists and values of other types are returned as they are.
    """
    if isinstance(value, dict):
        return {key: remove_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def iterate_values_by_key_path(value: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Yield key path, such as `a.b[0]`, and value of everything that is no block and no list.

    `where` is the key path of `value` itself, "" at the top.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from iterate_values_by_key_path(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from iterate_values_by_key_path(inner, f"{where}[{index}]")
    else:
        yield where, value


def get_by_key_path(config: Mapping, key_path: str) -> object:
    """Return the value of `config` at a key path such as "optimizer.params.lr"; else `MISSING`."""
    for key in key_path.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return MISSING
        config = config[key]
    return config


def set_by_key_path(config: dict, key_path: str, value: object) -> None:
    """Set the value of `config` at a key path such as "optimizer.params.lr", in place.

    Missing blocks are created.
    """
    *parents, key = key_path.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[key] = value
