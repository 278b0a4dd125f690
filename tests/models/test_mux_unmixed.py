"""Multiplexing after the first layers: states of the stock encoder up to there, then one pass."""

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, ElectraConfig, ElectraModel

from megamod.models.mux.bert import MuxBertForSequenceClassification, MuxBertModel
from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig
from megamod.models.mux.electra import MuxElectraModel

SIZES = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=12, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "bert": (BertModel(BertConfig(**SIZES)), MuxBertModel, MuxBertConfig, {}),
    "electra": (
        ElectraModel(ElectraConfig(**SIZES, embedding_size=8)),
        *(MuxElectraModel, MuxElectraConfig, {"embedding_size": 8}),
    ),
}


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [4, 7] that begin with cls, and their mask."""
    ids = torch.randint(5, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[1, 4:] = 2, 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_are_those_of_the_stock_encoder(tmp_path, family, layers):
    stock, kind, configuration, more = FAMILIES[family]
    stock.eval().save_pretrained(tmp_path / "stock")
    config = configuration(
        **SIZES, **more, num_instances=2, cls_token_id=2, unmixed_layers=layers, mask_token_id=4
    )
    model = kind.from_pretrained(tmp_path / "stock", config=config).eval()
    ids, mask = make_batch()
    mixed_from = []
    multiplex = model._multiplex
    model._multiplex = lambda x, mask: mixed_from.append(x) or multiplex(x, mask)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert states.shape == (4, 7, 16)
    expected = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    (x,) = mixed_from
    real = mask.view(2, 2, 7) != 0
    assert torch.allclose(x[real], expected[layers].view(2, 2, 7, 16)[real], atol=1e-5)
    # The other layers run once a group.
    keys = model.instance_embedding[:, None]
    hidden = model.mixing_norm((x * keys).mean(1))
    for layer in model.backbone.encoder.layer[layers:]:
        hidden = layer(hidden)
    again = model.encode(model.prepare_batch(ids, mask))
    assert torch.allclose(again.apply_norm(), hidden, atol=1e-5)


def test_a_classifier_keeps_the_setting(tmp_path):
    """Saved and loaded alike; the cls column alone is computed; gradients reach every layer."""
    torch.manual_seed(0)
    config = MuxBertConfig(**SIZES, num_instances=2, cls_token_id=2, unmixed_layers=2)
    model = MuxBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = MuxBertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    ids, mask = make_batch()
    first, second = (m(input_ids=ids[:3], attention_mask=mask[:3]).logits for m in (model, loaded))
    assert torch.equal(first, second) and first.shape == (3, 2)
    loaded(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    layers = loaded.bert.encoder.layer
    assert all(layer.output["dense"].weight.grad.abs().sum() > 0 for layer in layers)
    assert AutoModel.from_pretrained(tmp_path / "model").config.unmixed_layers == 2


@pytest.mark.parametrize("layers", [-1, 3])
def test_a_layer_must_be_left(layers):
    with pytest.raises(ValueError, match=f"unmixed_layers {layers} must be 0 to 2"):
        MuxBertConfig(**SIZES, unmixed_layers=layers)
