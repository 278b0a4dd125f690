"""Mixtures of experts from dense models: the stock classes compute what the experts compute."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from models.tiny_hosts import LENGTH, VOCAB, tiny_stock, tiny_stock_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from megamod.errors import UserError
from megamod.merging.merge import average_folders
from megamod.merging.moe.record import read_moe_record
from megamod.models.lm.demix import DemixForCausalLM
from megamod.models.lm.host import make_host_classes
from megamod.models.lm.moe_families import LAYERS, MOE_FAMILIES, MOE_OF_DENSE, MoeFamily
from megamod.runs.to_moe import MoeArgs, run_to_moe
from megamod.states.stream import ModelFolder

# Dense family -> changes of its tiny configuration.
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    kind: (kind, {}) for kind in MOE_OF_DENSE if kind != "olmo3"
} | {
    "llama, scaled rotary positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "olmo3": ("olmo3", {"layer_types": ["full_attention"] * 2}),
    "qwen3, four layers": ("qwen3", {"num_hidden_layers": 4}),
}


BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2}
"""Largest difference of logits of size 3 with forced routing."""


def dense_models(
    folder: Path, kind: str, count: int = 3, dtype: torch.dtype = torch.float32, **changes: object
) -> list[PreTrainedModel]:
    """Save models that differ in all weights as folder/a, folder/b, ...; return them."""
    models = [tiny_stock(kind, seed=seed, **changes).to(dtype) for seed in range(count)]
    for name, model in zip("abcdefgh", models, strict=False):
        model.save_pretrained(folder / name)
    return models


def to_moe(folder: Path, *names: str, output: str = "moe", **flags: object) -> Path:
    """Convert folder/a, folder/b, ... to folder/OUTPUT."""
    flags = {"models": [str(folder / name) for name in names], "quiet": True, **flags}
    run_to_moe(MoeArgs(output_dir=str(folder / output), num_threads=1, **flags))
    return folder / output


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: object) -> PreTrainedModel:
    """Load a stock model and require that names of tensors match exactly."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **kwargs
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def routers(model: PreTrainedModel) -> list[nn.Module]:
    family = MOE_FAMILIES[model.config.model_type]
    layers = model.get_submodule(LAYERS)
    return [layer.get_submodule(f"{family.module}.{family.router}") for layer in layers]


def force(model: PreTrainedModel, expert: int) -> None:
    """Send every token to one expert with weight 1."""
    family = MOE_FAMILIES[model.config.model_type]
    for router in routers(model):
        router.forward = _forced(family, expert)


def _forced(family: MoeFamily, expert: int):
    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        weights = torch.ones(rows, 1, dtype=hidden.dtype)
        experts = torch.full((rows, 1), expert)
        logits = torch.zeros(rows, 4)
        values = dict(zip(family.outputs, (logits, weights, experts), strict=True))
        return tuple(values[position] for position in range(3))

    return forward


def tokens(seed: int = 0, length: int = LENGTH // 2) -> Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits.double()


def farthest(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize("row", ROWS)
def test_class_computes_what_its_experts_compute(tmp_path, row):
    """With the plain loop: forced routing is one expert; equal experts are the dense model."""
    kind, changes = ROWS[row]
    dense = dense_models(tmp_path, kind, count=2, **changes)
    folder = to_moe(tmp_path, "a", "b", topk=1)
    shared = load(folder).state_dict()
    for expert, model in enumerate(dense):
        # The expert's feed-forward with the shared weights, as a dense model.
        mixed = copy.deepcopy(model)
        for name, parameter in mixed.named_parameters():
            if name in shared:
                parameter.data.copy_(shared[name])
        for dtype, bound in BOUNDS.items():
            sparse = load(folder, dtype, experts_implementation="eager").to(dtype)
            force(sparse, expert)
            expected = logits(copy.deepcopy(mixed).to(dtype))
            scale = max(1.0, float(expected.abs().max()) / 3)
            assert farthest(logits(sparse), expected) <= bound * scale
    names = ["x", "y", "z"]
    same = to_moe(tmp_path, "a", "a", "a", output="same", domains=names, topk=2, anchor=True)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 5e-2)):
        expected = logits(copy.deepcopy(dense[0]).to(dtype))
        difference = farthest(logits(load(same, dtype).to(dtype)), expected)
        assert difference <= bound * max(1.0, float(expected.abs().max()))


REFUSED = {
    "olmo": {},
    "smollm3": {},
    "hunyuan_v1_dense": {},
    "gemma": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "phi": {},
    "starcoder2": {},
    "llama": {"mlp_bias": True},  # Mixtral has no biases
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "olmo3": {},  # its tiny configuration has a sliding layer
}


