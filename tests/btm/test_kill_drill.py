"""Two kills of the drill in tests/drills: what comes about is what an undisturbed run makes."""

import pytest
from drills.btm_kill import DOMAINS, digests, drill, processes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_jobs_and_drivers_leave_no_trace(tmp_path):
    counts = drill(tmp_path, kills=2, seed=4)
    assert counts["jobs"] + counts["drivers"] == 2
    assert counts["forests"] >= 1 and counts["different"] == 0
    # The comparison was one of something: a model and an optimizer for each expert.
    output = digests(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in output) >= 2 * len(DOMAINS)
    assert set(DOMAINS) < set(output)
    assert processes(tmp_path) == []
