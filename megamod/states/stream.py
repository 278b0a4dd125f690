"""Reading and writing of weights larger than memory, piece by piece.

Elements are read and written at offsets of files, not through memory maps; the safetensors library
maps a file only while it checks the header. A reader holds the headers of its files, a writer one
piece per thread. Only the weight files of a folder are read, sharded or not, and no files of
optimizer state.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamod.dist.scope import convert_to_dense_name, parse_expert_domain
from megamod.errors import UserError
from megamod.files import write_json
from megamod.states.weight_files import compute_files_digest, read_index
from megamod.states.weights import (
    DENSE_FILE,
    DTYPES,
    INDEX_FILE,
    build_safetensors_header,
    is_sharded,
)

PIECE = 1 << 20  # bytes read at once: what is added up stays in the processor's second-level cache
ANCHOR, ROW = "anchor", "row"
"""Names in an anchored model: the frozen module of a layer, and the router row of an expert or
(`anchor_row`) of that module."""
_DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Element type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes, without the header of its file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class _Location:
    """Place of a tensor's bytes."""

    file: Path
    offset: int  # from the start of the file, in bytes


class ModelFolder:
    """Reader of the tensors of a model folder, or of one safetensors file.

    Headers are read at construction; `read` and `read_into` work inside a `with` block only, from
    any number of threads.

    Args:
        folder: model folder or safetensors file.
        member: a domain. Only the shared weights and this domain's expert are read, under their
            names in a dense model. None: all tensors, under their own names.
        beside_anchor: read an anchored model, whose experts compute beside an anchor, as a dense
            one: the shared weights with the feed-forwards of `member`, or of the anchor if that is
            None.
    Attributes:
        tensors: specification of every tensor by name, in the order of the files.
        files: the weight files that hold them.
    Raises:
        UserError: if weights or the member are missing, if a file is not whole, or without
            `beside_anchor` for a member of an anchored model, which is no dense model.
    """

    def __init__(self, folder: Path, member: str | None = None, *, beside_anchor: bool = False):
        self.folder, self.member = Path(folder), member
        self.tensors: dict[str, TensorSpec] = {}
        self._locations: dict[str, _Location] = {}
        self._descriptors: dict[Path, int] = {}
        entries: dict[str, tuple[TensorSpec, _Location]] = {}
        for file, listed_names in _find_weight_files(self.folder).items():
            file_entries = dict(_iterate_tensor_locations(file))
            if listed_names is not None and (missing := sorted(listed_names - file_entries.keys())):
                raise UserError(f"{self.folder / INDEX_FILE}: {missing[0]} is not in {file.name}")
            entries |= (
                file_entries
                if listed_names is None
                else {name: file_entries[name] for name in file_entries if name in listed_names}
            )
        if member is not None:
            domains = sorted({d for name in entries if (d := parse_expert_domain(name))})
            if member not in domains:
                known = ", ".join(domains) or "none"
                raise UserError(f"{folder}: has no expert of domain {member!r}; there are {known}")
            if not beside_anchor and any(f".{ANCHOR}." in name for name in entries):
                raise UserError(
                    f"{folder}: the expert of {member} computes beside an anchor and is no dense "
                    "model; `megamod to-moe` makes a mixture of both"
                )
        for name, (spec, location) in entries.items():
            if beside_anchor:
                name = _find_dense_name(name, member)
                if name is None:
                    continue
            elif member is not None:
                if parse_expert_domain(name) not in (None, member):
                    continue
                name = convert_to_dense_name(name)
            self.tensors[name], self._locations[name] = spec, location
        self.files = sorted({location.file for location in self._locations.values()})

    def __enter__(self) -> Self:
        """Open all weight files for reading.

        Raises:
            UserError: if a file cannot be opened.
        """
        try:
            self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Close the weight files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def read_into(self, name: str, start_element: int, buffer: Tensor) -> None:
        """Fill `buffer` with elements of the tensor `name`, from the flat index `start_element` on.

        Args:
            buffer: 1-D, contiguous, of the tensor's dtype, on the CPU; overwritten.
        Raises:
            UserError: if the file ends early or cannot be read.
        """
        location = self._locations[name]
        remaining = memoryview(buffer.view(torch.uint8).numpy())
        offset = location.offset + start_element * buffer.element_size()
        while remaining:
            try:
                count = os.preadv(self._descriptors[location.file], [remaining], offset)
            except OSError as error:
                raise UserError(f"{location.file}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise UserError(f"{location.file}: ends inside of {name}")
            remaining, offset = remaining[count:], offset + count

    def read(self, name: str) -> Tensor:
        """Read the whole tensor `name`, in its shape, into new memory; raises as `read_into`."""
        spec = self.tensors[name]
        flat = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, flat)
        return flat.view(spec.shape)

    def compute_digest(self) -> str:
        """Compute a digest of the whole weight files, see `compute_files_digest`.

        With a `member`, of those that hold its tensors. The files are read again.
        """
        return compute_files_digest(self.files)


