import importlib.util
import json
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamod.errors import UserError
from megamod.merging import tensors
from megamod.merging.merge import merge
from megamod.merging.methods import sparsify
from megamod.merging.methods.table import METHODS
from megamod.merging.plan import make_merge_plan
from megamod.merging.recipe import InputModel, MergeRecipe
from megamod.merging.recipe_file import read_recipe
from megamod.states import stream
from megamod.states.stream import ModelFolder

SHAPES = {"v": (37,), "m": (13, 11), "h.0.t": (3, 5, 7), "s": (), "one": (1, 1), "none": (0, 4)}
SHAPES |= {"wide": (2, 150)}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 16 floats, so that most tensors have several, the last one short."""
    monkeypatch.setattr(stream, "PIECE", 64)
    monkeypatch.setattr(tensors, "PIECE", 64)


def states_of(count: int, dtype=torch.float32, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """The first is the base, the others are near it."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    near = [
        {n: t + torch.randn(t.shape, generator=generator) / 4 for n, t in base.items()}
        for _ in range(count - 1)
    ]
    return [{name: tensor.to(dtype) for name, tensor in entry.items()} for entry in (base, *near)]


def write(root: Path, states: list[dict]) -> list[Path]:
    folders = [root / str(number) for number in range(len(states))]
    for folder, state in zip(folders, states, strict=True):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": 6}))
        save_file(state, folder / "model.safetensors")
    return folders


def build_recipe_from_flags(
    method: str, folders: list[Path], each: list[dict], overall=None, base: int | None = 0, **more
) -> MergeRecipe:
    inputs = tuple(InputModel(f, None, e) for f, e in zip(folders, each, strict=True))
    return MergeRecipe(method, inputs, overall or {}, base=base, origin="recipe", **more)


def merged(
    tmp_path, method: str, states: list[dict], each: list[dict], overall=None, base=0, seed=0
) -> dict[str, torch.Tensor]:
    """Merged tensors of a method, without writing files."""
    root = tmp_path / f"{method}{len(list(tmp_path.iterdir()))}"
    recipe = build_recipe_from_flags(method, write(root, states), each, overall, base)
    with ExitStack() as stack:
        folders = [stack.enter_context(ModelFolder(entry.path)) for entry in recipe.inputs]
        plan = make_merge_plan(recipe, folders, 10**9)
        actual = {}
        for name, spec in plan.specs.items():
            pieces = METHODS[method].function(plan.make_merge_tensor(name, seed))
            flat = torch.cat([torch.empty(0), *(p.reshape(-1).clone() for p in pieces)])
            actual[name] = flat.view(spec.shape)
        return actual


def compare(actual: dict, states: list[dict], naive, atol=1e-5) -> None:
    """`naive` gets one tensor of every model in float64."""
    assert actual.keys() == states[0].keys()
    for name, tensor in actual.items():
        expected = naive(*(state[name].double() for state in states))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=atol, msg=name)


