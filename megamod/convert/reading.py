"""Read foreign checkpoints without running code that they may contain.

A pickle can name any function and call it. So the names in it are listed first, with nothing
executed, and refused unless they are those of plain tensors, `argparse.Namespace` or one of the
container types below, for which inert stand-ins are loaded. What passes is read by
`torch.load(weights_only=True)`, which has a list of its own, in a child process with limits on
memory, processor time and file size; the child hands back safetensors and JSON. There is no other
way to read a pickle, and no flag that adds one.
"""

import argparse
import io
import json
import os
import pickletools
import re
import resource
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megamod.errors import UserError, report_damage, run_main
from megamod.files import write_json
from megamod.states.weight_files import read_index

if TYPE_CHECKING:  # the child refuses a file before it spends seconds on loading torch
    from torch import Tensor

_CONTAINERS = {
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": (
        *("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode"),
        *("BytesNode", "PathNode"),
    ),
    "fairseq.dataclass.configs": (
        *("FairseqConfig", "CommonConfig", "CommonEvalConfig", "DistributedTrainingConfig"),
        *("DatasetConfig", "OptimizationConfig", "CheckpointConfig", "FairseqBMUFConfig"),
        *("GenerationConfig", "EvalLMConfig", "InteractiveConfig", "EMAConfig"),
    ),
    "fairseq.dataclass.constants": (
        *("DDP_BACKEND_CHOICES", "DDP_COMM_HOOK_CHOICES", "LOG_FORMAT_CHOICES"),
        *("PIPELINE_CHECKPOINT_CHOICES", "PRINT_ALIGNMENT_CHOICES", "ZERO_SHARDING_CHOICES"),
        *("GENERATION_CONSTRAINTS_CHOICES", "GENERATION_DECODING_FORMAT_CHOICES"),
    ),
    "fairseq.models.transformer_lm": ("TransformerLanguageModelConfig",),
    "fairseq.optim.adam": ("FairseqAdamConfig",),
    "fairseq.tasks.language_modeling": ("LanguageModelingConfig",),
    # A scalar such as the best loss so far: its class, and the element type it names.
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
    "typing": ("Any",),
    "builtins": ("dict", "list", "tuple", "int", "float", "str", "bool"),
}
STAND_INS = tuple(f"{module}.{name}" for module, names in _CONTAINERS.items() for name in names)
"""Types that settings inside a checkpoint consist of; an inert class is loaded for each."""

_NAMESPACE = "argparse.Namespace"
_TENSORS = re.compile(
    r"torch\.\w*Storage|torch\.storage\.\w*Storage|torch\._utils\._rebuild_\w+|torch\._tensor\.\w+"
    r"|torch\.(Size|Tensor|device|float16|float32|float64|bfloat16|int8|int16|int32|int64|uint8|bool)"
    r"|torch\.nn\.parameter\.Parameter|collections\.(OrderedDict|Counter)"
    r"|_codecs\.encode"  # how protocol 2 writes bytes
)
_ELEMENTS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H"}
_ELEMENTS |= {"u4": "I", "u8": "Q", "f2": "e", "f4": "f", "f8": "d"}  # numpy's codes, struct's
_RENAMED = {"__builtin__.unicode": "builtins.str", "__builtin__.long": "builtins.int"}
_LEGACY_PICKLES = 5  # magic number, version, machine, the object, keys of its storages
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_STRINGS += ("STRING", "BINSTRING", "SHORT_BINSTRING")
_EXPANSION = 8  # bytes of tensors per byte of the file: several may share one storage
_MOST_SETTINGS = 100_000  # values of the settings, each as often as it is referred to
_TIMEOUT = 3600  # seconds until a child that does not even use the processor is ended

