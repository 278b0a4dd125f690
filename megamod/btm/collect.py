"""Adds finished experts to the forest."""

import json
from dataclasses import replace
from pathlib import Path

from megamod.btm.campaign import Campaign
from megamod.btm.grown import RECORD, expert_of
from megamod.btm.tasks import WORLD, expert_folder
from megamod.files import sha256
from megamod.states.checkpoint_folder import StateRecord, checkpoint_name
from megamod.states.forest import Expert, Parent, edit_forest


def collect(campaign: Campaign, number: int, in_one_world: bool = False) -> None:
    """Add the experts of round `number` to OUT/forest.json, in the order of the recipe.

    They are added together, once the round has ended, because until then the experts of the round
    start from the forest before it. Entries of an earlier call are replaced.
    """
    new_experts = [
        _world_entry(campaign, domain)
        if in_one_world
        else expert_of(expert_folder(campaign, domain), domain)
        for domain in campaign.rounds[number]
    ]
    with edit_forest(campaign.output) as experts:
        names = {expert.domain for expert in new_experts}
        experts[:] = [e for e in experts if e.domain not in names] + new_experts


def _world_entry(campaign: Campaign, domain: str) -> Expert:
    """Forest entry of an expert that was trained in one world with the others."""
    run = expert_folder(campaign, WORLD)
    checkpoint = run / "checkpoints" / checkpoint_name(campaign.total_steps)
    saved = StateRecord.read(checkpoint / domain)
    entry = Expert(
        domain,
        run / "model" / domain,
        seed=saved.settings.get("seed"),
        start_update=campaign.first_step(0),
        updates=saved.state.step,
        tokens=saved.state.tokens.get(domain, 0),
        gpus=saved.world_size // len(campaign.domains),
        data_digest=saved.settings.get("data digest"),
        config_digest=sha256(run / "model" / domain / "config.json"),
    )
    return replace(entry, parents=_parents(run))


def _parents(run: Path) -> tuple[Parent, ...]:
    record = run / RECORD
    if not record.is_file():
        return ()
    saved = json.loads(record.read_text(encoding="utf-8"))
    return tuple(Parent(**parent) for parent in saved["parents"])
