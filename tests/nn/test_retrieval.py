"""Slots, targets and losses of token retrieval; special tokens of multiplexed rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megamod.nn.demultiplexer import SharedRsaLayers
from megamod.nn.retrieval import (
    MlpRetrievalHead,
    PrefixRetrievalHead,
    RetrievalHead,
    build_retrieval_pairs,
    build_row_pairs,
    draw_retrieved_instances,
    score_tokens,
    select_retrieval_targets,
)

B, N, T, D, V = 2, 3, 4, 8, 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_slots_are_uniform_and_one_per_position():
    slots = draw_retrieved_instances(300, 20, 5, 2, torch.device("cpu"))
    assert slots.shape == (300, 20) and not slots[:, :2].any()
    counts = slots[:, 2:].flatten().bincount(minlength=5)
    share = 300 * 18 / 5
    assert (counts - share).abs().max() < 5 * (share * 0.8) ** 0.5
    assert (slots[:, 2:] != slots[:, 2:3]).any(1).float().mean() > 0.9  # not one per row
    for column in slots[:, 2:].T:
        assert column.bincount(minlength=5).min() > 20


def test_targets_by_hand():
    ids = torch.tensor([[1, 2, 0, 4], [5, 6, 7, 8], [9, 3, 0, 0], [4, 4, 2, 1]])
    slots = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    assert select_retrieval_targets(ids, slots).tolist() == [[1, 6, 0, 8], [4, 3, 2, 0]]
    assert select_retrieval_targets(ids, slots, first_column=1, ignored_id=0).tolist() == [
        [-100, 6, -100, 8],
        [-100, 3, 2, -100],
    ]
    kept = torch.tensor([[True, False, True, True], [False, False, True, True]])
    assert select_retrieval_targets(ids, slots, sampled=kept).tolist() == [
        [1, -100, 0, 8],
        [-100, -100, 2, 0],
    ]


@pytest.mark.parametrize("shape", [(3, 4), (4, 5)])
def test_targets_need_whole_groups(shape):
    with pytest.raises(ValueError, match=r"do not fit: expected \[B \* N, T\]"):
        select_retrieval_targets(torch.zeros(shape).long(), torch.zeros(2, 4).long())


def test_pairs():
    chosen = torch.tensor([[True, False, True], [False, False, True]])
    slots = torch.tensor([[2, 0, 1], [1, 1, 0]])
    assert [t.tolist() for t in build_retrieval_pairs(slots, chosen)] == [
        [0, 0, 1],
        [2, 1, 0],
        [0, 2, 2],
    ]
    rows = torch.zeros(6, 2).bool()
    rows[1, 0] = rows[5, 1] = True
    assert [t.tolist() for t in build_row_pairs(rows, 3)] == [[0, 1], [1, 2], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_with_and_without_logits(dtype):
    states = torch.randn(9, D).to(dtype).requires_grad_()
    decoder, labels = nn.Linear(D, V).to(dtype), torch.randint(V, (9,))
    expected = F.cross_entropy(
        states.float() @ decoder.weight.float().T + decoder.bias.float(), labels, reduction="sum"
    )
    expected_correct = int((decoder(states).argmax(-1) == labels).sum())
    gradients = {}
    for keep in (True, False):
        total, correct, logits = score_tokens(
            states, decoder, labels, return_logits=keep, count_correct=True
        )
        assert abs(total - expected) <= (0.2 if dtype == torch.bfloat16 else 1e-5)
        assert correct == expected_correct and (logits is not None) == keep
        gradients[keep] = torch.autograd.grad(total, [states, *decoder.parameters()])
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for with_logits, without in zip(gradients[True], gradients[False], strict=True):
        assert (with_logits - without).abs().max() <= tolerance * with_logits.abs().max()


@pytest.mark.parametrize("keep", [True, False])
def test_nothing_to_score(keep):
    decoder = nn.Linear(D, V)
    states = torch.zeros(0, D, requires_grad=True)
    total, correct, _ = score_tokens(
        states, decoder, torch.zeros(0).long(), return_logits=keep, count_correct=True
    )
    assert total == 0 and correct == 0
    total.backward()
    assert not decoder.weight.grad.any()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layers", [2, 3])
def test_head_by_keys(layers, residual):
    shared = SharedRsaLayers(N, D, 3, 1e-6).double()
    head = RetrievalHead(D, V, 1e-6, layers, residual).double()
    hidden = torch.randn(B, T, D).double()
    states = head(shared, hidden, None)
    for i in range(N):
        key = shared.demux_instance_embedding[i].expand(B, T, D)
        x = shared.get_norm(1)(F.gelu(shared.get_dense(1)(torch.cat([key, hidden], -1))))
        for layer in range(2, layers + 1):
            x = shared.get_norm(layer)(F.gelu(shared.get_dense(layer)(x))) + (x if residual else 0)
        x = head.pre_decoder_layer_norm(F.gelu(head.pre_decoder(x))) + (x if residual else 0)
        torch.testing.assert_close(states[:, i], x)
    slots = torch.randint(N, (B, T))
    chosen = torch.rand(B, T) < 0.5
    group, position = chosen.nonzero(as_tuple=True)
    torch.testing.assert_close(
        head(shared, hidden, build_retrieval_pairs(slots, chosen)),
        states[group, slots[group, position], position],
    )


def test_head_by_prefix():
    head = PrefixRetrievalHead(D, V, 1e-6).double()
    hidden = torch.randn(B, N + 1 + T, D).double()
    states = head(hidden, N, None)
    for i in range(N):
        key = hidden[:, i : i + 1].expand_as(hidden)
        expected = head.layer_norm(F.gelu(head.dense(torch.cat([key, hidden], -1))))
        torch.testing.assert_close(states[:, i], expected)


def test_head_by_networks():
    head = MlpRetrievalHead(N, D, V, 1e-6, 0.1).double().eval()
    hidden, slots = torch.randn(B, T, D).double(), torch.randint(N, (B, T))
    states = head(hidden, slots)
    for b in range(B):
        for t in range(T):
            i = int(slots[b, t])
            dense = getattr(head.demux_module, f"dense_{i}")
            x = getattr(head.demux_module, f"layer_norm_{i}")(F.gelu(dense(hidden[b, t])))
            x = head.layer_norm_pre_vocab(F.gelu(head.dense_pre_vocab(x)))
            torch.testing.assert_close(states[b, t], x)