_DEEPEST_SETTING = 20  # levels of nested settings that are read

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "state.safetensors")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Whole weights, and the indices of sharded ones; the first that exists is read."""


@dataclass
class Checkpoint:
    """Tensors by name, and the settings stored with them as plain JSON values."""

    tensors: "dict[str, Tensor]"
    settings: dict[str, object]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights of a `.safetensors` file, an index of shards, or a pickle of `torch.save`.

    The tensors of a pickle are those in its entry "model" (fairseq), or in its top-level dict if
    there is no such entry; its settings are its entries "cfg", "args" and "config". Other files
    have no settings. An index, a file with a name of `INDEX_FILES`, stands for all of its shards. A
    file with any other ending is a pickle, which is read in a child process with limits, see the
    module docstring. Tensors are on the CPU, in the dtype they are stored in.

    Raises:
        UserError: if the file is missing or malformed, if a shard is missing, or if a pickle
            exceeds the limits or names anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    if path.name in INDEX_FILES:
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return Checkpoint(_read_safetensors(path), {})
    with tempfile.TemporaryDirectory(prefix="megamod-convert-") as folder:
        command = [sys.executable, "-P", "-m", __name__, str(path.absolute()), folder]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.pop("RANK", None)
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{path}: reading it took more than {_TIMEOUT} s") from error
        if child.returncode != 0:
            raise UserError(_describe_child_failure(path, child.returncode, child.stderr))
        settings = json.loads((Path(folder) / "settings.json").read_text())
        return Checkpoint(_read_safetensors(Path(folder) / "tensors.safetensors"), settings)


def _describe_child_failure(path: Path, exit_code: int, stderr: str) -> str:
    """Describe why the child process could not read the pickle `path`, in one sentence.

    Args:
        exit_code: exit code of the child; negative: the number of the signal that ended it.
        stderr: its standard error, which ends with the reason.
    """
    reason = (stderr.strip().splitlines() or ["no message"])[-1]
    if exit_code == UserError.exit_code and reason.startswith("UserError: "):
        return reason.removeprefix("UserError: ")
    if exit_code < 0 or "not enough memory" in reason:
        ended = f"ended by signal {-exit_code}" if exit_code < 0 else reason[:300]
        return f"{path}: could not be read within the limits on memory and time ({ended})"
    return f"{path}: could not be read: {reason[:300]} (exit code {exit_code})"


def _read_shards(index: Path) -> Checkpoint:
    """Read the tensors of all shards of an index; raise UserError if a listed one is in none."""
    tensors: dict[str, Tensor] = {}
    for shard in list_shards(index):
        tensors |= read_checkpoint(shard).tensors
    weight_map = read_index(index.parent, index.name)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(f"{index}: {absent[0]} is not in {weight_map[absent[0]]}")
    return Checkpoint(tensors, {})


def find_weight_file(source: Path) -> Path:
    """Find the weights of a checkpoint for `read_checkpoint`: `source` itself, or a file in it.

    In a folder that is the first of `WEIGHT_FILES`, or else of `INDEX_FILES`, that exists.

    Raises:
        UserError: if `source` does not exist, or the folder has none of them.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(f"--input {source} does not exist")
    names = (*WEIGHT_FILES, *INDEX_FILES)
    existing = [source / name for name in names if (source / name).is_file()]
    if not existing:
        raise UserError(f"--input {source}: has none of {', '.join(names)}")
    return existing[0]


