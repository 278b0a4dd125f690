"""One expert of a mixture removed, replaced, or routed anew: all the others keep their bits."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import tiny_stock
from safetensors.torch import load_file, save_file

from megamod.errors import UserError
from megamod.merging.moe.record import FILE, read_moe_record
from megamod.runs.edit_moe import EditArgs, run_edit
from megamod.runs.to_moe import MoeArgs, run_to_moe
from megamod.states.forest import Expert, edit_forest, open_forest

FAMILIES = ["llama", "granite", "ernie4_5", "demix"]
FEED_FORWARDS = (".mlp.", ".block_sparse_moe.", ".feed_forward.")


def anchored(folder: Path, kind: str = "llama", **changes: object) -> None:
    """Save a seed and models that differ from it in their feed-forwards alone."""
    seed = tiny_stock(kind, **changes)
    seed.save_pretrained(folder / "seed")
    for number, name in enumerate(("law", "med", "new")):
        model, generator = copy.deepcopy(seed), torch.Generator().manual_seed(number)
        for path, parameter in model.named_parameters():
            if any(part in path for part in FEED_FORWARDS):
                parameter.data += torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)


def convert(folder: Path, names: list[str], output: str, rows: torch.Tensor, **flags) -> Path:
    save_file({"rows": rows}, folder / "rows.safetensors")
    models = [str(folder / name) for name in names]
    flags = {"router": "file", "router_file": str(folder / "rows.safetensors"), **flags}
    run_to_moe(MoeArgs(models=models, output_dir=str(folder / output), quiet=True, **flags))
    return folder / output


def edit(base: Path, output: str, quiet: bool = True, flags: dict | None = None, **change) -> Path:
    folder = base.parent / output
    args = MoeArgs(output_dir=str(folder), quiet=quiet, **(flags or {}))
    run_edit(args, EditArgs(base=str(base), **change))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def differing(first: Path, second: Path) -> set[str]:
    """Names of tensors that are not the same bits."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("kind", FAMILIES)
def test_dropped_expert_was_never_there(tmp_path, kind, capsys):
    """Anchored, rows from a file: every file is that of the mixture made without the expert."""
    anchored(tmp_path, kind)
    rows = torch.randn(2, 3, 16)
    whole = convert(tmp_path, ["seed", "law", "med"], "moe", rows, anchor=True, topk=3)
    less = convert(tmp_path, ["seed", "med"], "less", rows[:, [0, 2]], anchor=True, topk=2)
    dropped = edit(whole, "dropped", quiet=False, drop="law")
    assert "what is left of law: nothing" in capsys.readouterr().out
    for file in ("model.safetensors", "config.json", FILE, "README.md"):
        assert (dropped / file).read_bytes() == (less / file).read_bytes(), file
    assert sorted(f.name for f in dropped.iterdir()) == sorted(f.name for f in less.iterdir())


@pytest.mark.parametrize("kind", FAMILIES)
def test_upgraded_expert_is_the_only_change(tmp_path, kind):
    anchored(tmp_path, kind)
    rows = torch.randn(2, 3, 16)
    moe = convert(tmp_path, ["seed", "law", "med"], "moe", rows, anchor=True)
    fresh = convert(tmp_path, ["seed", "new", "med"], "fresh", rows, anchor=True)
    upgraded = edit(moe, "upgraded", upgrade="law", path=str(tmp_path / "new"))
    assert differing(upgraded, fresh) == set()
    changed = differing(upgraded, moe)
    assert changed and all(any(part in name for part in FEED_FORWARDS) for name in changed)
    record = read_moe_record(upgraded)
    assert record.domains == ["seed", "law", "med"]
    assert Path(record.experts[1].path).name == "new"
    assert record.experts[1].digest == read_moe_record(fresh).experts[1].digest


