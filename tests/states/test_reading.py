import argparse
import os
import pickle
import runpy
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch

from megamod.errors import UserError
from megamod.states.convert import reading
from megamod.states.convert.reading import STAND_INS, globals_in, read_checkpoint


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
    "getattr": lambda canary: Call(Call(getattr, os, "system"), f"touch {canary}"),
    "torch.load": lambda canary: Call(torch.load, str(canary.with_name("program.py"))),
    "nested": lambda canary: {"model": {"w": [({"x": Call(os.system, f"touch {canary}")},)]}},
    "argument": lambda canary: Call(eval, Call(str, f"open({str(canary)!r}, 'w')")),
    "state": lambda canary: {"model": {}, "args": WithState(Call(os.system, f"touch {canary}"))},
    "namespace": lambda canary: {"args": argparse.Namespace(a=Call(os.system, f"touch {canary}"))},
    "map": lambda canary: Call(list, Call(map, os.system, [f"touch {canary}"])),
}
CULPRIT = {
    "os.system": "posix.system",
    "subprocess": "subprocess.check_call",
    "eval": "builtins.eval",
    "exec": "builtins.exec",
    "runpy": "runpy.run_path",
    "open": "io.open",
    "getattr": "builtins.getattr",
    "torch.load": "torch.serialization.load",
    "nested": "posix.system",
    "argument": "builtins.eval",
    "state": "posix.system",
    "namespace": "posix.system",
    "map": "posix.system",
}
FORMS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "bare": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "bare text": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
}


@pytest.fixture
def no_os_module(monkeypatch):
    """A module cannot be pickled as an argument; `getattr` is given its name in its place."""


def hostile_file(tmp_path: Path, case: str, form: str) -> tuple[Path, Path]:
    canary, file = tmp_path / "canary", tmp_path / "model.pt"
    canary.with_name("program.py").write_text(f"open({str(canary)!r}, 'w')")
    FORMS[form](HOSTILE[case](canary), file)
    return file, canary
