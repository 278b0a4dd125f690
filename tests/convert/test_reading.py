import argparse
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from megamod.convert import reading
from megamod.convert.reading import (
    STAND_INS,
    find_weight_file,
    list_pickle_globals,
    read_checkpoint,
)
from megamod.errors import UserError


class Call:
    """Pickles as a call of a function, made by any unpickler that allows it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class WithState:
    """Pickles as an object with a state that is made by a call."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), {"a": self.state}


HOSTILE = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"),
    "exec": lambda canary: Call(exec, f"open({str(canary)!r}, 'w')"),
    "runpy": lambda canary: Call(runpy.run_path, str(canary.with_name("program.py"))),
    "open": lambda canary: Call(open, str(canary), "w"),
    "getattr": lambda canary: Call(getattr, Path, "touch"),
    "torch.load": lambda canary: Call(torch.load, str(canary.with_name("program.py"))),
    "nested": lambda canary: {"model": {"w": [({"x": Call(os.system, f"touch {canary}")},)]}},
    "argument": lambda canary: Call(eval, Call(str, f"open({str(canary)!r}, 'w')")),
    "state": lambda canary: {"model": {}, "args": WithState(Call(os.system, f"touch {canary}"))},
    "namespace": lambda canary: {"args": argparse.Namespace(a=Call(os.system, f"touch {canary}"))},
    "map": lambda canary: Call(list, Call(map, os.system, [f"touch {canary}"])),
}
CULPRIT = {case: case for case in ("eval", "exec", "open", "getattr")} | {
    "subprocess": "check_call",
    "runpy": "run_path",
    "torch.load": "load",
    "argument": "eval",
}  # what must be named; "system" in the other cases
FORMS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "bare": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "bare text": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
}


def hostile_file(tmp_path: Path, case: str, form: str) -> tuple[Path, Path]:
    canary, file = tmp_path / "canary", tmp_path / "model.pt"
    canary.with_name("program.py").write_text(f"open({str(canary)!r}, 'w')")
    FORMS[form](HOSTILE[case](canary), file)
    return file, canary


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", HOSTILE)
def test_both_gates_refuse_a_hostile_pickle(tmp_path, case, form):
    file, canary = hostile_file(tmp_path, case, form)
    culprit = CULPRIT.get(case, "system")
    assert culprit in {name.rpartition(".")[2] for name in list_pickle_globals(file)}
    with pytest.raises(UserError, match=r"model\.pt: "):
        reading._load_pickle(file)  # what comes after the list of names, were it ever passed
    assert not canary.exists()


@pytest.mark.parametrize(
    ("case", "form"), [*((case, "zip") for case in HOSTILE), ("state", "legacy"), ("eval", "bare")]
)
def test_a_hostile_pickle_is_refused_by_the_names_in_it(tmp_path, case, form):
    file, canary = hostile_file(tmp_path, case, form)
    with pytest.raises(UserError, match=r"is refused, because it names .*nothing was") as caught:
        read_checkpoint(file)
    assert f".{CULPRIT.get(case, 'system')}" in str(caught.value) and "\n" not in str(caught.value)
    assert not canary.exists()


def pickle_of(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([b"cposix\nsystem\n"], {"posix.system"}),
        ([b"(iposix\nsystem\n"], {"posix.system"}),
        ([b"(S'id'\niposix\nsystem\n"], {"posix.system"}),
        ([text("posix"), text("system"), b"\x93"], {"posix.system"}),
        # strings that come back from the memo
        ([text("posix"), b"\x940", text("system"), b"\x940", b"h\x00h\x01\x93"], {"posix.system"}),
        ([text("posix"), b"q\x05", text("system"), b"\x93"], {"posix.system"}),
        ([b"c__builtin__\neval\n"], {"builtins.eval"}),
        ([b"\x82\x01"], {"?"}),  # of the extension registry
        ([b"\x93"], {"?"}),
        ([b"]"], set()),
    ],
)
def test_names_are_found_in_every_opcode_that_looks_one_up(tmp_path, parts, named):
    (tmp_path / "x.pt").write_bytes(pickle_of(*parts))
    assert list_pickle_globals(tmp_path / "x.pt") == named


