import pytest

from megamod.dist.scope import (
    Scope,
    Sharing,
    convert_to_dense_name,
    find_scopes,
    parse_expert_domain,
    parse_sharing,
)
from megamod.models.lm.configuration import UNTIE

NAMES = {
    "model.layers.0.feed_forward.experts.law.fc1.weight": (
        "law",
        "model.layers.0.feed_forward.fc1.weight",
    ),
    "lm_head.experts.med.weight": ("med", "lm_head.weight"),
    "experts.a-b_1.x": ("a-b_1", "x"),
    "model.embeddings.tokens.weight": (None, "model.embeddings.tokens.weight"),
    "model.expertsy.law.weight": (None, "model.expertsy.law.weight"),
    "model.experts": (None, "model.experts"),  # nothing follows
}


@pytest.mark.parametrize("name", NAMES)
def test_domain_and_dense_name_of_a_parameter(name):
    assert (parse_expert_domain(name), convert_to_dense_name(name)) == NAMES[name]


def test_scopes_follow_names_under_demix_only():
    apart = {name: domain is not None for name, (domain, _) in NAMES.items()}
    by_name = find_scopes(NAMES, Sharing.DEMIX)
    assert {name: scope is Scope.DOMAIN for name, scope in by_name.items()} == apart
    # A dense mixture of experts of transformers calls its modules `experts` as well.
    assert set(find_scopes([*NAMES, "mlp.experts.0.up"], Sharing.DENSE).values()) == {Scope.WORLD}
    assert set(find_scopes(NAMES, Sharing.BTM).values()) == {Scope.DOMAIN}


def test_every_value_of_untie_has_a_sharing():
    assert parse_sharing("none") is Sharing.DENSE and parse_sharing("all") is Sharing.BTM
    assert {parse_sharing(untie) for untie in UNTIE if untie != "none"} == {Sharing.DEMIX}
