import hashlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamod.data.corpus.binarize import binarize
from megamod.errors import UserError
from megamod.states.checkpoint_folder import find_checkpoint
from megamod.states.forest import Expert, edit_forest
from megamod.states.manifest import find_file_faults
from megamod.states.weights import write_index, write_weights

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "launchers" / "verify.py"
STATE = {
    "model.norm.weight": torch.ones(3),
    "x.experts.law.fc1.weight": torch.zeros(4, 3),
    "x.experts.med.fc1.weight": torch.ones(4, 3),
}


def check(monkeypatch, path: Path) -> list[str]:
    """The command in this process: the faults it lists."""
    spec = importlib.util.spec_from_file_location("verify_launcher", LAUNCHER)
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    monkeypatch.setattr(sys, "argv", [str(LAUNCHER), str(path)])
    try:
        launcher.main()
    except UserError as error:
        return str(error).split("\n  ")[1:] or [str(error)]
    return []


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "demix", "domains": ["law", "med"]}')
    write_weights(folder, STATE, has_experts=True)
    write_index(folder, STATE, 108)
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A folder as the training loop leaves it, its manifest made without the project's code."""
    write_model(folder)
    (folder / "state.json").write_text('{"state": {"step": 4, "data_step": 4, "tokens": {}}}')
    files = {
        file.name: {
            "bytes": len(file.read_bytes()),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


@pytest.fixture
def whole_run(tmp_path):
    for step in (2, 4):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-4\n")
    write_model(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def made_data_bin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("\n\n".join(f"text {n} of {n * n}" for n in range(200)))
    binarize(
        {"law": folder / "a.txt", "med": folder / "a.txt"}, "sentencepiece:300", folder / "bin"
    )
    return folder / "bin"


@pytest.fixture
def data_bin(made_data_bin, tmp_path):
    return Path(shutil.copytree(made_data_bin, tmp_path / "bin"))


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def test_a_whole_run_in_one_line_per_group(whole_run):
    command = [sys.executable, str(LAUNCHER), str(whole_run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["ok"] * 4
    kinds = ["step-2: ch", "step-4: ch", "latest: step-4", "model: mod"]
    for line, kind in zip(done.stdout.splitlines(), kinds, strict=True):
        assert kind in line
    (whole_run / "checkpoints" / "step-2" / "shared.safetensors").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"UserError: {whole_run} is damaged, 1 faults:\n")
    assert "step-2/shared.safetensors is missing" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["FAULT", "ok", "ok", "ok"]


def test_verifying_a_checkpoint_loads_neither_torch_nor_deepspeed(whole_run):
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(LAUNCHER)!r}, {str(whole_run / 'checkpoints' / 'step-4')!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path, monkeypatch):
    rng, original = random.Random(0), write_checkpoint(tmp_path / "step-4")
    files = sorted(original.iterdir())
    for number in range(120):
        copy = Path(shutil.copytree(original, tmp_path / f"copy{number}" / "step-4"))
        file = copy / files[number % len(files)].name
        before = file.read_bytes()
        flip(file, rng)
        faults = find_file_faults(copy)
        if file.name == "manifest.json" and not faults:
            # only a flip between blanks, or in the spelling of a name, could leave it equal
            assert json.loads(file.read_text()) == json.loads(before)
        else:
            assert faults and all(str(copy) in fault for fault in faults)
    assert check(monkeypatch, original) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "manifest.json is missing"),
        ("", "not JSON"),
        ("[]", "is not `key: value` lines"),
        ('{"files": {}}', "files: {} has fewer than 1 items"),
        ('{"files": {"x": {"bytes": 3}}}', "files.x.sha256 is missing"),
        ('{"files": {"x": {"bytes": 3, "sha256": "0"}}}', "x is missing"),
        ('{"files": {"state.json": {"bytes": 3, "sha256": "0"}}}', "has 52 bytes, not 3"),
        ('{"files": {"state.json": {"bytes": 52, "sha256": "0"}}}', "SHA-256 digest of its man"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_told(tmp_path, monkeypatch, content, message):
    folder = write_checkpoint(tmp_path / "step-4")
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    fault, *unlisted = check(monkeypatch, folder)
    assert message in fault and all("has no digest" in text for text in unlisted)
    assert find_checkpoint(tmp_path / "none", "auto") is None
    with pytest.raises(UserError, match="none of 1 checkpoints is valid"):
        find_checkpoint(tmp_path, "auto")


def test_a_state_that_cannot_be_read_is_a_fault_whatever_its_digest(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "step-4")
    content = b'{"state": {"step": 4, "data_step": -4, "tokens": {}}}'
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["state.json"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_file_faults(folder) == []
    (fault,) = check(monkeypatch, folder)
    assert "state.json, state.data_step: -4 is not 0 or more" in fault


def test_sizes_alone_are_checked_on_request(tmp_path):
    folder = write_checkpoint(tmp_path / "step-4")
    flip(folder / "shared.safetensors", random.Random(1))
    assert (
        find_file_faults(folder, check_digests=False) == [] and len(find_file_faults(folder)) == 1
    )


def test_latest_must_name_a_checkpoint(whole_run, monkeypatch):
    (whole_run / "checkpoints" / "latest").write_text("step-9")
    (fault,) = check(monkeypatch, whole_run)
    assert "names 'step-9'; there are step-2, step-4" in fault


def test_models_are_checked_against_their_index(whole_run, tmp_path, monkeypatch):
    model = whole_run / "model"
    assert check(monkeypatch, model) == []
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["x.experts.new.fc1.weight"] = "shared.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (fault,) = check(monkeypatch, whole_run)
    assert "shared.safetensors do not agree on x.experts.new.fc1.weight" in fault
    cut = (model / "expert_law.safetensors").read_bytes()[:-1]
    (model / "expert_law.safetensors").write_bytes(cut)
    (model / "expert_med.safetensors").unlink()
    faults = check(monkeypatch, model)
    assert len(faults) == 2 and all("cannot be opened" in fault for fault in faults)
    (model / "config.json").write_text("{")
    (fault,) = check(monkeypatch, model)
    assert "config.json: cannot be read" in fault
    for domain in ("law", "med"):  # independent models: a folder each
        write_model(tmp_path / "both" / "model" / domain)
    assert (
        check(monkeypatch, tmp_path / "both") == check(monkeypatch, tmp_path / "both/model") == []
    )
    (tmp_path / "both" / "model" / "med" / "shared.safetensors").unlink()
    assert len(check(monkeypatch, tmp_path / "both")) == 1


def test_a_whole_data_bin(data_bin, monkeypatch, capsys):
    assert check(monkeypatch, data_bin) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 and all(line.startswith("ok") for line in lines)
    header = json.loads((data_bin / "databin.json").read_text())
    tokens = header["domains"]["med"]["train"]["tokens"]
    assert f"{tokens:,} tokens" in lines[5] and "med/train" in lines[5]


def test_every_flipped_bit_of_ids_and_indices_is_found(data_bin, monkeypatch):
    rng = random.Random(0)
    for file in sorted(data_bin.glob("*/*.[bi][id][nx]")):
        whole = file.read_bytes()
        flip(file, rng)
        faults = check(monkeypatch, data_bin)
        assert faults and all(str(file.with_suffix("")) in fault for fault in faults)
        file.write_bytes(whole)
    assert check(monkeypatch, data_bin) == []


def test_other_faults_of_a_data_bin(data_bin, monkeypatch):
    (data_bin / "law" / "train.bin").unlink()
    faults = check(monkeypatch, data_bin)
    assert len(faults) == 1 and "law/train.bin" in faults[0]
    shutil.copy(data_bin / "med" / "train.bin", data_bin / "law" / "train.bin")
    assert check(monkeypatch, data_bin) == []  # of the same text
    model = data_bin / "tokenizer" / "sentencepiece.model"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    (fault,) = check(monkeypatch, data_bin)
    assert "tokenizer/sentencepiece.model is missing or does not have the SHA-256" in fault
    header = json.loads((data_bin / "databin.json").read_text())
    del header["digest"], header["files"]  # as in earlier versions
    (data_bin / "databin.json").write_text(json.dumps(header))
    (fault,) = check(monkeypatch, data_bin)
    assert "tokenizer cannot be loaded" in fault
    model.write_bytes(whole)
    other = {**header, "tokenizer": {**header["tokenizer"], "digest": "0"}}
    (data_bin / "databin.json").write_text(json.dumps(other))
    (fault,) = check(monkeypatch, data_bin)
    assert "tokenizer is not the tokenizer of the header" in fault
    (data_bin / "databin.json").write_text(json.dumps({**header, "pad_id": 300}))
    (fault,) = check(monkeypatch, data_bin)
    assert "pad_id is 300" in fault


def test_a_data_bin_of_fairseq_has_its_ids_checked(data_bin, monkeypatch):
    (data_bin / "databin.json").unlink()
    shutil.rmtree(data_bin / "tokenizer")
    (data_bin / "law" / "valid_law.idx").unlink()  # any split may be absent
    assert check(monkeypatch, data_bin) == []
    lines = (data_bin / "dict.txt").read_text().splitlines()
    (data_bin / "dict.txt").write_text("\n".join(lines[:50]) + "\n")
    faults = check(monkeypatch, data_bin)
    assert len(faults) == 5 and all("outside the vocabulary of 54" in fault for fault in faults)


def test_a_forest_with_the_models_and_runs_of_its_experts(tmp_path, monkeypatch, capsys):
    for name in ("law", "med"):
        write_model(tmp_path / name / "model")
        config = {"model_type": "demix", "domains": [name], "vocab_size": 23}
        (tmp_path / name / "model" / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path / "law" / "checkpoints" / "step-4")
    write_checkpoint(tmp_path / "seed" / "checkpoints" / "step-2")
    with edit_forest(tmp_path) as experts:
        experts += [Expert(domain=name, path=tmp_path / name / "model") for name in ("law", "med")]
    assert check(monkeypatch, tmp_path) == []
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [kind for kind, _ in lines] == ["ok"] * 5
    assert lines[0][1] == f"{tmp_path / 'forest.json'}: forest, 2 experts"
    flip(tmp_path / "seed" / "checkpoints" / "step-2" / "shared.safetensors", random.Random(0))
    (tmp_path / "med" / "model" / "expert_med.safetensors").unlink()
    faults = check(monkeypatch, tmp_path / "forest.json")
    assert len(faults) == 2
    assert "expert_med.safetensors cannot be opened" in faults[0]
    assert "step-2/shared.safetensors does not have the SHA-256" in faults[1]
    shutil.rmtree(tmp_path / "med")
    (fault,) = check(monkeypatch, tmp_path)
    assert "med/model: there is no model" in fault
    (tmp_path / "forest.json").write_text('{"format": 1, "experts": [], "trees": 3}')
    (fault,) = check(monkeypatch, tmp_path)
    assert "forest.json: unknown key 'trees'; the nearest is 'experts'" in fault


def test_what_is_nothing_of_ours_is_told(tmp_path, monkeypatch):
    assert (
        "holds no checkpoint, no model, no forest and no data-bin"
        in check(monkeypatch, tmp_path)[0]
    )
    assert "is not a folder" in check(monkeypatch, tmp_path / "none")[0]