@pytest.mark.parametrize("kind", REFUSED)
def test_family_without_a_class_is_refused(tmp_path, kind):
    dense_models(tmp_path, kind, count=2, **REFUSED[kind])
    with pytest.raises(UserError) as caught:
        to_moe(tmp_path, "a", "b")
    assert str(tmp_path / "a") in str(caught.value)
    assert next(iter(REFUSED[kind]), "does not become" if kind != "olmo3" else "layer_types") in (
        str(caught.value)
    )
    assert not list(tmp_path.glob("*moe*"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite", "ernie4_5", "demix"])
def test_folder_is_that_of_the_stock_class(tmp_path, kind):
    """Saved again by transformers the tensors are the same bytes; generation uses the cache."""
    dense_models(tmp_path, kind, count=2, dtype=torch.bfloat16)
    folder = to_moe(tmp_path, "a", "b", topk=2)
    model = load(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = load(folder)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(tokens(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **options))


def test_experts_are_copied_and_the_rest_averaged_as_by_merge(tmp_path):
    """Every feed-forward has the bits of its source; every other tensor those of the average."""
    dense = dense_models(tmp_path, "llama", count=3)
    weights = [0.5, 0.3, 0.2]
    average_folders([(tmp_path / n, None) for n in "abc"], weights, tmp_path / "average")
    average = load_file(tmp_path / "average" / "model.safetensors")
    sparse = load_file(to_moe(tmp_path, "a", "b", "c", weights=weights) / "model.safetensors")
    for name, tensor in average.items():
        if ".mlp." not in name:
            assert torch.equal(sparse.pop(name), tensor), name
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for expert, model in enumerate(dense):
        state = model.state_dict()
        for layer in range(2):
            for name, part in parts.items():
                copied = sparse.pop(
                    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
                )
                assert torch.equal(copied, state[f"model.layers.{layer}.mlp.{part}.weight"])
    assert sorted(sparse) == [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1)]


def test_record_names_experts_in_order(tmp_path):
    dense_models(tmp_path, "llama", count=2)
    record = read_moe_record(to_moe(tmp_path, "b", "a", weights=[3.0, 1.0], seed=7))
    assert record.domains == ["b", "a"] and record.shared == "averaged"
    assert [expert.weight for expert in record.experts] == [0.75, 0.25]
    assert [Path(expert.path).name for expert in record.experts] == ["b", "a"]
    with ModelFolder(tmp_path / "b") as source:
        assert record.experts[0].digest == source.compute_digest()
    assert record.router == {"kind": "random", "seed": 7, "spread": 0.02}


def test_domains_of_one_model_share_its_weights(tmp_path):
    """A DEMix model: nothing is averaged, and each expert is that of its domain."""
    config = tiny_stock_config("llama")
    fields = {**config.to_dict(), "domains": ["law", "med"], "untie": "feedforward"}
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    kind, model_class = make_host_classes("llama")
    torch.manual_seed(0)
    model = model_class(kind(**fields)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "demix")
    run_to_moe(
        MoeArgs(forest=str(tmp_path / "demix"), output_dir=str(tmp_path / "moe"), quiet=True)
    )
    assert read_moe_record(tmp_path / "moe").shared == "one model"
    for expert, domain in enumerate(("law", "med")):
        model.set_domain(domain)
        sparse = load(tmp_path / "moe")
        force(sparse, expert)
        assert farthest(logits(sparse), logits(model)) <= 2e-6


@pytest.mark.parametrize("untie", ["feedforward", "feedforward_top", "transformer"])
def test_domains_of_the_projects_gpt(tmp_path, untie):
    """Experts share all but their feed-forwards; those that are whole blocks are averaged there."""
    config = tiny_stock_config("demix", domains=["law", "med"], untie=untie)
    torch.manual_seed(0)
    model = DemixForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "demix")
    flags = {"forest": str(tmp_path / "demix"), "output_dir": str(tmp_path / "moe")}
    run_to_moe(MoeArgs(**flags, quiet=True))
    shared = "averaged" if untie == "transformer" else "one model"
    assert read_moe_record(tmp_path / "moe").shared == shared
    for expert, domain in enumerate(("law", "med")):
        model.set_domain(domain)
        sparse = load(tmp_path / "moe")
        force(sparse, expert)
        assert (farthest(logits(sparse), logits(model)) <= 2e-6) == (shared == "one model")
    assert "after `import megamod`" in (tmp_path / "moe" / "README.md").read_text()


def test_anchor_demands_equal_bits(tmp_path):
    first, _ = dense_models(tmp_path, "qwen3", count=2)
    other = copy.deepcopy(first)
    for name, parameter in other.named_parameters():
        if ".mlp." in name:
            parameter.data += 0.5
    other.save_pretrained(tmp_path / "trained")
    sparse = load_file(to_moe(tmp_path, "a", "trained", anchor=True) / "model.safetensors")
    assert all(
        torch.equal(sparse[name], tensor)
        for name, tensor in first.state_dict().items()
        if ".mlp." not in name
    )
    with pytest.raises(UserError, match=r"--anchor: .* differs between .*/a and .*/b"):
        to_moe(tmp_path, "a", "b", output="refused", anchor=True)
    assert not (tmp_path / "refused").exists()


def test_single_expert_is_the_dense_model(tmp_path):
    (dense,) = dense_models(tmp_path, "llama", count=1)
    with pytest.raises(UserError, match="needs two experts"):
        to_moe(tmp_path, "a")
    assert farthest(logits(load(to_moe(tmp_path, "a", topk=1))), logits(dense)) <= 2e-6


def test_rows_are_read_from_a_file(tmp_path):
    dense_models(tmp_path, "llama", count=2)
    rows = torch.randn(2, 2, 16)
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    flags = {"router": "file", "router_file": str(tmp_path / "rows.safetensors")}
    model = load(to_moe(tmp_path, "a", "b", **flags))
    assert all(
        torch.equal(router.weight, layer)
        for router, layer in zip(routers(model), rows, strict=True)
    )
    rows[1, 0] = 0
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    with pytest.raises(UserError, match="expert 0 in layer 1"):
        to_moe(tmp_path, "a", "b", output="refused", **flags)
    save_file({"rows": rows[:1]}, tmp_path / "rows.safetensors")
    with pytest.raises(UserError, match=r"shape \[1, 2, 16\]"):
        to_moe(tmp_path, "a", "b", output="refused", **flags)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"topk": 3}, "--topk 3: there are 2 experts"),
        ({"domains": ["x", "x"]}, "two experts are called 'x'"),
        ({"domains": ["x"]}, "1 names for 2 models"),
        ({"weights": [1.0]}, "gives 1 weights"),
        ({"router": "calibrated"}, "needs --calibration"),
        ({"router": "random", "sharpness": 2.0}, "--sharpness 2.0 has no effect"),
        ({"router": "file"}, "--router file and --router_file PATH go together"),
        ({"anchor": True, "align": True}, "--anchor takes weights as they are"),
        ({"align_method": "orthogonal"}, "--align_method orthogonal has no effect"),
        ({"forest": "x"}, "give one of --forest and --models"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, flags, message):
    dense_models(tmp_path, "llama", count=2)
    with pytest.raises(UserError, match=re.escape(message)):
        to_moe(tmp_path, "a", "b", **flags)
    assert not (tmp_path / "moe").exists()


