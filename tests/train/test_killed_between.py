"""A run that was killed between two calls puts its files in order at its next start."""

import os
from pathlib import Path

from ranks import on_ranks
from train.tiny_runs import run_tiny

from megamod.runs.finetune.best import BestModel
from megamod.train.checkpoint import Checkpoints
from megamod.train.export import publish_model, recover_model

OLD, NEW = "model of step 2", "model of step 4"


class Killed(BaseException):
    """Takes the place of a signal that kills."""


def run_cut(rank: int, root: Path) -> dict[str, str]:
    """Cut a run before and after the commit of its last checkpoint; returns files by name."""
    checkpoints, commit, seen = root / "checkpoints", Checkpoints._commit, {}

    def run(cut: str = "") -> None:
        def commit_or_die(self, temporary, final):
            if final.name == "step-4" and cut == "before":
                raise Killed
            commit(self, temporary, final)
            if final.name == "step-4" and cut == "after":
                (checkpoints / "latest").write_text("step-2\n")  # renamed, and not yet recorded
                raise Killed

        Checkpoints._commit = commit_or_die
        try:
            run_tiny(root, "none", 1, 4, save_steps=2, per_domain=1)
        except Killed:
            pass
        finally:
            Checkpoints._commit = commit
        seen.update({f"{name} {cut}": (checkpoints / name).read_text() for name in FILES})

    for cut in ("before", "after", ""):
        run(cut)
    return seen


FILES = ("latest", "sound")


def test_records_of_checkpoints_catch_up(tmp_path):
    (seen,) = on_ranks(1, run_cut, tmp_path)
    # The step from which finite ones followed is known before the checkpoint after them.
    assert seen["sound before"] == seen["sound after"] == seen["sound "] == "2\n"
    assert seen["latest after"] == "step-2\n" and seen["latest "] == "step-4\n"


def replace_model(rank: int, root: Path) -> list[str]:
    """Replace a model, killed before each rename; returns the text that is there after a start."""
    folder, rename, texts = root / "model", Path.rename, []

    def write(text: str):
        return lambda target: (target / "card.md").write_text(text)

    for deadly in (1, 2):
        publish_model(write(OLD), folder)
        calls = [0]

        def rename_or_die(path, target, deadly=deadly, calls=calls):
            calls[0] += 1
            if calls[0] == deadly:
                raise Killed
            return rename(path, target)

        Path.rename = rename_or_die
        try:
            publish_model(write(NEW), folder)
        except Killed:
            pass
        finally:
            Path.rename = rename
        recover_model(folder)
        texts.append((folder / "card.md").read_text())
    publish_model(write(NEW), folder)
    assert sorted(os.listdir(root)) == ["model"]
    return [*texts, (folder / "card.md").read_text()]


def test_a_published_model_is_whole_at_any_time(tmp_path):
    assert on_ranks(1, replace_model, tmp_path) == [[OLD, OLD, NEW]]


SCORES = {2: 0.5, 4: 0.25}  # by step


def make_evaluation(step: int, score: float) -> dict:
    return {"step": step, "tasks": {}, "score": score, "instances_per_second": 1.0}


def repeat_evaluation(rank: int, root: Path) -> list[dict]:
    best = BestModel(root, lambda evaluation: evaluation["score"])
    (root / "model").mkdir()
    for step, score in SCORES.items():
        best.add_evaluation(make_evaluation(step, score))
    best.save_evaluations()
    best = BestModel(root, lambda evaluation: evaluation["score"])
    best.load_evaluations(4)  # killed in the evaluation of step 4, after its record was written
    assert not best.add_evaluation(make_evaluation(4, SCORES[4]))
    return best.evaluations


def test_an_evaluation_that_is_repeated_stands_once(tmp_path):
    (evaluations,) = on_ranks(1, repeat_evaluation, tmp_path)
    assert [item["step"] for item in evaluations] == [2, 4]
