"""Over which ranks a parameter is averaged: all of them, or those of one domain.

Dense training, DEMix and Branch-Train-Merge differ in nothing else. The scope of a parameter is
read off its name, in which an expert carries its domain: `...experts.<domain>...`.
"""

from collections.abc import Iterable
from enum import Enum

MARK = "experts"  # the component of a parameter name that is followed by a domain


class Scope(Enum):
    """The group that holds identical copies of a parameter."""

    WORLD = "world"
    DOMAIN = "domain"


class Sharing(Enum):
    """What the domains of a run share: everything, all but the experts, or nothing."""

    DENSE = "dense"
    DEMIX = "demix"
    BTM = "btm"


def sharing_of(untie: str) -> Sharing:
    """The sharing that a value of `--untie` stands for."""
    return {"none": Sharing.DENSE, "all": Sharing.BTM}.get(untie, Sharing.DEMIX)


def scopes(names: Iterable[str], sharing: Sharing) -> dict[str, Scope]:
    """Scope of every named parameter under a sharing."""
    if sharing is not Sharing.DEMIX:
        # Names are not asked: a stock mixture of experts calls its modules `experts` too.
        return dict.fromkeys(names, Scope.DOMAIN if sharing is Sharing.BTM else Scope.WORLD)
    return {name: Scope.DOMAIN if domain_of_name(name) else Scope.WORLD for name in names}


def domain_of_name(name: str) -> str | None:
    """The domain whose expert a parameter belongs to; None for a shared parameter.

    To be asked of models with an expert per domain alone.
    """
    parts = name.split(".")
    return parts[parts.index(MARK) + 1] if MARK in parts[:-1] else None


def dense_name(name: str) -> str:
    """The name that a parameter has in a dense model: `x.experts.law.fc1` -> `x.fc1`."""
    parts = name.split(".")
    if MARK in parts[:-1]:
        at = parts.index(MARK)
        del parts[at : at + 2]
    return ".".join(parts)
