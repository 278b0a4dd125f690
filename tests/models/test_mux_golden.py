"""Multiplexed models against tensors recorded from the original programs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from megamod.convert.datamux import convert
from megamod.models.mux import bert as mux_bert
from megamod.models.mux import electra as mux_electra
from megamod.models.mux import generator as mux_generator
from megamod.models.mux import roberta as mux_roberta
from megamod.models.mux.types import MixedStates

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "mux"
CASES = sorted(p.name for p in GOLDEN.glob("*")) if GOLDEN.is_dir() else []
CLASSES = {
    name: member
    for module in (mux_bert, mux_electra, mux_generator, mux_roberta)
    for name, member in vars(module).items()
    if isinstance(member, type)
}
WRAPPER = "discriminator."


@pytest.fixture(scope="module", params=CASES or ["none recorded"])
def case(request):
    """Model, configuration and recorded tensors of one case."""
    if not CASES:
        pytest.skip(f"recorded tensors are not at {GOLDEN}")
    folder = GOLDEN / request.param
    converted = convert(folder)
    fields = {k: v for k, v in converted.config.items() if k not in ("architectures", "model_type")}
    config = CONFIG_MAPPING[converted.config["model_type"]](**fields)
    model: PreTrainedModel = CLASSES[converted.config["architectures"][0]](config)
    missing, unexpected = model.load_state_dict(converted.state, strict=False)
    # A masked LM has no use for the demultiplexer of tasks.
    unused = ("demultiplexer.",) if "MaskedLM" in type(model).__name__ else ()
    assert all(key.startswith(unused) for key in unexpected) and (unused or not unexpected)
    tied = set(model.all_tied_weights_keys)
    assert set(missing) <= tied
    model.tie_weights()
    return model.eval(), load_file(folder / "io.safetensors")


def inputs_of(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded inputs, and the instances that the model drew."""
    fed = {k.removeprefix("in."): v for k, v in recorded.items() if k.startswith("in.")}
    fed["retrieved_instances"] = recorded["mid.retrieval_instance_labels"]
    if "out.sampled_input_ids" in recorded:
        fed["random_ids"] = recorded["out.sampled_input_ids"]
    return fed


def test_as_recorded(case):
    model, recorded = case
    fed = inputs_of(recorded)
    before = {name: tensor.clone() for name, tensor in fed.items()}
    output = model(**fed)
    assert all(torch.equal(fed[name], tensor) for name, tensor in before.items())

    logits = recorded.get("out.logits", recorded.get("out.disc_logits"))
    ours = output.logits
    if logits.dim() == 3 and logits.shape[-1] == model.config.vocab_size:
        at = recorded["in.labels"] != -100
        logits, ours = logits[at], ours[at]
    assert ours.shape == logits.shape
    assert (ours - logits).abs().max() <= 1e-5
    for name in ("loss", "task_loss", "retrieval_loss"):
        if f"out.{name}" in recorded:
            assert abs(output[name] - recorded[f"out.{name}"]) <= 1.5e-5, name
    if "out.disc_loss" in recorded:
        assert torch.equal(output.input_ids, recorded["out.sampled_input_ids"])
        assert torch.equal(output.corrupted, recorded["out.corruption_applied"].bool())
        assert abs(output.task_loss - recorded["out.disc_loss"]) <= 1.5e-5

    model.zero_grad()
    model.instance_embedding.requires_grad_()
    model(**fed).loss.backward()
    parameters = dict(model.named_parameters())
    names = [name for name in recorded if name.startswith("grad.")]
    assert names
    for name in names:
        gradient, expected = parameters[ours_of(name)].grad, recorded[name]
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def ours_of(name: str) -> str:
    """Our name of a recorded gradient."""
    return name.removeprefix("grad.").removeprefix(WRAPPER)


def test_without_labels_the_same_logits(case):
    model, recorded = case
    if "out.logits" not in recorded:
        return  # the wrapper is for training alone
    fed = {
        k: v for k, v in inputs_of(recorded).items() if k not in ("labels", "retrieved_instances")
    }
    with torch.no_grad():
        ours = model(**fed).logits
    expected = recorded["out.logits"]
    if expected.dim() == 3 and expected.shape[-1] == model.config.vocab_size:
        at = recorded["in.labels"] != -100
        expected, ours = expected[at], ours[at]
    assert len(ours) == len(expected) > 0
    assert (ours - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_intermediate_states(case):
    model, recorded = case
    fed, seen = inputs_of(recorded), {"embeddings": [], "encoder": []}
    hooks = [
        getattr(model.backbone, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append((inputs[0], output))
        )
        for name in seen
    ]
    output = model(**fed)
    for hook in hooks:
        hook.remove()
    (ids, embedded), (mixed, second) = seen["embeddings"]
    hidden = seen["encoder"][0][1]
    ours = {
        "effective_input_ids": ids,
        "embeddings_out": embedded,
        "muxed": mixed,
        "encoder_embeddings_out": second,
        "encoder_out": hidden,
    }
    if "mid.demuxed" in recorded:
        columns = (
            slice(None) if model.config.prefix_length else slice(recorded["mid.demuxed"].shape[1])
        )
        demuxed = model.demultiplex(MixedStates(hidden), columns).flatten(0, 1)
        is_roberta = model.config.model_type == "mux_roberta"
        ours["demuxed"] = output.logits if is_roberta else demuxed
    if "mid.retrieval_logits" in recorded:
        states = model.compute_vocabulary_states(MixedStates(hidden), None)
        slots = fed["retrieved_instances"][:, None, :, None].expand(-1, 1, -1, states.shape[-1])
        ours["retrieval_logits"] = model.retrieval_head.decoder(states.gather(1, slots)[:, 0])
    for name, value in ours.items():
        expected = recorded[f"mid.{name}"]
        assert value.shape == expected.shape, name
        allowed = 1e-5 * expected.abs().max().clamp(min=1)
        assert (value - expected).abs().max() <= allowed, name