def test_other_shapes_and_full_disks_are_refused(tmp_path, monkeypatch):
    dense_models(tmp_path, "llama", count=1)
    tiny_stock("llama", intermediate_size=32).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="has shape"):
        to_moe(tmp_path, "a", "wide")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="bytes, and 10 are free"):
        to_moe(tmp_path, "a", "a", domains=["x", "y"])
    assert not (tmp_path / "moe").exists()


def test_aligned_experts_compute_the_same_alone(tmp_path):
    """A permuted copy of a model becomes equal to it again, so that the average is the model."""
    (dense,) = dense_models(tmp_path, "llama", count=1)
    order = torch.randperm(24)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for layer in range(2):
        for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"model.layers.{layer}.mlp.{part}.weight"
            state[name] = state[name].index_select(axis, order)
    permuted = copy.deepcopy(dense)
    permuted.load_state_dict(state)
    permuted.save_pretrained(tmp_path / "permuted")
    for method in ("weight", "orthogonal"):
        folder = to_moe(tmp_path, "a", "permuted", align=True, align_method=method, output=method)
        assert read_moe_record(folder).aligned == method
        sparse = load_file(folder / "model.safetensors")
        for name in sparse:
            if ".experts.0." in name:
                other = sparse[name.replace(".experts.0.", ".experts.1.")]
                torch.testing.assert_close(sparse[name], other, rtol=0, atol=1e-6)
        assert farthest(logits(load(folder)), logits(dense)) <= 1e-5
