"""Alignments and merges recorded from the program of Verma and Elbayad 2024, tensor by tensor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from megamod.merging.alignment.align import align_models, collect_float_shapes
from megamod.merging.alignment.calibration import CalibrationBatch
from megamod.merging.alignment.measure import measure_covariances
from megamod.merging.alignment.options import AlignmentOptions, Calibration, CompatOptions
from megamod.merging.alignment.permute import (
    compute_reference_state,
    interpolate_states,
    merge_states,
    permute_state,
)
from megamod.merging.alignment.symmetry import find_symmetry

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "merging"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
pytestmark = pytest.mark.skipif(not CASES, reason=f"{GOLDEN} is not there")
GROUPS = {"ff_only": ("ff",), "attn_only": ("attn",), "res_only": ("res",)} | {
    "all": ("ff", "attn", "res")
}
COMPAT = CompatOptions(
    scale=True,
    unmerge=True,
    res_attn_without_embeddings=True,
    pooler_by_tokens=True,
    stacked=True,
)


@pytest.fixture(scope="module")
def common():
    config = json.loads((GOLDEN / "common/config.json").read_text())
    return config, load_file(GOLDEN / "common/inputs.safetensors")


def options_of(case: dict) -> AlignmentOptions:
    kind = case["merge_type"]
    attention = "head_perm" if case["permute_heads"] else "monotonic"
    return AlignmentOptions(
        method="identity" if case["matching"] == "identity" else "activation",
        groups=GROUPS.get(kind) or tuple(kind.split("+")),
        attention="ignore_heads" if case["ignore_heads"] else attention,
        residual="first" if case["res_type"] == "identity" else case["res_type"],
        qk=case["qk"],
        absolute=case["absolute_value"],
        head=case["merge_cls"],
        head_follow_residual=False,
        calibration=Calibration(special_tokens=case["special_toks"]),
        compat=COMPAT,
    )


def models(config: dict, task: str):
    kept = {
        k: v for k, v in config.items() if k not in ("dtype", "tied") and "calibration" not in k
    }
    kind = BertForMaskedLM if task == "mlm" else BertForSequenceClassification
    pair = []
    for which in "ab":
        model = kind(BertConfig(**kept)).eval()
        state = load_file(
            GOLDEN / f"common/{'mlm' if task == 'mlm' else 'cls'}_{which}.safetensors"
        )
        lost = model.load_state_dict(state, strict=False)
        assert not lost.unexpected_keys and all("decoder" in key for key in lost.missing_keys)
        pair.append(model)
    return pair


def batches_of(config: dict, inputs: dict) -> list[CalibrationBatch]:
    size = config["calibration_batch_size"]
    return [
        CalibrationBatch(ids, lengths)
        for ids, lengths in zip(
            inputs["input_ids"].split(size), inputs["lengths"].split(size), strict=True
        )
    ]


@pytest.mark.parametrize("name", CASES)
def test_case(name, common):
    config, inputs = common
    case = json.loads((GOLDEN / name / "config.json").read_text())
    golden = load_file(GOLDEN / name / "golden.safetensors")
    options = options_of(case)
    first, second = models(config, case["task"])
    batches = batches_of(config, inputs)
    alignment = align_models(first, second, batches, options)

    for key, permutation in golden.items():
        if key.startswith("perm."):
            group = key.removeprefix("perm.")
            group = group[:-2] + ".qk" if group.endswith((".k", ".q")) else group
            assert torch.equal(alignment.permutations[group], permutation.long()), key
    if "unmerge_perm" in golden:  # what the original program applies to the embeddings once more
        assert torch.equal(alignment.permutations["res.emb"], golden["unmerge_perm"].long())
    shared = options.residual in ("first", "last") and options.method == "activation"
    for group, cost in case["costs"].items():
        # Places that share a permutation have a cost in the record that is another group's.
        if not (shared and group.startswith("res.") and group != "res.emb"):
            assert alignment.costs[group] == pytest.approx(cost, abs=1e-5), group

    state_a, state_b = first.state_dict(), second.state_dict()
    symmetry = find_symmetry(first.config.to_dict(), collect_float_shapes(state_a), qk=options.qk)
    merged = merge_states(state_a, state_b, symmetry, alignment)
    compared = [key for key in golden if key.startswith("merged.")]
    assert len(compared) > 50
    for key in compared:
        torch.testing.assert_close(
            merged[key.removeprefix("merged.")], golden[key], rtol=0, atol=1e-6, msg=key
        )

    correlations = [key for key in golden if key.startswith("xcorr.")]
    groups = [symmetry.groups[key.removeprefix("xcorr.")] for key in correlations]
    measured = measure_covariances(first, second, groups, (), batches, options)
    for key in correlations:
        count = measured.row_count if key == "xcorr.pooler" else None
        result = (
            measured.covariances[key.removeprefix("xcorr.")]
            .finalise_moments(count)
            .overwrite_cross_by_correlation()
        )
        torch.testing.assert_close(result.float(), golden[key].float(), rtol=0, atol=1e-5)

    for curve, unmerge in (("released", True), ("correct", False)):
        losses = case[f"eval_loss_by_lambda_{curve}_head"]
        if losses is None:
            continue
        compat = COMPAT.model_copy(update={"unmerge": unmerge})
        chosen = replace(alignment, options=options.model_copy(update={"compat": compat}))
        pair = (
            compute_reference_state(state_a, symmetry, chosen),
            permute_state(state_b, symmetry, chosen),
        )
        model = untied_model(first)
        for weight in (0.0, 0.35, 1.0):
            mixed = interpolate_states(*pair, weight)
            model.load_state_dict(mixed)
            at = case["lambda_grid"].index(weight)
            assert float(loss(model, inputs)) == pytest.approx(losses[at], abs=1e-4), (
                curve,
                weight,
            )


def untied_model(like):
    config = BertConfig(**(like.config.to_dict() | {"tie_word_embeddings": False}))
    return BertForMaskedLM(config).eval()


@torch.no_grad()
def loss(model, inputs):
    return model(
        input_ids=inputs["eval_input_ids"],
        attention_mask=inputs["eval_attention_mask"],
        labels=inputs["eval_labels"],
    ).loss
