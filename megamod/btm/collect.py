"""Finished experts become part of the forest."""

import json
from dataclasses import replace
from pathlib import Path

from megamod.btm.grown import RECORD, expert_of
from megamod.btm.recipe import Campaign
from megamod.btm.tasks import WORLD, expert_folder
from megamod.files import sha256
from megamod.states.forest import Expert, Parent, edit_forest


def collect(campaign: Campaign, number: int, in_one_world: bool = False) -> None:
    """Put the experts of round `number` into OUT/forest.json, in the order of the recipe.

    All at once, when the round has ended: until then the experts of that round start from the
    forest as it was. Entries of an earlier call are replaced.
    """
    made = [
        _of_world(campaign, domain)
        if in_one_world
        else expert_of(expert_folder(campaign, domain), domain)
        for domain in campaign.rounds[number]
    ]
    with edit_forest(campaign.output) as experts:
        names = {expert.domain for expert in made}
        experts[:] = [e for e in experts if e.domain not in names] + made


def _of_world(campaign: Campaign, domain: str) -> Expert:
    """The entry of an expert that was trained beside the others, in one world."""
    run = expert_folder(campaign, WORLD)
    checkpoint = run / "checkpoints" / f"step-{campaign.total_steps}" / domain
    saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    entry = Expert(
        domain,
        run / "model" / domain,
        seed=saved["settings"].get("seed"),
        start_update=campaign.first_step(0),
        updates=saved["state"]["step"],
        tokens=saved["state"]["tokens"].get(domain, 0),
        gpus=saved["world_size"] // len(campaign.domains),
        data_digest=saved["settings"].get("data digest"),
        config_digest=sha256(run / "model" / domain / "config.json"),
    )
    return replace(entry, parents=_parents(run))


def _parents(run: Path) -> tuple[Parent, ...]:
    record = run / RECORD
    if not record.is_file():
        return ()
    told = json.loads(record.read_text(encoding="utf-8"))
    return tuple(Parent(**parent) for parent in told["parents"])
