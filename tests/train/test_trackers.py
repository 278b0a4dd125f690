"""Curves at Weights & Biases: a module that records the calls takes its place."""

import sys
from types import SimpleNamespace

import pytest

from megamod.errors import UserError
from megamod.train import trackers
from megamod.train.trackers import RUN_ID, check_tracker, open_tracker


class RecordingRun:
    """A run of wandb that records what is called."""

    def __init__(self):
        self.points, self.metrics, self.finished = [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.points.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """The stub in place of wandb; `starts` has the arguments of each init."""
    starts = []

    def init(**options):
        starts.append(SimpleNamespace(run=RecordingRun(), **options))
        return starts[-1].run

    stub = SimpleNamespace(init=init, Error=type("Error", (Exception,), {}), starts=starts)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return stub


def test_settings_and_points_arrive(wandb, tmp_path, monkeypatch):
    folder = tmp_path / "demix"
    folder.mkdir()
    (folder / "run.yaml").write_text("learning_rate: 0.001\nmodel: tiny\n")
    tracker = open_tracker("wandb", folder, 0)
    tracker.write(10, {"train/loss": 3.0})
    tracker.close()
    (start,) = wandb.starts
    assert (start.project, start.name, start.dir) == ("megamod", "demix", str(folder))
    assert start.config == {"learning_rate": 0.001, "model": "tiny"}
    assert start.run.points == [{"train/loss": 3.0, "step": 10}] and start.run.finished
    # The step is an axis of its own, since a resumed run repeats some.
    assert ("*", "step") in start.run.metrics
    monkeypatch.setenv("WANDB_PROJECT", "modular")
    open_tracker("wandb", folder, 5)
    again = wandb.starts[-1]
    assert (again.project, again.id, again.resume) == ("modular", start.id, "allow")
    assert (folder / RUN_ID).read_text().strip() == start.id


def test_two_runs_are_two(wandb, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        open_tracker("wandb", tmp_path / name, 0)
    assert wandb.starts[0].id != wandb.starts[1].id


def test_a_start_that_wandb_refuses_is_one_sentence(wandb, tmp_path, monkeypatch):
    def refuse(**_):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"api_key not configured; log in .* WANDB_MODE=offline"):
        open_tracker("wandb", tmp_path, 0)


def test_without_wandb_the_answer_is_how_to_install_it(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'megamod\[wandb\]'"):
        check_tracker("wandb")
    check_tracker("tensorboard")
    check_tracker("none")


def test_nothing_is_opened_for_none(tmp_path):
    assert open_tracker("none", tmp_path, 0) is None
