"""Tiny random models of stock families, and configurations to make them from."""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from megamod.models.lm.host import find_stock_class

VOCAB, WIDTH, LAYERS, LENGTH = 40, 16, 2, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    # Without dropout gradients can be compared.
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("resid_pdrop", "dropout", "activation_dropout", "resid_dropout"), 0.0),
    **dict.fromkeys(("embed_dropout", "hidden_dropout_prob", "layerdrop"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "residual_dropout"), 0.0),
}
KEY_VALUE = {"num_key_value_heads": 1}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, **KEY_VALUE}
# What families call otherwise, need besides, or bound by other fields.
FAMILIES = {
    "qwen3": {"head_dim": 8, **KEY_VALUE},
    "gemma": {"head_dim": 8, **KEY_VALUE},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "vaultgemma": GEMMA,
    "nanochat": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0, **KEY_VALUE},
    "ernie4_5": {"head_dim": 8},
    "helium": {"head_dim": 8, **KEY_VALUE},
    "hunyuan_v1_dense": {"head_dim": 8, **KEY_VALUE},
    "glm": {"head_dim": 8, **KEY_VALUE},
    "glm4": {"head_dim": 8, **KEY_VALUE},
    "gptj": {"rotary_dim": 4, "n_inner": 24},
    "codegen": {"rotary_dim": 4, "n_inner": 24, "num_attention_heads": 4},
    "gpt2": {"n_inner": 24},
    "gpt_bigcode": {"n_inner": 24},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "mpt": {"max_seq_len": LENGTH, "expansion_ratio": 2, "emb_pdrop": 0.0},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": WIDTH},
    "xglm": {"ffn_dim": 24, "num_hidden_layers": LAYERS},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
}


def tiny_stock_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """A small configuration of a family of transformers."""
    kind = CONFIG_MAPPING[model_type]
    fields = {**COMMON, **FAMILIES.get(model_type, KEY_VALUE), **changes}
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", ())}
    return kind(**{n: v for n, v in fields.items() if n in known or n in kind.attribute_map})


def tiny_stock(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model of a family of transformers, every parameter random and none zero."""
    config = tiny_stock_config(model_type, **changes)
    torch.manual_seed(seed)
    model = find_stock_class(config)._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
