"""Mixture-of-experts classes of transformers, and the dense families they hold experts of.

Data only. `megamod/merging/moe` turns dense models into a mixture by these tables, and
`tests/merging/test_moe.py` compares every row with the stock classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""Tensors of the feed-forward of a stock dense model, at `FEED_FORWARD` of each layer."""
FEED_FORWARD = "mlp"
LAYERS = "model.layers"


@dataclass(frozen=True)
class MoeFamily:
    """Names and fields of a class whose layers equal those of a dense family, feed-forward aside.

    Attributes:
        architecture: name of the class.
        block: path of the sparse block in a layer, in weight files; `module`: in memory.
        router: path of the router in the block, in memory; `row_name`: name of its weight [E, D],
            in files.
        tensors: name in the block -> parts of the dense feed-forward, in files. A name with `{e}`
            is one tensor per expert; the others have all experts along a first axis, parts along
            the rows.
        zeros: name in a layer -> shape of tensors that are zero, E experts and D features.
        count, experts_per_token, width: configuration fields of E, of the experts that a router
            selects for a token, and of the width F of an expert.
        constants: further fields that make the class equal to the dense one.
        always_norms: the class divides the weights of a token's experts by their sum whatever the
            configuration says, so that one expert per token gives the router no gradient.
        float_router: the class keeps its router in float32.
        outputs: positions of logits, weights and experts in what the router returns.
        feed_forward: path of the feed-forward in a layer of the dense models; `parts`: its tensors,
            the first of shape [F, D].
    """

    architecture: str
    block: str = "mlp"
    module: str = "mlp"
    router: str = "gate"
    row_name: str = "gate.weight"
    tensors: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {f"experts.{{e}}.{part}": (part,) for part in PARTS}
    )
    zeros: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    count: str = "num_experts"
    experts_per_token: str = "num_experts_per_tok"
    width: str = "intermediate_size"
    constants: Mapping[str, object] = field(default_factory=dict)
    always_norms: bool = False
    float_router: bool = False
    outputs: tuple[int, int, int] = (0, 1, 2)
    feed_forward: str = "mlp"
    parts: tuple[str, ...] = PARTS


_GATE, _UP, _DOWN = PARTS
_GPT_PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
_SPARSE_EVERYWHERE = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

MOE_FAMILIES: dict[str, MoeFamily] = {
    "mixtral": MoeFamily(
        "MixtralForCausalLM",
        block="block_sparse_moe",
        tensors={
            "experts.{e}.w1.weight": (_GATE,),
            "experts.{e}.w3.weight": (_UP,),
            "experts.{e}.w2.weight": (_DOWN,),
        },
        count="num_local_experts",
        always_norms=True,
    ),
    "qwen3_moe": MoeFamily(
        "Qwen3MoeForCausalLM", width="moe_intermediate_size", constants=_SPARSE_EVERYWHERE
    ),
    "qwen2_moe": MoeFamily(
        "Qwen2MoeForCausalLM",
        # A shared expert cannot be absent; zeros in its down projection switch it off.
        zeros={
            "mlp.shared_expert.gate_proj.weight": (1, "D"),
            "mlp.shared_expert.up_proj.weight": (1, "D"),
            "mlp.shared_expert.down_proj.weight": ("D", 1),
            "mlp.shared_expert_gate.weight": (1, "D"),
        },
        width="moe_intermediate_size",
        constants=_SPARSE_EVERYWHERE | {"shared_expert_intermediate_size": 1, "qkv_bias": True},
    ),
    "flex_olmo": MoeFamily("FlexOlmoForCausalLM", constants={"norm_topk_prob": True}),
    "granitemoe": MoeFamily(
        "GraniteMoeForCausalLM",
        block="block_sparse_moe",
        module="block_sparse_moe",
        router="router",
        row_name="router.layer.weight",
        tensors={"input_linear.weight": (_GATE, _UP), "output_linear.weight": (_DOWN,)},
        count="num_local_experts",
        always_norms=True,
        outputs=(2, 1, 0),
    ),
    "ernie4_5_moe": MoeFamily(
        "Ernie4_5_MoeForCausalLM",
        zeros={"mlp.moe_statics.e_score_correction_bias": (1, "E")},
        count="moe_num_experts",
        experts_per_token="moe_k",
        width="moe_intermediate_size",
        constants={
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        always_norms=True,
        float_router=True,
    ),
    "cohere2_moe": MoeFamily(
        "Cohere2MoeForCausalLM",
        constants={
            "num_shared_experts": 0,
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "rms_norm_eps": None,
        },
        always_norms=True,
    ),
    # The project's own GPT, whose layers no class of transformers has; loaded with this package.
    "demix_moe": MoeFamily(
        "DemixMoeForCausalLM",
        block="feed_forward",
        module="feed_forward",
        tensors={f"experts.{{e}}.{part}": (part,) for part in _GPT_PARTS},
        constants={"domains": [], "untie": "none", "domain": None},
        always_norms=True,
        feed_forward="feed_forward",
        parts=_GPT_PARTS,
    ),
}
"""Classes by model type."""

MOE_OF_DENSE = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "olmo3": "flex_olmo",
    "granite": "granitemoe",
    "ernie4_5": "ernie4_5_moe",
    "cohere2": "cohere2_moe",
    "demix": "demix_moe",
}
"""Model type of a dense family -> that of the class with the same layers."""

WITHOUT_MOE = {
    "olmo": "OLMoE normalises queries and keys, and its norms have weights, which OLMo has not",
    "smollm3": "every fourth layer has no rotary positions, and Mixtral has them in all",
    "hunyuan_v1_dense": "the shared expert of hunyuan_v1_moe is of full size and cannot be absent",
}
"""Reasons why further families have no such class."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
}
"""Fields of dense configurations with the values that change nothing, where the class lacks them.
`layer_types` must be full attention in all layers."""
WITHOUT_EFFECT = ("max_window_layers", "sliding_window")
"""Fields that have no effect with full attention in all layers."""
