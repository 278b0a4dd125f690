"""Anchored experts: trained beside the frozen seed, alone or in one run, and put together."""

import shutil
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import tiny_stock
from ranks import on_ranks
from runs.test_host_pretrain import DOMAINS, LENGTH, seed_folder, start, words_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megamod.args import ModelArgs
from megamod.data.corpus.binarize import binarize
from megamod.errors import UserError
from megamod.merging.merge import average_folders
from megamod.merging.moe.record import read_moe_record
from megamod.models.lm.load import load_lm
from megamod.runs.edit_moe import EditArgs, run_edit
from megamod.runs.pretrain.anchor import check_anchor_flags
from megamod.runs.to_moe import MoeArgs, run_to_moe
from megamod.states.weights import read_weights

SEED = "olmo2"


def make_folder(root: Path) -> Path:
    texts = {domain: words_of(domain) for domain in DOMAINS}
    every = [text for some in texts.values() for text in some]
    seed_folder(root / "seed", SEED, every)
    binarize(texts, str(root / "seed"), root / "bin")
    return root


def train(rank: int, root: Path) -> None:
    """Experts alone and together, each in a world of one rank; a run in two halves."""
    for domain in DOMAINS:
        train_anchored(root, domain, domain)
    train_anchored(root, "both", *DOMAINS, "--global_batch_size", 8)
    train_anchored(root, "still", "law", "--max_steps", 0)
    train_anchored(root, "halves", "law", "--stop_step", 2)
    train_anchored(root, "halves", "law")
    with pytest.raises(UserError, match="anchored experts are feed-forwards of all layers"):
        start(root, "refused", "--model", root / "seed", "--anchor", root / "bin")
    with pytest.raises(UserError, match="this run draws new weights"):
        train_anchored(root, "refused", "law", "--from_scratch")
    with pytest.raises(UserError, match="has experts already"):
        train_anchored(root, "refused", "law", "--model", root / "law" / "model")
    assert not (root / "refused").exists()


def train_anchored(root: Path, output: str, *flags: object) -> None:
    """A run of domains, and further flags."""
    common = ("--model", root / "seed", "--untie", "feedforward", "--anchor", root / "bin")
    common += ("--learning_rate", 0.01, "--max_grad_norm", 0, "--adam_epsilon", 1e-12)
    start(root, output, *common, "--domains", *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("anchored"))
    on_ranks(1, train, root)
    combine(root, "law")
    combine(root, "law", "med")
    return root


def combine(root: Path, *runs: str, output: str | None = None, **flags: object) -> Path:
    folder = root / (output or "moe-" + "-".join(runs))
    models = [str(root / run) for run in runs]
    run_to_moe(MoeArgs(models=models, output_dir=str(folder), quiet=True, num_threads=1, **flags))
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(3, 290, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def load_mixture(folder: Path, **kwargs: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_only_experts_change(trained):
    before, after = read_weights(trained / "seed"), read_weights(trained / "law" / "model")
    rows = read_weights(trained / "med" / "model")
    for name, tensor in after.items():
        if name.endswith("anchor_row"):
            assert torch.equal(tensor, rows[name])
            assert float(tensor.norm()) == pytest.approx(1.0)
        elif ".experts." not in name:
            assert torch.equal(tensor, before[name.replace(".anchor.", ".")]), name
        elif not name.endswith(".row"):
            assert not torch.equal(tensor, before[name.replace(".experts.law.", ".")]), name


def test_before_training_it_is_the_seed(trained):
    seed = AutoModelForCausalLM.from_pretrained(trained / "seed")
    still = load_lm(trained / "still" / "model", dtype=torch.float32)
    assert float((logits(still) - logits(seed)).abs().max()) <= 2e-6


def test_one_run_of_two_domains_equals_a_run_alone(trained):
    """For the first domain: the order of a domain's blocks depends on its number."""
    both = read_weights(trained / "both" / "model")
    for name, tensor in read_weights(trained / "law" / "model").items():
        assert float((both[name] - tensor).abs().max()) <= 1e-6, name


def test_resumed_run_has_the_same_bits(trained):
    whole = read_weights(trained / "law" / "model")
    halves = read_weights(trained / "halves" / "model")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_mixture_computes_what_was_trained(trained):
    """Float64 with the plain loop: nothing but the order of sums differs."""
    folder = trained / "moe-law"
    mixture = load_mixture(folder, dtype=torch.float64, experts_implementation="eager")
    model = load_lm(trained / "law" / "model", dtype=torch.float64)
    assert float((logits(mixture) - logits(model)).abs().max()) <= 1e-12
    assert [e.domain for e in read_moe_record(folder).experts] == ["anchor", "law"]


def test_dropping_an_expert_gives_the_mixture_without_it(trained, tmp_path):
    """Every byte of every tensor, in either order of the experts."""
    for base, number in ((combine(trained, "med", "law"), 0), (trained / "moe-law-med", 1)):
        output = tmp_path / f"dropped-{number}"
        run_edit(MoeArgs(output_dir=str(output), quiet=True), EditArgs(base=str(base), drop="med"))
        alone, dropped = (load_file(f / "model.safetensors") for f in (trained / "moe-law", output))
        assert alone.keys() == dropped.keys()
        assert all(torch.equal(alone[name], dropped[name]) for name in alone)
    with pytest.raises(UserError, match="is the anchor of the other experts"):
        run_edit(
            MoeArgs(output_dir=str(tmp_path / "none"), quiet=True),
            EditArgs(base=str(trained / "moe-law-med"), drop="anchor"),
        )


def test_order_of_experts_does_not_matter(trained):
    args = dict(dtype=torch.float64, experts_implementation="eager")
    first = combine(trained, "law", "med", output="moe-all", topk=3)
    second = combine(trained, "med", "law", output="moe-all-reversed", topk=3)
    difference = logits(load_mixture(first, **args)) - logits(load_mixture(second, **args))
    assert float(difference.abs().max()) <= 1e-6  # routers compute their softmax in float32


def change(trained: Path, folder: Path, name: str) -> Path:
    """A copy of the med run whose tensor of that name has one other element."""
    shutil.copytree(trained / "med" / "model", folder)
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.anchor.up_proj.weight",
        "model.layers.0.mlp.anchor_row",
        "model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_other_anchor_is_refused(trained, tmp_path, name):
    other = change(trained, tmp_path / "other", name)
    with pytest.raises(UserError) as refused:
        combine(trained, "law", str(other), output="never")
    plain = name.replace("mlp.anchor.", "mlp.")
    assert name in str(refused.value) or plain in str(refused.value)
    assert str(other) in str(refused.value) and str(trained / "law" / "model") in str(refused.value)
    assert not (trained / "never").exists()


def test_anchored_expert_is_no_dense_model(trained, tmp_path):
    with pytest.raises(UserError, match="computes beside an anchor and is no dense model"):
        average_folders([(trained / "law" / "model", "law")], [1.0], tmp_path / "average")
    with pytest.raises(UserError, match="do not make one mixture"):
        combine(trained, "law", "seed", output="never")
    with pytest.raises(UserError, match="its rows are trained"):
        combine(trained, "law", output="never", router="random")


def test_projects_gpt_is_no_anchor(tmp_path):
    tiny_stock("demix").save_pretrained(tmp_path / "gpt")
    args = ModelArgs(model=str(tmp_path / "gpt"), anchor="bin", untie="feedforward")
    with pytest.raises(UserError, match="only stock models have anchored experts"):
        check_anchor_flags(args, has_start=True)
