import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from saved_models import make_model

from megamod import files
from megamod.errors import UserError
from megamod.states import forest as module
from megamod.states.forest import Expert, Parent, check_forest_writable, edit_forest, open_forest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_model(root / "law", domains=["law"])
    make_model(root / "med", domains=["med"])
    make_model(root / "wide", domains=["wide"], vocab_size=31)
    make_model(root / "mixed", "feedforward")
    return root


@pytest.fixture
def folder(models, tmp_path):
    return shutil.copytree(models, tmp_path / "place")


def law(folder) -> Expert:
    parents = (Parent(path="seed/checkpoints/step-3", weight=1.0),)
    return Expert(
        domain="law",
        path=folder / "law",
        member=None,
        parents=parents,
        seed=5,
        start_update=3,
        updates=7,
        tokens=640,
        gpus=2,
        data_digest="abc",
        config_digest="def",
    )


def test_what_is_written_is_read(folder, tmp_path):
    with edit_forest(folder) as experts:
        assert experts == []
        experts += [law(folder), Expert(domain="code", path=folder / "mixed", member="code")]
    forest = open_forest(folder)
    assert forest == open_forest(folder / "forest.json")
    assert forest.domains == ("law", "code")
    assert forest.experts == (
        law(folder),
        Expert(domain="code", path=folder / "mixed", member="code"),
    )
    record = json.loads((folder / "forest.json").read_text())["experts"][0]
    assert record["path"] == "law" and record["member"] is None
    moved = shutil.move(folder, tmp_path / "moved")
    assert open_forest(moved).experts[0].path == tmp_path / "moved" / "law"


def test_experts_elsewhere_keep_their_whole_path(folder, tmp_path):
    with edit_forest(tmp_path / "other" / "forest.json") as experts:
        experts.append(Expert(domain="law", path=folder / "law"))
    assert open_forest(tmp_path / "other").experts == (Expert(domain="law", path=folder / "law"),)


def test_model_folders_are_forests(folder):
    members = open_forest(folder / "mixed").experts
    assert [(e.domain, e.member, e.path) for e in members] == [
        (name, name, folder / "mixed") for name in ("law", "code", "art")
    ]
    shutil.rmtree(folder / "mixed")
    shutil.rmtree(folder / "wide")
    assert open_forest(folder).experts == (
        Expert(domain="law", path=folder / "law"),
        Expert(domain="med", path=folder / "med"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "gone"}, "no config.json"),
        ({"path": 3}, r"experts\[0\].path: 3 is not text"),
        ({"member": "law"}, "one dense model"),
        ({"path": "mixed"}, "the members there are law, code, art"),
        ({"path": "mixed", "member": "tax"}, "member 'tax'"),
        ({"steps": 3}, "unknown key 'steps'; the nearest is 'tokens'"),
        ({"updates": "7"}, r"experts\[0\].updates: '7' is not a whole number"),
        ({"parents": [{"path": "seed"}]}, r"parents\[0\].weight is missing"),
        ({"domain": "med"}, "domain 'med' is listed twice"),
        ({"domain": "../law"}, "place, domain: '../law' is not made of letters"),
        ({"path": "wide"}, "different vocabularies: 31 of law, 23 of med"),
    ],
)
def test_wrong_entries_are_named(folder, change, message):
    entries = [{"domain": "law", "path": "law"} | change, {"domain": "med", "path": "med"}]
    text = json.dumps({"format": 1, "experts": entries})
    (folder / "forest.json").write_text(text)
    for attempt in (open_forest, lambda path: edit_forest(path).__enter__().clear()):
        if "experts[0]" in message or attempt is open_forest:
            with pytest.raises(UserError, match=message):
                attempt(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("[]", "is not `key: value` lines"),
        ('{"format": 2}', "format: 2 is not one of 1"),
        ('{"format": 1, "experts": {}}', "experts: {} is not a list"),
        ('{"format": 1, "experts": [3]}', r"experts\[0\]: 3 is not `key: value` lines"),
        ('{"format": 1, "experts": [], "more": 1}', "unknown key 'more'"),
        ('{"format": 1, "experts": []}', "holds no expert"),
    ],
)
def test_other_files_are_refused(folder, text, message):
    (folder / "forest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_forest(folder)


def test_what_is_no_forest_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="one dense model"):
        open_forest(folder / "law")
    with pytest.raises(UserError, match="holds no expert"):
        open_forest(tmp_path / "nothing")