def list_shards(index: Path) -> list[Path]:
    """List the weight files that an index names, in alphabetical order.

    Raises:
        UserError: if the index is malformed, or names a file outside its folder or one that does
            not exist.
    """
    names = sorted(set(read_index(index.parent, index.name).values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent}: the weight file {name} is missing")
    return [index.parent / name for name in names]


def list_pickle_globals(path: Path) -> set[str]:
    """List the full names that unpickling a `torch.save` file would look up; nothing is executed.

    "?" stands for a name that the pickle computes.

    Raises:
        UserError: if the file is no pickle or cannot be read, or is an archive that torch.save did
            not write.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if any(name.endswith("/constants.pkl") for name in names):
                    raise UserError(f"{path}: is a TorchScript archive, which holds code")
                packed = [i.filename for i in archive.infolist() if i.compress_size != i.file_size]
                if packed:
                    raise UserError(
                        f"{path}: {packed[0]} is compressed, which torch.save never does"
                    )
                listed: set[str] = set()
                for name in names:
                    if name.endswith(".pkl"):
                        listed |= set(_iterate_pickle_globals(io.BytesIO(archive.read(name))))
                return listed
        with open(path, "rb") as file:
            listed = set(_iterate_pickle_globals(file))
            with suppress(ValueError):  # a stream that ends early is left to torch to refuse
                for _ in range(_LEGACY_PICKLES - 1):
                    listed |= set(_iterate_pickle_globals(file))
            return listed
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: is not an archive of torch.save: {error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not a pickle of torch.save: {error}") from error


def _iterate_pickle_globals(file: BinaryIO) -> Iterator[str]:
    """Yield the full names that one pickle looks up, "?" for a computed one.

    `file` is read up to the end of the pickle. Raise ValueError if it holds none.
    """
    strings: list[str] = []  # the last two strings that were pushed
    memo: dict[int, str] = {}
    memorable: str | None = None
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".", 1)
            yield _RENAMED.get(name, name.replace("__builtin__.", "builtins.", 1))
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:]) if len(strings) >= 2 else "?"
        elif opcode.name.startswith("EXT"):
            yield "?"
        elif opcode.name in _STRINGS:
            memorable = str(argument)
            strings = [*strings[-1:], memorable]
            continue
        elif opcode.name == "MEMOIZE" and memorable is not None:
            memo[len(memo)] = memorable
            continue
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and memorable is not None:
            memo[argument] = memorable
            continue
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET") and argument in memo:
            strings = [*strings[-1:], memo[argument]]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = "?"
        memorable = None


def _read_safetensors(path: Path) -> "dict[str, Tensor]":
    """Read the tensors of a safetensors file by name; raise UserError if it cannot be read."""
    from safetensors.torch import load_file

    with report_damage(f"{path}: is not a whole safetensors file"):
        return load_file(path)


def _copy_pickle_in_child() -> None:
    """Copy a pickle into a folder as tensors.safetensors and settings.json, in the child process.

    The command line names the pickle and the folder. Raise UserError if the pickle names anything
    but tensors, plain values and settings, or as `_load_pickle`.
    """
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    _limit_resources(path.stat().st_size)
    listed = list_pickle_globals(path)
    refused = sorted(
        name for name in listed - {_NAMESPACE, *STAND_INS} if not _TENSORS.fullmatch(name)
    )
    if refused:
        names = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if refused[5:] else "")
        raise UserError(
            f"{path}: is refused, because it names {names}. A checkpoint may hold "
            "tensors, plain values, argparse.Namespace and the containers of omegaconf; nothing "
            "was executed"
        )
    tensors, settings = _load_pickle(path)

    from safetensors.torch import save_file

    save_file(tensors, folder / "tensors.safetensors")
    write_json(folder / "settings.json", settings)


def _limit_resources(file_bytes: int) -> None:
    """Limit memory, processor time and file size of this process, in proportion to `file_bytes`.

    The checkpoint, whose length in bytes that is, is copied in memory and on disk.
    """
    gigabyte = 2**30
    seconds = 60 + file_bytes // (20 * 2**20)  # time for the imports, and at least 20 MiB a second
    memory = 16 * gigabyte + 4 * file_bytes  # a torch for CUDA maps many gigabytes
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, gigabyte + 2 * file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _load_pickle(path: Path) -> "tuple[dict[str, Tensor], dict[str, object]]":
    """Load the tensors and settings of a pickle whose names have been checked by the caller.

    Returns:
        tensors by name and settings, as in `Checkpoint`.
    Raises:
        UserError: if torch refuses it, if it is not a dict of ordinary tensors, or if its tensors
            have more elements than it stores, or too many for its length.
    """
    import pickle  # for the name of its error; nothing is unpickled by it

    import torch

    allowed = [(_StandIn.make_type(name), name) for name in STAND_INS]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        reason = re.search(r"(Unsupported|Trying|Can only|Unsafe|Only)[^\n]*", str(error))
        raise UserError(f"{path}: is refused: {reason[0] if reason else error}") from error
    except Exception as error:
        # Whatever a broken or crafted file makes the reader stumble over is a fault of the file.
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    model = content.get("model", content)
    if not isinstance(model, dict):
        raise UserError(f'{path}: "model" is a {type(model).__name__}, not a dict of tensors')
    tensors = {}
    left = _EXPANSION * path.stat().st_size
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            if model is content:
                continue
            raise UserError(f'{path}: {name!r} of "model" is a {type(value).__name__}')
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{path}: {name!r} is not an ordinary tensor")
        if value.nbytes > value.untyped_storage().nbytes():
            raise UserError(f"{path}: {name!r} claims more elements than the file stores for it")
        left -= value.nbytes
        if left < 0:
            raise UserError(
                f"{path}: its tensors share storage, and together have more than "
                f"{_EXPANSION} times the bytes of the file"
            )
        tensors[str(name)] = value.detach().clone(memory_format=torch.contiguous_format)
    settings = {str(k): v for k, v in content.items() if k in ("cfg", "args", "config")}
    return tensors, _convert_to_json_value(settings, 0, iter(range(_MOST_SETTINGS)), path)


class _StandIn:
    """Inert replacement of a type of omegaconf, fairseq or numpy; keeps its arguments and state."""

    @classmethod
    def make_type(cls, name: str) -> type:
        """Make a stand-in class for a type by its full name, whose last part names the class."""
        return type(name.rpartition(".")[2], (cls,), {})

    def __new__(cls, *arguments: object) -> "_StandIn":
        """Create an instance that keeps the arguments of its construction."""
        instance = super().__new__(cls)
        instance.__dict__["arguments"] = arguments
        return instance

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        """Store the state from the pickle as it is, without interpreting it."""
        self.__dict__["state"] = state


def _convert_to_json_value(value: object, depth: int, budget: Iterator[int], path: Path) -> object:
    """Convert a value to plain JSON values.

    A value of another type, such as a tensor, becomes null, and so does one nested more than
    `_DEEPEST_SETTING` levels deep.

    Args:
        depth: nesting of the value, 0 at the top.
        budget: iterator with an item for every value that may still come; consumed.
        path: the checkpoint, for messages.
    Raises:
        UserError: if `budget` is exhausted.
    """
    if next(budget, None) is None:
        raise UserError(f"{path}: its settings have more than {_MOST_SETTINGS:,} values")
    if depth > _DEEPEST_SETTING:
        return None
    plain = partial(_convert_to_json_value, depth=depth + 1, budget=budget, path=path)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, _StandIn):
        attributes = vars(value)
        if type(value).__name__ == "scalar":
            return _unpack_numpy_scalar(*attributes["arguments"])
        if "state" not in attributes:  # an enumeration: its value
            return plain(attributes["arguments"][0]) if len(attributes["arguments"]) == 1 else None
        state = attributes["state"]
        content_keys = ("_content", "_val")
        return next((plain(state[k]) for k in content_keys if k in state), None)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def _unpack_numpy_scalar(dtype: object, data: object) -> int | float | bool | None:
    """Unpack a numpy scalar from a pickle; None for a type that is no number, or malformed bytes.

    Args:
        dtype: stand-in of the numpy dtype; its arguments and state are the code and the byte order.
        data: bytes of the value.
    """
    fields = vars(dtype) if isinstance(dtype, _StandIn) else {}
    code, order = (fields.get("arguments") or ("",))[0], (fields.get("state") or (3, "<"))[1]
    code = _ELEMENTS.get(code) if isinstance(code, str) else None
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        return None
    return struct.unpack((">" if order == ">" else "<") + code, data)[0]


if __name__ == "__main__":
    run_main(_copy_pickle_in_child)