def _find_dense_name(name: str, member: str | None) -> str | None:
    """Find the name that a tensor of an anchored model has in the dense model of one expert.

    Args:
        member: domain of the expert; None: the anchor in place of an expert.
    Returns:
        None for a tensor that the dense model lacks: a router row, or a part of another expert.
    """
    if name.endswith((f".{ROW}", f".{ANCHOR}_{ROW}")):
        return None
    domain = parse_expert_domain(name)
    if domain is None and f".{ANCHOR}." in name:
        return name.replace(f".{ANCHOR}.", ".", 1) if member is None else None
    return convert_to_dense_name(name) if domain in (None, member) else None


def iterate_pieces(numel: int, itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Yield start and stop, in elements, of the pieces in which a tensor is processed.

    Args:
        numel: elements of the tensor; 0 yields nothing.
        itemsize: bytes of an element; a piece has at most `PIECE` bytes.
    """
    step = PIECE // itemsize
    for start in range(0, numel, step):
        yield start, min(start + step, numel)


def plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> dict[str, list[str]]:
    """Map file names to the names of the tensors in them: one file, or several shards.

    Tensors keep the order of `specs`. Those of a shard have at most `max_bytes` bytes, without the
    header of its file; a tensor larger than that has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    if len(shards) == 1:
        return {DENSE_FILE: shards[0]}
    stem = DENSE_FILE.removesuffix(".safetensors")
    count = len(shards)
    return {
        f"{stem}-{number:05d}-of-{count:05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def write_streamed_tensors(
    folder: Path,
    files: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], Iterable[Tensor]],
    threads: int = 1,
) -> list[Path]:
    """Write safetensors files whose tensors are produced in pieces.

    An index is written, too, unless the only file is model.safetensors. Existing files are
    replaced, and after an error files are incomplete: write into a folder that is renamed once it
    is whole.

    Args:
        folder: existing folder.
        files: file names -> names of the tensors in them, as from `plan_shards`.
        specs: specification of each tensor by name.
        produce: called with the name of each tensor; returns its elements in order, as contiguous
            tensors of its dtype on the CPU. A piece is written before the next one is requested.
        threads: number of tensors that are produced at the same time, each by a call of `produce`
            in a worker thread, the largest first. 1 produces them in the order of the files, in
            each the widest element types first, in the caller's thread.
    Returns:
        paths of the written files, with that of the index at the end.
    Raises:
        ValueError: if `produce` returns fewer or more elements than the specification says.
        OSError: if a file cannot be written.
        Exception: the first error of `produce`.
    """
    with ExitStack() as stack:
        tensors = []  # descriptor, location in the file, name
        for file, names in files.items():
            header, order = build_safetensors_header(
                {name: (specs[name].dtype, specs[name].shape) for name in names}, {"format": "pt"}
            )
            stream = stack.enter_context(open(folder / file, "wb", buffering=0))
            _write_bytes(stream.fileno(), memoryview(header), 0)
            offset = len(header)
            for name in order:
                tensors.append((stream.fileno(), offset, name))
                offset += specs[name].nbytes
        failed = threading.Event()

        def write_tensor(descriptor: int, offset: int, name: str) -> None:
            """Produce the tensor `name` and write it at byte `offset` of an open file descriptor.

            Stops early if another thread failed.

            Raises:
                ValueError: if `produce` returns fewer or more elements than specified.
            """
            left = specs[name].nbytes
            for piece in produce(name):
                if failed.is_set():
                    return
                left -= piece.nbytes
                if left < 0:
                    break
                raw = memoryview(piece.reshape(-1).view(torch.uint8).numpy())
                _write_bytes(descriptor, raw, offset)
                offset += piece.nbytes
            if left:
                difference = f"{left} bytes fewer" if left > 0 else f"{-left} bytes more"
                raise ValueError(f"{name}: {difference} than its specification says")

        if threads == 1:
            for location in tensors:
                write_tensor(*location)
        else:
            # The large ones first, so that no thread is left alone with one at the end.
            tensors.sort(key=lambda location: -specs[location[2]].nbytes)
            pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            try:
                jobs = [pool.submit(write_tensor, *location) for location in tensors]
                for finished in as_completed(jobs):
                    finished.result()
            finally:
                failed.set()
                pool.shutdown(cancel_futures=True)
    written = [folder / file for file in files]
    if list(files) != [DENSE_FILE]:
        weight_map = {name: file for file, names in files.items() for name in names}
        size = sum(specs[name].nbytes for name in weight_map)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)
        written.append(folder / INDEX_FILE)
    return written


