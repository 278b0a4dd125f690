"""Decoder families of transformers whose feed-forward layers can be copied per domain.

One row per model type. A family without a row is trained as a whole model, with its own forward
pass. A new family is a new row; `tests/models/test_hosts.py` checks every row against the stock
class.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """Facts about a stock causal language model that its configuration does not state.

    Attributes:
        layers: path of the list of decoder layers.
        feed_forward: attributes of a layer that together are its feed-forward.
        multiply, divide: configuration field by which logits are multiplied or divided.
        softcap: configuration field with the bound c of logits, z -> c tanh(z / c); a value of None
            there means that logits are not bounded.
        positions: path of the learned position table.
    """

    layers: str = "model.layers"
    feed_forward: tuple[str, ...] = ("mlp",)
    multiply: str | None = None
    divide: str | None = None
    softcap: str | None = None
    positions: str | None = None


PLAIN = (
    *("llama", "mistral", "ministral3", "seed_oss", "helium", "qwen2", "qwen3", "olmo", "olmo2"),
    *("olmo3", "exaone4", "smollm3", "ernie4_5", "hunyuan_v1_dense", "stablelm", "gemma", "phi3"),
    *("glm", "glm4", "nemotron", "arcee", "jais2", "apertus", "starcoder2", "phi", "persimmon"),
)
"""Families with `model.layers`, a module `mlp` and unscaled logits."""

SOFTCAP = "final_logit_softcapping"
"""Field of Gemma's configurations, and of others, with the bound of logits."""

HOSTS: dict[str, Host] = {
    **dict.fromkeys(PLAIN, Host()),
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma", "nanochat"), Host(softcap=SOFTCAP)),
    "granite": Host(divide="logits_scaling"),
    "cohere": Host(multiply="logit_scale"),
    "cohere2": Host(multiply="logit_scale"),
    "gpt_neox": Host("gpt_neox.layers"),
    "gpt2": Host("transformer.h", positions="transformer.wpe"),
    "gpt_bigcode": Host("transformer.h", positions="transformer.wpe"),
    "gpt_neo": Host("transformer.h", positions="transformer.wpe"),
    "gptj": Host("transformer.h"),
    "codegen": Host("transformer.h"),
    "bloom": Host("transformer.h"),
    "falcon": Host("transformer.h"),
    "mpt": Host("transformer.blocks", ("ffn",)),
    "opt": Host("model.decoder.layers", ("fc1", "fc2"), positions="model.decoder.embed_positions"),
    "xglm": Host("model.layers", ("fc1", "fc2")),
    "biogpt": Host("biogpt.layers", ("fc1", "fc2"), positions="biogpt.embed_positions"),
}

DOCUMENTS_BY_MASK = ("bloom", "falcon", "mpt", "opt", "xglm", "biogpt")
"""Families that need a mask to stop attention at documents: they do not read the borders off
`position_ids` that restart within a row."""

UNTIE_OF_HOSTS = ("none", "feedforward", "feedforward_every_other", "feedforward_top")
"""Parts of a stock model that can exist once per domain: those inside single layers."""


def find_layers_path(config: object) -> str | None:
    """Find the path of the list of decoder layers; None for a family without a row.

    Args:
        config: configuration of a stock model, or of the project's GPT.
    """
    kind = getattr(config, "host", config.model_type)
    return "model.layers" if kind == "demix" else HOSTS[kind].layers if kind in HOSTS else None
