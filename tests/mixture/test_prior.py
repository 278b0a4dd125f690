import json

import pytest

from megamod.errors import UserError
from megamod.mixture.prior import (
    Prior,
    make_uniform_prior,
    read_prior,
    restrict_to_top_k,
    write_prior,
)

DOMAINS = ("law", "med", "code")
TEXT = {"data_digest": "ab", "domain": "law", "split": "valid", "sequences": 100}


def test_a_prior_is_read_in_the_requested_order(tmp_path):
    prior = Prior(DOMAINS, (0.5, 0.2, 0.3), "history", TEXT)
    write_prior(tmp_path / "prior.json", prior)
    assert read_prior(tmp_path / "prior.json", DOMAINS) == prior
    turned = read_prior(tmp_path / "prior.json", ("code", "law", "med"))
    assert turned.weights == pytest.approx((0.3, 0.5, 0.2)) and turned.domains[0] == "code"
    assert json.loads((tmp_path / "prior.json").read_text()) == {
        "format": 1,
        "domains": ["law", "med", "code"],
        "prior": [0.5, 0.2, 0.3],
        "rule": "history",
        "text": TEXT,
    }


def test_top_k_is_scaled_to_one():
    prior = Prior(("a", "b", "c", "d"), (0.1, 0.4, 0.4, 0.1))
    assert restrict_to_top_k(prior, 3).weights == pytest.approx((1 / 9, 4 / 9, 4 / 9, 0))
    assert restrict_to_top_k(prior, 1).domains_with_weight == ("b",)
    assert restrict_to_top_k(prior, 4).weights == pytest.approx(prior.weights)
    for k in (0, 5):
        with pytest.raises(UserError, match=f"--topk {k}: there are 4 experts"):
            restrict_to_top_k(prior, k)
    assert make_uniform_prior("ab") == Prior(("a", "b"), (0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": [0.5, 0.5]}, "2 weights for 3 domains"),
        ({"prior": "x"}, "prior: 'x' is not a list"),
        ({"prior": [0.5, 0.2, 0.2]}, "sums to 0.9; must be 1 within 0.0001"),
        ({"prior": [1.2, -0.1, -0.1]}, r"prior\[0\]: 1.2 is not 1.0001 or less"),
        ({"prior": [0.9, 0.3, -0.2]}, r"prior\[2\]: -0.2 is not 0 or more"),
        ({"prior": [0.5, 0.5, None]}, r"prior\[2\]: None is not a number"),
        ({"prior": [True, 0, 0]}, r"prior\[0\]: True is not a number"),
        ({"domains": ["law", "med"], "prior": [0.5, 0.5]}, "has no weight of domain 'code'"),
        ({"domains": ["law", "med", "art"]}, "there is no expert of domain 'art'"),
        ({"domains": ["law", "med", "law"]}, "names domain 'law' twice"),
        ({"prior": [0.5, 0.5, float("nan")]}, r"prior\[2\]: nan"),
        ({"domains": ["law", "med", "../law"]}, r"domains\[2\]: '../law' is not made of"),
        ({"domains": []}, r"domains: \[\] has fewer than 1 items"),
        ({"format": 2}, "format: 2 is not one of 1"),
        ({"priors": 1}, "unknown key 'priors'; the nearest is 'prior'"),
        ({"rule": "bayes"}, "rule: 'bayes' is not one of last_token, history"),
    ],
)
def test_invalid_priors_are_refused(tmp_path, change, message):
    content = {"format": 1, "domains": list(DOMAINS), "prior": [0.5, 0.2, 0.3], **change}
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_prior(path, DOMAINS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[1]", "is not `key: value` lines"), ("{}", "format is missing")],
)
def test_invalid_json_is_refused(tmp_path, text, message):
    (tmp_path / "prior.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_prior(tmp_path / "prior.json", DOMAINS)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_prior(tmp_path / "none.json", DOMAINS)


def test_rounding_is_forgiven(tmp_path):
    path = tmp_path / "prior.json"
    path.write_text(json.dumps({"format": 1, "domains": ["a", "b"], "prior": [0.33333, 0.66666]}))
    assert sum(read_prior(path, ("a", "b")).weights) == pytest.approx(1, abs=1e-12)
