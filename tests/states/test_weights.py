import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megamod.errors import UserError
from megamod.states.checkpoint_folder import KINDS, read_fragments, write_fragments
from megamod.states.weights import (
    assign_to_experts,
    extract_expert_weights,
    read_weights,
    select_weight_file,
    write_index,
    write_weights,
)

DEMIX = {
    "norm.weight": torch.arange(3.0),
    "x.experts.law.fc1": torch.ones(2, 2),
    "x.experts.med.fc1": torch.full((2, 2), 2.0),
}


def test_experts_and_shared_weights_lie_in_files_of_their_own(tmp_path):
    files = write_weights(tmp_path, DEMIX, has_experts=True)
    contents = {file.name: set(load_file(file)) for file in files}
    assert contents == {
        "shared.safetensors": {"norm.weight"},
        "expert_law.safetensors": {"x.experts.law.fc1"},
        "expert_med.safetensors": {"x.experts.med.fc1"},
    }
    index = json.loads(write_index(tmp_path, DEMIX, 44).read_text())
    assert index["metadata"] == {"total_size": 44}
    for name, file in index["weight_map"].items():
        assert name in contents[file] and file == select_weight_file(name, has_experts=True)
    read = read_weights(tmp_path)
    assert read.keys() == DEMIX.keys()
    assert all(torch.equal(read[name], DEMIX[name]) for name in DEMIX)


def test_a_dense_model_is_one_file_with_the_mark_of_torch(tmp_path):
    state = {"a": torch.nn.Parameter(torch.randn(3, 2).T), "b": torch.ones(1, dtype=torch.bfloat16)}
    (file,) = write_weights(tmp_path, state, has_experts=False)
    assert file.name == "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    read = read_weights(tmp_path)
    assert torch.equal(read["a"], state["a"]) and read["b"].dtype == torch.bfloat16


def test_a_missing_weight_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the weight file model\.safetensors is missing"):
        read_weights(tmp_path)
    write_weights(tmp_path, DEMIX, has_experts=True)
    write_index(tmp_path, DEMIX, 44)
    (tmp_path / "expert_med.safetensors").unlink()
    with pytest.raises(UserError, match=r"expert_med\.safetensors is missing"):
        read_weights(tmp_path)


def test_one_expert_with_the_shared_weights_is_a_dense_model():
    state = extract_expert_weights(DEMIX, "med")
    assert state.keys() == {"norm.weight", "x.fc1"}
    assert state["x.fc1"] is DEMIX["x.experts.med.fc1"]
    with pytest.raises(UserError, match="no expert of domain 'code'; there are law, med"):
        extract_expert_weights(DEMIX, "code")


def test_spreading_a_dense_model_gives_every_expert_its_weights():
    dense = {"norm.weight": torch.ones(3), "x.fc1": torch.zeros(2, 2)}
    filled = assign_to_experts(dense, DEMIX)
    assert filled.keys() == DEMIX.keys()
    assert filled["x.experts.law.fc1"] is filled["x.experts.med.fc1"] is dense["x.fc1"]
    assert extract_expert_weights(filled, "law").keys() == dense.keys()
    with pytest.raises(UserError, match=r"lack x\.fc1 \(and 1 more\)"):
        assign_to_experts({"norm.weight": torch.ones(3)}, DEMIX)


def test_copies_of_optimizer_fragments_are_equal_bit_for_bit(tmp_path):
    """Metadata of a safetensors file come in another order each time that it is opened."""
    kinds = {kind: torch.arange(2.0) for kind in KINDS}
    write_fragments(tmp_path / "0", {f"w{number}": (number, kinds) for number in range(30)})
    for copy in ("1", "2", "3"):
        fragments = read_fragments(tmp_path / "0", lambda name: name != "w7")
        write_fragments(tmp_path / copy, {name: (start, of) for name, start, of in fragments})
    contents = {(tmp_path / copy).read_bytes() for copy in ("1", "2", "3")}
    assert len(contents) == 1
