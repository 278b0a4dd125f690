"""The ranges of all ranks make up every parameter, at every stage; what is written arrives."""

import deepspeed
import pytest
import torch
from ranks import on_ranks
from train.tiny_runs import DOMAINS, build_tiny, tiny_config

from megamod.dist.scope import parse_expert_domain
from megamod.models.lm.demix import DemixForCausalLM, initialise_lm_weights
from megamod.train.fragments import (
    copy_masters_to_weights,
    iterate_fragments,
    read_optimizer_steps,
    set_optimizer_steps,
)

CASES = [("none", 0, "fp32"), ("none", 1, "fp32"), ("none", 2, "fp32"), ("none", 3, "fp32")]
CASES += [("feedforward", 1, "fp32"), ("feedforward", 2, "fp32"), ("none", 3, "bf16")]
CASES += [("input_output", 1, "bf16")]


def whole_weights(engine) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            [parameter], enabled=engine.zero_optimization_stage() == 3
        ):
            weights[name] = parameter.detach().float().clone().flatten()
    return weights


def look(rank: int, root) -> list[dict[str, object]]:
    output = []
    for number, (untie, stage, precision) in enumerate(CASES):
        engine = build_tiny(root / str(number), untie, stage, precision=precision).engine
        held, kinds = [], set()
        for fragment in iterate_fragments(engine):
            kinds |= set(fragment.tensors)
            sizes = {len(tensor) for tensor in fragment.tensors.values()}
            assert len(sizes) == 1
            held.append((fragment.name, fragment.start, sizes.pop()))
            dtypes = {tensor.dtype for tensor in fragment.tensors.values()}
            assert dtypes == {torch.float32}
            assert fragment.tensors["exp_avg"].abs().sum() == 0
        before = whole_weights(engine)
        masters_agree = all(
            torch.equal(f.tensors["master"], before[f.name][f.start :][: len(f.tensors["master"])])
            for f in iterate_fragments(engine)
        )
        # Every element gets a value that tells its place.
        for f in iterate_fragments(engine):
            size = len(f.tensors["master"])
            f.tensors["master"].copy_(torch.arange(f.start, f.start + size) % 128)
            f.tensors["exp_avg"].fill_(2.0)
        copy_masters_to_weights(engine)
        after = whole_weights(engine)
        output.append(
            dict(
                held=held,
                kinds=kinds,
                masters_agree=masters_agree,
                steps=read_optimizer_steps(engine),
                arrived=all(
                    torch.equal(weight, (torch.arange(len(weight)) % 128).float())
                    for weight in after.values()
                ),
                names=sorted(after),
            )
        )
        set_optimizer_steps(engine, 17.0)
        assert read_optimizer_steps(engine) == 17.0
        assert all(float(f.tensors["exp_avg"].min()) == 2.0 for f in iterate_fragments(engine))
    return output


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return on_ranks(2, look, tmp_path_factory.mktemp("fragments"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_ranges_make_up_every_parameter_once(output, number):
    untie, stage, _ = CASES[number]
    model = DemixForCausalLM(tiny_config(untie))
    initialise_lm_weights(model, seed=5)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for rank, of in enumerate(output):
        for name, start, size in of[number]["held"]:
            domain = parse_expert_domain(name)
            assert domain in (None, *DOMAINS[2 * rank : 2 * rank + 2])
            if stage > 0 or rank == 0:  # without ZeRO every rank holds everything
                ranges.setdefault(name, []).append((start, start + size))
    assert ranges.keys() == sizes.keys()
    for name, pieces in ranges.items():
        ends = [0] + [stop for _, stop in sorted(pieces)]
        assert [start for start, _ in sorted(pieces)] == ends[:-1] and ends[-1] == sizes[name]
    if untie == "none":  # ranks do share the work
        assert any(len(pieces) == 2 for pieces in ranges.values()) == (stage > 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, c)) for c in CASES])
def test_masters_are_the_weights_and_writing_them_writes_those(output, number):
    for of in output:
        row = of[number]
        assert row["kinds"] == {"master", "exp_avg", "exp_avg_sq"}
        assert (row["masters_agree"], row["arrived"], row["steps"]) == (True, True, 0.0)
    if CASES[number][0] == "none":
        assert output[0][number]["names"] == output[1][number]["names"]
