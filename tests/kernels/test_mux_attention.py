"""The first block's attention from token ids, against float64 and against its two halves."""

import pytest
import torch
from megamod_kernels import mux_attention as module
from megamod_kernels.mux_attention import mux_attention, mux_attention_reference
from megamod_kernels.mux_embed import Tables, mux_embed
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(2, 3, 5, 48, 4), (1, 1, 3, 300, 3), (3, 2, 1, 80, 2)]
WORDS, POSITIONS, SEGMENTS = 11, 9, 2


def case(shape, dtype=torch.float64, arguments=False):
    """Ids, the learned tensors, optional ids, mask, upstream gradients of both results."""
    groups, instances, length, size, _ = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes, scale=1.0):
        return (torch.randn(*sizes, generator=generator) * scale).to(dtype).double()

    def ids(rows, below):
        return torch.randint(below, (rows, length), generator=generator)

    learned = [draw(rows, size) for rows in (WORDS, POSITIONS, SEGMENTS)]
    learned += [1 + 0.1 * draw(size), draw(size), draw(instances, size)]
    learned[3] = learned[3].to(dtype).double()
    for _ in range(3):
        learned += [draw(size, size, scale=size**-0.5), draw(size, scale=0.1)]
    rows = groups * instances
    optional = (ids(rows, SEGMENTS), ids(rows, POSITIONS), ids(groups, POSITIONS))
    mask = torch.rand(groups, 1, 1, length, generator=generator) < 0.7
    mask[..., 0] = True
    upstream = [draw(groups, length, size) for _ in range(2)]
    inputs = (optional, mask) if arguments else ((None,) * 3, None)
    return ids(rows, WORDS), learned, *inputs, upstream


def results(function, shape, drawn, dtype, **more):
    """Both results, and gradients of tables, norm, key and projections."""
    ids, learned, optional, mask, upstream = drawn
    leaves = [tensor.to(dtype).requires_grad_() for tensor in learned]
    tables = Tables(*leaves[:5], 1e-5, 1, 0, 1)
    projections = list(zip(leaves[6::2], leaves[7::2], strict=True))
    arguments = (ids, leaves[5], tables, projections, shape[-1], *optional, mask)
    values = function(*arguments, **more)
    return *values, *torch.autograd.grad(values, leaves, [item.to(dtype) for item in upstream])


def kernels(*arguments, **more):
    return mux_attention(*arguments, implementation="triton", **more)


def error(result, exact) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("arguments", [False, True], ids=["default", "given"])
def test_projections_against_float64(shape, kind, arguments, monkeypatch, poisoned, rounding):
    """All but the softmax, which is torch's on both sides and noisier than what is compared."""
    dtype = DTYPES[kind]
    monkeypatch.setattr(module, "_compute_attention", lambda projected, *_: sum(projected))
    drawn = case(shape, dtype, arguments)
    exact = results(mux_attention_reference, shape, drawn, torch.float64)
    eager = results(mux_attention_reference, shape, drawn, dtype)
    for result, plain, target in zip(
        results(kernels, shape, drawn, dtype), eager, exact, strict=True
    ):
        assert result.dtype == dtype and result.shape == target.shape
        if dtype == torch.float32:
            assert error(result, target) <= 2e-6
        else:
            assert error(result, target) <= 1.1 * error(plain, target)


@pytest.mark.parametrize("arguments", [False, True], ids=["default", "given"])
def test_attention_against_float64(arguments, poisoned):
    shape = SHAPES[0]
    drawn = case(shape, torch.float32, arguments)
    exact = results(mux_attention_reference, shape, drawn, torch.float64)
    most = max(item.norm() for item in exact)
    for result, target in zip(results(kernels, shape, drawn, torch.float32), exact, strict=True):
        if target.norm() < 1e-12:  # that of the keys' bias, which softmax does not see
            assert result.norm() <= 1e-7 * most
        else:
            assert error(result, target) <= 5e-6


@pytest.mark.long  # half a minute of the interpreter
def test_large_tiles(monkeypatch, poisoned):
    """Tuned tiles on sizes that no tile divides, which tests are too small to be given."""
    tuned = module.select_matmul_tile(2**20, 2)
    assert tuned != module.select_matmul_tile(1, 2)
    monkeypatch.setattr(module, "select_matmul_tile", lambda *_: tuned)
    shape = (17, 2, 8, 140, 2)
    drawn = case(shape, torch.float32)
    monkeypatch.setattr(module, "count_embedded_rows", lambda _: 16)
    exact = results(mux_attention_reference, shape, drawn, torch.float64)
    for result, target in zip(results(kernels, shape, drawn, torch.float32), exact, strict=True):
        assert target.norm() < 1e-12 or error(result, target) <= 5e-6


