"""Every multiplexed model against a naive one, in float64: outputs and all gradients."""

import pytest
import torch
from mux_oracle_heads import classifier, discriminator, masked_lm, replaced_tokens
from tiny_mux import batch, build_model
from torch import Tensor
from torch.nn import functional as F

GAUSS, BINARY, ORTHO, LOW = (
    "gaussian_hadamard",
    "binary_hadamard",
    "random_ortho",
    "random_ortho_low_rank",
)
V1, V2 = "gaussian_attention", "gaussian_attention_v2"
SHORT = {"gen": "generator", "extra": "generator_config", "D": "embedding_size"}
SHORT |= {"L": "num_hidden_demux_layers", "N": "num_instances", "kept": "retrieval_loss_coeff"}
SHORT |= {"labels": "num_labels", "segments": "use_token_type_ids"}
# family head demultiplexer multiplexer, fields; "rows", "plain" (no mask, types) are of the batch
CASES = [
    ("bert", "mlm", "index_pos", GAUSS, dict(L=2, N=2)),
    ("bert", "mlm", "index_pos", BINARY, dict(L=3, N=3)),
    ("bert", "mlm", "index_pos", ORTHO, dict(L=4, N=2, kept=0.0)),
    ("bert", "mlm", "index_pos", LOW, dict(L=3, N=1)),
    ("bert", "mlm", "index_pos", V2, dict(L=2, N=3)),
    ("bert", "mlm", "index", GAUSS, dict(L=3, N=2)),
    ("bert", "mlm", "index", V2, dict(N=2)),
    ("bert", "mlm", "index", BINARY, dict(N=1, kept=0.0)),
    ("bert", "sequence", "index_pos", GAUSS, dict(L=2, N=2, rows=5)),
    ("bert", "sequence", "index_pos", BINARY, dict(L=4, N=3, labels=1)),
    ("bert", "sequence", "index_pos", ORTHO, dict(L=3, N=1, kept=0.0)),
    ("bert", "sequence", "index_pos", LOW, dict(L=3, N=3)),
    ("bert", "sequence", "index_pos", V2, dict(L=2, N=3)),
    ("bert", "sequence", "index_pos", V2, dict(L=3, N=2, plain=True)),
    ("bert", "sequence", "index", GAUSS, dict(N=2)),
    ("bert", "sequence", "index", LOW, dict(N=3, rows=4, kept=0.0)),
    ("bert", "token", "index_pos", GAUSS, dict(L=4, N=3)),
    ("bert", "token", "index_pos", V2, dict(L=2, N=2, rows=3)),
    ("bert", "token", "index_pos", ORTHO, dict(L=3, N=2, kept=0.0)),
    ("bert", "token", "index", GAUSS, dict(N=3, rows=5)),
    ("bert", "token", "index", BINARY, dict(N=2, plain=True)),
    ("electra", "mlm", "index_pos", GAUSS, dict(L=3, N=2, D=8)),
    ("electra", "mlm", "index", ORTHO, dict(N=2)),
    ("electra", "discriminator", "index_pos", GAUSS, dict(L=2, N=2, D=8)),
    ("electra", "discriminator", "index_pos", V1, dict(L=3, N=3)),
    ("electra", "discriminator", "index_pos", LOW, dict(L=4, N=2, kept=0.0)),
    ("electra", "discriminator", "index_pos", ORTHO, dict(L=3, N=1, plain=True)),
    ("electra", "discriminator", "index", BINARY, dict(N=2, D=8)),
    ("electra", "discriminator", "index", V1, dict(N=2)),
    ("electra", "sequence", "index_pos", GAUSS, dict(L=3, N=3, rows=4, D=8)),
    ("electra", "sequence", "index_pos", ORTHO, dict(L=2, N=2)),
    ("electra", "sequence", "index", GAUSS, dict(N=2, labels=1)),
    ("electra", "token", "index_pos", BINARY, dict(L=4, N=2)),
    ("electra", "token", "index", LOW, dict(N=3, rows=4)),
    ("electra", "wrapper", "index_pos", GAUSS, dict(L=3, N=2)),
    ("electra", "wrapper", "index_pos", GAUSS, dict(L=3, N=2, gen="plain", D=8)),
    ("electra", "wrapper", "index", GAUSS, dict(N=2, gen="plain", extra={"embedding_size": 8})),
    ("electra", "wrapper", "index_pos", BINARY, dict(L=3, N=2, gen="multiplexed")),
    (
        *("electra", "wrapper", "index", ORTHO),
        dict(N=2, gen="multiplexed", extra={"num_hidden_layers": 1, "intermediate_size": 8}),
    ),
    (
        *("electra", "wrapper", "index_pos", GAUSS),
        dict(N=3, gen="multiplexed", extra={"embedding_size": 8, "hidden_size": 8}, kept=0.0),
    ),
    (
        *("electra", "wrapper", "index_pos", V1),
        dict(L=2, N=2, gen="plain", extra={"tie_word_embeddings": False}),
    ),
    ("roberta", "sequence", "index", GAUSS, dict(N=2, rows=3)),
    ("roberta", "sequence", "index", ORTHO, dict(N=3, plain=True)),
    ("roberta", "sequence", "mlp", ORTHO, dict(N=3)),
    ("roberta", "sequence", "mlp", BINARY, dict(N=2, rows=3, labels=1)),
    ("roberta", "token", "index", BINARY, dict(N=3)),
    ("roberta", "token", "mlp", GAUSS, dict(N=2, rows=5)),
    ("roberta", "token", "mlp", GAUSS, dict(N=2, rows=3, plain=True)),
    ("roberta", "token", "mlp", GAUSS, dict(N=1, kept=0.0)),
]


