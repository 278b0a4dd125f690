"""The drill of tests/drills/btm_kill.py: killed forests are what undisturbed ones are."""

import pytest
from drills.btm_kill import DOMAINS, digests, drill, processes
from drills.sizes import SEED, pick, report

KILLS = pick(2, 20)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_killed_jobs_and_drivers_leave_no_trace(tmp_path, record_property):
    counts = drill(tmp_path, kills=KILLS, seed=SEED)
    assert counts["jobs"] + counts["drivers"] == KILLS
    report(record_property, KILLS, counts["different"])
    assert counts["forests"] >= 1 and counts["different"] == 0
    # The comparison was one of something: a model and an optimizer for each expert.
    output = digests(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in output) >= 2 * len(DOMAINS)
    assert set(DOMAINS) < set(output)
    assert processes(tmp_path) == []