def module_with(monkeypatch, name: str, **types_by_name: type) -> None:
    """Types that pickle under a name of a package that is not installed."""
    package = ""
    for part in name.split(".")[:-1]:
        package = f"{package}.{part}".removeprefix(".")
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    module = types.ModuleType(name)
    for key, value in types_by_name.items():
        value.__module__, value.__qualname__, value.__name__ = name, key, key
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_fairseq_file_with_namespace_and_omegaconf_settings(tmp_path, monkeypatch):
    class Node:
        def __init__(self, **state):
            self.__dict__.update(state)

    node = {key: type(key, (Node,), {}) for key in ("AnyNode", "IntegerNode", "EnumNode")}
    DictConfig, ListConfig = type("D", (Node,), {}), type("L", (Node,), {})
    ContainerMetadata = type("M", (Node,), {})
    Choices = Enum("Choices", {"simple": "simple"}, type=str)
    module_with(monkeypatch, "omegaconf.nodes", **node)
    module_with(monkeypatch, "omegaconf.dictconfig", DictConfig=DictConfig)
    module_with(monkeypatch, "omegaconf.listconfig", ListConfig=ListConfig)
    module_with(monkeypatch, "omegaconf.base", ContainerMetadata=ContainerMetadata)
    module_with(monkeypatch, "fairseq.dataclass.constants", LOG_FORMAT_CHOICES=Choices)

    root = DictConfig(_metadata=ContainerMetadata(ref_type=dict, key_type=str, flags=None))
    root._content = {
        "model": DictConfig(
            _parent=root,
            _content={
                "decoder_attention_heads": node["IntegerNode"](_val=4, _parent=root),
                "activation_fn": node["AnyNode"](_val="gelu"),
                "betas": ListConfig(_content=[node["AnyNode"](_val=0.9), 0.95]),
            },
        ),
        "log_format": Choices.simple,
    }
    half = torch.arange(6.0).view(2, 3).half()
    content = {
        "args": argparse.Namespace(arch="transformer_lm_gpt3_small", decoder_attention_heads=4),
        "cfg": root,
        "model": OrderedDict(a=half, b=half.t(), c=half),  # shared storage, other strides
        "optimizer_history": [{"num_updates": 7}],
        "extra_state": {"epoch": 1},
    }
    for number, save in enumerate((FORMS["zip"], FORMS["legacy"])):
        file = tmp_path / f"checkpoint{number}.pt"
        save(content, file)
        read = read_checkpoint(file)
        assert read.tensors.keys() == {"a", "b", "c"}
        assert torch.equal(read.tensors["b"], half.t()) and read.tensors["b"].dtype == torch.half
        assert read.settings == {
            "args": {"arch": "transformer_lm_gpt3_small", "decoder_attention_heads": 4},
            "cfg": {
                "model": {
                    "decoder_attention_heads": 4,
                    "activation_fn": "gelu",
                    "betas": [0.9, 0.95],
                },
                "log_format": "simple",
            },
        }


def test_stand_ins_do_nothing():
    assert not any(name.startswith(("os.", "posix.", "subprocess.", "sys.")) for name in STAND_INS)
    built = reading._StandIn.make_type("omegaconf.nodes.AnyNode")("touch", "x")
    built.__setstate__({"_val": 3})
    assert (
        type(built).__name__ == "AnyNode"
        and reading._convert_to_json_value(built, 0, iter(range(9)), Path("x")) == 3
    )


def test_a_bare_state_dict_keeps_its_tensors_only(tmp_path):
    torch.save({"w": torch.ones(2, 2), "step": 3}, tmp_path / "pytorch_model.bin")
    read = read_checkpoint(tmp_path / "pytorch_model.bin")
    assert read.tensors.keys() == {"w"} and read.settings == {}


