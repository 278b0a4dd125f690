"""Blocks of a token file against a walk over its tokens, and against fairseq's recorded ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megamod.data.corpus.indexed import IndexedDataset, IndexedWriter
from megamod.data.lm.blocks import IGNORE, TokenBlocks
from megamod.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared/golden/demix_btm/databin"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no recorded data-bin here")
EOS, PAD, TOKEN = 2, 1, 99


def make(folder: Path, sizes, dtype=np.uint16) -> IndexedDataset:
    """Items whose tokens are all different and that do not end in eos."""
    token = 10
    with IndexedWriter(folder / "a", np.dtype(dtype)) as writer:
        for size in sizes:
            writer.add_item(np.arange(token, token + size))
            token += size
    return IndexedDataset(folder / "a")


def walk(dataset: IndexedDataset, block_size: int, token: int | None):
    """Rows of (inputs, labels) by the definition: one token after the other."""
    flat = [(int(t), at == 0) for item in range(len(dataset)) for at, t in enumerate(dataset[item])]
    span = block_size - (token is not None)
    for start in range(0, len(flat), span):
        inputs, labels = ([], []) if token is None else ([token], [token])
        for position in range(start, min(start + span, len(flat))):
            target, opens = flat[position]
            begins = position == start and opens
            inputs.append(EOS if begins else flat[position - 1][0])
            labels.append(target)
        missing = block_size - len(inputs)
        yield inputs + [PAD] * missing, labels + [IGNORE] * missing


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("block_size", [2, 3, 5, 8, 16, 64])
def test_blocks_equal_a_naive_loop(tmp_path, block_size, token, dtype):
    dataset = make(tmp_path, [3, 1, 7, 4, 4, 0, 9, 2, 10], dtype)
    blocks = TokenBlocks(dataset, block_size, EOS, PAD, token)
    expected = list(walk(dataset, block_size, token))
    assert len(blocks) == len(expected)
    inputs, labels, padded = blocks.gather_inputs_and_labels(np.arange(len(blocks)))
    assert inputs.tolist() == [row for row, _ in expected]
    assert labels.tolist() == [row for _, row in expected]
    assert inputs.dtype == labels.dtype == torch.int64
    assert padded == (labels == IGNORE).any()
    counts = [sum(t != IGNORE for t in row) for _, row in expected]
    assert blocks.count_targets(np.arange(len(blocks))).tolist() == counts
    for indices in ([len(blocks) - 1], [0, 0], list(range(1, len(blocks) - 1)) or [0]):
        inputs, labels, padded = blocks.gather_inputs_and_labels(np.array(indices))
        assert inputs.tolist() == [expected[item][0] for item in indices]
        assert labels.tolist() == [expected[item][1] for item in indices]
        assert padded == any(IGNORE in expected[item][1] for item in indices)


def test_pad_may_be_eos(tmp_path):
    """Padding is recognised by length, not by id."""
    blocks = TokenBlocks(make(tmp_path, [5, 1]), 4, EOS, pad_id=EOS)
    inputs, labels, padded = blocks.gather_inputs_and_labels(np.array([1]))
    assert inputs.tolist() == [[13, 14, EOS, EOS]]
    assert labels.tolist() == [[14, 15, IGNORE, IGNORE]] and padded


def test_full_blocks_share_one_buffer(tmp_path):
    blocks = TokenBlocks(make(tmp_path, [30]), 4, EOS, PAD)
    inputs, labels, _ = blocks.gather_inputs_and_labels(np.array([1, 3]))
    assert inputs.untyped_storage().data_ptr() == labels.untyped_storage().data_ptr()
    assert inputs[0, 1].data_ptr() == labels[0, 0].data_ptr()


def test_bad_arguments(tmp_path):
    dataset = make(tmp_path, [9])
    for index in (-1, 3):
        with pytest.raises(IndexError, match="blocks are 0 to 2"):
            TokenBlocks(dataset, 4, EOS, PAD).gather_inputs_and_labels(np.array([0, index]))
    with pytest.raises(UserError, match="--max_seq_length 1"):
        TokenBlocks(dataset, 1, EOS, PAD, TOKEN)


@needs_golden
@pytest.mark.parametrize("block_size", [16, 32])
def test_fairseq_blocks(block_size):
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "io.safetensors")
    blocks = TokenBlocks(IndexedDataset(GOLDEN / "train"), block_size, EOS, PAD)
    indices = np.arange(len(blocks))
    inputs, labels, _ = blocks.gather_inputs_and_labels(indices)
    assert torch.equal(inputs, golden[f"block{block_size}.source"])
    padding = labels == IGNORE
    assert torch.equal(labels.masked_fill(padding, PAD), golden[f"block{block_size}.target"])
    assert blocks.count_targets(indices).tolist() == golden[f"block{block_size}.sizes"].tolist()
    assert (~padding).sum(1).tolist() == golden[f"block{block_size}.sizes"].tolist()


@needs_golden
def test_fairseq_domain_token():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "io.safetensors")
    blocks = TokenBlocks(IndexedDataset(GOLDEN / "train"), 16, EOS, PAD, domain_token=62)
    inputs, labels, padded = blocks.gather_inputs_and_labels(np.array([0, 1, 10]))
    assert torch.equal(inputs, golden["domain_token.source"]) and padded
    assert torch.equal(labels.masked_fill(labels == IGNORE, PAD), golden["domain_token.target"])