def _write_bytes(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content` at a byte offset; the system may write a part of it per call."""
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def _find_weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Find the weight files of a folder, or a single file; each with the names of its tensors in
    the index.

    Without an index the value is None. Raise UserError if there are no weights in safetensors, the
    index is malformed, or one of its files is missing.
    """
    if folder.suffix == ".safetensors" and folder.is_file():
        return {folder: None}
    if not is_sharded(folder):
        if not (folder / DENSE_FILE).is_file():
            others = sorted(f.name for f in folder.glob("*.bin")) if folder.is_dir() else []
            reason = f"only {others[0]}, turn it into safetensors first" if others else "no weights"
            raise UserError(
                f"{folder}: has {reason}; a model folder has {DENSE_FILE} or {INDEX_FILE}"
                if folder.is_dir()
                else f"{folder}: is not a folder"
            )
        return {folder / DENSE_FILE: None}
    files: dict[Path, set[str] | None] = {}
    for name, file in read_index(folder).items():
        files.setdefault(folder / file, set()).add(name)
    if missing := sorted(file.name for file in files if not file.is_file()):
        raise UserError(f"{folder}: the weight file {missing[0]} is missing")
    return files


def _iterate_tensor_locations(file: Path) -> Iterator[tuple[str, tuple[TensorSpec, _Location]]]:
    """Yield name, specification and location of each tensor of a file, sorted by offset.

    Raise UserError if the file is damaged, or has a dtype that is not in `DTYPES`.
    """
    try:
        with safe_open(file, framework="pt"):  # checks every length and offset
            pass
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{file}: is not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES_BY_NAME:
            known = ", ".join(_DTYPES_BY_NAME)
            hint = "; dequantise the model first" if entry["dtype"].startswith("F8") else ""
            raise UserError(f"{file}: {name} has dtype {entry['dtype']}; known are {known}{hint}")
        spec = TensorSpec(_DTYPES_BY_NAME[entry["dtype"]], tuple(entry["shape"]))
        yield name, (spec, _Location(file, 8 + length + entry["data_offsets"][0]))
