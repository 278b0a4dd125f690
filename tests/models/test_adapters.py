"""LoRA by PEFT on every family, and fine-tuning by TRL, against what they do to stock models."""

import importlib.util

import pytest
import torch
from saved_models import make_model
from tiny_mux import FIELDS, build_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import CaMtlForMultiTask

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason='needs pip install "megamod[dev]"'
)
GAUSS = "gaussian_hadamard"
FAMILIES = (
    *("dense", "expert", "ca_mtl-base", "ca_mtl-plain", "bert-sequence-index_pos"),
    *("bert-token-index", "bert-mlm-index_pos", "electra-token-index_pos"),
    *("electra-mlm-index", "roberta-sequence-mlp", "roberta-token-index"),
)


def model_and_batch(family: str, folder) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model without dropout, and a labelled batch."""
    ids = torch.randint(4, 23, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("dense", "expert"):
        chosen = {"domain": "law"} if family == "expert" else {}
        make_model(folder, "feedforward" if chosen else "none")
        model = AutoModelForCausalLM.from_pretrained(folder, **chosen)
        return model, batch | {"labels": ids}
    if family.startswith("ca_mtl"):
        sizes = {name: FIELDS[name] for name in FIELDS.keys() & CaMtlConfig.__annotations__.keys()}
        config = CaMtlConfig(
            **sizes,
            variant=family.split("-")[1],
            max_seq_length=8,
            classifier_dropout=0.0,
            tasks=["a", "b"],
            task_kinds=["sequence", "sequence"],
            task_labels=[["x", "y"], ["x", "y", "z"]],
        )
        torch.manual_seed(0)
        fields = {"task_ids": torch.tensor([0, 1, 1, 0]), "labels": torch.tensor([1, 2, 0, 0])}
        return CaMtlForMultiTask(config), batch | fields
    kind, head, demux = family.split("-")
    fields = {"retrieval_loss_coeff": 0.0, "task_loss_coeff": 1.0}
    model = build_model(kind, head, demux, GAUSS, fields).float()
    return model, batch | {"labels": ids[:, 0] % 3 if head == "sequence" else ids % 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_every_linear_layer(family, tmp_path):
    """Every layer that the pass uses takes part: its factors get a gradient."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, batch = model_and_batch(family, tmp_path / "model")
    expected = model.eval()(**batch)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, lora_alpha=8))
    same = adapted.eval()(**batch)  # B is zero at first
    torch.testing.assert_close(same.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert any(parameter.requires_grad for parameter in adapted.parameters())

    factors = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_(0, 0.3)
    changed = adapted(**batch)
    adapted.zero_grad()
    changed.loss.backward()
    for name, factor in factors.items():
        # Idle experts, and layers that the release has without using them, take no part.
        idle = ".experts.code." in name or ".experts.art." in name or "demux_module.dense_3" in name
        assert idle or (factor.grad is not None and factor.grad.any()), name

    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    fresh, _ = model_and_batch(family, tmp_path / "model")
    loaded = PeftModel.from_pretrained(fresh, folder).eval()(**batch)
    torch.testing.assert_close(loaded.loss, changed.loss, rtol=1e-5, atol=1e-6)
    # Merging W + B A into the weights is the same model, so no path reads the weights alone.
    merged = adapted.merge_and_unload().eval()(**batch)
    torch.testing.assert_close(merged.loss, changed.loss, rtol=1e-4, atol=1e-5)


def test_lora_with_checkpointing_and_generation(tmp_path):
    from peft import LoraConfig, get_peft_model

    gradients = []
    for checkpointing in (False, True):
        model, batch = model_and_batch("dense", tmp_path / "model")
        config = LoraConfig(target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        adapted = get_peft_model(model, config).train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
        adapted(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    written = adapted.eval().generate(input_ids=batch["input_ids"][:1, :3], max_new_tokens=2)
    assert written.shape[1] <= 5


def test_a_trained_prompt_uses_embeddings_as_input(tmp_path):
    """Prompt tuning passes `inputs_embeds`; rows of the table are then the tokens themselves."""
    from peft import PromptTuningConfig, get_peft_model

    model, batch = model_and_batch("dense", tmp_path / "model")
    ids = batch["input_ids"]
    rows = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=rows).logits, model(ids).logits)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=rows)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    adapted = get_peft_model(model, config)
    adapted(**batch).loss.backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 23)}
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=plain, **named)


@needs_trl
@pytest.mark.parametrize("family", ["dense", "expert"])
def test_supervised_fine_tuning(family, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, _ = model_and_batch(family, tmp_path / "model")
    rows = torch.randint(4, 23, (5, 6), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=5,
        max_length=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=word_tokenizer()
    )
    assert trainer.train().global_step == 2
    ids = torch.tensor(rows)
    with torch.no_grad():
        expected = float(model.eval()(ids, labels=ids).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
