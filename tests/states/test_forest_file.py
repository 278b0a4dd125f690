import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from saved_models import make_model

from megamod import files
from megamod.errors import UserError
from megamod.states import forest as module
from megamod.states.forest import Expert, Parent, edit_forest, open_forest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_model(root / "law", domains=["law"])
    make_model(root / "med", domains=["med"])
    make_model(root / "wide", domains=["wide"], vocab_size=31)
    make_model(root / "mixed", "feedforward")
    return root


@pytest.fixture
def place(models, tmp_path):
    return shutil.copytree(models, tmp_path / "place")


def law(place) -> Expert:
    parents = (Parent("seed/checkpoints/step-3", 1.0),)
    return Expert("law", place / "law", None, parents, 5, 3, 7, 640, 2, "abc", "def")


def test_what_is_written_is_read(place, tmp_path):
    with edit_forest(place) as experts:
        assert experts == []
        experts += [law(place), Expert("code", place / "mixed", "code")]
    forest = open_forest(place)
    assert forest == open_forest(place / "forest.json")
    assert forest.domains == ("law", "code")
    assert forest.experts == (law(place), Expert("code", place / "mixed", "code"))
    record = json.loads((place / "forest.json").read_text())["experts"][0]
    assert record["path"] == "law" and record["member"] is None
    moved = shutil.move(place, tmp_path / "moved")
    assert open_forest(moved).experts[0].path == tmp_path / "moved" / "law"


def test_experts_elsewhere_keep_their_whole_path(place, tmp_path):
    with edit_forest(tmp_path / "other" / "forest.json") as experts:
        experts.append(Expert("law", place / "law"))
    assert open_forest(tmp_path / "other").experts == (Expert("law", place / "law"),)


def test_model_folders_are_forests(place):
    members = open_forest(place / "mixed").experts
    assert [(e.domain, e.member, e.path) for e in members] == [
        (name, name, place / "mixed") for name in ("law", "code", "art")
    ]
    shutil.rmtree(place / "mixed")
    shutil.rmtree(place / "wide")
    assert open_forest(place).experts == (
        Expert("law", place / "law"),
        Expert("med", place / "med"),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "gone"}, "no config.json"),
        ({"path": 3}, r"experts\[0\]: path is 3"),
        ({"member": "law"}, "one dense model"),
        ({"path": "mixed"}, "the members there are law, code, art"),
        ({"path": "mixed", "member": "tax"}, "member 'tax'"),
        ({"steps": 3}, "unknown key 'steps'"),
        ({"updates": "7"}, "updates is '7'"),
        ({"parents": [{"path": "seed"}]}, "parents"),
        ({"domain": "med"}, "domain 'med' is listed twice"),
        ({"domain": "../law"}, "domain '../law' is not made of letters"),
        ({"path": "wide"}, "different vocabularies: 31 of law, 23 of med"),
    ],
)
def test_wrong_entries_are_named(place, change, told):
    entries = [{"domain": "law", "path": "law"} | change, {"domain": "med", "path": "med"}]
    text = json.dumps({"format": 1, "experts": entries})
    (place / "forest.json").write_text(text)
    for attempt in (open_forest, lambda path: edit_forest(path).__enter__().clear()):
        if "experts[0]" in told or attempt is open_forest:
            with pytest.raises(UserError, match=told):
                attempt(place)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1, "experts": {}}', "not a list"),
        ('{"format": 1, "experts": [3]}', r"experts\[0\]: is not an object"),
        ('{"format": 1, "experts": [], "more": 1}', "unknown key 'more'"),
        ('{"format": 1, "experts": []}', "holds no expert"),
    ],
)
def test_other_files_are_refused(place, text, told):
    (place / "forest.json").write_text(text)
    with pytest.raises(UserError, match=told):
        open_forest(place)


def test_what_is_no_forest_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="one dense model"):
        open_forest(place / "law")
    with pytest.raises(UserError, match="holds no expert"):
        open_forest(tmp_path / "nothing")


