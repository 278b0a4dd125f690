"""Check that a run, a checkpoint, a model folder or a data-bin is whole.

    python launchers/verify.py OUT                        every checkpoint of a run, and its model
    python launchers/verify.py OUT/checkpoints/step-40    sizes and SHA-256 digests
    python launchers/verify.py OUT/model                  weight files against their index
    python launchers/verify.py DATABIN                    digests, indices and ids of every split

One line per group of files. Exit code 0 if all is whole, 2 with the list of faults if not.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from megamod.errors import UserError, run

Group = tuple[str, list[str]]
"""What was looked at, in words, and its faults."""


def main() -> None:
    """Look at one group after the other; list what is wrong at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder, as above")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    path = parser.parse_args().path
    faults = []
    for title, found in groups(path):
        print(f"{'FAULT' if found else 'ok':<7}{title}", flush=True)
        faults += found
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(f"{path} is not whole, {len(faults)} faults:{listed}")


def groups(path: Path) -> Iterator[Group]:
    """Every group of files below a folder, by what the folder is.

    Raises:
        UserError: if it is nothing of ours.
    """
    from megamod.states.manifest import MANIFEST, list_checkpoints

    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    if (path / "databin.json").exists() or (path / "dict.txt").exists():
        yield from data_bin(path)
    elif any((path / name).exists() for name in (MANIFEST, "state.json")) or path in (
        list_checkpoints(path.parent)
    ):
        yield checkpoint(path)
    elif (path / "config.json").exists():
        yield model(path)
    else:
        found = [*run_folder(path)]
        if not found:
            raise UserError(f"{path} holds no checkpoint, no model and no data-bin")
        yield from found


def run_folder(path: Path) -> Iterator[Group]:
    """Checkpoints by rising step, and the models: one, or one per domain."""
    from megamod.states.manifest import list_checkpoints

    for folder in (path, path / "checkpoints"):
        yield from map(checkpoint, list_checkpoints(folder))
        if (folder / "latest").exists():
            name = (folder / "latest").read_text(errors="replace").strip()
            names = [one.name for one in list_checkpoints(folder)]
            wrong = f"{folder / 'latest'} names {name!r}; there are {', '.join(names) or 'none'}"
            yield f"{folder / 'latest'}: {name}", [] if name in names else [wrong]
    for pattern in ("model/config.json", "model/*/config.json", "*/config.json"):
        for config in sorted(path.glob(pattern)):
            if pattern != "*/config.json" or config.parent.name != "model":
                yield model(config.parent)


def checkpoint(path: Path) -> Group:
    """All files of the manifest, with their digests."""
    from megamod.states.manifest import verify

    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{path}: checkpoint, {len(files)} files, {size:,} bytes", verify(path)


def model(path: Path) -> Group:
    """Weight files that can be opened and hold what the index says; it has no digests."""
    from safetensors import SafetensorError, safe_open

    faults: list[str] = []
    held: dict[str, str] = {}
    index, where = path / "model.safetensors.index.json", path / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "model_type" not in config:
            faults.append(f"{where} names no model_type")
        where, listed = index, {}
        if index.exists():
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: model", [f"{where} is unreadable: {error!r}"]
    files = sorted(set(listed.values())) or ["model.safetensors"]
    for name in files:
        try:
            with safe_open(path / name, framework="np") as tensors:
                held |= dict.fromkeys(tensors.keys(), name)
        except (OSError, SafetensorError) as error:
            faults.append(f"{path / name} cannot be opened: {error}")
    if listed and not faults:
        faults += [
            f"{index} and {listed.get(name, held.get(name))} do not agree on {name}"
            for name in sorted(listed.keys() | held.keys())
            if listed.get(name) != held.get(name)
        ]
    return f"{path}: model, {len(files)} weight files, {len(held)} tensors", faults


def data_bin(path: Path) -> Iterator[Group]:
    """Header and tokenizer, then every split: index, digests, and each id once."""
    from megamod.data.binarize import split_prefix
    from megamod.data.documents import SPLITS
    from megamod.data.lm import DataBin
    from megamod.files import sha256

    try:
        data = DataBin(path)
    except UserError as error:
        yield f"{path}: data-bin", [str(error)]
        return
    header = path / "databin.json"
    told = json.loads(header.read_text(encoding="utf-8")) if header.exists() else {}
    yield f"{path}: data-bin, {len(data.domains)} domains, {data.vocab_size:,} ids", []
    if "tokenizer" in told:
        yield f"{path / 'tokenizer'}: tokenizer", tokenizer_faults(path / "tokenizer", told)
    for domain in data.domains:
        for split in told["domains"][domain] if told else SPLITS:
            prefix = path / split_prefix(domain, split)
            if not told and not prefix.with_name(f"{prefix.name}.idx").exists():
                continue  # in a data-bin of fairseq any split may be absent
            title, faults = f"{prefix}", []
            try:
                dataset = data.split(domain, split)
                dataset.check_ids(data.vocab_size)
                title = f"{prefix}: {len(dataset):,} items, {len(dataset.tokens):,} tokens"
            except UserError as error:
                faults.append(str(error))
            expected = told["domains"][domain][split].get("sha256", {}) if told else {}
            for ending, digest in expected.items():
                file = prefix.with_name(f"{prefix.name}.{ending}")
                if file.exists() and sha256(file) != digest:
                    faults.append(f"{file} does not have the SHA-256 digest of databin.json")
            yield title, faults


def tokenizer_faults(folder: Path, header: dict) -> list[str]:
    """The tokenizer beside the ids must be the one that made them."""
    from megamod.data.tokenizers import load_tokenizer

    try:
        digest = load_tokenizer(folder).digest
    except (UserError, OSError, ValueError) as error:
        return [f"{folder} cannot be loaded: {error}"]
    return (
        [] if digest == header["tokenizer"]["digest"] else [f"{folder} is not that of the header"]
    )


if __name__ == "__main__":
    run(main)
