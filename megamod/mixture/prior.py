"""Priors over experts: estimated on held-out text, stored as JSON, restricted to the top k."""

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
        weights: in the same order; not negative, with sum 1.
        rule: posterior rule of the estimation.
        text: text of the estimation: "data_digest", "domain", "split", "sequences".
    """

    domains: tuple[str, ...]
    weights: tuple[float, ...]
    rule: str = "last_token"
    text: Mapping[str, object] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Domains with a weight above 0."""
        return tuple(d for d, w in zip(self.domains, self.weights, strict=True) if w > 0)


def uniform(domains: Sequence[str]) -> Prior:
    """Prior with equal weights."""
    return Prior(tuple(domains), (1 / len(domains),) * len(domains))


def top_k(prior: Prior, k: int) -> Prior:
    """Keep the k largest weights, scaled to sum 1, and set the others to 0; ties: the earlier.

    Raises:
        UserError: if there are fewer than k experts.
    """
    if not 1 <= k <= len(prior.domains):
        raise UserError(f"--topk {k}: there are {len(prior.domains)} experts, give 1 or more")
    by_weight = sorted(range(len(prior.weights)), key=lambda expert: -prior.weights[expert])
    total = math.fsum(prior.weights[expert] for expert in by_weight[:k])
    weights = [0.0] * len(prior.weights)
    for expert in by_weight[:k]:
        weights[expert] = prior.weights[expert] / total
    return replace(prior, weights=tuple(weights))


def write_prior(path: Path, prior: Prior) -> None:
    """Write a prior as JSON, atomically."""
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
    """Read a prior of experts of these domains, in the order of `domains`.

    Raises:
        UserError: if the file cannot be read, names other domains, or has invalid weights.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"prior {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"prior {path} is not JSON: {error}") from error
    named, weights, rule = _checked(path, content)
    for domain in named:
        if domain not in domains:
            raise UserError(
                f"prior {path}: there is no expert of domain {domain!r}; "
                f"the experts are {', '.join(domains)}"
            )
    for domain in domains:
        if domain not in named:
            raise UserError(
                f"prior {path}: has no weight of domain {domain!r}; it names {', '.join(named)}"
            )
    total = math.fsum(weights)
    by_domain = dict(zip(named, weights, strict=True))
    ordered = tuple(by_domain[domain] / total for domain in domains)
    return Prior(tuple(domains), ordered, rule, content.get("text"))


def _checked(path: Path, content: object) -> tuple[list[str], list[float], str]:
    """Check a file's content and return domains, weights and rule."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        value = repr(content.get("format")) if isinstance(content, dict) else "missing"
        raise UserError(f"prior {path}: key 'format' is {value}; only {FORMAT} can be read")
    if unknown := sorted(set(content) - KEYS):
        raise UserError(f"prior {path}: unknown key {unknown[0]!r}; allowed: {sorted(KEYS)}")
    named, weights = content.get("domains"), content.get("prior")
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
    rule = content.get("rule", RULES[0])
    if rule not in RULES:
        raise UserError(f"prior {path}: rule {rule!r} is unknown; allowed: {', '.join(RULES)}")
    return named, weights, rule