def name_of(case: tuple) -> str:
    *words, fields = case
    return "-".join(
        (*words, *(f"{k}{v if not isinstance(v, dict) else ''}" for k, v in fields.items()))
    )


def naive(head: str, model, weights: dict[str, Tensor], inputs: dict, replaced: Tensor) -> dict:
    fields = model.config.to_dict() | {"num_labels": model.config.num_labels}
    if head == "wrapper":
        generator = (
            model.config.make_generator_config().to_dict() if fields["generator"] != "none" else {}
        )
        return replaced_tokens(weights, inputs, fields, generator, replaced)
    if head == "mlm":
        return masked_lm(weights, inputs, fields)
    if head == "discriminator":
        return discriminator(weights, inputs, fields)
    return classifier(weights, head, inputs, fields)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_as_the_naive_model(case):
    family, head, demux, mux, fields = case
    fields = dict(fields)
    rows, plain = fields.pop("rows", None), fields.pop("plain", False)
    fields = {SHORT.get(name, name): value for name, value in fields.items()}
    model = build_model(family, head, demux, mux, fields).eval()
    inputs = batch(head, model.config, rows or 2 * model.config.num_instances, plain)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    torch.manual_seed(5)  # what a generator draws
    output = model(**inputs)
    output.loss.backward()
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())

    weights = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    expected = naive(head, model, weights, inputs, output.get("input_ids"))
    prefix = model.config.prefix_length
    if head == "mlm" and prefix:  # columns are those of the input, the last of them dropped
        expected["logits"] = F.pad(expected["logits"][:, prefix:], (0, 0, 0, prefix))
    assert output.logits.shape == expected["logits"].shape
    assert (output.logits - expected["logits"]).abs().max() <= 1e-10
    for name, value in expected.items():
        if name != "logits" and value is not None:
            assert abs(output[name] - value) <= 2e-6 * max(1, abs(value)), name
    assert (output.retrieval_loss is None) == (model.config.retrieval_loss_coeff == 0)
    expected["loss"].backward()
    compare_gradients(model, weights)

    model.zero_grad()
    model.train()  # losses without logits, and of real tokens only
    torch.manual_seed(5)
    again = model(**inputs).loss
    assert abs(again - expected["loss"]) <= 2e-6 * max(1, abs(expected["loss"]))
    again.backward()
    compare_gradients(model, weights)


def compare_gradients(model, weights: dict[str, Tensor]) -> None:
    """All of them, to 1e-5 of the largest entry."""
    largest = max(w.grad.abs().max() for w in weights.values() if w.grad is not None)
    for name, parameter in model.named_parameters():
        zero = torch.zeros(())
        gradient = zero if parameter.grad is None else parameter.grad
        expected = zero if weights[name].grad is None else weights[name].grad
        allowed = 1e-5 * expected.abs().max() + 1e-10 * largest
        assert (gradient - expected).abs().max() <= allowed, name
