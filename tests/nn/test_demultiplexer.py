"""Demultiplexers against concatenation and repetition, and memory kept for backward."""

import pytest
import torch
from megamod_kernels.demux import Pairs
from megamod_kernels.mux import multiplex
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.nn.demultiplexer import (
    MlpDemultiplexer,
    PrefixDemultiplexer,
    RsaDemultiplexer,
    SharedRsaLayers,
    apply_keyed_linear,
)

B, N, L, D = 2, 3, 5, 8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rsa(layers: int, dropout: float = 0.0) -> tuple[SharedRsaLayers, RsaDemultiplexer]:
    return SharedRsaLayers(N, D, layers, 1e-6).double(), RsaDemultiplexer(D, 1e-6, dropout).double()


def naive_rsa(shared: SharedRsaLayers, demux: RsaDemultiplexer, hidden: Tensor, p: float) -> Tensor:
    """Demultiplex with hidden states and keys repeated for every instance: [B, N, L, D]."""
    instances, length = len(shared.demux_instance_embedding), hidden.shape[1]
    repeated = hidden[:, None].repeat(1, instances, 1, 1)
    keys = shared.demux_instance_embedding[None, :, None].repeat(len(hidden), 1, length, 1)
    x = F.dropout(F.gelu(shared.get_dense(1)(torch.cat([keys, repeated], -1))), p)
    for layer in range(2, shared.layers):
        x = F.dropout(F.gelu(shared.get_dense(layer)(x)), p) + x
    return demux.pre_decoder_layer_norm(F.gelu(demux.pre_decoder(x))) + x


def all_pairs(count: int | None = None) -> Pairs:
    """All pairs of instance and position in a random order, or the first `count` of them."""
    grid = torch.cartesian_prod(torch.arange(B), torch.arange(N), torch.arange(L))
    group, instance, position = grid[torch.randperm(len(grid))[:count]].T
    return Pairs(group, instance, position)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_rsa(layers):
    shared, demux = rsa(layers)
    hidden = torch.randn(B, L, D).double().requires_grad_()
    expected = naive_rsa(shared, demux, hidden, 0.0)
    states = demux(shared, hidden)
    torch.testing.assert_close(states, expected)
    pairs = all_pairs(7)
    torch.testing.assert_close(demux(shared, hidden, pairs), at(expected, pairs))
    states.square().sum().backward()
    # Layer L belongs to the retrieval head, and norms are not applied here.
    for name, parameter in shared.named_parameters():
        unused = f"_{layers}." in name or "norm" in name
        assert (parameter.grad is None) == unused, name


def at(states: Tensor, pairs: Pairs) -> Tensor:
    return states[pairs.group, pairs.instance, pairs.position]


def test_rsa_drops_only_in_training():
    shared, demux = rsa(3, dropout=0.5)
    hidden = torch.randn(B, L, D).double()
    expected = naive_rsa(shared, demux, hidden, 0.0)
    torch.testing.assert_close(demux.eval()(shared, hidden), expected)
    assert (demux.train()(shared, hidden) - expected).abs().max() > 0.1


