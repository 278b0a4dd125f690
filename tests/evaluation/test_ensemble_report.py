import json

import pytest

from megamod.evaluation.ensemble import DomainResult, MixingProtocol
from megamod.evaluation.ensemble_report import (
    format_json_lines,
    format_priors,
    format_scores,
    make_results_record,
)
from megamod.evaluation.perplexity import Score
from megamod.evaluation.plots import plot_posterior
from megamod.mixture.prior import Prior


def results(size: int = 16) -> dict[str, DomainResult]:
    def score(nll: float) -> Score:
        return Score(nll, 10, size)

    return {
        "novel": DomainResult(
            "novel",
            prior=Prior(("law", "med"), (0.9, 0.1), text={"sequences": 100}),
            single={"law": score(20.0), "med": score(30.0)},
            modes={"cached_prior": score(18.0), "simple_average": score(1e5)},
            without={"law": score(29.0), "med": score(19.0)},
            lines=[{"ppl": float("inf"), "posterior": [0.5, 0.5]}],
        )
    }


def test_tables():
    output = format_scores(results(), MixingProtocol(removal_test=True))
    perplexity, bits, alone, removal = output.split("\n\n")
    rows = [line.split() for line in perplexity.splitlines()[2:]]
    assert rows[:2] == [["best", "single", "expert", "7.39"], ["cached_prior", "6.05*"]]
    assert perplexity.endswith("best single expert: law on novel")
    assert "1.803" in bits and "1.623*" in bits  # 20 and 18 nats over 16 bytes
    assert alone.splitlines()[0] == "test perplexity of each expert alone"
    assert [line.split() for line in alone.splitlines()[2:]] == [["law", "7.39*"], ["med", "20.09"]]
    assert removal.splitlines()[0] == "test perplexity of cached_prior without one expert"
    assert [line.split()[-1] for line in removal.splitlines()[2:]] == ["6.05*", "18.17", "6.69"]
    assert len(format_scores(results(size=0), MixingProtocol()).split("\n\n")) == 2


def test_a_long_prior_is_summed_up():
    names = tuple(f"d{number}" for number in range(9))
    prior = Prior(names, (0.0, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.06, 0.04))
    output = format_priors({"x": DomainResult("x", prior=prior)}).splitlines()[1]
    assert output.startswith("x  d1 0.300, d2 0.200") and output.endswith("3 others 0.100")
    assert format_priors({"x": DomainResult("x")}) == ""


def test_record_and_lines_are_json():
    record = json.loads(json.dumps(make_results_record(results(), MixingProtocol())))
    novel = record["domains"]["novel"]
    assert novel["prior"] == {"law": 0.9, "med": 0.1} and novel["best_single"] == "law"
    assert novel["perplexity"] == pytest.approx(6.0496, abs=1e-4) and novel["tokens"] == 10
    assert novel["without"]["med"]["nll"] == 19.0 and record["rule"] == "last_token"
    assert json.loads(format_json_lines(results())) == {"ppl": None, "posterior": [0.5, 0.5]}


@pytest.mark.parametrize("experts", [1, 4, 14])
def test_plot_of_the_posterior(tmp_path, experts):
    shares = {f"d{n}": [1 / experts] * 30 for n in range(experts)}
    plot_posterior(shares, tmp_path / "along.png", "a title")
    assert (tmp_path / "along.png").read_bytes()[:4] == b"\x89PNG"
