import numpy as np
import pytest
import torch
from megamod_kernels.mux_embed import Tables, mux_embed, mux_embed_reference

WORDS, POSITIONS, SEGMENTS = 11, 9, 2
SHAPES = [(2, 5, 7, 48), (1, 1, 3, 300), (3, 2, 1, 200), (1, 17, 2, 80)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(shape, dtype, inputs, id=f"{name}-{kind}" + "-B{}-N{}-T{}-D{}".format(*shape))
    for shape in SHAPES
    for name, dtype in DTYPES.items()
    for kind, inputs in (("default", False), ("given", True))
    if inputs == (name != "fp16") or shape == SHAPES[0]
]


def case(shape, dtype=torch.float32, inputs=False):
    """Ids, key, tables, optional ids, upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    groups, instances, length, size = shape

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    def ids(rows, below):
        return torch.randint(below, (rows, length), generator=generator)

    tables = Tables(
        *(draw(rows, size) for rows in (WORDS, POSITIONS, SEGMENTS)),
        1 + 0.1 * draw(size),
        draw(size),
        eps=1e-5,
        first_position=1,
        word_padding=0,
        position_padding=1,
    )
    rows = groups * instances
    optional = (ids(rows, SEGMENTS), ids(rows, POSITIONS), ids(groups, POSITIONS))
    upstream = draw(groups, length, size)
    key = draw(instances, size)
    return ids(rows, WORDS), key, tables, optional if inputs else (None,) * 3, upstream


def results(function, inputs, dtype, **more):
    """The value, and gradients of word, position, token_type, weight, bias and key."""
    ids, key, tables, optional, upstream = inputs
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tables[:5], key)]
    value = function(ids, leaves[5], Tables(*leaves[:5], *tables[5:]), *optional, **more)
    return value, *torch.autograd.grad(value, leaves, upstream.to(dtype))


def kernels(*inputs, **more):
    return mux_embed(*inputs, implementation="triton", **more)


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


def keep(seed, stream, rows, size, p):
    """Dropout's factors by Philox4x32-10 in integers: Salmon et al. 2011."""
    low = np.uint64(0xFFFFFFFF)
    row, quad = np.meshgrid(np.arange(rows), np.arange(-(-size // 4)), indexing="ij")
    c = [n.astype(np.uint64) for n in (row, quad, np.full_like(row, stream), 0 * row)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        item, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (two >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            two & low,
            (item >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            item & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    bits = np.stack(c, -1).reshape(rows, -1)[:, :size]
    return torch.from_numpy((bits >> np.uint64(8)) / 2.0**24 >= p) / (1 - p)


@pytest.mark.parametrize(("shape", "dtype", "inputs"), CASES)
def test_value_and_gradients_against_float64(shape, dtype, inputs, poisoned, rounding):
    drawn = case(shape, dtype, inputs)
    exact = results(mux_embed_reference, drawn, torch.float64)
    eager = results(mux_embed_reference, drawn, dtype)
    for result, plain, expected in zip(results(kernels, drawn, dtype), eager, exact, strict=True):
        assert result.dtype == dtype and result.shape == expected.shape
        if dtype == torch.float32:
            assert error(result, expected) <= 2e-6
        else:
            assert error(result, expected) <= 1.1 * error(plain, expected)


@pytest.mark.parametrize("inputs", [False, True], ids=["default", "given"])
def test_dropout_is_replayed_in_backward(inputs, monkeypatch, poisoned):
    shape, p, seed = (2, 2, 2, 270), 0.3, 2**61 + 12345
    drawn = case(shape, inputs=inputs)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([seed]))
    result = results(kernels, drawn, torch.float32, dropout=p)
    groups, instances, length, size = shape
    masks = (
        keep(seed, 0, groups * instances * length, size, p).view(shape),
        keep(seed, 1, groups * length, size, p).view(groups, length, size),
    )
    assert all(0.6 < (mask > 0).double().mean() < 0.8 for mask in masks)
    exact = results(mux_embed_reference, drawn, torch.float64, masks=masks)
    for ours, expected in zip(result, exact, strict=True):
        assert error(ours, expected) <= 2e-6


def test_sums_over_many_chunks_and_partials(monkeypatch):
    drawn = case((2, 3, 4, 24), inputs=True)
    exact = results(mux_embed_reference, drawn, torch.float64)
    monkeypatch.setattr("megamod_kernels.mux_embed.PARTIALS", 2)
    for chunk in (1, 3):
        monkeypatch.setattr("megamod_kernels.mux_embed.CHUNK", chunk)
        result = results(kernels, drawn, torch.float32)
        for ours, expected in zip(result, exact, strict=True):
            assert error(ours, expected) <= 2e-6
        again = results(kernels, drawn, torch.float32)
        assert all(torch.equal(item, other) for item, other in zip(result, again, strict=True))


def test_padding_receives_no_gradient():
    drawn = case((2, 3, 5, 48), inputs=True)
    _, word, position, *_ = results(kernels, drawn, torch.float32)
    assert not word[0].any() and word[1:].any() and not position[1].any()
    ids, key, tables, optional, upstream = drawn
    free = tables._replace(word_padding=None, position_padding=None)
    _, word, position, *_ = results(kernels, (ids, key, free, optional, upstream), torch.float32)
    assert word[0].any() and position[1].any()


def test_one_row_of_positions_for_all():
    ids, key, tables, _, upstream = case((2, 3, 5, 48))
    row = torch.tensor([[4, 1, 1, 0, 8]])
    drawn = (ids, key, tables, (None, row, row.flip(1)), upstream)
    result = results(kernels, drawn, torch.float32)
    for ours, expected in zip(
        result, results(mux_embed_reference, drawn, torch.float64), strict=True
    ):
        assert error(ours, expected) <= 2e-6


def test_tensors_that_are_not_contiguous():
    ids, key, tables, optional, upstream = case((2, 3, 5, 48), inputs=True)

    def turned(tensor):
        return tensor.T.contiguous().T if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]

    strided = Tables(*(turned(table) for table in tables[:5]), *tables[5:])
    result = kernels(turned(ids), turned(key), strided, *(turned(item) for item in optional))
    assert torch.equal(result, kernels(ids, key, tables, *optional))
    drawn = (ids, key, tables, optional, upstream[:1, :, :1].expand(2, 5, 48))
    exact = results(mux_embed_reference, drawn, torch.float64)
    for ours, expected in zip(results(kernels, drawn, torch.float32), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_what_backward_keeps():
    ids, key, tables, optional, _ = case((2, 5, 7, 48))
    leaves = [table.detach().requires_grad_() for table in tables[:5]]

    def saved(function):
        sizes = {}

        def note(tensor):
            if not any(tensor.data_ptr() == held.data_ptr() for held in (*leaves, key, ids)):
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            value = function(ids, key, Tables(*leaves, *tables[5:]), *optional)
        return sum(sizes.values()), value

    ours, value = saved(kernels)
    plain, _ = saved(mux_embed_reference)
    assert ours == value.nbytes and ours <= 0.35 * plain
    with torch.no_grad():
        assert kernels(ids, key, tables).grad_fn is None


def test_nothing_to_embed():
    for shape in ((0, 2, 3, 8), (2, 2, 0, 8)):
        drawn = case(shape)
        value, *grads = results(kernels, drawn, torch.float32)
        assert value.shape == drawn[-1].shape and not any(grad.any() for grad in grads)


def test_gradcheck_of_the_reference():
    ids, key, tables, optional, _ = case((1, 2, 3, 4), torch.float64, inputs=True)
    tables = tables._replace(word_padding=None, position_padding=None)
    leaves = [tensor.requires_grad_() for tensor in (*tables[:5], key)]

    def definition(*inputs):
        return mux_embed_reference(ids, inputs[5], Tables(*inputs[:5], *tables[5:]), *optional)

    assert torch.autograd.gradcheck(definition, leaves)


def test_the_operation_is_known_to_torch():
    ids, key, tables, optional, upstream = drawn = case((1, 2, 3, 8))
    exact = results(mux_embed_reference, drawn, torch.float32)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, drawn, torch.float32), exact)
    away = Tables(*(table.to("meta") for table in tables[:5]), *tables[5:])
    assert kernels(ids.to("meta"), key.to("meta"), away).shape == upstream.shape
    leaves = [tensor.requires_grad_() for tensor in (*tables[:5], key)]
    numbers = (tables.eps, 1, 0.0, 0, 1, True)
    inputs = (ids, *leaves, *optional, None, *numbers)
    torch.library.opcheck(torch.ops.megamod.mux_embed, inputs)


def test_what_does_not_fit_is_refused():
    ids, key, tables, _, _ = case((1, 2, 3, 8))
    for inputs, message in (
        ((ids[:1], key, tables), r"ids \(1, 3\) and key \(2, 8\) do not fit"),
        (
            (ids, key[:, :4], tables),
            r"word \(11, 8\) does not fit key \(2, 4\): expected \[rows, 4\]",
        ),
        (
            (ids, key, tables._replace(weight=tables.weight[None])),
            r"weight \(1, 8\) does not fit key \(2, 8\): expected \[8\]",
        ),
        (
            (ids, key, tables._replace(word=tables.word[0])),
            r"word \(8,\) does not fit key \(2, 8\): expected \[rows, 8\]",
        ),
        ((ids, key, tables, ids[:1]), r"token_type_ids \(1, 3\) does not fit: expected \[2, 3\]"),
        ((ids.repeat(1, 3), key, tables), "9 tokens need more than the 8 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            mux_embed(*inputs)