def test_every_subset_of_a_forest_gives_the_model_that_never_had_the_others(tmp_path):
    """All 2^4 subsets of four experts: weights, router rows and record, byte for byte."""
    domains = ("law", "med", "code", "news")
    for seed, name in enumerate(domains):
        tiny_stock("llama", seed=seed).save_pretrained(tmp_path / name)

    def moe(forest: str) -> Path:
        output = tmp_path / f"{forest}-moe"
        topk = min(2, len(open_forest(tmp_path / forest).experts))
        args = MoeArgs(forest=str(tmp_path / forest), output_dir=str(output), topk=topk, quiet=True)
        run_to_moe(args)
        return output

    def grow(forest: str, names: tuple[str, ...]) -> None:
        with edit_forest(tmp_path / forest) as experts:
            experts += [
                Expert(domain=d, path=tmp_path / d, data_digest=f"data of {d}") for d in names
            ]

    subsets = [some for size in range(5) for some in itertools.combinations(domains, size)]
    assert len(subsets) == 2**4
    for some in subsets:
        name = "-".join(some) or "nothing"
        grow(f"{name}-left", domains)
        with edit_forest(tmp_path / f"{name}-left") as experts:
            experts[:] = [expert for expert in experts if expert.domain in some]
        if not some:
            with pytest.raises(UserError, match="no expert"):
                moe(f"{name}-left")
            continue
        grow(f"{name}-never", some)
        left, never = moe(f"{name}-left"), moe(f"{name}-never")
        for file in ("model.safetensors", "config.json", FILE):
            assert (left / file).read_bytes() == (never / file).read_bytes(), (some, file)


def test_averages_contain_every_expert(tmp_path, capsys):
    for seed, name in enumerate(("law", "med")):
        tiny_stock("llama", seed=seed).save_pretrained(tmp_path / name)
    moe = convert(tmp_path, ["law", "med"], "moe", torch.randn(2, 2, 16))
    with pytest.raises(UserError, match="averages that contain it"):
        edit(moe, "dropped", drop="law")
    assert not (tmp_path / "dropped").exists()
    dropped = edit(moe, "dropped", quiet=False, drop="law", keep_influence=True)
    assert "averages that contain it" in capsys.readouterr().out
    config = json.loads((dropped / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)
    block = "model.layers.1.block_sparse_moe"
    kept, before = weights(dropped), weights(moe)
    name = "experts.{}.w1.weight"
    assert torch.equal(kept[f"{block}.{name.format(0)}"], before[f"{block}.{name.format(1)}"])
    assert torch.equal(kept[f"{block}.gate.weight"], before[f"{block}.gate.weight"][1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "seed"}, "is the anchor of the other experts"),
        ({"drop": "tax"}, "has no expert of domain 'tax'; there are seed, law"),
        ({"upgrade": "law", "path": "other"}, "differs from .* whose experts share all"),
        ({"upgrade": "law", "path": "gpt"}, "is a gpt2, which does not become"),
        ({"upgrade": "law"}, "--path is missing"),
        ({"drop": "law", "refresh": "law"}, "give one of --drop, --upgrade and --refresh"),
        ({"refresh": "law"}, "--calibration is missing"),
        ({"drop": "law", "flags": {"topk": 1}}, "--topk does not go with --base"),
    ],
)
def test_changes_that_are_refused(tmp_path, change, message):
    anchored(tmp_path)
    tiny_stock("llama", seed=5).save_pretrained(tmp_path / "other")
    tiny_stock("gpt2").save_pretrained(tmp_path / "gpt")
    moe = convert(tmp_path, ["seed", "law"], "moe", torch.randn(2, 2, 16), anchor=True)
    if "path" in change:
        change["path"] = str(tmp_path / change["path"])
    with pytest.raises(UserError, match=message):
        edit(moe, "out", **change)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_folder_that_is_no_mixture_is_refused(tmp_path):
    tiny_stock("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="is a llama, not one of the mixtures"):
        edit(tmp_path / "llama", "out", drop="law")
    tiny_stock("mixtral", num_local_experts=2).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(UserError, match=r"there is no moe\.json"):
        edit(tmp_path / "mixtral", "out", drop="law")
