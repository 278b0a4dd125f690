"""Bytes on the wire per step: counted by wrapping the collectives, against the closed form."""

import pytest
from deepspeed import DeepSpeedEngine
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from tiny_runs import DOMAINS, LENGTH, MICRO, RECIPE, ds_config, make_batch, tiny_config
from wire_counter import counted

from megamod.dist.communication import compute_step_traffic
from megamod.dist.scope import Sharing, parse_sharing
from megamod.dist.topology import DomainTopology
from megamod.models.lm.host import make_dense_class

MICRO_STEPS = 2
TIED = "model.embeddings.tokens.weight"
EXPERTS = ("feedforward", "feedforward_every_other", "feedforward_top")
EXPERTS += ("transformer", "transformer_output", "input_output")
CASES = [
    ("none", 0, {}),
    ("none", 1, {}),
    ("none", 2, {}),
    ("none", 3, {}),
    ("none", 3, {"persistence_threshold": 0}),
    ("none", 3, {"persistence_threshold": 0, "live_limit": 0, "tied_names": [TIED]}),
    *((untie, stage, {}) for untie in EXPERTS for stage in (1, 2)),
    ("all", 1, {}),
    ("all", 2, {}),
    ("all", 3, {"persistence_threshold": 0}),
    *(("lora", stage, {}) for stage in (2, 3)),
    ("lora", 3, {"persistence_threshold": 0}),
]
MIXTURES = [(1, False), (2, False), (2, True)]  # ZeRO stage, gradient checkpointing


def count_step(engine: DeepSpeedEngine, step: int, source: str, **words: object) -> dict:
    """Train one step on batches of the domain `source`; return the bytes that `counted` has."""
    from megamod.train.engine import finish_micro_step

    with counted() as sent:
        for index in range(MICRO_STEPS):
            batch = make_batch(source, step, index, ragged=False)
            loss = engine(batch["input_ids"], shift_labels=batch["labels"], **words).loss
            engine.backward(loss)
            finish_micro_step(engine, 0.5)
    return sent


def count_all(rank: int) -> dict:
    """Two steps of every case; the second is counted. Two domains, so two ranks share each."""
    from megamod.models.lm.adapter import add_new_adapter, make_lora_fields
    from megamod.models.lm.demix import DemixForCausalLM
    from megamod.train.engine import build_engine
    from megamod.train.optim import make_adamw

    domains, results = DOMAINS[:2], {}
    for number, (untie, stage, limits) in enumerate(CASES):
        adapted, untie = untie == "lora", untie.replace("lora", "none")
        topology = DomainTopology(4, domains, parse_sharing(untie))
        held = topology.get_rank_domains(rank)
        demix = topology.sharing is Sharing.DEMIX
        model = DemixForCausalLM(tiny_config(untie, domains), held if demix else None)
        if adapted:
            add_new_adapter(model, make_lora_fields(model, rank=2))
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
        config = ds_config(stage, MICRO_STEPS, 0.5)
        if "persistence_threshold" in limits:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if "live_limit" in limits:
            config["zero_optimization"]["stage3_max_live_parameters"] = 0
            config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        engine = build_engine(model, lambda groups: make_adamw(groups, **RECIPE), config, topology)
        for step in range(2):
            words = {"domain": held[0]} if demix else {}
            sent = count_step(engine, step, held[0], **words)
        payload = sent["payload"]
        world = sum(size for (_, ranks), size in payload.items() if len(ranks) == 4)
        domain = sum(size for (_, ranks), size in payload.items() if len(ranks) < 4)
        expected = compute_step_traffic(
            sizes, topology, stage, MICRO_STEPS, 4, frozen=frozen, **limits
        )
        results[number] = (world, domain, expected.world, expected.domain)
    return results


def count_mixtures(rank: int) -> list[tuple[dict, dict, list[float]]]:
    """Counted payload and control, and the closed form, of a mixture spread over pairs of ranks.

    Each token goes to all experts, so that loads are even, as the closed form assumes.
    """
    from megamod.train.engine import build_engine
    from megamod.train.expert_parallel import (
        compute_parallel_exchange,
        get_expert_data_parallel_size,
        list_expert_names,
    )
    from megamod.train.optim import make_adamw

    results, topology = [], DomainTopology(4, DOMAINS[:2], Sharing.DENSE)
    for stage, recomputed in MIXTURES:
        stock = tiny_stock("mixtral", num_local_experts=4, num_experts_per_tok=4)
        model = make_dense_class(type(stock))(stock.config).train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = {**ds_config(stage, MICRO_STEPS, 0.5), "use_data_before_expert_parallelism": False}
        config["expert_parallel"] = {"enabled": True, "autoep_size": 2}
        engine = build_engine(model, lambda groups: make_adamw(groups, **RECIPE), config, topology)
        sizes = {name: p.numel() for name, p in engine.module.named_parameters()}
        for step in range(2):
            sent = count_step(engine, step, DOMAINS[rank % 2])
        expected = compute_step_traffic(
            sizes,
            topology,
            stage,
            MICRO_STEPS,
            4,
            experts=list_expert_names(engine.module),
            expert_data_parallel_size=get_expert_data_parallel_size(engine.module),
        )
        exchange = compute_parallel_exchange(engine.module, MICRO_STEPS * MICRO * LENGTH)
        predicted = [expected.world, expected.expert, exchange]
        results.append((dict(sent["payload"]), dict(sent["control"]), predicted))
    return results


@pytest.fixture(scope="module")
def traffic() -> list[dict]:
    return on_ranks(4, count_all)


@pytest.fixture(scope="module")
def mixtures() -> list[list]:
    """In processes of their own: DeepSpeed keeps the groups of domains, of other ranks."""
    return on_ranks(4, count_mixtures)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_counted_bytes_are_those_of_the_closed_form(traffic, number):
    for world, domain, expected_world, expected_domain in (result[number] for result in traffic):
        assert (world, domain) == (expected_world, expected_domain)


@pytest.mark.slow
def test_independent_models_send_nothing_to_each_other(traffic):
    for result in traffic:
        for number, (untie, *_) in enumerate(CASES):
            if untie == "all":
                assert result[number][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MIXTURES)), ids=lambda number: str(MIXTURES[number]))
def test_tokens_and_experts_are_sent_in_groups_of_their_own(mixtures, number):
    """Ranks 0 and 1 hold the experts once, 2 and 3 again; each pair exchanges tokens."""
    for rank, results in enumerate(mixtures):
        payload, control, (world, expert, exchange) = results[number]
        pair, same = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        assert payload.pop(("all_to_all", pair)) == exchange > 0
        of_group = {pair: 0, same: 0, (0, 1, 2, 3): 0}
        for (_, ranks), size in payload.items():
            of_group[ranks] += size
        assert of_group == {pair: 0, same: expert, (0, 1, 2, 3): world} and expert > 0
        assert sum(control.values()) < exchange / 10


def test_traffic_of_the_125m_recipe():
    """32 GPUs, 8 domains: experts are reduced by 4 ranks each, the rest by all."""
    shared, expert = 124_446_720 - 56_669_184, 56_669_184
    demix = compute_step_traffic(
        {"attention": shared, "x.experts.law.fc1": expert},
        DomainTopology(32, tuple("abcdefgh"), Sharing.DEMIX),
        zero_stage=0,
        micro_steps=8,
        element_bytes=2,
    )
    assert demix.world == 2 * 31 / 32 * 2 * shared
    assert demix.domain == 2 * 3 / 4 * 2 * expert
