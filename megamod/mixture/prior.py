"""Priors over experts: uniform ones, files of estimated ones, and restriction to the top k.

`ensemble.estimate_prior` estimates them on held-out text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megamod.errors import UserError
from megamod.files import write_json
from megamod.mixture.posterior import RULES
from megamod.names import Name
from megamod.schemas import Items, Schema, read_checked_file

FORMAT = 1
TOLERANCE = 1e-4  # of the sum of the weights in a file


@dataclass(frozen=True)
class Prior:
    """Probability of each expert before any token is seen.

    Attributes:
        domains: domains of the experts.
        weights: in the same order; not negative, with sum 1.
        rule: posterior rule of the estimation.
        text: text of the estimation: "data_digest", "domain", "split", "sequences"; None: unknown.
    """

    domains: tuple[str, ...]
    weights: tuple[float, ...]
    rule: str = "last_token"
    text: Mapping[str, object] | None = None

    @property
    def domains_with_weight(self) -> tuple[str, ...]:
        """Domains with a weight above 0."""
        return tuple(d for d, w in zip(self.domains, self.weights, strict=True) if w > 0)


def make_uniform_prior(domains: Sequence[str]) -> Prior:
    """Make a prior that gives each domain's expert the weight 1 / E."""
    return Prior(tuple(domains), (1 / len(domains),) * len(domains))


def restrict_to_top_k(prior: Prior, k: int) -> Prior:
    """Return a copy of a prior with the k largest weights, scaled to sum 1; the others are 0.

    Of equal weights the earlier one is kept.

    Raises:
        UserError: if k is below 1 or above the number of experts.
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
    """Write a prior to a JSON file, atomically; `read_prior` reads it in any order of domains."""
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


class _PriorFile(Schema):
    """The file that `write_prior` writes."""

    format: Literal[FORMAT]
    domains: Items[Name] = Field(min_length=1)
    prior: Items[Annotated[float, Field(ge=0, le=1 + TOLERANCE, allow_inf_nan=False)]]
    rule: Literal[RULES] = RULES[0]
    text: dict[str, object] | None = None

    @model_validator(mode="after")
    def _check_weights(self) -> "_PriorFile":
        """Refuse a doubled domain, another number of weights, and a sum other than 1, by a
        ValueError.
        """
        if doubled := [d for d in self.domains if self.domains.count(d) > 1]:
            raise ValueError(f"names domain {doubled[0]!r} twice")
        if len(self.prior) != len(self.domains):
            raise ValueError(f"{len(self.prior)} weights for {len(self.domains)} domains")
        total = math.fsum(self.prior)
        if abs(total - 1) > TOLERANCE:
            raise ValueError(f"prior sums to {total:.6g}; must be 1 within {TOLERANCE}")
        return self


def read_prior(path: Path, domains: Sequence[str]) -> Prior:
    """Read a prior from a JSON file; its weights are put into the order of `domains`.

    Args:
        path: a file that `write_prior` wrote.
        domains: domains of the experts, exactly those that the file must name.
    Returns:
        the prior, with weights scaled to sum 1.
    Raises:
        UserError: if the file cannot be read, names other domains, or has invalid weights.
    """
    file = read_checked_file(path, _PriorFile, f"prior {path}")
    named = file.domains
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
    total = math.fsum(file.prior)
    by_domain = dict(zip(named, file.prior, strict=True))
    ordered = tuple(by_domain[domain] / total for domain in domains)
    return Prior(tuple(domains), ordered, file.rule, file.text)
