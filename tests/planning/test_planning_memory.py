"""Bytes of a rank: counted in an engine of DeepSpeed, and by hand for many ranks."""

import pytest
import torch
from ranks import on_ranks
from train.tiny_runs import (
    DOMAINS,
    RECIPE,
    ds_config,
    make_batch,
    model_of,
    muon_of_recipe,
    tiny_config,
)

from megamod.dist.scope import Sharing, parse_sharing
from megamod.dist.topology import DomainTopology
from megamod.planning.memory import TrainingSetting, compute_memory

CASES = [
    ("none", 0, "fp32"),
    *[("none", stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16", "fp16")],
    *[("feedforward", stage, "bf16") for stage in (1, 2)],
    ("none", 3, "bf16", "cpu"),  # weights on the host
    *[("none", stage, "fp32", "muon") for stage in (0, 1, 2, 3)],
    *[("none", stage, "bf16", "muon") for stage in (1, 3)],
    ("feedforward", 2, "bf16", "muon"),
]
TWO_RANKS = [
    *[("none", stage, kind) for stage in (1, 2, 3) for kind in ("fp32", "bf16")],
    *[(untie, stage, "bf16") for untie in ("feedforward", "all") for stage in (1, 2)],
    ("none", 3, "bf16", "cpu"),
    ("none", 3, "bf16", "muon"),
    *[("lora", stage, "bf16") for stage in (1, 2, 3)],
]


def settings(stage: int, precision: str, more: str = "none") -> TrainingSetting:
    weights, muon = ("none", True) if more == "muon" else (more, False)
    return TrainingSetting(
        stage, precision, 2, 1, False, offload_param=weights, bucket=1000, persistent=100, muon=muon
    )


def counted(rank: int, world: int, cases: list[tuple]) -> list[tuple]:
    """Bytes of weights, gradients, optimizer and of weights on the host of an engine.

    Gradients are those at the end of a backward pass.
    """
    from deepspeed.accelerator import get_accelerator

    from megamod.models.lm.adapter import add_new_adapter, make_lora_fields
    from megamod.models.lm.demix import DemixForCausalLM
    from megamod.train.deepspeed_settings import apply_muon_rules
    from megamod.train.engine import build_engine, finish_micro_step
    from megamod.train.optim import make_adamw

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any processor
    domains, output = DOMAINS[:2], []
    for untie, stage, precision, *where in cases:
        adapted, untie = untie == "lora", untie.replace("lora", "none")
        sharing = parse_sharing(untie)
        topology = DomainTopology(world, domains, sharing)
        held, demix = topology.get_rank_domains(rank), sharing is Sharing.DEMIX
        model = DemixForCausalLM(tiny_config(untie, domains), held if demix else None)
        if adapted:
            add_new_adapter(model, make_lora_fields(model, rank=2))
        sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
        steps = 2 if stage == 1 else 1  # gradients of stage 1 are whole until the last micro-batch
        config = ds_config(stage, steps, 0.5, precision)
        config["zero_optimization"] |= {
            "reduce_bucket_size": 1000,
            "stage3_param_persistence_threshold": 100,
        }
        muon = where == ["muon"]
        if muon:
            config["gradient_clipping"] = 0.0
            apply_muon_rules(config)
        elif where:
            config["zero_optimization"]["offload_param"] = {"device": where[0]}
        maker = muon_of_recipe if muon else lambda groups: make_adamw(groups, **RECIPE)
        engine = build_engine(model, maker, config, topology, muon=muon)
        batch = make_batch(held[0], 0, 0, ragged=False)
        domain = held[0] if demix else None
        engine.backward(loss_of(engine, batch, domain))
        gradients = gradient_bytes(engine, stage)
        if steps == 2:
            finish_micro_step(engine, 0.5)
            engine.backward(loss_of(engine, batch, domain))
        finish_micro_step(engine, 0.5)
        hidden = {n for n, p in model.named_parameters() if muon and p.use_muon}
        setting = settings(stage, precision, *where)
        needed = compute_memory(sizes, frozen, topology, setting, muon_names=hidden)
        away = 0
        if setting.offload_param != "none":
            away = storage_bytes(engine.optimizer.param_groups_fp16_flat_cpu_memory)
        result = (weight_bytes(engine, stage) - away, gradients, optimizer_bytes(engine, stage))
        expected = (needed.weights, needed.gradients, needed.optimizer, needed.host_weights)
        output.append(((*result, away), expected))
    return output


HOSTS = [("llama", "none", 1), ("gpt2", "none", 3), ("apertus", "feedforward", 1)]


def counted_of_hosts(rank: int) -> list[tuple]:
    """Bytes of weights and optimizer of engines around stock models, and of their plans.

    The plan knows the model without storage.
    """
    from megamod.models.lm.load import select_lm_class
    from megamod.train.engine import build_engine, finish_micro_step
    from megamod.train.optim import make_adamw

    output = []
    for family, untie, stage in HOSTS:
        domains = DOMAINS[:2]
        topology = DomainTopology(1, domains, parse_sharing(untie))
        config, model = model_of(untie, domains, family=family)
        with torch.device("meta"):
            planned = select_lm_class(config)(config, domains if untie != "none" else None)
        sizes = {name: parameter.numel() for name, parameter in planned.named_parameters()}
        assert sizes == {name: p.numel() for name, p in model.named_parameters()}
        settings_of_engine = ds_config(stage, 1, 0.5)
        settings_of_engine["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        engine = build_engine(
            model, lambda groups: make_adamw(groups, **RECIPE), settings_of_engine, topology
        )
        batch = make_batch(domains[0], 0, 0, ragged=False)
        engine.backward(loss_of(engine, batch, domains[0] if untie != "none" else None))
        finish_micro_step(engine, 0.5)
        needed = compute_memory(sizes, {}, topology, settings(stage, "fp32"))
        output.append(
            (
                (weight_bytes(engine, stage), optimizer_bytes(engine, stage)),
                (needed.weights, needed.optimizer),
            )
        )
    return output


def all_counted(rank: int) -> tuple[list[tuple], list[tuple]]:
    return counted(rank, 1, CASES), counted_of_hosts(rank)


def loss_of(engine, batch, domain):
    return engine(batch["input_ids"], shift_labels=batch["labels"], domain=domain).loss


def weight_bytes(engine, stage: int) -> int:
    tensors = [parameter.data for parameter in engine.module.parameters()]
    if stage == 3:
        tensors += [parameter.ds_tensor for parameter in engine.module.parameters()]
        # What is gathered lives until it is released: only what stays is counted.
        kept = {id(p) for p in engine.optimizer.persistent_parameters}
        parameters = list(engine.module.parameters())
        whole = sum(p.data.numel() * p.element_size() for p in parameters if id(p) in kept)
        return whole + sum(p.ds_tensor.numel() * p.element_size() for p in parameters)
    return storage_bytes(tensors)


def gradient_bytes(engine, stage: int) -> int:
    zero = engine.optimizer
    if stage == 3:
        return storage_bytes([zero.grad_partitions_flat_buffer])
    if stage == 2:
        groups = zero.averaged_gradients.values()
        return sum(t.numel() * t.element_size() for group in groups for t in group)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    held = [p.grad for p in parameters if p.grad is not None]
    assert len(held) == len(parameters)
    return sum(gradient.numel() * gradient.element_size() for gradient in held)


def optimizer_bytes(engine, stage: int) -> int:
    zero = engine.optimizer
    base, masters = zero, []
    if stage:
        base = zero.optimizer
        name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        masters = getattr(zero, name)
    states = [t for state in base.state.values() for name, t in state.items() if name != "step"]
    copies = [copy for copy, _ in getattr(zero, "_muon_pending_momentum", {}).values()]
    return storage_bytes([*masters, *states, *copies])


def storage_bytes(tensors) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.fixture(scope="module")
def alone() -> tuple[list[tuple], list[tuple]]:
    return on_ranks(1, all_counted)[0]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_bytes_are_those_of_the_engine(alone, number):
    result, expected = alone[0][number]
    assert result == expected


@pytest.mark.parametrize("number", range(len(HOSTS)), ids=lambda number: str(HOSTS[number]))
def test_bytes_of_stock_models_are_those_of_the_engine(alone, number):
    result, expected = alone[1][number]
    assert result == expected


@pytest.mark.slow
def test_bytes_are_those_of_the_engine_on_two_ranks():
    for message in on_ranks(2, counted, 2, TWO_RANKS):
        for case, (result, expected) in zip(TWO_RANKS, message, strict=True):
            assert result == expected, case
