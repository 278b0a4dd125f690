"""A run that diverges ends with exit code 3, publishes nothing and loses no good checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from saved_models import make_model
from train.tiny_runs import build_tiny, run_tiny

from megamod.errors import PolicyStop, UserError
from megamod.models.lm.configuration import read_lm_config
from megamod.models.lm.load import build_lm
from megamod.states.manifest import find_file_faults
from megamod.states.verify import check_path
from megamod.states.weights import find_non_finite_weight
from megamod.train.export import publish_model

DOMAINS = ("law", "med")
NAN = float("nan")


class Diverging:
    """An objective whose loss is NaN in the micro-batches of some steps."""

    def __init__(self, objective, is_bad):
        self.objective, self.is_bad = objective, is_bad
        self.count_items = objective.count_items
        self.calls = 0

    def compute_loss(self, engine, batch, share):
        scored = self.objective.compute_loss(engine, batch, share)
        self.calls += 1
        return replace(scored, loss=scored.loss * NAN) if self.is_bad(self.calls) else scored


def attempt(folder: Path, is_bad, last: int, **options) -> tuple[str, list[str]]:
    """Message of the PolicyStop of a run on one rank with a micro-batch a step; its checkpoints."""
    message = ""
    options = dict(save_steps=1, domains=DOMAINS[:1], per_domain=1) | options
    try:
        wrap = lambda objective: Diverging(objective, is_bad)  # noqa: E731
        run_tiny(folder, "none", 0, last, wrap_objective=wrap, **options)
    except PolicyStop as error:
        message = str(error)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return message, saved


def runs(_: int, root: Path) -> dict[str, object]:
    logging.disable(logging.CRITICAL)
    seen: dict[str, object] = {}
    skip = dict(nonfinite="skip", save_steps=0)
    seen["budget"] = attempt(root / "budget", lambda n: n > 1, 9, max_nonfinite_steps=3, **skip)
    seen["within"] = attempt(root / "within", lambda n: n in (2, 3, 5), 9, **skip)
    seen["nothing"] = attempt(root / "nothing", lambda n: True, 4, **skip)
    back = dict(nonfinite="rollback", max_nonfinite_steps=5)
    seen["rollback"] = attempt(root / "rollback", lambda n: n > 3, 9, **back)
    # Steps 1 to 3 are finite, then no process sees a finite loss: a scheduler that restarts.
    stop = dict(nonfinite="stop", keep=1)
    seen["stop"] = [attempt(root / "stop", lambda n: n > 3, 9, **stop)]
    seen["stop"] += [attempt(root / "stop", lambda n: True, 9, **stop) for _ in range(3)]
    # Two finite steps after the only checkpoint, then divergence: that checkpoint stays too.
    seen["first"] = attempt(root / "first", lambda n: n > 4, 9, **(stop | dict(save_steps=2)))
    seen["calm"] = attempt(root / "calm", lambda n: False, 5, keep=2)
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    (result,) = on_ranks(1, runs, tmp_path_factory.mktemp("diverged"))
    return result


@pytest.mark.slow  # starts ranks
def test_skipped_steps_have_a_budget(seen):
    message, saved = seen["budget"]
    assert "not finite at step 5" in message and "--max_nonfinite_steps 3" in message
    assert saved == ["step-5"]
    assert seen["within"] == ("", ["step-9"])


@pytest.mark.slow  # starts ranks
def test_a_run_without_a_finite_step_ends_by_policy(seen):
    assert "none of 4 steps" in seen["nothing"][0]


@pytest.mark.slow  # starts ranks
def test_rollbacks_end(seen):
    message, saved = seen["rollback"]
    assert "--nonfinite rollback: there is no earlier checkpoint" in message
    # Checkpoint 3 was rejected, as its next step failed, then 2, then 1 is the last.
    assert saved[0] == "step-1" and len(saved) == 2


@pytest.mark.slow  # starts ranks
def test_a_stop_pushes_no_good_checkpoint_out(seen):
    for number, (message, saved) in enumerate(seen["stop"]):
        assert f"not finite at step {4 + number}" in message
        assert saved == ["step-2", f"step-{4 + number}"]
        assert "--resume" in message and "step-2 goes back" in message
    assert seen["first"][1] == ["step-2", "step-5"]
    assert seen["calm"] == ("", ["step-4", "step-5"])


def export_nan(rank: int, root: Path) -> tuple[str, list[str], list[str]]:
    logging.disable(logging.CRITICAL)
    tiny = build_tiny(root, "feedforward", 1, domains=DOMAINS)
    export, model = tiny.checkpoints.write_model, root / "model"
    publish_model(export, model)
    before = sorted(path.name for path in model.iterdir())
    if rank == 1:  # its expert alone
        with torch.no_grad():
            next(p for n, p in tiny.engine.module.named_parameters() if ".experts." in n)[0] = NAN
    try:
        publish_model(export, model)
        message = ""
    except PolicyStop as error:
        message = str(error)
    torch.distributed.barrier()
    return message, before, sorted(path.name for path in root.iterdir())


@pytest.mark.slow  # starts ranks
def test_a_published_model_is_finite_and_has_digests(tmp_path):
    for message, before, left in on_ranks(2, export_nan, tmp_path):
        assert "weights that are not finite" in message
        assert "manifest.json" in before
        assert left == ["model", "run.yaml"]
    model = tmp_path / "model"
    assert find_non_finite_weight(model) is None and find_file_faults(model) == []
    ((title, faults),) = check_path(model)
    assert ": model, " in title and faults == []
    config = bytearray((model / "config.json").read_bytes())
    config[30] ^= 4
    (model / "config.json").write_bytes(config)
    ((_, faults),) = check_path(model)
    assert any("config.json does not have the SHA-256" in fault for fault in faults)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = make_model(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[3]
    state[name].view(-1)[0] = NAN
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = read_lm_config(folder)
    with pytest.raises(UserError, match=f"--init_from .*{name} holds values that are not finite"):
        build_lm(config, seed=1, init_from=folder)
