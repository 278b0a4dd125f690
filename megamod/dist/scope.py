"""Scope of a parameter: the ranks that average its gradient.

Dense training, DEMix and Branch-Train-Merge differ in nothing else. The scope follows from the name
of the parameter, which for an expert of a domain contains it: `...experts.<domain>...`. The experts
of a stock mixture have no domain, and are named by the caller.
"""

from collections.abc import Collection, Iterable
from enum import Enum

EXPERTS_COMPONENT = "experts"  # the component of a parameter name that is followed by a domain


class Scope(Enum):
    """Ranks that hold identical copies of a parameter."""

    WORLD = "world"  # all ranks
    DOMAIN = "domain"  # the ranks of a domain
    EXPERT = "expert"  # the ranks with the same share of a mixture's experts


class Sharing(Enum):
    """Parameters shared by the domains of a run."""

    DENSE = "dense"  # all
    DEMIX = "demix"  # all but the experts
    BTM = "btm"  # none


def parse_sharing(untie: str) -> Sharing:
    """Return the sharing that a value of `--untie` means: "none", "all", or parts of the model."""
    return {"none": Sharing.DENSE, "all": Sharing.BTM}.get(untie, Sharing.DEMIX)


def find_scopes(
    names: Iterable[str], sharing: Sharing, experts: Collection[str] = ()
) -> dict[str, Scope]:
    """Find the scope of every parameter by name.

    Dense training gives all parameters WORLD, BTM gives them DOMAIN, but for `experts`. In DEMix an
    expert's parameters are DOMAIN, and all others WORLD.

    Args:
        names: names of parameters.
        sharing: dense, DEMix or BTM.
        experts: parameters with a rank's share of the experts of a mixture; their scope is EXPERT.
            Without effect in DEMix, which trains no such mixtures.
    """
    if sharing is not Sharing.DEMIX:
        # Names do not matter here: a stock mixture of experts names its modules `experts` too.
        scope = Scope.DOMAIN if sharing is Sharing.BTM else Scope.WORLD
        return {name: Scope.EXPERT if name in experts else scope for name in names}
    return {name: Scope.DOMAIN if parse_expert_domain(name) else Scope.WORLD for name in names}


def parse_expert_domain(name: str) -> str | None:
    """Parse the expert's domain from a parameter's name; return None for a shared parameter.

    Names of stock mixtures of experts, whose experts have no domains, must not be passed: what
    follows `experts` in them would be returned as the domain.
    """
    parts = name.split(".")
    return parts[parts.index(EXPERTS_COMPONENT) + 1] if EXPERTS_COMPONENT in parts[:-1] else None


def convert_to_dense_name(name: str) -> str:
    """Return the name that a parameter has in a dense model: `x.experts.law.fc1` -> `x.fc1`.

    The name of a shared parameter is returned unchanged. Names of stock mixtures must not be
    passed, see `parse_expert_domain`.
    """
    parts = name.split(".")
    if EXPERTS_COMPONENT in parts[:-1]:
        index = parts.index(EXPERTS_COMPONENT)
        del parts[index : index + 2]
    return ".".join(parts)