def test_a_failed_edit_changes_nothing(place):
    with edit_forest(place) as experts:
        experts.append(law(place))
    before = (place / "forest.json").read_bytes()
    with pytest.raises(ZeroDivisionError), edit_forest(place) as experts:
        experts.append(Expert("med", place / "med"))
        raise ZeroDivisionError
    with pytest.raises(UserError, match="vocabularies"), edit_forest(place) as experts:
        experts.append(Expert("wide", place / "wide"))
    assert (place / "forest.json").read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_while_writing_changes_nothing(place, monkeypatch, call):
    with edit_forest(place) as experts:
        experts.append(law(place))
    before = (place / "forest.json").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(OSError, match="No space"), edit_forest(place) as experts:
        experts.append(Expert("med", place / "med"))
    assert (place / "forest.json").read_bytes() == before
    assert not list(place.glob(".forest.json.*.tmp"))


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


def test_a_kill_at_any_call_leaves_the_old_forest_or_the_new(place, monkeypatch):
    """As if killed at the first call that changes the disk, at the second, and so on."""
    with edit_forest(place) as experts:
        experts.append(law(place))
    seen, done, start = [], False, (place / "forest.json").read_bytes()
    while not done:
        (place / "forest.json").write_bytes(start)
        (place / "config.json").unlink(missing_ok=True)
        left = [len(seen)]
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(files.os, name, crashing(getattr(files.os, name), left))
            patch.setattr("builtins.open", crashing(open, left))
            # The end of a process leaves temporary files where they are.
            patch.setattr("pathlib.Path.unlink", crashing(Path.unlink, left))
            try:
                with edit_forest(place) as experts:
                    experts.append(Expert("med", place / "med"))
                done = True
            except Crash:
                pass
        seen.append(open_forest(place).domains)
    assert seen[0] == ("law",) and seen[-1] == ("law", "med") and len(seen) > 8
    assert seen == sorted(seen)  # never back
    with edit_forest(place):
        pass
    assert not list(place.glob(".forest.json.*.tmp"))


def test_parents_inside_move_with_the_forest(place, tmp_path):
    parents = tuple(Parent(str(at / "seed"), 0.5) for at in (place, tmp_path / "elsewhere"))
    with edit_forest(place) as experts:
        experts.append(Expert("law", place / "law", parents=parents))
    paths = [parent.path for parent in open_forest(place).experts[0].parents]
    assert paths == ["seed", str(tmp_path / "elsewhere" / "seed")]


def test_a_run_stands_for_its_model(place, tmp_path):
    shutil.copytree(place / "mixed", tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert open_forest(tmp_path / "run").domains == ("law", "code", "art")


def add(place, number: int) -> None:
    with edit_forest(place) as experts:
        experts.append(Expert(f"law{number}", place / "law"))


def test_editors_wait_for_each_other(place):
    assert module.FILE == "forest.json"
    context = multiprocessing.get_context("fork")
    editors = [context.Process(target=add, args=(place, number)) for number in range(8)]
    for editor in editors:
        editor.start()
    for editor in editors:
        editor.join(60)
    assert sorted(open_forest(place).domains) == [f"law{number}" for number in range(8)]


def test_a_forest_has_the_tokenizer_of_its_experts(place):
    """That of the first expert with one; a tokenizer that is there already stays."""
    (place / "med" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (place / "med" / "tokenizer_config.json").write_text("{}")
    (place / "med" / "notes.json").write_text("{}")
    forest = place / "forest"
    with edit_forest(forest) as experts:
        experts += [Expert(name, place / name) for name in ("law", "med")]
    files = {file.name for file in forest.iterdir() if not file.name.startswith(".")}
    assert files == {"forest.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (forest / "tokenizer.json").read_text() == '{"model": {"vocab": {"a": 0}}}'
    (forest / "tokenizer.json").write_text("mine")
    with edit_forest(forest) as experts:
        del experts[0]
    assert (forest / "tokenizer.json").read_text() == "mine"
