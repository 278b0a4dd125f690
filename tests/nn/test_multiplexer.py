"""Keys of the multiplexers, and the multiplexed sequences."""

import importlib.util
from pathlib import Path

import pytest
import torch

from megamod.nn.multiplexer import (
    MULTIPLEXERS,
    KeySettings,
    compute_key_shape,
    draw_keys,
    multiplex_orthogonal,
)


def drawn(variant: str, instances: int, size: int, seed: int = 0, **options) -> torch.Tensor:
    return draw_keys(
        variant, instances, size, generator=torch.Generator().manual_seed(seed), **options
    )


@pytest.mark.parametrize("variant", [*MULTIPLEXERS])
def test_shapes(variant):
    keys = drawn(variant, 3, 12)
    assert tuple(keys.shape) == compute_key_shape(variant, 3, 12)
    assert keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("instances", "size", "epsilon", "chunks"),
    [
        (2, 64, 0.3, [(0, 36), (27, 64)]),
        (5, 64, 0.3, [(0, 13), (10, 25), (22, 37), (34, 49), (46, 64)]),
        (3, 10, 0.0, [(0, 3), (3, 6), (6, 10)]),
        (2, 8, 1.0, [(0, 6), (2, 8)]),
        (1, 7, 0.5, [(0, 7)]),
    ],
)
def test_binary_chunks(instances, size, epsilon, chunks):
    keys = drawn("binary_hadamard", instances, size, epsilon=epsilon)
    for key, (start, stop) in zip(keys, chunks, strict=True):
        assert key.tolist() == [1.0 if start <= i < stop else 0.0 for i in range(size)]


@pytest.mark.parametrize("variant", ["gaussian_hadamard", "gaussian_attention_v2"])
@pytest.mark.parametrize("norm", [1.0, 8])
def test_gaussian_keys_have_one_length_and_any_direction(variant, norm):
    keys = drawn(variant, 5, 400, norm=norm)
    torch.testing.assert_close(keys.norm(dim=1), torch.full((5,), float(norm)))
    # Directions of high dimension are almost orthogonal: cosines have deviation 1 / sqrt(400).
    cosines = (keys @ keys.T / norm**2).fill_diagonal_(0)
    assert cosines.abs().max() < 5 / 20
    assert keys.mean().abs() < 5 * norm / 400 / 5**0.5


def test_orthogonal_keys():
    keys = drawn("random_ortho", 4, 16)
    for key in keys:
        torch.testing.assert_close(key @ key.T, torch.eye(16), atol=1e-6, rtol=0)
    assert (keys[0] - keys[1]).abs().max() > 0.1


def test_orthogonal_keys_are_uniform():
    """Entries of a uniform matrix have mean 0 and variance 1 / D; a plain QR has biased signs.

    The trace of a uniform orthogonal matrix has mean 0 and variance 1.
    """
    keys = drawn("random_ortho", 3000, 4)
    assert keys.mean(0).abs().max() < 5 * (1 / 4 / 3000) ** 0.5
    assert (keys.pow(2).mean(0) - 1 / 4).abs().max() < 0.03
    trace = keys.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean()) < 5 / 3000**0.5 and abs(trace.var() - 1) < 0.15
    determinants = torch.linalg.det(keys)
    assert 0.45 < (determinants > 0).float().mean() < 0.55


def test_low_rank_keys():
    """V_i = Q P_i' with rotations P and Q shared by all instances."""
    size, instances = 14, 4
    keys = drawn("random_ortho_low_rank", instances, size).double()
    width = size // instances
    for key in keys:
        values = torch.linalg.svdvals(key)
        torch.testing.assert_close(values[:width], torch.ones(width).double(), atol=1e-6, rtol=0)
        assert values[width:].max() < 1e-6
        assert abs(key.pow(2).sum() - width) < 1e-5
    for i in range(instances):
        for j in range(i):
            assert (keys[i] @ keys[j].T).abs().max() < 1e-6  # columns of P are orthogonal
            assert (keys[i].T @ keys[j]).abs().max() < 1e-6  # those of Q


def test_low_rank_keys_come_from_rotations():
    """With one instance the key is Q P', of determinant 1."""
    for seed in range(6):
        key = drawn("random_ortho_low_rank", 1, 5, seed)[0]
        torch.testing.assert_close(key @ key.T, torch.eye(5), atol=1e-6, rtol=0)
        assert abs(torch.linalg.det(key) - 1) < 1e-5


@pytest.mark.parametrize("variant", ["gaussian_hadamard", "random_ortho", "random_ortho_low_rank"])
def test_a_seed_gives_the_same_keys(variant):
    assert torch.equal(drawn(variant, 2, 8, 3), drawn(variant, 2, 8, 3))
    assert not torch.equal(drawn(variant, 2, 8, 3), drawn(variant, 2, 8, 4))


def test_orthogonal_product_is_the_plain_sum():
    torch.manual_seed(0)
    x, key = torch.randn(2, 3, 4, 5).double(), torch.randn(3, 5, 5).double()
    mixed = multiplex_orthogonal(x, key)
    for b in range(2):
        for t in range(4):
            expected = sum(key[i] @ x[b, i, t] for i in range(3)) / 3**0.5
            torch.testing.assert_close(mixed[b, t], expected)


def test_the_multiplexer_of_the_documentation(tmp_path):
    """The function that docs/multiplexing.md shows, entered into the table as it stands."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "multiplexing.md").read_text()
    code = page.split("## Add a multiplexer")[1].split("```python\n")[1].split("```")[0]
    head = "import torch\nfrom torch import Tensor\n"
    head += "from megamod.nn.multiplexer import KeySettings, multiplexer\n"
    (tmp_path / "signs.py").write_text(head + code)
    spec = importlib.util.spec_from_file_location("signs", tmp_path / "signs.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    entry = MULTIPLEXERS.pop("sign_hadamard")
    keys = entry.draw(KeySettings(3, 8))
    x = torch.randn(2, 3, 4, 8)
    assert set(keys.flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(entry.mix(x, keys, "auto"), (x * keys[:, None]).mean(1))
