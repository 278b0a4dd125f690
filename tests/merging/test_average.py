import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import make_model
from transformers import AutoModelForCausalLM

import megamod  # noqa: F401  (makes the models known)
from megamod.errors import UserError
from megamod.merging.merge import average_folders, merge
from megamod.merging.recipe_file import read_recipe
from megamod.states.weights import extract_expert_weights, read_weights

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "mergekit"


def make_folder(
    folder: Path, state: dict[str, torch.Tensor], files: dict[str, str] | None = None, **config
) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "toy", "vocab_size": 6, "dtype": "float32"} | config
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    return folder


def random_state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """`big` spans two pieces; `ids` is the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "big.weight": torch.randn(300_001, generator=generator).to(dtype),
        "h.0.w": torch.randn(3, 4, generator=generator).to(dtype),
        "h.1.w": torch.randn(3, 4, generator=generator).to(dtype),
        "ids": torch.tensor([3, 4]),
    }


def expected(states, weights, normalize=True) -> dict[str, torch.Tensor]:
    """Weighted average in float64; integers of the first model."""
    total = sum(weights) if normalize else 1
    merged = dict(states[0])
    for name, first in states[0].items():
        if first.is_floating_point():
            values = [state[name].double() * w for state, w in zip(states, weights, strict=True)]
            merged[name] = (sum(values) / total).to(first.dtype)
    return merged


def close(folder: Path, reference: dict[str, torch.Tensor], **tolerance) -> None:
    result = read_weights(folder)
    assert result.keys() == reference.keys()
    for name, tensor in reference.items():
        assert result[name].dtype == tensor.dtype and result[name].shape == tensor.shape
        torch.testing.assert_close(result[name], tensor, **tolerance)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_average_is_the_weighted_sum(tmp_path, normalize, shard_bytes):
    states, weights = [random_state(seed) for seed in range(3)], [0.3, 0.3, -0.1]
    for number, state in enumerate(states):
        make_folder(tmp_path / str(number), state, {"vocab.txt": "a\nb"}, hidden_act="gelu")
    sources = [(tmp_path / str(number), None) for number in range(3)]
    output = tmp_path / "new" / "out"
    average_folders(
        sources, weights, output, normalize=normalize, shard_bytes=shard_bytes, domains=list("xyz")
    )
    close(output, expected(states, weights, normalize), rtol=1e-6, atol=1e-6)
    assert (output / "vocab.txt").read_text() == "a\nb"
    assert json.loads((output / "config.json").read_text())["hidden_act"] == "gelu"
    parents = json.loads((output / "merge.json").read_text())["parents"]
    shares = [w / 0.5 if normalize else w for w in weights]
    assert [parent["weight"] for parent in parents] == pytest.approx(shares)
    assert [parent["path"] for parent in parents] == [str(path) for path, _ in sources]
    assert [parent["domain"] for parent in parents] == list("xyz")
    assert len({parent["digest"] for parent in parents}) == 3
    assert all(parent["digest"] in (output / "README.md").read_text() for parent in parents)
    assert len(list(output.glob("*.safetensors"))) == (1 if shard_bytes == 10**9 else 3)


def test_half_precision_is_added_up_in_float32(tmp_path):
    states = [random_state(seed, torch.bfloat16) for seed in range(8)]
    for number, state in enumerate(states):
        make_folder(tmp_path / str(number), state)
    sources = [(tmp_path / str(number), None) for number in range(8)]
    average_folders(sources, [1.0] * 8, tmp_path / "out")
    reference = expected(states, [1.0] * 8)
    # Rounded once: all but a few, that lie between two numbers, have the bits of the exact average.
    result = read_weights(tmp_path / "out")
    assert (result["big.weight"] != reference["big.weight"]).float().mean() < 1e-4
    average_folders(sources, [1.0] * 8, tmp_path / "wide", out_dtype="float32")
    wide = {k: v.float() if v.is_floating_point() else v for k, v in states[0].items()}
    exact = expected([wide, *states[1:]], [1.0] * 8)
    close(tmp_path / "wide", exact, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_a_model_of_weight_zero_is_not_read(tmp_path):
    states = [random_state(0), random_state(1)]
    states[1]["h.0.w"][0] = torch.nan
    sources = [(make_folder(tmp_path / str(n), s), None) for n, s in enumerate(states)]
    average_folders(sources, [2.0, 0.0], tmp_path / "out")
    close(tmp_path / "out", states[0])


@pytest.mark.parametrize("first_has_both", [True, False])
def test_tied_tensors_that_only_one_file_repeats(tmp_path, first_has_both):
    embeddings = [torch.randn(6, 2, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    states = [{"embed": e} for e in embeddings]
    states[not first_has_both]["head"] = states[not first_has_both]["embed"].clone()
    sources = [(make_folder(tmp_path / str(n), s), None) for n, s in enumerate(states)]
    average_folders(sources, [1.0, 1.0], tmp_path / "out")
    mean = (embeddings[0] + embeddings[1]) / 2
    close(tmp_path / "out", {"embed": mean} | ({"head": mean} if first_has_both else {}))


def test_experts_of_a_demix_model_become_one_dense_model(tmp_path):
    folder = make_model(tmp_path / "demix", untie="feedforward")
    (tmp_path / "elsewhere").mkdir()
    other = make_model(tmp_path / "elsewhere" / "elm")
    average_folders(
        [(folder, "law"), (folder, "art"), (other, None)],
        [0.5, 0.25, 0.25],
        tmp_path / "out",
        domains=["law", "art", "code"],
        shard_bytes=20_000,
    )
    state = read_weights(folder)
    states = [
        extract_expert_weights(state, "law"),
        extract_expert_weights(state, "art"),
        read_weights(other),
    ]
    merged = {
        name: sum(w * s[name] for w, s in zip([0.5, 0.25, 0.25], states, strict=True))
        for name in states[2]
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.untie == "none" and model.config.domains == ["law", "art", "code"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, merged[name], rtol=1e-6, atol=1e-6)


def test_whole_demix_models_are_averaged_expert_by_expert(tmp_path):
    folders = [make_model(tmp_path / name, untie="feedforward") for name in ("a", "b")]
    average_folders([(folder, None) for folder in folders], [1.0, 1.0], tmp_path / "out")
    states = [read_weights(folder) for folder in folders]
    close(tmp_path / "out", expected(states, [1.0, 1.0]), rtol=1e-6, atol=1e-6)
    assert (tmp_path / "out" / "expert_law.safetensors").exists()


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"recorded tensors are not at {GOLDEN}")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", ["linear", "slerp_gradient", "task_arithmetic", "ties"])
def test_mergekit_recipe_gives_the_recorded_tensors(tmp_path, case, threads):
    (tmp_path / "case").mkdir()
    for name in ("a", "b", "base"):
        folder = tmp_path / "common" / name
        folder.mkdir(parents=True)
        for file, target in ((f"{name}.safetensors", "model.safetensors"), ("config.json", None)):
            content = (GOLDEN / "common" / file).read_bytes()
            (folder / (target or file)).write_bytes(content)
    recipe = tmp_path / "case" / "merge.yml"
    recipe.write_bytes((GOLDEN / case / "merge.yml").read_bytes())
    merge(read_recipe(recipe), tmp_path / "out", threads=threads)
    result = load_file(tmp_path / "out" / "model.safetensors")
    recorded = load_file(GOLDEN / case / "merged.safetensors")
    assert result.keys() == recorded.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=1e-6)


GOOD = random_state(0)


@pytest.mark.parametrize(
    ("state", "config", "files", "weights", "message"),
    [
        (GOOD | {"h.0.w": torch.zeros(4, 3)}, {}, {}, [1, 1], ["h.0.w", "[3, 4]", "[4, 3]"]),
        ({k: v for k, v in GOOD.items() if k != "h.1.w"}, {}, {}, [1, 1], ["has no h.1.w"]),
        (GOOD | {"h.2.w": torch.zeros(2)}, {}, {}, [1, 1], ["has no h.2.w"]),
        (GOOD | {"h.0.w": torch.zeros(3, 4).long()}, {}, {}, [1, 1], ["h.0.w"]),
        (GOOD, {"vocab_size": 7}, {}, [1, 1], ["vocab_size", "6", "7"]),
        (GOOD, {"num_attention_heads": 3}, {}, [1, 1], ["num_attention_heads", "2", "3"]),
        (GOOD, {"model_type": "other"}, {}, [1, 1], ["model_type", "other"]),
        (GOOD, {}, {"vocab.txt": "b\na"}, [1, 1], ["id 0 is 'a'", "and 'b' in the second"]),
        (GOOD, {}, {}, [1], ["gives 1 weights", "2 models"]),
        (GOOD, {}, {}, [1, -1], ["sum to zero"]),
        (GOOD, {}, {}, [1, float("nan")], ["nan", "finite number"]),
        (GOOD | {"h.1.w": torch.full((3, 4), torch.nan)}, {}, {}, [1, 1], ["bad", "h.1.w"]),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path, state, config, files, weights, message
):
    common = {"num_attention_heads": 2}
    make_folder(tmp_path / "good", GOOD, {"vocab.txt": "a\nb"}, **common)
    make_folder(tmp_path / "bad", state, {"vocab.txt": "a\nb"} | files, **common | config)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        average_folders(
            [(tmp_path / "good", None), (tmp_path / "bad", None)], weights, tmp_path / "out"
        )
    assert all(part in str(error.value) for part in message), error.value
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_overflow_of_the_stored_dtype_is_no_result(tmp_path):
    folder = make_folder(tmp_path / "a", {"w": torch.full((3,), 1e5)})
    with pytest.raises(UserError, match=r"w would hold values that are not finite in torch\.float"):
        average_folders([(folder, None)], [1.0], tmp_path / "out", out_dtype="float16")
    with pytest.raises(UserError, match="exists already"):
        average_folders([(folder, None)], [1.0], folder)


PROGRAM = """
import sys, threading, time
from pathlib import Path
import torch
from megamod.merging.merge import merge
from megamod.merging.recipe import InputModel, MergeRecipe

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

