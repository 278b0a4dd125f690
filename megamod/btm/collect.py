"""Finished experts of a campaign, added to its forest."""

from megamod.btm.campaign import Campaign
from megamod.btm.forest_entry import list_seed_parents, make_forest_entry, read_branch_record
from megamod.btm.tasks import WORLD, get_expert_folder
from megamod.files import hash_file
from megamod.states.adapter import get_config_file
from megamod.states.checkpoint_folder import StateRecord, format_checkpoint_name
from megamod.states.forest import Expert, edit_forest


def add_round_to_forest(campaign: Campaign, round_index: int, in_one_world: bool = False) -> None:
    """Add the experts of a round to OUT/forest.json, in the order of the recipe.

    They are added together, once the round has ended, because until then the experts of the round
    start from the forest before it. Entries of the same domains are replaced.

    Args:
        round_index: number of the round, from 0.
        in_one_world: the round was trained in one job of independent models, in OUT/experts/world.
    Raises:
        UserError: if the run of an expert has no model, or the forest is malformed.
    """
    new_experts = [
        _make_world_expert(campaign, domain)
        if in_one_world
        else make_forest_entry(get_expert_folder(campaign, domain), domain)
        for domain in campaign.rounds[round_index]
    ]
    with edit_forest(campaign.output) as experts:
        names = {expert.domain for expert in new_experts}
        experts[:] = [e for e in experts if e.domain not in names] + new_experts


def _make_world_expert(campaign: Campaign, domain: str) -> Expert:
    """Make the forest entry of an expert that was trained in one job with the others.

    Args:
        domain: domain of the expert, which names its subfolder in the job's checkpoint and model.
    Raises:
        UserError: if the last checkpoint of the job lacks the state of this expert, or branch.json
            is malformed.
    """
    run = get_expert_folder(campaign, WORLD)
    checkpoint = run / "checkpoints" / format_checkpoint_name(campaign.get_last_step(0))
    saved = StateRecord.read(checkpoint / domain)
    branched, model = read_branch_record(run), run / "model" / domain
    return Expert(
        domain=domain,
        path=model,
        parents=branched.parents if branched else list_seed_parents(model),
        seed=saved.settings.get("seed"),
        start_update=campaign.get_first_step(0),
        updates=saved.state.step,
        tokens=saved.state.tokens.get(domain, 0),
        gpus=saved.world_size // len(campaign.domains),
        data_digest=saved.settings.get("data digest"),
        config_digest=hash_file(get_config_file(run / "model" / domain)),
    )
