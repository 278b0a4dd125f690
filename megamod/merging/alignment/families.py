"""Module names of the architectures whose features can be permuted, one table row each.

A new architecture of the same kind (attention, feed-forward, residual stream) is a new row here.
Names are relative to the backbone's prefix, and those inside a layer to the layer.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Head:
    """A layer between the last hidden states and the output: dense, activation, perhaps a norm.

    Attributes:
        name: name of its permutation group.
        dense: module that produces its features.
        norm: module that normalises them; None: no norm.
        readers: modules that read them, of which a model has at most one.
        whole: name prefixes of all tensors of the head, for `merge_keeping_heads`.
    """

    name: str
    dense: str
    norm: str | None
    readers: tuple[str, ...]
    whole: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Module names of an architecture.

    Attributes:
        prefix: prefix of the backbone in models with a head.
        layer: prefix of one layer, with `{}` for its number.
        query, key, value: projections of attention; one name for all three if they are one matrix.
        mixed: projection of attention back to the residual stream.
        widen, narrow: the two linear layers of the feed-forward network.
        gate: linear layer whose output is multiplied with that of `widen`; None: no gate.
        norms: the two norms of a layer, in the order in which they are applied.
        tables: embedding tables.
        outer_norm: norm after the embeddings (post-norm) or after the last layer (pre-norm).
        pre_norm: True if norms come before attention and feed-forward.
        transposed: True if weights are [in, out].
        rms: True if norms do not subtract the mean.
        rotary: True if queries and keys are rotated, which fixes the order of their features. The
            planes are entries (p, p + h / 2) of a head.
        head_norms: True if queries and keys are normalised within heads.
        layers, heads: configuration fields with the numbers of layers and of attention heads.
        key_heads: configuration field with the number of key and value heads; None: as many.
        output_heads: heads that a model may have.
        readers: other modules that read the last hidden states.
        tied: (tensor, tensor that it shares storage with), unless the configuration unties them.
        ties: value of `tie_word_embeddings` if the configuration does not have it.
        free: endings of the names of tensors that no permutation touches.
        residual: True if the residual stream can be permuted.
        required: configuration fields with the only values that these names describe.
    """

    prefix: str
    layer: str
    query: str
    key: str
    value: str
    mixed: str
    widen: str
    narrow: str
    norms: tuple[str, str]
    tables: tuple[str, ...]
    outer_norm: str
    pre_norm: bool = False
    transposed: bool = False
    gate: str | None = None
    rms: bool = False
    rotary: bool = False
    head_norms: bool = False
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    key_heads: str | None = None
    output_heads: tuple[Head, ...] = ()
    readers: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ties: bool = True
    free: tuple[str, ...] = ()
    residual: bool = True
    required: tuple[tuple[str, object], ...] = ()


_TABLES = tuple(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type"))
_ENCODER = dict(
    layer="encoder.layer.{}.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    mixed="attention.output.dense",
    widen="intermediate.dense",
    narrow="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    tables=_TABLES,
    outer_norm="embeddings.LayerNorm",
)
_LLAMA = Family(
    prefix="model.",
    layer="layers.{}.",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    mixed="self_attn.o_proj",
    widen="mlp.up_proj",
    gate="mlp.gate_proj",
    narrow="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    tables=("embed_tokens",),
    outer_norm="norm",
    pre_norm=True,
    rms=True,
    rotary=True,
    key_heads="num_key_value_heads",
    readers=("lm_head", "score", "qa_outputs"),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
    ties=False,
    # Norms within heads and rotary tables are the same for every head, whatever their order.
    free=(
        *("score.bias", "qa_outputs.bias", "rotary_emb.inv_freq"),
        *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ),
)
_TRANSFORM = "cls.predictions.transform"

# By `model_type`.
FAMILIES = {
    "bert": Family(
        prefix="bert.",
        **_ENCODER,
        output_heads=(
            Head(
                "mlm_head",
                f"{_TRANSFORM}.dense",
                f"{_TRANSFORM}.LayerNorm",
                ("cls.predictions.decoder",),
                ("cls.predictions.",),
            ),
            Head(
                "pooler",
                "pooler.dense",
                None,
                ("classifier", "cls.seq_relationship"),
                ("bert.pooler.", "pooler.", "classifier.", "cls.seq_relationship."),
            ),
        ),
        readers=("classifier", "qa_outputs"),
        tied=(
            ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ),
        free=(
            *("cls.predictions.bias", "cls.predictions.decoder.bias", "classifier.bias"),
            *("cls.seq_relationship.bias", "qa_outputs.bias"),
        ),
    ),
    "roberta": Family(
        prefix="roberta.",
        **_ENCODER,
        output_heads=(
            Head("mlm_head", "lm_head.dense", "lm_head.layer_norm", ("lm_head.decoder",), ("lm_",)),
            Head("pooler", "classifier.dense", None, ("classifier.out_proj",), ("classifier.",)),
        ),
        readers=("classifier", "qa_outputs", "pooler.dense"),
        tied=(
            ("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
            ("lm_head.decoder.bias", "lm_head.bias"),
        ),
        free=(
            *("lm_head.bias", "lm_head.decoder.bias", "classifier.bias", "qa_outputs.bias"),
            *("classifier.out_proj.bias", "pooler.dense.bias"),
        ),
    ),
    "gpt2": Family(
        prefix="transformer.",
        layer="h.{}.",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        mixed="attn.c_proj",
        widen="mlp.c_fc",
        narrow="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        tables=("wte", "wpe"),
        outer_norm="ln_f",
        pre_norm=True,
        transposed=True,
        layers="n_layer",
        heads="n_head",
        readers=("lm_head", "score", "classifier", "qa_outputs"),
        tied=(("lm_head.weight", "wte.weight"),),
        # Old checkpoints store the causal mask.
        free=(".attn.bias", ".attn.masked_bias", "classifier.bias", "qa_outputs.bias"),
    ),
    "opt": Family(
        prefix="model.decoder.",
        layer="layers.{}.",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        mixed="self_attn.out_proj",
        widen="fc1",
        narrow="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        tables=("embed_tokens", "embed_positions"),
        outer_norm="final_layer_norm",
        pre_norm=True,
        readers=("lm_head", "score", "qa_outputs"),
        tied=(("lm_head.weight", "embed_tokens.weight"),),
        free=("qa_outputs.bias",),
        required=(
            ("do_layer_norm_before", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
        ),
    ),
    "demix": Family(
        prefix="model.",
        layer="layers.{}.",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        mixed="attention.out_proj",
        widen="feed_forward.fc1",
        narrow="feed_forward.fc2",
        norms=("attention_norm", "feed_forward_norm"),
        tables=("embeddings.tokens", "embeddings.positions"),
        outer_norm="final_norm",
        pre_norm=True,
        readers=("lm_head",),
        tied=(("lm_head.weight", "embeddings.tokens.weight"),),
    ),
    # What follows keys and demultiplexer differs from variant to variant: their features stay.
    "mux_bert": Family(prefix="bert.", **_ENCODER, residual=False),
}
FAMILIES |= dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA)
FAMILIES["qwen3"] = replace(_LLAMA, head_norms=True)
FAMILIES["xlm-roberta"] = FAMILIES["roberta"]