def arc(t: float, x: torch.Tensor, y: torch.Tensor, straight: float) -> torch.Tensor:
    """Spherical interpolation of two vectors, written out."""
    norms = x.norm() * y.norm()
    cosine = (x.flatten() @ y.flatten() / norms).clamp(-1, 1) if norms > 0 else torch.ones(())
    if cosine.abs() > straight:
        return (1 - t) * x + t * y
    angle = cosine.acos()
    return (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()


def kept_by_rank(tau: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Mask of the ranks [low, high) by magnitude; of equal magnitudes the first ranks highest."""
    flat = tau.flatten()
    order = sorted(range(len(flat)), key=lambda i: (abs(float(flat[i])), -i))
    mask = torch.zeros(len(flat))
    mask[order[low:high]] = 1
    return mask.view(tau.shape)


def election(base, deltas, weights, factor=1.0, normalize=False) -> torch.Tensor:
    """Entry by entry, in Python."""
    result = base.clone().flatten()
    flat = [delta.flatten() for delta in deltas]
    for i in range(len(result)):
        entries = [(w, w * float(d[i])) for w, d in zip(weights, flat, strict=True)]
        sign = 1 if sum(e for _, e in entries) >= 0 else -1
        kept = [(w, e) for w, e in entries if e * sign > 0]
        total = sum(w for w, _ in kept) if normalize else 1
        result[i] += factor * sum(e for _, e in kept) / (total or 1)
    return result.view(base.shape)


def test_slerp(tmp_path):
    states = states_of(2, seed=3)
    states[1]["wide"] = states[0]["wide"] * 2  # parallel: straight
    states[1]["v"] = -states[0]["v"]
    states[1]["m"] = torch.randn(13, 11, generator=torch.Generator().manual_seed(9))
    for t in (0.0, 0.3, 1.0):
        actual = merged(tmp_path, "slerp", states, [{}, {}], {"t": t})
        compare(actual, states, lambda x, y, t=t: arc(t, x, y, 0.9995))
    actual = merged(tmp_path, "slerp", states, [{}, {}], {"t": 0.3}, base=1)
    compare(actual, states, lambda x, y: arc(0.3, y, x, 0.9995))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "axis"),
    [
        ({}, None),
        ({"nuslerp_flatten": False}, -1),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
    ],
)
def test_nuslerp_of_tensors_rows_and_columns(tmp_path, dtype, settings, axis):
    states, weights = states_of(3, dtype), [{}, {"weight": 3.0}, {"weight": 1.0}]

    def naive(x, y):
        if axis is None or x.dim() == 0:
            return arc(0.25, x, y, 1 - 1e-16)
        if x.numel() == 0:
            return x
        rows = [t.movedim(axis, -1).reshape(-1, t.shape[axis]) for t in (x, y)]
        done = torch.stack([arc(0.25, a, b, 1 - 1e-16) for a, b in zip(*rows, strict=True)])
        return done.view(x.movedim(axis, -1).shape).movedim(-1, axis)

    actual = merged(tmp_path, "nuslerp", states[1:], weights[1:], settings, base=None)
    compare(actual, states[1:], naive)
    actual = merged(tmp_path, "nuslerp", states, weights, settings)
    compare(actual, states, lambda b, x, y: b + naive(x - b, y - b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(tmp_path, dtype, normalize):
    states = states_of(4, dtype)
    each = [{}, {"weight": 0.7}, {"weight": -0.2}, {"weight": 0.9}]
    actual = merged(
        tmp_path, "task_arithmetic", states, each, {"lambda": 0.9, "normalize": normalize}
    )
    divisor = 1.4 if normalize else 1
    compare(
        actual,
        states,
        lambda b, x, y, z: b + 0.9 * (0.7 * (x - b) - 0.2 * (y - b) + 0.9 * (z - b)) / divisor,
    )


def trim(tau: torch.Tensor, density: float) -> torch.Tensor:
    count = tau.numel()
    keep = max(1, int(density * count)) if density < 1 else count
    return tau * kept_by_rank(tau, max(0, count - keep), count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rescale", [False, True])
def test_ties(tmp_path, dtype, rescale):
    states, weights, densities = states_of(4, dtype), [1.0, 0.5, -0.3], [0.5, 0.1, 1.0]
    each = [{}] + [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]

    def naive(base, *models, normalize):
        deltas = [trim(m - base, d) for m, d in zip(models, densities, strict=True)]
        if rescale:
            full = [(m - base).abs().sum() for m in models]
            deltas = [d * (f / d.abs().sum()) for d, f in zip(deltas, full, strict=True)]
        return election(base, deltas, weights, 0.8, normalize) if base.numel() else base

    for normalize in (True, False):
        settings = {"lambda": 0.8, "normalize": normalize, "rescale": rescale, "int8_mask": True}
        actual = merged(tmp_path, "ties", states, each, settings)
        compare(actual, states, lambda *all_, n=normalize: naive(*all_, normalize=n), atol=2e-5)


@pytest.mark.parametrize("elect", [False, True])
def test_breadcrumbs(tmp_path, elect):
    states, weights = states_of(3, torch.bfloat16), [0.6, 0.5]
    for density, gamma in ((0.5, 0.1), (0.97, 0.2), (0.001, 0.5)):
        common = {"density": density, "gamma": gamma}

        def naive(base, *models, density=density, gamma=gamma):
            deltas = []
            for model in models:
                count = base.numel()
                keep, top = int(density * count), int(gamma * count)
                low = max(0, count - keep - top)
                deltas.append((model - base) * kept_by_rank(model - base, low, low + keep))
            if elect and base.numel():
                return election(base, deltas, weights)
            return base + sum(w * d for w, d in zip(weights, deltas, strict=True))

        method = "breadcrumbs_ties" if elect else "breadcrumbs"
        each = [{}] + [{"weight": w} | common for w in weights]
        compare(merged(tmp_path, method, states, each), states, naive)


def test_drops_are_of_the_right_number_and_norm_and_repeat(tmp_path):
    states = states_of(2)
    base, tau = states[0]["wide"], states[1]["wide"] - states[0]["wide"]
    each = [{}, {"weight": 1.0, "density": 0.4}]
    for method in ("dare_linear", "dare_ties", "della_linear", "della"):
        entry, same = (
            merged(tmp_path, method, states, each, {"normalize": False}) for _ in range(2)
        )
        other = merged(tmp_path, method, states, each, {"normalize": False}, seed=1)
        assert all(torch.equal(entry[name], same[name]) for name in entry)
        assert not torch.equal(entry["wide"], other["wide"])
        delta = entry["wide"] - base
        kept = delta.abs() > 1e-6
        assert 0.28 < kept.double().mean() < 0.52
        torch.testing.assert_close(delta.abs().sum(), tau.abs().sum(), rtol=1e-3, atol=0)
        ratios = (delta / tau)[kept & (tau.abs() > 0.05)]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-3, atol=0)
        raw = merged(tmp_path, method, states, each, {"rescale": False, "normalize": False})
        torch.testing.assert_close(raw["wide"] - base, tau * kept, rtol=0, atol=1e-6)
    exact = merged(tmp_path, "dare_linear", states, each, {"rescale_by_density": True})
    torch.testing.assert_close(
        exact["wide"] - base, tau * kept_of(exact, base) / 0.4, rtol=0, atol=1e-4
    )
    for method in ("dare_linear", "dare_ties", "della_linear", "della"):
        full = merged(tmp_path, method, states, [{}, {"weight": 1.0, "density": 1.0}])
        compare(full, states, lambda b, x: x)


def kept_of(actual: dict, base: torch.Tensor) -> torch.Tensor:
    return (actual["wide"] - base).abs() > 1e-6


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_is_the_method_it_is_named_after_on_what_was_not_dropped(tmp_path, method):
    states, weights = states_of(3), [0.8, 0.5]
    each = [{}] + [{"weight": w, "density": 0.5} for w in weights]
    actual = merged(tmp_path, method, states, each, {"rescale": False})
    alone = [
        merged(tmp_path, "dare_linear", [states[0], s], [{}, e], {"rescale": False})
        for s, e in ((states[1], each[1]),)
    ]
    # The first model draws the same numbers without the second.
    mask = (alone[0]["m"] - states[0]["m"]).abs() > 1e-6
    first = (states[1]["m"] - states[0]["m"]) * mask
    rest = actual["m"] - states[0]["m"] - 0.8 * first
    if method == "dare_linear":
        second = (states[2]["m"] - states[0]["m"]) * 0.5
        assert (((rest - second).abs() < 1e-5) | (rest.abs() < 1e-5)).all()
        assert 0.3 < ((rest - second).abs() < 1e-5).double().mean() < 0.7
    else:
        both = torch.stack([first * 0.8, (states[2]["m"] - states[0]["m"]) * 0.5])
        delta = actual["m"] - states[0]["m"]
        allowed = [torch.zeros_like(delta), *both, both.sum(0)]
        assert torch.stack([(delta - a).abs() < 1e-5 for a in allowed]).any(0).all()


def test_della_keeps_large_entries_rather_than_small_ones(tmp_path):
    states = [{"w": torch.zeros(400, 64)}, {"w": torch.arange(1.0, 65).expand(400, 64).clone()}]
    each = [{}, {"weight": 1.0, "density": 0.5, "epsilon": 0.4}]
    for settings, mean in (({"rescale": False}, None), ({"rescale_by_density": True}, 1.0)):
        actual = merged(tmp_path, "della_linear", states, each, settings)["w"]
        chances = (actual != 0).double().mean(0)
        expected = torch.linspace(0.1, 0.9, 64).double()
        assert (chances - expected).abs().max() < 0.11 and (chances - expected).mean().abs() < 0.01
        if mean:
            assert (actual / states[1]["w"]).mean().item() == pytest.approx(mean, abs=0.03)
    each[1]["epsilon"] = 0.6
    with pytest.raises(UserError, match=r"w: density 0\.5 with epsilon 0\.6"):
        merged(tmp_path, "della", states, each)


@pytest.mark.parametrize("rows", [False, True])
def test_model_stock(tmp_path, rows):
    states = states_of(4)
    actual = merged(tmp_path, "model_stock", states, [{}] * 4, {"filter_wise": rows})

    def whole(base, *models):
        taus = [(model - base).flatten() for model in models]
        pairs = [
            float((a @ b / (a.norm() * b.norm()).clamp(min=1e-6)).clamp(-1, 1))
            for a, b in combinations(taus, 2)
        ]
        cosine = sum(pairs) / len(pairs)
        t = len(models) * cosine / (1 + (len(models) - 1) * cosine)
        return t * sum(models) / len(models) + (1 - t) * base

    def naive(base, *models):
        if not rows or base.dim() < 2:
            return whole(base, *models)
        if base.numel() == 0:
            return base
        flat = [t.reshape(-1, t.shape[-1]) for t in (base, *models)]
        return torch.stack([whole(*row) for row in zip(*flat, strict=True)]).view(base.shape)

    # Where task vectors are nearly opposed the quotient is ill-conditioned.
    compare(actual, states, naive, atol=2e-4)


def test_passthrough(tmp_path):
    states = states_of(1)
    compare(merged(tmp_path, "passthrough", states, [{}], base=None), states, lambda x: x)
    scaled = merged(tmp_path, "passthrough", states, [{"scale": -0.5}], base=None)
    compare(scaled, states, lambda x: -0.5 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_among_equals_and_zeros(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (101,), generator=generator).to(dtype) / 3
    values[::7] = torch.randn(15, generator=generator).to(dtype)
    values[3] = -0.0
    ordered = values.abs().sort().values
    for rank in range(0, 101, 5):
        value, below, equal = sparsify.find_magnitude_of_rank(
            lambda: values.clone().split(16), rank
        )
        assert value == ordered[rank]
        assert below == (ordered < value).sum() and equal == (ordered == value).sum()


@pytest.mark.parametrize(("low", "high"), [(0, 101), (0, 1), (100, 101), (17, 80), (40, 42)])
def test_of_equal_entries_the_first_stay(tmp_path, low, high):
    generator = torch.Generator().manual_seed(1)
    tau = torch.randint(-2, 3, (101,), generator=generator).float()
    folders = write(tmp_path, [{"w": torch.zeros(101)}, {"w": tau}])
    with ModelFolder(folders[0]) as first, ModelFolder(folders[1]) as second:
        base, model = (tensors.ModelTensor(f, "w", {}) for f in (first, second))
        vector = sparsify.TaskVector(tensors.MergeTensor("w", [base, model], base, {}), model)
        thin = sparsify._keep_ranks(vector, low, high)()
        pieces = [piece.clone() for piece in vector.iterate_pieces()]
        for piece in pieces:
            thin(piece)
    assert torch.equal(torch.cat(pieces), tau * kept_by_rank(tau, low, high))


def test_threads_and_order_change_nothing(tmp_path):
    states = states_of(3)
    folders = write(tmp_path, states)
    each = [{}] + [{"weight": 0.5, "density": 0.5}] * 2
    recipe = build_recipe_from_flags("dare_ties", folders, each)
    for name, threads in (("one", 1), ("three", 3)):
        merge(recipe, tmp_path / name, threads=threads, seed=4)
    entry, three = (tmp_path / name / "model.safetensors" for name in ("one", "three"))
    assert entry.read_bytes() == three.read_bytes()
    assert json.loads((tmp_path / "one" / "merge.json").read_text())["random_seed"] == 4


@pytest.mark.parametrize(
    ("method", "count", "base", "message"),
    [
        ("ties", 2, None, "recipe: ties compares models with base_model"),
        ("slerp", 3, 0, "slerp merges 1 models besides the base, not 2"),
        ("nuslerp", 2, 0, "nuslerp merges 2 models besides the base, not 1"),
        ("model_stock", 2, 0, "model_stock merges at least 2 models besides the base, not 1"),
        ("passthrough", 2, None, "passthrough merges 1 models, not 2"),
        ("slerp", 2, 0, "t is missing for"),
        ("task_arithmetic", 2, 0, "weight is missing for"),
    ],
)
def test_what_a_method_cannot_merge(tmp_path, method, count, base, message):
    with pytest.raises(UserError, match=message):
        merged(tmp_path, method, states_of(count), [{}] * count, base=base)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"fisher", "regmean"}))
def test_what_is_not_finite_is_found_by_every_method(tmp_path, method):
    count = {"passthrough": 1, "slerp": 2}.get(method, 3)
    base = None if METHODS[method].base == "none" else 0
    states = states_of(count)
    states[-1]["m"][12, 3] = torch.nan
    each = [{"weight": 0.5, "density": 0.5}] * count
    recipe = build_recipe_from_flags(
        method, write(tmp_path / "models", states), each, {"t": 0.5}, base
    )
    with pytest.raises(UserError, match=rf"models/{count - 1}: m holds values"):
        merge(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_the_method_of_the_documentation(tmp_path):
    """The file that docs/merging.md shows, entered into the table as it stands."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "merging.md").read_text()
    code = page.split("### Adding a method")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "median_of_the_docs.py").write_text(code)
    before = dict(METHODS)
    spec = importlib.util.spec_from_file_location("median", tmp_path / "median_of_the_docs.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        generator = torch.Generator().manual_seed(0)
        states = [{"w": torch.randn(7, 5, generator=generator)} for _ in range(3)]
        folders = write(tmp_path / "models", states)
        lines = "\n".join(f"- {{model: {folder}}}" for folder in folders)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"merge_method: median\nmodels:\n{lines}\nparameters: {{scale: 2}}\n")
        merge(read_recipe(recipe), tmp_path / "out")
        expected = torch.stack([state["w"] for state in states]).median(0).values * 2
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")["w"], expected)
    finally:
        METHODS.clear()
        METHODS.update(before)
