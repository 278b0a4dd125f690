"""Damaged files of every format: their readers read them, or refuse them in one sentence.

A case is a valid file with one to three changes: values of a document replaced, renamed, doubled,
deleted or nested deep; lines cut, swapped, repeated; bytes flipped, inserted, lost. Cases are read
in forked processes, so that a crash or a file that takes too long ends one of them alone.
"""

import copy
import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from megamod.errors import UserError, format_expected_error

SLOW = 60  # seconds that no file may take
BATCH = 250  # cases of one process
LONGEST_MESSAGE = 1500

VALUES = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**40, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "\ud800", "a" * 5000, "\0", "auto", "1e400"),
    *([], {}, [[]], [None], {"": None}, {"x": {"x": {}}}),
)
PIECES = (
    *(b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r\n", b"\t", b" ", b"{", b"}", b"[", b'"'),
    *(b"\xef\xbb\xbf", b":", b"- ", b"&a [*a, *a]", b"!!python/object/apply:os.system [x]"),
    *(b"null", b"NaN", b"-1", b"99999999999999999999", b"#", b"\x80\x04.", b"A" * 3000),
)


@dataclass(frozen=True)
class Format:
    """A file format with its reader.

    Attributes:
        file: name of the damaged file below the folder; its valid content is there already.
        read: reads the folder. It may check what was read by another way, with `assert`.
        kind: "json", "yaml", "lines", "binary" or "header" (the JSON header of a safetensors file):
            how the file is changed.
    """

    file: str
    read: Callable[[Path], object]
    kind: str


@dataclass
class Result:
    """Counts of cases, and descriptions of those that broke a rule."""

    refused: int = 0
    accepted: int = 0
    lost: tuple[str, ...] = ()


def run_cases(
    name: str, format_: Format, folder: Path, first: int, count: int, seed: int
) -> Result:
    """Read `count` damaged files, in processes of `BATCH` cases each."""
    total = Result()
    for start in range(first, first + count, BATCH):
        stop = min(start + BATCH, first + count)
        part = _run_in_child(name, format_, folder, range(start, stop), seed)
        total.refused += part.refused
        total.accepted += part.accepted
        total.lost += part.lost
    return total


def _run_in_child(name: str, format_: Format, folder: Path, numbers: range, seed: int) -> Result:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            for number in numbers:
                line = json.dumps([number, *_try(name, format_, folder, number, seed)])
                os.write(write, line.encode() + b"\n")
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        rows = [json.loads(line) for line in stream]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lost = [f"{name} {number}: {text}" for number, kind, text in rows if kind == "lost"]
    if status != 0:
        number = numbers.start + len(rows)
        ending = f"more than {SLOW} s" if status == -signal.SIGALRM else f"ended with {status}"
        lost.append(f"{name} {number}: {ending}")
        rest = range(number + 1, numbers.stop)
        if rest:
            later = _run_in_child(name, format_, folder, rest, seed)
            lost += later.lost
            rows += [[0, "refused", ""]] * later.refused + [[0, "accepted", ""]] * later.accepted
    kinds = [kind for _, kind, _ in rows]
    return Result(kinds.count("refused"), kinds.count("accepted"), tuple(lost))


def _try(name: str, format_: Format, folder: Path, number: int, seed: int) -> tuple[str, str]:
    """Read one damaged file; returns "refused", "accepted" or "lost", and a description."""
    file = folder / format_.file
    original = file.read_bytes()
    damaged = damage(original, format_.kind, random.Random(f"{seed} {name} {number}"))
    file.write_bytes(damaged)
    before = sorted(str(path) for path in folder.rglob("*"))
    began = time.monotonic()
    signal.alarm(SLOW)
    try:
        format_.read(folder)
        outcome = "accepted", ""
    except (UserError, OSError, MemoryError) as error:  # as of a command
        message = format_expected_error(error)
        outcome = "refused", ""
        if "\n" in message.strip() and "faults" not in message and ": line" not in message:
            outcome = "lost", f"more than one paragraph: {message[:300]!r}"
        if len(message) > LONGEST_MESSAGE:
            outcome = "lost", f"a message of {len(message)} characters: {message[:200]!r}"
        if folder.name not in message and Path(format_.file).name not in message:
            outcome = "lost", f"the message names no file: {message[:300]!r}"
    except BaseException as error:
        outcome = "lost", f"{type(error).__name__}: {error!s:.300}"
    finally:
        signal.alarm(0)
        unchanged = file.read_bytes() == damaged
        file.write_bytes(original)
    if not unchanged or sorted(str(path) for path in folder.rglob("*")) != before:
        outcome = "lost", "files were changed"
    if time.monotonic() - began > SLOW:
        outcome = "lost", "slow"
    return outcome


def damage(content: bytes, kind: str, draw: random.Random) -> bytes:
    """Change a valid file."""
    for _ in range(draw.randint(1, 3)):
        if kind in ("json", "yaml") and draw.random() < 0.75:
            content = _damage_document(content, kind, draw)
        elif kind == "header":
            content = _damage_header(content, draw)
        elif kind == "lines" and draw.random() < 0.5:
            content = _damage_lines(content, draw)
        else:
            content = _damage_bytes(content, draw)
    return content


def _damage_document(content: bytes, kind: str, draw: random.Random) -> bytes:
    try:
        value = json.loads(content) if kind == "json" else yaml.safe_load(content)
    except Exception:  # an earlier change has broken it
        return _damage_bytes(content, draw)
    nodes = []

    def visit(parent) -> None:
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            nodes.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                visit(parent[key])

    root = {"root": copy.deepcopy(value)}
    visit(root)
    parent, key = draw.choice(nodes)
    kind_of_change = draw.randrange(6)
    if kind_of_change == 0 and isinstance(parent, dict) and parent is not root:
        del parent[key]
    elif kind_of_change == 1 and isinstance(parent, dict) and parent is not root:
        parent[draw.choice((f"{key}_", "", "x" * 300, str(key).upper()))] = parent.pop(key)
    elif kind_of_change == 2 and isinstance(parent, list):
        parent += [parent[key]] * draw.choice((1, 50))
    elif kind_of_change == 3 and type(parent[key]) in (int, float):
        parent[key] = draw.choice((-parent[key], parent[key] * 2**20, str(parent[key]), 0.5))
    else:
        parent[key] = draw.choice(VALUES)
    try:
        if kind == "json":
            return json.dumps(root["root"]).encode("utf-8", "surrogatepass")
        return yaml.dump(root["root"], allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, UnicodeError):
        return _damage_bytes(content, draw)


def _damage_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file, or its recorded length, but no tensor."""
    stop = 8 + int.from_bytes(content[:8], "little")
    if draw.random() < 0.1:
        return _damage_bytes(content[:stop], draw) + content[stop:]
    header = _damage_document(content[8:stop], "json", draw)
    return struct.pack("<Q", len(header)) + header + content[stop:]


def _damage_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    change = draw.randrange(5)
    if change == 0:
        del lines[at]
    elif change == 1:
        lines[at], lines[other] = lines[other], lines[at]
    elif change == 2:
        lines[at:at] = [lines[other]] * draw.choice((1, 30))
    else:
        cells = lines[at].split(draw.choice((b"\t", b" ", b",")))
        cells[draw.randrange(len(cells))] = draw.choice(PIECES)
        lines[at] = b"\t".join(cells)
    return b"\n".join(lines)


def _damage_bytes(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return draw.choice(PIECES)
    at = draw.randrange(min(len(content), draw.choice((40, len(content)))))
    change = draw.randrange(6)
    if change == 0:
        return content[:at]
    if change == 1:
        return content[:at] + draw.choice(PIECES) + content[at:]
    if change == 2:
        return content[:at] + content[at + draw.choice((1, 4, 40)) :]
    if change == 3:
        number = draw.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        return content[:at] + struct.pack("<Q", number) + content[at + 8 :]
    if change == 4:
        return content[:at] + content[at : at + 200] * 3 + content[at:]
    flipped = bytearray(content)
    flipped[at] ^= 1 << draw.randrange(8)
    return bytes(flipped)