def test_a_failed_edit_changes_nothing(folder):
    with edit_forest(folder) as experts:
        experts.append(law(folder))
    before = (folder / "forest.json").read_bytes()
    with pytest.raises(ZeroDivisionError), edit_forest(folder) as experts:
        experts.append(Expert(domain="med", path=folder / "med"))
        raise ZeroDivisionError
    with pytest.raises(UserError, match="vocabularies"), edit_forest(folder) as experts:
        experts.append(Expert(domain="wide", path=folder / "wide"))
    assert (folder / "forest.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(folder, monkeypatch):
    check_forest_writable(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"forest\.json: its folder cannot be written"):
        check_forest_writable(folder / "forest.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_while_writing_changes_nothing(folder, monkeypatch, call):
    with edit_forest(folder) as experts:
        experts.append(law(folder))
    before = (folder / "forest.json").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(OSError, match="No space"), edit_forest(folder) as experts:
        experts.append(Expert(domain="med", path=folder / "med"))
    assert (folder / "forest.json").read_bytes() == before
    assert not list(folder.glob(".forest.json.*.tmp"))


class Crash(BaseException):
    """Stands for the end of the process."""


def crashing(original, left: list[int]):
    """The call, until so many of those that change the disk are through."""

    def call(*arguments, **options):
        harmless = original is open and not set(str(arguments[1:2])) & set("wax+")
        left[0] -= not harmless
        if left[0] < 0:
            raise Crash
        return original(*arguments, **options)

    return call


def test_a_kill_at_any_call_leaves_the_old_forest_or_the_new(folder, monkeypatch):
    """As if killed at the first call that changes the disk, at the second, and so on."""
    with edit_forest(folder) as experts:
        experts.append(law(folder))
    seen, done, start = [], False, (folder / "forest.json").read_bytes()
    while not done:
        (folder / "forest.json").write_bytes(start)
        (folder / "config.json").unlink(missing_ok=True)
        left = [len(seen)]
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(files.os, name, crashing(getattr(files.os, name), left))
            patch.setattr("builtins.open", crashing(open, left))
            # The end of a process leaves temporary files where they are.
            patch.setattr("pathlib.Path.unlink", crashing(Path.unlink, left))
            try:
                with edit_forest(folder) as experts:
                    experts.append(Expert(domain="med", path=folder / "med"))
                done = True
            except Crash:
                pass
        seen.append(open_forest(folder).domains)
    assert seen[0] == ("law",) and seen[-1] == ("law", "med") and len(seen) > 8
    assert seen == sorted(seen)  # never back
    with edit_forest(folder):
        pass
    assert not list(folder.glob(".forest.json.*.tmp"))


def test_parents_inside_move_with_the_forest(folder, tmp_path):
    parents = tuple(
        Parent(path=str(at / "seed"), weight=0.5) for at in (folder, tmp_path / "elsewhere")
    )
    with edit_forest(folder) as experts:
        experts.append(Expert(domain="law", path=folder / "law", parents=parents))
    paths = [parent.path for parent in open_forest(folder).experts[0].parents]
    assert paths == ["seed", str(tmp_path / "elsewhere" / "seed")]


def test_a_run_stands_for_its_model(folder, tmp_path):
    shutil.copytree(folder / "mixed", tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert open_forest(tmp_path / "run").domains == ("law", "code", "art")


def add(folder, number: int) -> None:
    with edit_forest(folder) as experts:
        experts.append(Expert(domain=f"law{number}", path=folder / "law"))


def test_editors_wait_for_each_other(folder):
    assert module.FILE == "forest.json"
    context = multiprocessing.get_context("fork")
    editors = [context.Process(target=add, args=(folder, number)) for number in range(8)]
    for editor in editors:
        editor.start()
    for editor in editors:
        editor.join(60)
    assert sorted(open_forest(folder).domains) == [f"law{number}" for number in range(8)]


def test_a_forest_has_the_tokenizer_of_its_experts(folder):
    """That of the first expert with one; a tokenizer that is there already stays."""
    (folder / "med" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "med" / "tokenizer_config.json").write_text("{}")
    (folder / "med" / "notes.json").write_text("{}")
    forest = folder / "forest"
    with edit_forest(forest) as experts:
        experts += [Expert(domain=name, path=folder / name) for name in ("law", "med")]
    files = {file.name for file in forest.iterdir() if not file.name.startswith(".")}
    assert files == {"forest.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (forest / "tokenizer.json").read_text() == '{"model": {"vocab": {"a": 0}}}'
    (forest / "tokenizer.json").write_text("mine")
    with edit_forest(forest) as experts:
        del experts[0]
    assert (forest / "tokenizer.json").read_text() == "mine"