def test_tensors_that_claim_more_than_is_stored_are_refused(tmp_path):
    torch.save({"model": {"w": torch.zeros(1).expand(10**12)}}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="'w' claims more elements than the file stores"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_a_compressed_archive_is_refused(tmp_path):
    torch.save({"w": torch.zeros(4)}, tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as small,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in small.namelist():
            content = small.read(name)
            bomb.writestr(name, bytes(2**22) if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="is compressed, which"):
        read_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("exit_code", "stderr", "message"),
    [
        (-9, "", "within the limits on memory and time .ended by signal 9"),
        (2, "MemoryError: not enough memory: x\n", "within the limits .* not enough memory: x"),
        (1, "Traceback\nKeyError: 'a'\n", r"could not be read: KeyError: 'a' \(exit code 1\)"),
    ],
)
def test_a_child_that_fails_is_described(tmp_path, monkeypatch, exit_code, stderr, message):
    (tmp_path / "a.pt").write_bytes(b"")
    child = subprocess.CompletedProcess([], exit_code, "", stderr)
    monkeypatch.setattr(reading.subprocess, "run", lambda *_, **__: child)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"PK\x03\x04" + bytes(40),
        b"\x80\x02}q\x00.",
        pickle_of(b"\x8e" + struct.pack("<Q", 2**50)),
        b"\x80\x02" + b"(" * 100_000,
    ],
)
def test_malformed_files_are_a_user_error(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pt"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a dict"),
        ({"model": torch.zeros(1)}, '"model" is a Tensor'),
        ({"model": {"w": 3}}, "'w' of \"model\" is a int"),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, "'w' is not an ordinary tensor"),
    ],
)
def test_other_contents_are_told(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError) as caught:
        reading._load_pickle(tmp_path / "model.pt")
    assert message in str(caught.value)


def test_torchscript_is_refused(tmp_path):
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this format is on its way out
        torch.jit.trace(Twice(), torch.zeros(1)).save(str(tmp_path / "model.pt"))
    with pytest.raises(UserError, match="TorchScript archive, which holds code"):
        read_checkpoint(tmp_path / "model.pt")


def test_missing_and_broken_safetensors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert read_checkpoint(tmp_path / "x.safetensors").tensors == {}
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(UserError, match="not a whole safetensors"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_scalars_of_numpy_among_the_settings(tmp_path):
    """The best loss so far, a learning rate: values, and nothing runs."""
    content = {
        "model": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=np.float64(0.5), seed=np.int64(-3), fp16=np.bool_(True)),
        "extra_state": {"best": np.float32(2.5), "val_loss": np.float16(1)},
    }
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    result = read_checkpoint(path)
    assert torch.equal(result.tensors["w"], torch.ones(2))
    assert result.settings["args"] == {"lr": 0.5, "seed": -3, "fp16": True}


def test_arrays_of_objects_are_no_scalars(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"w": torch.ones(2)}, "extra": np.array([None, 1], dtype=object)}, path)
    with pytest.raises(UserError, match="is refused, because it names numpy"):
        read_checkpoint(path)


def test_shards_are_read_together(tmp_path):
    shards = {"a": {"x": torch.ones(2)}, "b": {"y": torch.zeros(3), "z": torch.ones(1)}}
    names = {key: f"pytorch_model-{shard}.bin" for shard, part in shards.items() for key in part}
    for shard, part in shards.items():
        torch.save(part, tmp_path / f"pytorch_model-{shard}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert find_weight_file(tmp_path) == index
    assert read_checkpoint(index).tensors.keys() == {"x", "y", "z"}
    index.write_text(json.dumps({"weight_map": names | {"q": "pytorch_model-b.bin"}}))
    with pytest.raises(UserError, match="q is not in pytorch_model-b"):
        read_checkpoint(index)
    (tmp_path / "pytorch_model-a.bin").unlink()
    with pytest.raises(UserError, match=r"the weight file pytorch_model-a\.bin is missing"):
        read_checkpoint(index)
    index.write_text(json.dumps({"weight_map": {"x": "../other.bin"}}))
    with pytest.raises(UserError, match="not a file of this folder"):
        read_checkpoint(index)


def test_small_files_that_expand_are_refused(tmp_path):
    """One storage for thousands of tensors, and lists of lists of lists."""
    tensor = torch.zeros(500, 500)
    torch.save({"model": {f"w{number}": tensor for number in range(2000)}}, tmp_path / "shared.pt")
    with pytest.raises(UserError, match="share storage, and together have more than 8 times"):
        read_checkpoint(tmp_path / "shared.pt")
    nested = ["ha"]
    for _ in range(18):
        nested = [nested] * 10
    torch.save({"model": {}, "cfg": nested}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="its settings have more than 100,000 values"):
        read_checkpoint(tmp_path / "nested.pt")