def test_dropout_keeps_the_mean_of_the_first_layer():
    """With a last layer of 0 and L = 2 the result is the first layer after dropout."""
    shared, demux = rsa(2, dropout=0.25)
    for parameter in demux.parameters():
        parameter.data.zero_()
    hidden = torch.randn(B, L, D).double()
    whole = naive_rsa(shared, demux, hidden, 0.0)
    drawn = torch.stack([demux(shared, hidden) for _ in range(400)])
    kept = drawn / whole
    assert ((kept.abs() < 1e-9) | ((kept - 4 / 3).abs() < 1e-9)).all()
    assert abs((kept > 0).double().mean() - 0.75) < 0.01
    assert abs(kept.mean() - 1) < 0.02


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("own_keys", [True, False])
def test_keyed_is_a_layer_over_key_and_hidden(few, own_keys):
    hidden = torch.randn(B, L, D).double()
    key = torch.randn(B, N, D).double() if own_keys else torch.randn(N, D).double()
    dense = torch.nn.Linear(2 * D, D).double()
    weight, bias = dense.weight, dense.bias
    keys = key[:, :, None].expand(B, N, L, D) if own_keys else key[:, None].expand(B, N, L, D)
    together = torch.cat([keys, hidden[:, None].expand(B, N, L, D)], -1)
    expected = together @ weight.T + bias
    pairs, none = all_pairs(3 if few else None), all_pairs(0)
    for layer in (dense, torch.nn.Sequential(dense)):  # the second is one to call, not to read
        torch.testing.assert_close(apply_keyed_linear(hidden, key, layer, None), expected)
        torch.testing.assert_close(
            apply_keyed_linear(hidden, key, layer, pairs), at(expected, pairs)
        )
        assert apply_keyed_linear(hidden, key, layer, none).shape == (0, D)


def test_prefix_columns_are_the_keys():
    demux = PrefixDemultiplexer(D, 1e-6).double()
    hidden = torch.randn(B, N + 1 + L, D).double()
    expected = torch.stack(
        [
            F.layer_norm(
                F.gelu(
                    demux.dense(torch.cat([hidden[:, i : i + 1].expand_as(hidden), hidden], -1))
                ),
                (D,),
                eps=1e-6,
            )
            for i in range(N)
        ],
        1,
    )
    torch.testing.assert_close(demux(hidden, N, slice(N + 1, None)), expected[:, :, N + 1 :])
    torch.testing.assert_close(demux(hidden, N, slice(N, N + 1)), expected[:, :, N : N + 1])
    pairs = all_pairs(9)
    torch.testing.assert_close(demux(hidden, N, slice(0, 0), pairs), at(expected, pairs))


def test_networks_of_instances():
    demux = MlpDemultiplexer(N, D, 1e-6, 0.5).double().eval()
    hidden = torch.randn(B, L, D).double()
    states = demux(hidden)
    for i in range(N):
        dense, norm = getattr(demux, f"dense_{i}"), getattr(demux, f"layer_norm_{i}")
        torch.testing.assert_close(states[:, i], norm(F.gelu(dense(hidden))))
    slots = torch.randint(N - 1, (B, L))  # nobody asks for the last instance
    asked = demux(hidden, slots)
    expected = states.gather(1, slots[:, None, :, None].expand(B, 1, L, D))[:, 0]
    torch.testing.assert_close(asked, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_kept_for_backward(dropout):
    """At most 0.35 of the plain form, plus the instances for a learned key."""
    groups, instances, length, size = 2, 5, 32, 64
    shared = SharedRsaLayers(instances, size, 3, 1e-6)
    demux = RsaDemultiplexer(size, 1e-6, dropout).train()
    x = torch.randn(groups, instances, length, size, requires_grad=True)
    tensor_bytes, kept = x.nbytes, {}
    for learned in (False, True):
        key = nn.Parameter(torch.randn(instances, size), requires_grad=learned)
        parameters = [*shared.parameters(), *demux.parameters(), key]
        kept[learned] = saved_bytes(lambda key=key: demux(shared, multiplex(x, key)), parameters)
        if not learned:
            naively = saved_bytes(
                lambda key=key: naive_rsa(shared, demux, (x * key[:, None]).mean(1), dropout),
                parameters,
            )
    assert naively > 7 * tensor_bytes  # the concatenation alone is two
    assert kept[False] <= 0.35 * naively
    assert kept[False] < 3.5 * tensor_bytes
    assert kept[True] == kept[False] + tensor_bytes


def saved_bytes(function, excluded: list[Tensor]) -> int:
    """Storages that a forward pass keeps for backward, each counted once."""
    known, sizes = {t.untyped_storage().data_ptr() for t in excluded}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(sizes.values())
