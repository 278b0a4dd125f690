"""Damaged files of others end in one sentence, whatever their reader stumbles over."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import launch
from safetensors.torch import save_file
from saved_models import make_model

from megamod.convert.sources import resolve_model
from megamod.data.corpus.tokenizers import load_tokenizer
from megamod.data.tasks.specs import TASKS
from megamod.data.tasks.text_labels import read_text_task
from megamod.errors import UserError, report_damage
from megamod.merging.merge import merge
from megamod.merging.recipe_file import read_recipe
from megamod.models.lm.configuration import read_lm_config
from megamod.models.lm.load import build_lm, load_lm
from megamod.states.checkpoint_folder import StateRecord
from megamod.states.config_file import read_config_file
from megamod.states.forest import open_forest
from megamod.states.manifest import find_file_faults
from megamod.states.stream import ModelFolder
from megamod.states.verify import check_path
from megamod.states.weight_files import has_weights, read_index
from megamod.states.weights import read_weights

DEEP = "[" * 100_000
CONFIGS = [
    *("", "{", "[]", "3", "null", '"text"', DEEP, "\0\1"),
    *('{"model_type": 3}', '{"model_type": "gpt2", "n_layer": 1e400}', '{"model_type": []}'),
    '{"model_type": "gpt2", "n_embd": "wide"}',
    '{"model_type": "demix", "hidden_size": -4}',
    '{"model_type": "demix", "domains": 7, "untie": "feedforward"}',
    '{"model_type": "llama", "rope_scaling": 3, "rope_parameters": 4}',
]
INDICES = [
    *("", "{", "[]", "3", DEEP, "{}", '{"weight_map": 3}', '{"weight_map": []}'),
    *('{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}'),
    '{"weight_map": {"a": "absent.safetensors"}}',
]


def refused(call, *arguments, **options) -> str:
    """Message of the UserError that a call ends with: one line, and not long."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_configurations(tmp_path, text):
    folder = make_model(tmp_path / "model")
    (folder / "config.json").write_text(text, encoding="utf-8", errors="replace")
    for call in (read_lm_config, load_lm):
        assert "model" in refused(call, folder, flag="--model")
    assert "--model" in refused(resolve_model, str(folder), "--model", {"gpt2"}.__contains__)


@pytest.mark.parametrize("half", [b"\\ud800", b"\xed\xa0\x80"])
def test_half_of_a_character(tmp_path, half):
    folder = make_model(tmp_path / "model")
    content = (folder / "config.json").read_bytes().rstrip().removesuffix(b"}")
    (folder / "config.json").write_bytes(content + b', "note": "' + half + b'"}')
    assert "cannot be written as UTF-8" in refused(read_config_file, folder)


@pytest.mark.parametrize("text", INDICES, ids=range(len(INDICES)))
def test_indices(tmp_path, text):
    folder = make_model(tmp_path / "model", "feedforward")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    for call in (read_weights, has_weights, ModelFolder):
        assert "model" in refused(call, folder)
    ((_, faults),) = check_path(folder)
    assert faults


@pytest.mark.parametrize("cut", [0, 7, 60, 3000])
def test_weights_that_are_cut_short(tmp_path, cut):
    folder = make_model(tmp_path / "model")
    config, file = read_lm_config(folder), folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    for call in (read_weights, load_lm, ModelFolder):
        assert "model" in refused(call, folder)
    refused(build_lm, config, seed=1, init_from=folder)


