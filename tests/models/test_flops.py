"""Operations by the formula, against the products that torch counts."""

import pytest
import torch
from models.tiny_hosts import tiny_stock_config
from torch.utils.flop_counter import FlopCounterMode

from megamod.models.lm.configuration import DemixConfig
from megamod.models.lm.demix import DemixForCausalLM
from megamod.models.lm.flops import compute_flops_per_token, count_active_parameters
from megamod.models.lm.host import make_host_classes
from megamod.models.lm.load import build_lm

LENGTH = 32
WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 500}


def counted(model: torch.nn.Module) -> float:
    """Per token; by way of the logits, as the counter passes over products that add in place."""
    ids = torch.randint(3, 40, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.logsumexp(-1).sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gemma2"])
def test_stock_families(family):
    inner = dict.fromkeys(("n_inner", "ffn_dim"), 160)
    changes = {"num_key_value_heads": 2, "head_dim": 24, "word_embed_proj_dim": 64, **inner}
    config = tiny_stock_config(family, **WIDE, **changes)
    config._attn_implementation = "eager"
    model = build_lm(config, seed=1).train()
    assert compute_flops_per_token(config, model, LENGTH) == pytest.approx(counted(model), rel=0.02)


def test_the_own_decoder_and_frozen_weights():
    shape = dict(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = DemixConfig(**shape, max_position_embeddings=LENGTH, attn_implementation="eager")
    model = DemixForCausalLM(config).train()
    assert compute_flops_per_token(config, model, LENGTH) == pytest.approx(counted(model), rel=0.02)
    before = compute_flops_per_token(config, model, LENGTH)
    model.model.layers.requires_grad_(False)
    frozen = sum(p.numel() for p in model.model.layers.parameters())
    assert compute_flops_per_token(config, model, LENGTH) == before - 2 * frozen


def test_one_expert_counts():
    stock = tiny_stock_config("llama", **WIDE)
    kind, model_class = make_host_classes("llama")
    fields = {n: v for n, v in stock.to_dict().items() if n != "model_type"}
    config = kind(**fields, domains=["a", "b"], untie="feedforward")
    with torch.device("meta"):
        model, plain = model_class(config), model_class(config, ())
    assert count_active_parameters(config, model) == count_active_parameters(config, plain)
    moe = tiny_stock_config("mixtral", num_local_experts=8, num_experts_per_tok=2)
    with torch.device("meta"):
        sparse = build_lm(moe, seed=1)
    experts = sum(p.numel() for name, p in sparse.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in sparse.parameters()) - experts
    lookups = sparse.get_input_embeddings().weight.numel()
    # Not a row of the table, so its embeddings are counted.
    assert count_active_parameters(moe, sparse)[0] in (
        rest + experts / 4,
        rest - lookups + experts / 4,
    )
