"""One plain gradient step through the engine against autograd in one process."""

import pytest
import torch
from ranks import on_ranks
from train.tiny_runs import DOMAINS, ds_config, make_batch, tiny_config

from megamod.dist.process import get_rank as my_rank
from megamod.dist.scope import Sharing, parse_expert_domain
from megamod.dist.topology import DomainTopology
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.train.engine import build_engine, finish_micro_step, get_loss_group

MICRO_STEPS = 2
CASES = [
    # world, sharing, ZeRO stage, domains, clip
    *[(4, "dense", stage, 2, 0.0) for stage in (0, 1, 2, 3)],
    *[(4, "demix", stage, 2, 0.0) for stage in (1, 2)],
    *[(4, "demix", stage, 2, 0.5) for stage in (1, 2)],
    *[(4, "dense", stage, 2, 0.5) for stage in (0, 3)],
    *[(4, "demix", stage, 4, 0.0) for stage in (1, 2)],
    *[(4, "btm", stage, 2, 0.5) for stage in (1, 2, 3)],
]


def batches_of_rank(rank: int, ranks_per_domain: int) -> list[dict[str, object]]:
    """Ragged batches of the rank's domain; ranks of one domain read different ones."""
    domain, part = DOMAINS[rank // ranks_per_domain], rank % ranks_per_domain
    return [make_batch(domain, 0, part * MICRO_STEPS + index) for index in range(MICRO_STEPS)]


def loss_of(model, batch, choose: bool, items: float):
    return model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        shift_labels=batch["labels"],
        num_items_in_batch=items,
        domain=DOMAINS[batch["domain"]] if choose else None,
    ).loss


def steps(rank: int, cases) -> list[dict[str, object]]:
    """The gradient that plain descent at rate 1 has taken from the weights, by case."""
    output = []
    for world, kind, stage, count, clip in cases:
        sharing = Sharing(kind)
        topology = DomainTopology(world, DOMAINS[:count], sharing)
        choose = sharing is Sharing.DEMIX
        config = tiny_config("feedforward" if choose else "none", DOMAINS[:count])
        model = DemixForCausalLM(config, topology.get_rank_domains(rank) if choose else None)
        initialise_lm_weights(model, seed=5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine = build_engine(
            model,
            lambda groups: torch.optim.SGD(groups, lr=1.0),
            ds_config(stage, MICRO_STEPS, clip),
            topology,
        )
        mine = batches_of_rank(rank, world // count)
        group = get_loss_group(engine)
        items = torch.tensor(float(sum(batch["tokens"] for batch in mine)))
        torch.distributed.all_reduce(items, group=group)
        share = float(items) / MICRO_STEPS / torch.distributed.get_world_size(group)
        norms = []
        for batch in mine:
            engine.backward(loss_of(engine, batch, choose, share))
            norms.append(finish_micro_step(engine, clip))
        taken = {}
        for name, parameter in engine.module.named_parameters():
            if stage == 3:
                import deepspeed

                with deepspeed.zero.GatheredParameters([parameter]):
                    taken[name] = (before[name] - parameter.detach()).numpy().copy()
            else:
                taken[name] = (before[name] - parameter.detach()).numpy().copy()
        members = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
        output.append(dict(taken=taken, norms=norms, members=members, rank=my_rank()))
    return output


@pytest.fixture(scope="module")
def output():
    return on_ranks(4, steps, CASES)


def naive(kind: str, count: int, only: str | None = None) -> dict[str, torch.Tensor]:
    """Sum over domains of d(summed nll)/d(weight), each domain apart, divided by all tokens."""
    model = DemixForCausalLM(
        tiny_config("feedforward" if kind == "demix" else "none", DOMAINS[:count])
    )
    initialise_lm_weights(model, seed=5)
    batches = [b for rank in range(4) for b in batches_of_rank(rank, 4 // count)]
    batches = [b for b in batches if only in (None, DOMAINS[b["domain"]])]
    total = sum(batch["tokens"] for batch in batches)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch, kind == "demix", 1.0).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad
    return {name: item / total for name, item in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_one_step_takes_the_gradient_of_the_joint_loss(output, number):
    """Experts too are divided by the tokens of all domains, not of their own."""
    _, kind, _, count, clip = CASES[number]
    for rank, of in enumerate(output):
        domain = DOMAINS[rank // (4 // count)]
        expected = naive(kind, count, domain if kind == "btm" else None)
        norm = torch.stack([item.square().sum() for item in expected.values()]).sum().sqrt()
        factor = min(1.0, clip / float(norm)) if clip else 1.0
        assert clip == 0 or factor < 0.9
        got = of[number]
        assert got["norms"][0] is None
        assert got["norms"][1] == pytest.approx(float(norm), rel=1e-5)
        for name, item in got["taken"].items():
            held = parse_expert_domain(name)
            assert held in (None, domain)
            error = abs(torch.from_numpy(item) - factor * expected[name]).max()
            # What is taken is seen through the rounding of weights of about 1.
            assert error <= 3e-7 + 1e-5 * factor * float(expected[name].abs().max()), (rank, name)


@pytest.mark.slow
def test_the_loss_is_that_of_the_ranks_that_share_it(output):
    for number, (_, kind, *_) in enumerate(CASES):
        for rank, of in enumerate(output):
            pair = [0, 1] if rank < 2 else [2, 3]
            assert of[number]["members"] == (pair if kind == "btm" else [0, 1, 2, 3])


def disagree(rank: int) -> str:
    """Build an engine with ranks {0, 2} and {1, 3} as groups, which DeepSpeed does by default."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=False)
    topology = DomainTopology(4, DOMAINS[:2], Sharing.DEMIX)
    model = DemixForCausalLM(
        tiny_config("feedforward", DOMAINS[:2]), topology.get_rank_domains(rank)
    )
    try:
        build_engine(model, lambda of: torch.optim.SGD(of, lr=1.0), ds_config(1, 1, 0.0), topology)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_other_groups_than_those_of_the_data_are_refused():
    output = on_ranks(4, disagree)
    assert output[1].startswith("rank 1: DeepSpeed averages its experts over ranks [1, 3]")
    assert output[1].endswith("data is read by ranks [0, 1]")
    assert all(output)