def test_a_pickle_under_the_name_of_an_index_is_not_read(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "evil.bin")
    index = {"weight_map": {"a": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "evil.bin: cannot be read as weights" in refused(read_weights, folder)


def test_a_small_file_cannot_claim_a_large_model(tmp_path):
    fields = {"model_type": "bert", "num_hidden_layers": 10**9, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config_file(tmp_path)["hidden_size"] == 64  # nothing to compare with
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    message = refused(resolve_model, str(tmp_path), "--model")
    assert "1000000000 layers of width 64 and intermediate size" in message
    assert message.endswith("cannot be in weight files of 80 bytes")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_small_file_cannot_claim_the_default_sizes_of_a_family(tmp_path, family):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    message = refused(resolve_model, str(tmp_path), "--model")
    assert "token embeddings, cannot be in weight files of 80 bytes" in message
    if family == "llama":
        assert "cannot be in weight files" in refused(load_lm, tmp_path)


TOKENIZERS = {
    "tokenizer.json": ["", "{", "[]", DEEP, '{"version": "1.0"}', '{"model": {"type": "BPE"}}'],
    "vocab.txt": ["", "\n\n"],
    "sentencepiece.model": ["", "not one", "\0" * 50],
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(tmp_path, name):
    for text in TOKENIZERS[name]:
        (tmp_path / name).write_text(text)
        assert "--tokenizer" in refused(load_tokenizer, tmp_path)


def test_code_of_a_folder_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    (tmp_path / "evil.py").write_text("open('executed', 'w')\n")
    monkeypatch.chdir(tmp_path)
    auto = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"]}
    fields = {"model_type": "evilbert", "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    for call in (lambda: resolve_model(str(tmp_path), "--model"), lambda: load_tokenizer(tmp_path)):
        refused(call)
    assert not (tmp_path / "executed").exists()


@settings(max_examples=60)
@given(st.data())
def test_changed_bytes_of_an_index_are_read_or_refused(tmp_path_factory, data):
    """Structure-aware: a valid index with a part replaced by any JSON value."""
    values = st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=4)
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors"}}
    key = data.draw(st.sampled_from(["weight_map", "a"]))
    (index if key == "weight_map" else index["weight_map"])[key] = data.draw(values)
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        names = read_index(folder).values()
    except UserError:
        return
    assert all("/" not in name and name not in ("", "..") for name in names)


STATES = [
    *(
        "",
        "{}",
        "[]",
        DEEP,
        '{"state": 3}',
        '{"state": {"step": "4", "data_step": 4, "tokens": {}}}',
    ),
    '{"state": {"step": -4, "data_step": 4, "tokens": {}}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}, "mean_loss": NaN}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}}, "world_size": 0}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {"law": 1.5}}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}}, "setings": {}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}, "skipped": 5}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}, "nonfinite_steps": [5]}}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}}, "optimizer_steps": 5}',
    '{"state": {"step": 4, "data_step": 4, "tokens": {}}, "optimizer_steps": 1.5}',
]


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_states_of_checkpoints(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    assert "state.json" in refused(StateRecord.read, tmp_path)


def test_manifests(tmp_path):
    for text in ("", "[]", DEEP, '{"files": 3}', '{"files": {"a": {"bytes": []}}}'):
        (tmp_path / "manifest.json").write_text(text)
        (fault,) = find_file_faults(tmp_path)
        assert "manifest.json" in fault


class UnpicklingError(Exception):
    """As torch raises it, with advice that nobody must follow."""


class Panic(BaseException):
    """As the panic of a library in Rust."""


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), RecursionError("deep"), Panic("x"), OSError(), UnpicklingError("weights_only")],
)
def test_every_error_of_a_reader_becomes_one_sentence(error):
    def read():
        with report_damage("FILE: cannot be read"):
            raise error

    assert refused(read).startswith("FILE: cannot be read: ")
    assert "weights_only" not in refused(read)
    with pytest.raises(KeyboardInterrupt), report_damage("FILE"):
        raise KeyboardInterrupt


def test_messages_name_the_document_that_names_the_folder(tmp_path):
    """A path that a document names is wrong: the document is what the user mends."""
    file, wrong = tmp_path / "some.yml", "/etc/passwd"
    inputs = [{"model": str(make_model(tmp_path / "model"))}, {"model": wrong}]
    file.write_text(json.dumps({"merge_method": "linear", "models": inputs}))
    assert "some.yml: /etc/passwd" in refused(merge, read_recipe(file), None, dry_run=True)
    forest = tmp_path / "forest.json"
    launch("forest", "add", "--forest", forest, "--path", tmp_path / "model", "--domain", "law")
    document = json.loads(forest.read_text())
    document["experts"][0]["path"] = wrong
    forest.write_text(json.dumps(document))
    assert "forest.json: law: /etc/passwd" in refused(open_forest, forest)
    (tmp_path / "plain").write_text("a\tb\n")
    task = replace(TASKS["sst-2"], folder="", files={"train": ("plain",)})
    assert f"task sst-2 in {tmp_path}" in refused(read_text_task, task, tmp_path, ["train"])


@pytest.mark.parametrize("far", [2**24, 2**31, 2**70])
def test_ids_that_are_far_from_others(tmp_path, far):
    """tokenizers and transformers would take minutes and 9 GB for this file."""
    model = {
        "type": "WordLevel",
        "vocab": {"[UNK]": 0, "</s>": 1, "far": far},
        "unk_token": "[UNK]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    message = refused(load_tokenizer, tmp_path)
    assert f"{tmp_path / 'tokenizer.json'}: token 'far' has the id {far}" in message
