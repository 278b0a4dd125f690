"""Models whose config.json does not describe their weights are not merged."""

import json
import subprocess
import sys

import pytest
import torch
from models.tiny_hosts import tiny_stock
from saved_models import make_model

from megamod.errors import UserError
from megamod.merging.merge import average_folders

MISSING = object()
CHANGES = [
    *(("hidden_size", value) for value in (32, 1, -16, 0, None, "16", MISSING)),
    *(("vocab_size", value) for value in (24, 2**31, 10**40, 1.5, MISSING)),
    *(("num_hidden_layers", value) for value in (1, 3, "2", [2], MISSING)),
    *(("num_attention_heads", value) for value in (3, 0, MISSING)),
    *(("intermediate_size", value) for value in (65, -1)),
    *(("pad_token_id", value) for value in (99, {}, "x")),
    *(("domains", value) for value in (["law", "law"], [3], "law", ["\ud800"])),
    *(("untie", 3), ("untie", "x"), ("domain", "law"), ("model_type", "llama"), ("model_type", 3)),
    *(("layer_norm_eps", []), ("hidden_dropout_prob", "x"), ("architectures", 3)),
    *(("tie_word_embeddings", "yes"), ("transformers_version", {}), ("use_cache", [])),
    *(("layer_norm_eps", float("nan")), ("hidden_dropout_prob", float("inf"))),
    *(("dtype", "floa432"), ("torch_dtype", "auto")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("damaged") / "model")


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=range(len(CHANGES)))
def test_a_config_that_does_not_fit_its_weights(folder, tmp_path, key, value):
    file = folder / "config.json"
    original = file.read_text()
    fields = json.loads(original)
    if value is MISSING:
        del fields[key]
    else:
        fields[key] = value
    file.write_text(json.dumps(fields))
    try:
        with pytest.raises(UserError) as caught:
            average_folders([(folder, None)] * 2, [1, 1], tmp_path / "out")
    finally:
        file.write_text(original)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 1), ("head_dim", 64)])
def test_a_stock_model_whose_config_describes_another(tmp_path, key, value):
    model = tiny_stock("llama", seed=1)
    model.save_pretrained(tmp_path / "model")
    average_folders([(tmp_path / "model", None)], [1], tmp_path / "whole")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"config\.json: (describes|does not describe)"):
        average_folders([(tmp_path / "model", None)], [1], tmp_path / "out")


def test_a_type_that_no_library_knows_is_merged(folder, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unknown", "hidden_size": 3}')
    save_file({"a": torch.ones(4)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    average_folders([(tmp_path / "model", None)] * 2, [1, 1], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_transformers_is_not_loaded_for_a_usual_model(folder, tmp_path):
    code = """
import sys
from pathlib import Path
from megamod.merging.merge import average_folders
average_folders([(Path(sys.argv[1]), None)] * 2, [1, 1], Path(sys.argv[2]))
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out")], check=True)
