"""Trainer and pipelines of transformers on every kind of model, as if it were a stock one."""

import warnings

import pytest
import torch
from saved_models import make_model
from tiny_hosts import tiny_stock
from tiny_mux import FIELDS, build_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import CaMtlForMultiTask
from megamod.models.lm.configuration import read_lm_config
from megamod.models.lm.host import make_host_classes
from megamod.states.forest import Expert, edit_forest

ROWS, LENGTH, CLASSES = 5, 7, 3  # five rows are no whole groups of two
GAUSS = "gaussian_hadamard"
NO_RETRIEVAL = {"retrieval_loss_coeff": 0.0, "task_loss_coeff": 1.0}
KINDS = (
    *("dense", "expert", "llama", "ca_mtl", "bert-sequence-index_pos", "bert-mlm-index"),
    *("bert-mlm-index_pos", "electra-token-index_pos", "roberta-sequence-mlp"),
    "electra-discriminator-index_pos",
)


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 23, shape, generator=torch.Generator().manual_seed(seed))


def ca_mtl() -> CaMtlForMultiTask:
    """A sequence, a token and a regression task."""
    sizes = {name: FIELDS[name] for name in FIELDS.keys() & CaMtlConfig.__annotations__.keys()}
    torch.manual_seed(0)
    config = CaMtlConfig(
        **sizes,
        max_seq_length=8,
        classifier_dropout=0.0,
        tasks=["a", "b", "c"],
        task_kinds=["sequence", "token", "regression"],
        task_labels=[["x", "y"], ["O", "B", "I"], []],
    )
    return CaMtlForMultiTask(config)


