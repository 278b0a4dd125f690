import json
import math
import zlib
from hashlib import sha256
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamod.errors import UserError
from megamod.states.stream import (
    PIECE,
    ModelFolder,
    TensorSpec,
    iterate_pieces,
    plan_shards,
    write_streamed_tensors,
)
from megamod.states.weights import read_weights

MARKS = "layers.0.feed_forward.experts"


def random_state() -> dict[str, torch.Tensor]:
    """Tensors of several types, one of them longer than two pieces, one empty, one a number."""
    generator = torch.Generator().manual_seed(4)
    long = torch.randn(2 * PIECE // 4 + 5, generator=generator)
    return {
        "long": long,
        "half": torch.randn(3, 7, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "ids": torch.arange(9).reshape(3, 3),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64),
    }


def parts_of(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(tensor.reshape(-1).split(size)) if tensor.numel() else []


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("most", [10**9, 3_000_000, 1])
def test_what_is_written_in_pieces_is_read_back(tmp_path, most):
    state = random_state()
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in state.items()}
    files = plan_shards(specs, most)
    assert sorted(name for names in files.values() for name in names) == sorted(state)
    written = write_streamed_tensors(
        tmp_path, files, specs, lambda name: parts_of(state[name], 1000)
    )
    assert sorted(written) == sorted(tmp_path.iterdir())

    weights = [file for file in written if file.suffix == ".safetensors"]
    assert len(weights) == (1 if most == 10**9 else len(weights))
    for file in weights:
        held = files[file.name]
        assert len(held) == 1 or sum(specs[name].nbytes for name in held) <= most
    same({k: v for file in weights for k, v in load_file(file).items()}, state)
    with ModelFolder(tmp_path) as folder:
        same({name: folder.read(name) for name in folder.tensors}, state)
        part = torch.empty(7)
        folder.read_into("long", PIECE // 4 - 3, part)
        assert torch.equal(part, state["long"][PIECE // 4 - 3 :][:7])
    if len(weights) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())


@pytest.mark.parametrize(("count", "message"), [(3, "4 bytes fewer than"), (6, "8 bytes more")])
def test_a_wrong_number_of_elements_is_noticed(tmp_path, count, message):
    specs = {"a": TensorSpec(torch.float32, (4,))}
    with pytest.raises(ValueError, match=message):
        write_streamed_tensors(
            tmp_path, plan_shards(specs, 99), specs, lambda name: [torch.zeros(count)]
        )


def test_pieces_cover_a_tensor_once():
    for numel in (0, 1, PIECE // 4, PIECE // 4 + 1, 3 * PIECE // 4 - 1):
        result = list(iterate_pieces(numel))
        assert sum(stop - start for start, stop in result) == numel
        assert all(b == c for (_, b), (c, _) in pairwise(result))
        assert len(result) == math.ceil(numel / (PIECE // 4))


def test_a_member_is_the_dense_model_of_its_domain(tmp_path):
    shared = {"norm": torch.randn(4)}
    files = {"shared.safetensors": shared}
    for domain in ("law", "med"):
        files[f"expert_{domain}.safetensors"] = {f"{MARKS}.{domain}.fc1": torch.randn(3)}
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    save_file({"exp_avg": torch.zeros(3)}, tmp_path / "optimizer-0.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with ModelFolder(tmp_path, "med") as folder:
        read = {name: folder.read(name) for name in folder.tensors}
        names = [file.name for file in folder.files]
        digest = folder.compute_digest()
    expert = files["expert_med.safetensors"][f"{MARKS}.med.fc1"]
    same(read, {"norm": shared["norm"], "layers.0.feed_forward.fc1": expert})
    assert names == ["expert_med.safetensors", "shared.safetensors"]
    hashed = sha256()
    for name in names:
        content = (tmp_path / name).read_bytes()
        hashed.update(name.encode() + zlib.crc32(content).to_bytes(4, "little"))
    assert digest == f"crc32-sha256:{hashed.hexdigest()}"
    assert ModelFolder(tmp_path).tensors.keys() == weight_map.keys()
    with pytest.raises(UserError, match="no expert of domain 'art'; there are law, med"):
        ModelFolder(tmp_path, "art")


def test_broken_folders_are_refused_by_name(tmp_path):
    def refused(*message: str) -> None:
        with pytest.raises(UserError) as error, ModelFolder(tmp_path) as folder:
            folder.read("a")
        assert all(part in str(error.value) for part in message), error.value

    refused(str(tmp_path), "no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused("pytorch_model.bin", "safetensors first")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    whole = file.read_bytes()
    for broken in (b"", whole[:5], whole[:-1], b"\xff" * 8 + whole[8:], whole[:20] + whole[40:]):
        file.write_bytes(broken)
        refused("model.safetensors")
    file.write_bytes(whole)
    file.rename(tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{", "model.safetensors.index.json: cannot be read"),
        ("[]", "model.safetensors.index.json: is not an object"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file of this folder"),
        ('{"weight_map": {"a": 3}}', "not a file of this folder"),
        ('{"weight_map": {"a": "other.safetensors"}}', "other.safetensors is missing"),
        ('{"weight_map": {"b": "part.safetensors"}}', "b is not in part.safetensors"),
    ):
        index.write_text(content)
        refused(message)
    # Beside a single file an index counts for nothing, here as in transformers.
    file.write_bytes(whole)
    assert list(ModelFolder(tmp_path).tensors) == list(read_weights(tmp_path)) == ["a"]
