"""Checkpoints whose manifest fits their damaged files: each reader checks its file by itself."""

import json

import pytest
import torch
from drills import signed
from saved_models import make_model

from megamod.errors import UserError
from megamod.models.lm.load import load_lm
from megamod.states.checkpoint_folder import is_checkpoint, list_checkpoints, write_fragments
from megamod.states.manifest import find_file_faults, write_model_manifests
from megamod.states.verify import check_path

KINDS = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture
def folder(tmp_path):
    return signed.make_checkpoint(tmp_path / "run")


def refuse(folder):
    """Message of a resumed run, in one line; `megamod verify` reports the checkpoint, too."""
    with pytest.raises(UserError) as caught:
        signed.resume(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_resumed(folder):
    signed.resume(folder)
    assert signed.verify_signed(folder) == []


FRAGMENTS = {  # of rank 1, whose range is 30 to 64
    "overlap": ({"weight": 0}, 34, {}, "from element 0 overlaps"),
    "a hole": ({"weight": 31}, 33, {}, "is incomplete"),
    "too short": ({"weight": 30}, 33, {}, "is incomplete"),
    "too long": ({"weight": 30}, 40, {}, "holds 70 elements of 'weight', which has 64"),
    "other length": ({"weight": 30}, 34, {"exp_avg": torch.ones(1)}, "have the shapes"),
    "rank 2": ({"weight": 30}, 34, {k: torch.ones(34, 1) for k in KINDS}, "have the shapes"),
    "integers": ({"weight": 30}, 34, {"exp_avg": torch.ones(34, dtype=torch.int64)}, "holds I64"),
    "negative": ({"weight": -30}, 34, {}, "is '-30', not a whole number"),
    "text": ({"weight": "3_0"}, 34, {}, "is '3_0', not a whole number"),
    "other name": ({"bias": 30}, 34, {}, "weight is incomplete"),
}


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_that_are_not_a_share_of_the_parameter(folder, name):
    starts, size, tensors, message = FRAGMENTS[name]
    file = folder / f"step-{signed.STEP}" / "optimizer-1.safetensors"
    whole = {kind: torch.ones(size) for kind in KINDS} | tensors
    write_fragments(file, {name: (start, whole) for name, start in starts.items()})
    assert message in refuse(folder)
    if not {"incomplete", "elements"} & set(message.split()):  # these need the model
        (fault,) = signed.verify_signed(folder)
        assert message in fault


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("cur_scale", 0), ("cur_scale", True), ("cur_scale", -1.0), ("scale_window", 0)),
        *(("scale_window", 2.5), ("scale_factor", -2.0), ("cur_hysteresis", 0), ("cur_iter", -1)),
        *(("min_scale", False), ("delayed_shift", 0), ("last_overflow_iter", -2)),
    ],
)
def test_loss_scales_that_none_can_have(folder, key, value):
    file = folder / f"step-{signed.STEP}" / "state.json"
    content = json.loads(file.read_text())
    content["loss_scaler"][key] = value
    file.write_text(json.dumps(content))
    assert f"loss_scaler: {key} is {value}" in refuse(folder)
    (fault,) = signed.verify_signed(folder)
    assert key in fault


def test_a_file_that_the_manifest_does_not_list_has_no_digest(folder):
    checkpoint = folder / f"step-{signed.STEP}"
    content = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("optimizer-1.safetensors", "model.safetensors", "state.json"):
        files = {key: value for key, value in content["files"].items() if key != name}
        (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
        (fault,) = find_file_faults(checkpoint)
        assert fault == f"{checkpoint / name} is not in manifest.json, so it has no digest"
    (checkpoint / "notes.txt").write_text("of a user")
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    assert find_file_faults(checkpoint) == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../b", "a//b", "a\0b"])
def test_a_manifest_names_files_below_its_folder(folder, name):
    file = folder / f"step-{signed.STEP}" / "manifest.json"
    content = json.loads(file.read_text())
    content["files"][name] = {"bytes": 0, "sha256": ""}
    file.write_text(json.dumps(content))
    (fault,) = find_file_faults(file.parent)
    assert "is not the path of a file below the folder" in fault


def test_names_that_are_nearly_those_of_checkpoints(tmp_path):
    for name in ("step-²", "step-٣", "step-007", "step-", "step-1x", "step-8"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-8"]


@pytest.mark.parametrize("layers", [0, 1])
def test_a_configuration_of_fewer_layers_cuts_no_model(tmp_path, layers):
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match="does not describe all layers of the weights"):
        load_lm(folder)


def test_a_published_model_is_no_checkpoint(tmp_path):
    folder = make_model(tmp_path / "model")
    write_model_manifests(folder)
    assert not is_checkpoint(folder)
    ((title, faults),) = check_path(folder)
    assert "model, 1 weight files" in title and faults == []
    (tmp_path / "step-3").mkdir()
    assert is_checkpoint(tmp_path / "step-3")
