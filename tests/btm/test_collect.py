"""Experts of one world become a forest like those of jobs of their own."""

import json
from pathlib import Path

from megamod.btm.campaign import Campaign
from megamod.btm.collect import add_round_to_forest


def test_experts_of_one_world(tmp_path):
    campaign = Campaign((("law", "med"),), ("law", "med"), 10, 4, 8, 4, 16, tmp_path)
    run = tmp_path / "experts" / "world"
    for domain, tokens in (("law", 384), ("med", 380)):
        state = {"step": 10, "data_step": 10, "tokens": {"law": tokens, "med": tokens}}
        saved = {"state": state, "settings": {"seed": 3, "data digest": "d"}, "world_size": 4}
        for folder, name, record in (
            (run / "checkpoints" / "step-10" / domain, "state.json", saved),
            (run / "model" / domain, "config.json", {"vocab_size": 5, "domains": [domain]}),
        ):
            folder.mkdir(parents=True)
            (folder / name).write_text(json.dumps(record))
    parents = [{"path": "seed/checkpoints/step-4", "weight": 1.0}]
    (run / "branch.json").write_text(json.dumps({"parents": parents, "start_update": 4}))

    add_round_to_forest(campaign, 0, in_one_world=True)
    first = (tmp_path / "forest.json").read_text()
    add_round_to_forest(campaign, 0, in_one_world=True)  # again, as after a kill
    assert (tmp_path / "forest.json").read_text() == first
    law, med = json.loads(first)["experts"]
    assert Path(law["path"]) == Path("experts/world/model/law")
    assert (law["domain"], law["tokens"], law["gpus"], law["seed"]) == ("law", 384, 2, 3)
    assert (med["domain"], med["tokens"], med["start_update"], med["updates"]) == (
        *("med", 380, 4),
        10,
    )
    assert med["parents"] == parents
