"""Sources of an encoder's first weights: --model, --init_from, or the generator."""

from pathlib import Path

import pytest
import torch
from test_encoder_lm import LENGTH, SMALL, make_place
from transformers import BertForMaskedLM

from megamod.args import ModelArgs, MuxArgs
from megamod.data.lm.databin import DataBin
from megamod.errors import UserError
from megamod.runs.pretrain.encoder_lm import (
    build_encoder_config,
)
from megamod.runs.pretrain.encoder_start import build_initial_encoder, find_weight_source


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("bare"))


def test_a_stock_encoder_starts_a_multiplexed_one(bare):
    """--model BERT or --init_from BERT with --num_instances 2: layers kept, multiplexer new."""
    data, mux = DataBin(bare / "bin"), MuxArgs(objective="masked_lm", num_instances=2)
    stock = BertForMaskedLM.from_pretrained(bare / "plain")
    kept = {k: v for k, v in stock.named_parameters() if k.startswith("bert.")}
    for args in (
        ModelArgs(model=str(bare / "plain")),
        ModelArgs(model=str(bare / "mux"), init_from=str(bare / "plain")),
    ):
        config = build_encoder_config(args, mux, data, LENGTH)
        assert config.model_type == "mux_bert" and config.num_instances == 2
        assert all(getattr(config, name) == value for name, value in SMALL.items())
        model = build_initial_encoder(config, 1, find_weight_source(args, config), "masked_lm")
        result = dict(model.named_parameters())
        assert len(kept) > 30 and all(torch.equal(result[k], v) for k, v in kept.items())
    args = ModelArgs(model=str(bare / "plain"), from_scratch=True)
    assert find_weight_source(args, build_encoder_config(args, mux, data, LENGTH)) is None


def test_the_weights_of_the_model_are_taken(bare):
    """--model FOLDER is a start, not only a shape; --init_from wins."""
    data, mux = DataBin(bare / "bin"), MuxArgs(objective="masked_lm")
    args = ModelArgs(model=str(bare / "plain"))
    config = build_encoder_config(args, mux, data, LENGTH)
    model = build_initial_encoder(config, 7, find_weight_source(args, config), "masked_lm")
    stock = BertForMaskedLM.from_pretrained(bare / "plain").state_dict()
    assert all(torch.equal(stock[k], v) for k, v in model.state_dict().items())
    other = ModelArgs(model=str(bare / "plain"), init_from=str(bare / "mux"))
    with pytest.raises(UserError, match=r"--init_from .* is a model of type 'mux_bert'"):
        find_weight_source(other, config)
    assert find_weight_source(ModelArgs(model="small"), config) is None
