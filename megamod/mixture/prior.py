"""Priors over experts: estimated once on held-out text, kept as JSON, cut to the best few."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamod.errors import UserError
from megamod.files import write_json
from megamod.mixture.posterior import RULES

FORMAT = 1
KEYS = {"format", "domains", "prior", "rule", "text"}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Prior:
    """Probability of each expert before any token is seen.

    Attributes:
        domains: of the experts.
        weights: in the same order; not negative, summing to 1.
        rule: of the posterior it was estimated with.
        text: what it was estimated on: "data_digest", "domain", "split", "sequences".
    """

    domains: tuple[str, ...]
    weights: tuple[float, ...]
    rule: str = "last_token"
    text: Mapping[str, object] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Domains of the experts that count."""
        return tuple(d for d, w in zip(self.domains, self.weights, strict=True) if w > 0)


def uniform(domains: Sequence[str]) -> Prior:
    """All experts alike."""
    return Prior(tuple(domains), (1 / len(domains),) * len(domains))


def top_k(prior: Prior, k: int) -> Prior:
    """The k largest weights, scaled to sum to 1, the others 0; of equal ones the earlier.

    Raises:
        UserError: if there are not so many experts.
    """
    if not 1 <= k <= len(prior.domains):
        raise UserError(f"--topk {k}: there are {len(prior.domains)} experts, give 1 or more")
    by_weight = sorted(range(len(prior.weights)), key=lambda place: -prior.weights[place])
    total = math.fsum(prior.weights[place] for place in by_weight[:k])
    weights = [0.0] * len(prior.weights)
    for place in by_weight[:k]:
        weights[place] = prior.weights[place] / total
    return replace(prior, weights=tuple(weights))


def write_prior(path: Path, prior: Prior) -> None:
    """Write it as JSON, whole or not at all."""
    write_json(
        Path(path),
        {
            "format": FORMAT,
            "domains": list(prior.domains),
            "prior": list(prior.weights),
            "rule": prior.rule,
            "text": dict(prior.text) if prior.text is not None else None,
        },
    )


def read_prior(path: Path, domains: Sequence[str]) -> Prior:
    """A prior for experts of these domains, in their order.

    Raises:
        UserError: if the file cannot be read, names other domains, or its numbers are no prior.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"prior {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"prior {path} is not JSON: {error}") from error
    named, weights, rule = _checked(path, found)
    for domain in named:
        if domain not in domains:
            raise UserError(
                f"prior {path}: there is no expert of domain {domain!r}; "
                f"the experts are {', '.join(domains)}"
            )
    for domain in domains:
        if domain not in named:
            raise UserError(
                f"prior {path}: says nothing of domain {domain!r}; it names {', '.join(named)}"
            )
    total = math.fsum(weights)
    by_domain = dict(zip(named, weights, strict=True))
    ordered = tuple(by_domain[domain] / total for domain in domains)
    return Prior(tuple(domains), ordered, rule, found.get("text"))


def _checked(path: Path, found: object) -> tuple[list[str], list[float], str]:
    """Domains, weights and rule of a file's content."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        told = repr(found.get("format")) if isinstance(found, dict) else "missing"
        raise UserError(f"prior {path}: key 'format' is {told}; only {FORMAT} can be read")
    if unknown := sorted(set(found) - KEYS):
        raise UserError(f"prior {path}: unknown key {unknown[0]!r}; allowed: {sorted(KEYS)}")
    named, weights = found.get("domains"), found.get("prior")
    if not isinstance(named, list) or not named or not all(type(d) is str for d in named):
        raise UserError(f"prior {path}: key 'domains' is {named!r}, not a list of names")
    if doubled := [d for d in named if named.count(d) > 1]:
        raise UserError(f"prior {path}: names domain {doubled[0]!r} twice")
    if not isinstance(weights, list) or len(weights) != len(named):
        length = len(weights) if isinstance(weights, list) else "not a list"
        raise UserError(
            f"prior {path}: key 'prior' has the wrong length: {length}, domains: {len(named)}"
        )
    for domain, weight in zip(named, weights, strict=True):
        if type(weight) not in (int, float) or not 0 <= weight <= 1 + TOLERANCE:
            raise UserError(
                f"prior {path}: the weight of domain {domain!r} is {weight!r}, "
                "not a number from 0 to 1"
            )
    total = math.fsum(weights)
    if abs(total - 1) > TOLERANCE:
        raise UserError(f"prior {path}: sums to {total:.6g}; must be 1 within {TOLERANCE}")
    rule = found.get("rule", RULES[0])
    if rule not in RULES:
        raise UserError(f"prior {path}: rule {rule!r} is unknown; allowed: {', '.join(RULES)}")
    return named, weights, rule