def model_and_rows(kind: str, folder) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model without dropout, and labelled rows for it."""
    ids = ids_of(ROWS, LENGTH)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("dense", "expert"):
        chosen = {"domain": "code"} if kind == "expert" else {}
        make_model(folder, "feedforward" if chosen else "none")
        model = AutoModelForCausalLM.from_pretrained(folder, **chosen)
        return model, rows | {"labels": ids.clone()}
    if kind == "llama":
        tiny_stock("llama", vocab_size=23).save_pretrained(folder)
        config = read_lm_config(folder)
        fields = {**config.to_dict(), "domains": ["law", "code"], "untie": "feedforward"}
        del fields["model_type"]
        configuration, model = make_host_classes("llama")
        return model(configuration(**fields, domain="code")), rows | {"labels": ids.clone()}
    if kind == "ca_mtl":
        return ca_mtl(), rows | {
            "task_ids": torch.tensor([0, 0, 2, 0, 2]),
            "labels": torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0]),
        }
    family, head, demux = kind.split("-")
    model = build_model(family, head, demux, GAUSS, NO_RETRIEVAL).float()
    labels = torch.randint(CLASSES, (ROWS,)) if head == "sequence" else ids % CLASSES
    if head == "mlm":
        labels = ids.masked_fill(torch.arange(LENGTH) != 2, -100)
    if head == "discriminator":
        labels = ids % 2
    return model, rows | {"labels": labels}


def trainer_of(model, rows, folder, **more) -> Trainer:
    settings = dict(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    arguments = TrainingArguments(str(folder), **settings | more)
    data = [{name: field[row] for name, field in rows.items()} for row in range(ROWS)]
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("kind", KINDS)
def test_train_evaluate_and_predict(kind, tmp_path):
    model, rows = model_and_rows(kind, tmp_path / "model")
    trainer = trainer_of(model, rows, tmp_path / "out", average_tokens_across_devices=False)
    assert trainer.label_names == ["labels"]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    history = trainer.train()
    assert history.global_step == 2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    if kind in ("expert", "llama"):
        assert any(".experts.code." in name for name in changed)
        assert not any(".experts.law." in name for name in changed)

    # Batches of three and two rows, as the evaluation has them; Trainer weighs them by rows.
    model.eval()
    parts = [{name: field[:3] for name, field in rows.items()}]
    parts += [{name: field[3:] for name, field in rows.items()}]
    with torch.no_grad():
        outputs = [model(**part) for part in parts]
    expected = sum(len(p["labels"]) * float(o.loss) for p, o in zip(parts, outputs, strict=True))
    predicted = trainer.predict(trainer.eval_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected / ROWS, rel=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(expected / ROWS, rel=1e-5)
    if kind == "ca_mtl":
        a, b, c = predicted.predictions
        assert (a.shape, b.shape, c.shape) == ((3, 2), (0, LENGTH, 3), (2, 1))
        assert torch.allclose(torch.tensor(a), torch.cat([o.logits[0] for o in outputs]))
    else:
        assert predicted.predictions.shape[0] == ROWS
        together = torch.cat([output.logits for output in outputs])
        assert torch.allclose(torch.tensor(predicted.predictions), together, atol=1e-6)


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """The loss of each micro-batch is divided by the tokens of the whole step."""
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model, rows = model_and_rows("dense", tmp_path / "model")
        for row, scored in enumerate((3, 6, 1, 4, 2)):
            rows["labels"][row, 1 + scored :] = -100
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer_of(model, rows, tmp_path / "out", max_steps=1, optim="sgd", **sizes).train()
        weights.append([p.detach().clone() for p in model.parameters()])
    for whole, accumulated in zip(*weights, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-4, atol=1e-6)


def test_labels_of_tokens_and_of_rows_of_many_tasks():
    model, ids = ca_mtl().eval(), ids_of(4, LENGTH)
    of_tokens = ids % 3
    alone = model(ids, task_ids=torch.ones(4).long(), labels=of_tokens)
    apart = model(ids, task_ids=torch.ones(4).long(), token_labels=of_tokens)
    assert torch.equal(alone.loss, apart.loss)
    expected = functional.cross_entropy(alone.logits[1].flatten(0, 1), of_tokens.flatten())
    torch.testing.assert_close(alone.loss, expected)
    with pytest.raises(ValueError, match="task_ids is missing; it numbers the tasks a, b, c"):
        model(ids)


def test_arguments_that_no_model_has_are_refused():
    for model in (ca_mtl(), build_model("bert", "sequence", "index_pos", GAUSS, {})):
        arguments = {"input_ids": ids_of(2, LENGTH)}
        if model.config.model_type == "ca_mtl":
            arguments["task_ids"] = torch.zeros(2).long()
        model(**arguments, inputs_embeds=None, output_attentions=False, use_cache=True)
        with pytest.raises(ValueError, match="forward does not support output_attentions=True"):
            model(**arguments, output_attentions=True)
        with pytest.raises(ValueError, match=r"not support inputs_embeds of shape \(2, 3, 4\)"):
            model(**arguments, inputs_embeds=torch.zeros(2, 3, 4))
        arguments.pop("input_ids")
        with pytest.raises(ValueError, match=r"not support inputs_embeds of shape \(2, 3, 4\)"):
            model(**arguments, inputs_embeds=torch.zeros(2, 3, 4))
        with pytest.raises(ValueError, match="needs input_ids"):
            model(**arguments)


def tokenizer_of(words: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    """Words divided by blanks; with a cls and sep token around them if these are named."""
    plain = Tokenizer(WordLevel(words, unk_token=special["unk_token"]))
    plain.pre_tokenizer = WhitespaceSplit()
    if "cls_token" in special:
        ends = [(name, words[name]) for name in (special["cls_token"], special["sep_token"])]
        template = "{} $A {}".format(*(name for name, _ in ends))
        plain.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


WORDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 23)}
GPT = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("kind", ["dense", "expert", "forest"])
def test_text_generation_by_path(kind, tmp_path):
    untie = "feedforward" if kind == "expert" else "none"
    folder = make_model(tmp_path / "model", untie, max_position_embeddings=16)
    tokenizer = tokenizer_of(WORDS, **GPT)
    tokenizer.save_pretrained(folder)
    chosen = {"domain": "law"} if kind == "expert" else {}
    if kind == "forest":
        with edit_forest(tmp_path / "forest") as experts:
            experts.append(Expert(domain="law", path=folder))
        folder = tmp_path / "forest"
    write = pipeline("text-generation", str(folder), model_kwargs=chosen, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, **chosen)
    texts = ["w4 w9", "w5 w8 w10 w11 w7", "w6"]
    answers = write(texts, batch_size=2, max_new_tokens=4, do_sample=False)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=4, do_sample=False)
        words = tokenizer.decode(alone[0], skip_special_tokens=True).split()
        assert answer["generated_text"].replace("w", " w").split() == words
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        longest = write("w4 w9", min_new_tokens=300, max_new_tokens=300, return_tensors=True)
    assert len(longest[0]["generated_token_ids"]) == 16  # the last position


BERT = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 38, "[CLS]": 39, "[SEP]": 2}
BERT |= {f"w{n}": n for n in range(3, 36)}
NAMES = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "MASK", "CLS", "SEP")}


@pytest.mark.parametrize("demux", ["index_pos", "index"])
def test_encoder_pipelines_by_path(demux, tmp_path):
    """Three texts, two instances, batches of two: the last group is filled up."""
    tokenizer = tokenizer_of(BERT, **NAMES)
    texts = ["w3 w4", "w5 w6 w7", "w8"]
    fields = NO_RETRIEVAL | {"num_instances": 2, "max_position_embeddings": 24}

    def run(task: str, head: str, inputs: list[str], **more: object):
        folder = tmp_path / head
        build_model("bert", head, demux, GAUSS, fields).float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        call = pipeline(task, str(folder), device="cpu")
        return call.model, call(inputs, batch_size=2, **more)

    model, answers = run("text-classification", "sequence", texts, top_k=None)
    batches = [tokenizer(texts[:2], padding=True, return_tensors="pt")]
    batches.append(tokenizer(texts[2:], return_tensors="pt"))
    with torch.no_grad():
        scores = torch.cat([model(**batch).logits for batch in batches]).softmax(-1)
    for answer, row in zip(answers, scores, strict=True):
        answered = {entry["label"]: entry["score"] for entry in answer}
        assert list(map(answered.get, model.config.id2label.values())) == pytest.approx(
            row.tolist()
        )

    model, answers = run("token-classification", "token", texts)
    with torch.no_grad():
        logits = [row for batch in batches for row in model(**batch).logits]
    for answer, row, text in zip(answers, logits, texts, strict=True):
        best = row.softmax(-1).max(-1)
        assert [entry["word"] for entry in answer] == text.split()
        places = [entry["index"] for entry in answer]
        assert [entry["score"] for entry in answer] == pytest.approx(best.values[places].tolist())

    masked = ["w3 [MASK] w5", "w6 [MASK]", "[MASK] w4 w5 w6"]
    model, answers = run("fill-mask", "mlm", masked, top_k=1)
    batches = [tokenizer(masked[:2], padding=True, return_tensors="pt")]
    batches.append(tokenizer(masked[2:], return_tensors="pt"))
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        for row, ids in zip(logits, batch["input_ids"], strict=True):
            (best,) = answers.pop(0)
            score, token = row[ids == 38].softmax(-1)[0].max(0)
            assert (best["token"], best["score"]) == (int(token), pytest.approx(float(score)))
