"""Tiny multiplexed models of every class, and batches for them."""

import torch
from torch import Tensor

from megamod.models.mux import bert as mux_bert
from megamod.models.mux import electra as mux_electra
from megamod.models.mux import generator as mux_generator
from megamod.models.mux import roberta as mux_roberta
from megamod.models.mux.configuration import MuxConfig
from megamod.models.mux.model import MuxPreTrainedModel

FIELDS = dict(
    vocab_size=41,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
    retrieval_loss_coeff=0.25,
    task_loss_coeff=0.75,
    cls_token_id=39,
    mask_token_id=38,
    prefix_fill_token_id=37,
    prefix_first_token_id=36,
)
LENGTH = 7
FAMILIES = {
    "bert": (mux_bert.MuxBertConfig, mux_bert, "MuxBertFor"),
    "electra": (mux_electra.MuxElectraConfig, mux_electra, "MuxElectraFor"),
    "roberta": (mux_roberta.MuxRobertaConfig, mux_roberta, "MuxRobertaFor"),
}
HEADS = {
    "mlm": "MaskedLM",
    "sequence": "SequenceClassification",
    "token": "TokenClassification",
    "discriminator": "PreTraining",
    "wrapper": "ReplacedTokens",
}


def build_model(
    family: str, head: str, demux: str, mux: str, fields: dict[str, object]
) -> MuxPreTrainedModel:
    """A model of which no weight has a special value, in float64."""
    config, module, prefix = FAMILIES[family]
    if family == "electra":
        fields = {"embedding_size": FIELDS["hidden_size"]} | fields
    if family == "electra" and head in ("mlm", "wrapper"):
        module = mux_generator
    config = config(**FIELDS | dict(demuxing_variant=demux, muxing_variant=mux) | fields)
    torch.manual_seed(0)
    model = getattr(module, prefix + HEADS[head])(config).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data = (1.0 if is_norm else 0.0) + 0.3 * drawn
        parameter.requires_grad_()
    model.tie_weights()
    return model


def batch(head: str, config: MuxConfig, rows: int, plain: bool) -> dict[str, Tensor]:
    """Ragged rows, padding in them, and slots to retrieve."""
    generator = torch.Generator().manual_seed(2)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    N, prefix, pad = config.num_instances, config.prefix_length, config.pad_token_id
    groups, pretraining = -(-rows // N), head in ("mlm", "discriminator", "wrapper")
    length = LENGTH if not pretraining or not prefix else LENGTH + prefix
    ids = draw(config.vocab_size - 8, rows, length) + 2
    lengths = draw(length - 2, rows) + 3
    mask = (torch.arange(length) < lengths[:, None]).long()
    mask[:N, -1] = 0  # one position is padding in all instances
    ids[mask == 0] = pad
    total = length if pretraining else length + prefix
    inputs = {"input_ids": ids}
    if not plain:
        inputs["attention_mask"] = mask
        inputs["token_type_ids"] = draw(config.type_vocab_size, rows, length)
        of_tokens = pretraining or config.model_type == "mux_roberta"
        inputs["position_ids"] = draw(config.max_position_embeddings, rows, total)
        if not of_tokens:
            inputs["position_ids"] = inputs["position_ids"][:groups]
    inputs["labels"] = draw(config.num_labels, rows)
    if head == "sequence" and config.num_labels == 1:
        inputs["labels"] = torch.randn(rows, generator=generator, dtype=torch.double)
    if head == "token":
        inputs["labels"] = draw(config.num_labels, rows, length)
        inputs["labels"][draw(3, rows, length) == 0] = -100
    if head == "discriminator":
        inputs["labels"] = draw(2, rows, length)
    if head in ("mlm", "wrapper"):
        chosen = (draw(3, rows, length) == 0) & (mask == 1)
        inputs["labels"] = ids.masked_fill(~chosen, -100)
        keep = draw(4, rows, length) == 0
        ids[chosen & ~keep] = config.mask_token_id
    inputs["retrieved_instances"] = draw(N, groups, total)
    if head == "wrapper":
        inputs["generator_retrieved_instances"] = draw(N, groups, total)
    return inputs
