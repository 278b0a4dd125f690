"""Files of studies: what settings a cell has, and what is refused."""

import re
from pathlib import Path

import pytest
import yaml

from megamod.errors import UserError
from megamod.runs.studies.finetuning import run_finetuning_cell
from megamod.runs.studies.study_file import Cell, read_study

STUDIES = Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "studies"
GOOD = {
    "title": "t",
    "kind": "language_models",
    "text": {"domains": ["law"], "tokenizer": "sentencepiece:300"},
    "common": {"model": "tiny", "max_steps": 9, "seed_share": None},
    "rungs": {"a": {"max_steps": 4}, "b": {}},
    "arms": {"x": {"learning_rate": {"a": 0.1, "b": 0.2}}, "y": {"model": "125m"}},
    "seeds": [3, 1],
    "table": {"value": "perplexity", "lines": {"x": ["x", "own"]}, "baseline": ["x", "own"]},
}


def written(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_settings_of_cells(tmp_path):
    study = read_study(written(tmp_path / "mine.yaml"))
    assert study.name == "mine"
    assert [cell.name for cell in study.cells] == [
        *("x.a.s3", "y.a.s3", "x.a.s1", "y.a.s1", "x.b.s3", "y.b.s3", "x.b.s1", "y.b.s1"),
    ]
    assert study.find_cell("x.a.s3").settings == dict(model="tiny", max_steps=4, learning_rate=0.1)
    assert study.find_cell("x.b.s1").settings == dict(model="tiny", max_steps=9, learning_rate=0.2)
    assert study.find_cell("y.a.s1").settings == dict(model="125m", max_steps=4)
    with pytest.raises(UserError, match=r"no 'x.a.s2'; the nearest: x.a.s"):
        study.find_cell("x.a.s2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "poems"}, "mine.yaml, kind: 'poems' is not one of language_models, finetuning"),
        ({"text": None}, "kind: language_models needs `text`"),
        ({"armz": {}}, "mine.yaml: unknown key 'armz'; the nearest is 'arms'"),
        ({"arms": {}}, "mine.yaml, arms: {} has fewer than 1 items"),
        ({"arms": {"x": {}, "a b": {}}}, "letters, digits"),
        ({"arms": {"x": {"learning_rate": {"a": 1.0}}}}, "by rung has the keys a; the rungs: a, b"),
        ({"common": {"x": [{}]}}, "mine.yaml, common.x: {} is not text, a number, true, false"),
        ({"common": {"x": {1: 2}}}, "common.x: {1: 2} has keys that are not names of rungs"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": ["1"]}, "mine.yaml, seeds[0]: '1' is not a whole number"),
        ({"table": {**GOOD["table"], "baseline": ["z", "own"]}}, "'z' is no arm"),
        ({"table": {**GOOD["table"], "lines": {"x": ["x"]}}}, "is not an arm and a row"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_study(written(tmp_path / "mine.yaml", **changes))
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b"- 1", b""])
def test_not_a_study(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_study(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies(path):
    study = read_study(path)
    assert len({cell.name for cell in study.cells}) == len(study.cells)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launcher": "mtl"}, "x.all.s1: the launcher mtl needs the setting tasks"),
        ({"launcher": "bert"}, "launcher 'bert' is none of glue, ner, mtl"),
        ({"launcher": "ner", "one_model_a_task": True}, "is for the launcher mtl, not ner"),
    ],
)
def test_refused_settings_of_finetuning(tmp_path, settings, message):
    cell = Cell("x", "all", 1, settings)
    with pytest.raises(UserError, match=re.escape(message)):
        run_finetuning_cell(None, cell, tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