def test_it_is_embedding_and_attention_one_after_the_other():
    """Dropout of embeddings included: the same seed drops the same."""
    shape = SHAPES[0]
    ids, learned, optional, mask, _ = case(shape, arguments=True)
    leaves = [tensor.float() for tensor in learned]
    tables = Tables(*leaves[:5], 1e-5, 1, 0, 1)
    projections = list(zip(leaves[6::2], leaves[7::2], strict=True))
    torch.manual_seed(5)
    attended, x = kernels(ids, leaves[5], tables, projections, 4, *optional, mask, 0.3)
    torch.manual_seed(5)
    alone = mux_embed(ids, leaves[5], tables, *optional, 0.3, "triton")
    assert torch.equal(x, alone)
    query, key, value = (
        (alone @ weight.T + bias).view(2, 5, 4, 12).transpose(1, 2) for weight, bias in projections
    )
    scores = (query @ key.mT) / 12**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ value).transpose(1, 2).reshape(2, 5, 48)
    torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-5)


def test_frozen_tables_and_either_result_alone():
    shape = SHAPES[0]
    ids, learned, optional, mask, upstream = case(shape, arguments=True)

    def run(function, dtype, trained, taken):
        leaves = [
            tensor.to(dtype).requires_grad_(number in trained)
            for number, tensor in enumerate(learned)
        ]
        tables = Tables(*leaves[:5], 1e-5, 1, 0, 1)
        projections = list(zip(leaves[6::2], leaves[7::2], strict=True))
        values = function(ids, leaves[5], tables, projections, 4, *optional, mask)
        target = [leaves[number] for number in trained]
        return torch.autograd.grad(values[taken], target, upstream[taken].to(dtype))

    for trained, taken in (((6, 7, 10, 11), 0), ((0, 1, 2, 3, 4, 5), 1), ((0, 5), 0)):
        exact = run(mux_attention_reference, torch.float64, trained, taken)
        result = run(kernels, torch.float32, trained, taken)
        for item, target in zip(result, exact, strict=True):
            assert error(item, target) <= 2e-6


def test_auto_is_the_definition_away_from_a_gpu():
    shape = SHAPES[0]
    drawn = case(shape, arguments=True)
    plain = results(mux_attention_reference, shape, drawn, torch.float32)
    for item, other in zip(results(mux_attention, shape, drawn, torch.float32), plain, strict=True):
        assert torch.equal(item, other)


def test_nothing_to_do():
    shape = (0, 2, 3, 8, 2)
    attended, x, *grads = results(kernels, shape, case(shape), torch.float32)
    assert attended.shape == x.shape == (0, 3, 8) and not any(grad.any() for grad in grads)


def test_gradcheck_of_the_reference():
    ids, learned, optional, mask, _ = case((1, 2, 3, 4, 2), arguments=True)
    leaves = [tensor.requires_grad_() for tensor in learned]

    def definition(*arguments):
        tables = Tables(*arguments[:5], 1e-5, 1, None, None)
        projections = list(zip(arguments[6::2], arguments[7::2], strict=True))
        return mux_attention_reference(ids, arguments[5], tables, projections, 2, *optional, mask)

    assert torch.autograd.gradcheck(definition, leaves)


def test_the_operation_is_known_to_torch():
    shape = (1, 2, 3, 8, 2)
    ids, learned, optional, *_ = drawn = case(shape)
    exact = results(mux_attention_reference, shape, drawn, torch.float32)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, shape, drawn, torch.float32), exact)
    leaves = [tensor.float().requires_grad_() for tensor in learned]
    numbers = (1e-5, 1, 0.0, 0, 1, True)
    arguments = (ids, *leaves[:6], *optional, None, leaves[6:], *numbers)
    torch.library.opcheck(torch.ops.megamod.mux_qkv, arguments)
    away = [leaf.to("meta") for leaf in leaves]
    projections = list(zip(away[6::2], away[7::2], strict=True))
    with FlopCounterMode(display=False) as counter:
        attended, x = kernels(
            ids.to("meta"), away[5], Tables(*away[:5], 1e-5, 1, 0, 1), projections, 2
        )
    assert attended.shape == x.shape == (1, 3, 8)
    assert counter.get_total_flops() == 3 * 2 * 3 * 8 * 8 + 2 * 2 * 2 * 3 * 3 * 4


def test_what_does_not_fit_is_refused():
    ids, learned, _, _, _ = case((1, 2, 3, 8, 2))
    tables = Tables(*learned[:5], 1e-5, 1, 0, 1)
    projections = list(zip(learned[6::2], learned[7::2], strict=True))
    with pytest.raises(ValueError, match=r"ids \(1, 3\) and key \(2, 8\) do not fit"):
        mux_attention(ids[:1], learned[5], tables, projections, 2)
    with pytest.raises(ValueError, match="heads 3 do not divide 8 columns"):
        mux_attention(ids, learned[5], tables, projections, 3)
    wrong = [(weight[:, 1:], bias) for weight, bias in projections]
    with pytest.raises(ValueError, match=r"projection \(8, 7\) with bias \(8,\) does not fit key"):
        mux_attention(ids, learned[5], tables, wrong, 2)