root, each = Path(sys.argv[1]), {"weight": 0.5, "density": 0.3}
inputs = tuple(InputModel(root / n, None, each) for n in "abc")

def work(method):
    global peak
    models = inputs[:2] if method == "slerp" else inputs
    recipe = MergeRecipe(method, models, {"t": 0.3}, base=None if method == "linear" else 0)
    before, peak, done = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    threading.Thread(target=watch, daemon=True).start()
    merge(recipe, root / method, threads=2)
    done.set()
    return peak - before
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three models of 48 MB."""
    root = tmp_path_factory.mktemp("large")
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        state = {f"w{n}": torch.randn(6_000_000, generator=generator) for n in range(2)}
        make_folder(root / name, state)
    return root


def run_program(code: str, root: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM + code, str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_memory_is_that_of_a_few_pieces_and_transformers_is_not_needed(large):
    code = """
print([work(method) for method in ("linear", "slerp", "ties", "dare_ties")])
assert "transformers" not in sys.modules and "deepspeed" not in sys.modules
"""
    output, errors = run_program(code, large).communicate(timeout=120)
    assert output, errors
    # Two threads with their pieces: less than one of the three models, whatever its size.
    assert max(json.loads(output)) < 40_000_000, output


def test_a_merge_that_is_killed_leaves_no_output(large):
    process = run_program("work('della')", large)
    begun = (large / f".tmp-della-{'?' * 8}/*.safetensors").relative_to(large)
    for _ in range(6000):
        if list(large.glob(str(begun))) or process.poll() is not None:
            break
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (large / "della").exists()
