"""The post-norm encoder against that of transformers, and its positions."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from megamod.models.mux.configuration import MuxBertConfig, MuxRobertaConfig
from megamod.nn.encoder import (
    Encoder,
    EncoderEmbeddings,
    EncoderLayer,
    EncoderModel,
    compute_padding_aware_positions,
    initialise_weights,
    make_key_mask,
)

SIZES = dict(
    vocab_size=200,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=10,
)


@pytest.fixture
def config():
    return MuxBertConfig(**SIZES)


def test_equals_the_encoder_of_transformers(config):
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    ours = EncoderModel(config).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "_ids" not in k})
    ids, types = torch.randint(200, (3, 7)), torch.randint(2, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5]])).long()
    expected = theirs(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    hidden = ours.encode(ours.embeddings(ids, types), make_key_mask(mask))
    assert (hidden - expected).abs().max() < 1e-5
    hidden = ours.encode(ours.embeddings(ids, types), mask[:, None, None].bool())
    assert (hidden - expected).abs().max() < 1e-5


def test_vectors_in_place_of_words(config):
    torch.manual_seed(0)
    embeddings = EncoderEmbeddings(config, 12).eval()
    ids = torch.randint(200, (2, 5))
    words = embeddings.word_embeddings(ids)
    assert torch.equal(embeddings(words), embeddings(ids))
    positions = torch.arange(5)[None]
    assert torch.equal(embeddings(ids, torch.zeros_like(ids), positions), embeddings(ids))


def test_roberta_positions_start_after_padding():
    torch.manual_seed(0)
    config = MuxRobertaConfig(**SIZES | {"vocab_size": 60000})
    embeddings = EncoderEmbeddings(config, 12).eval()
    words = torch.randn(1, 4, 12)
    assert torch.equal(embeddings(words), embeddings(words, None, torch.tensor([[2, 3, 4, 5]])))


def test_padding_aware_positions():
    ids = torch.tensor([[7, 9, 1, 1], [1, 8, 1, 5], [1, 1, 1, 1]])
    assert compute_padding_aware_positions(ids, 1).tolist() == [
        [2, 3, 1, 1],
        [1, 2, 1, 3],
        [1, 1, 1, 1],
    ]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [None, "keys", "both"])
def test_first_queries_are_those_of_all(config, queries, masked):
    torch.manual_seed(0)
    encoder = Encoder(config).eval()
    x, mask = torch.randn(2, 6, 12), None
    if masked:
        mask = make_key_mask(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]))
    if masked == "both":
        mask = mask + torch.randn(2, 1, 6, 6)
    some = encoder(x, mask, queries)
    torch.testing.assert_close(some, encoder(x, mask)[:, :queries], atol=1e-6, rtol=1e-5)


def test_all_keys_masked_is_attention_to_all(config):
    """-10000 everywhere shifts all scores equally, so all-padding columns do not become NaN."""
    torch.manual_seed(0)
    layer = EncoderLayer(config).double().eval()
    x = torch.randn(1, 4, 12).double()
    torch.testing.assert_close(
        layer(x, make_key_mask(torch.zeros(1, 4)).double()), layer(x), atol=1e-9, rtol=0
    )


def test_initial_weights(config):
    torch.manual_seed(0)
    linear, kept = nn.Linear(200, 200), nn.Linear(200, 200)
    kept.default_initialisation = True
    initialise_weights(linear, 0.02)
    initialise_weights(kept, 0.02)
    assert abs(linear.weight.std() - 0.02) < 1e-3 and not linear.bias.any()
    # torch draws uniformly from +- 1 / sqrt(200), which has deviation 1 / sqrt(600).
    assert abs(kept.weight.std() - 600**-0.5) < 1e-3 and kept.bias.any()
    embeddings = EncoderEmbeddings(config, 12)
    embeddings.apply(lambda module: initialise_weights(module, 0.02))
    assert not embeddings.word_embeddings.weight[0].any()
    assert embeddings.word_embeddings.weight[1].any()
    assert embeddings.LayerNorm.weight.tolist() == [1.0] * 12
