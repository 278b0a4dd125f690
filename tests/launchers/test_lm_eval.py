"""The evaluation harness's `hf` backend on our models, offline, against scores by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models.tiny_hosts import tiny_stock
from saved_models import VOCAB, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from megamod.errors import UserError
from megamod.lm_eval import main
from megamod.states.forest import Expert, edit_forest

REPOSITORY = Path(__file__).resolve().parents[2]
CHOICES = [("w4 w9 w7", ["w5 w6", "w8"], 0), ("w11", ["w12", "w4 w4", "w20"], 2)]
TEXTS = ["w4 w5 w6 w22 w21", "w9 w8 w9 w8 w9 w8 w10"]
BOS = 0
TASKS = ("tiny_choice", "tiny_rolling", "tiny_write")

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='needs pip install "megamod[eval]"'
)


def write_tasks(folder: Path) -> Path:
    """One task of each kind of request: choices, rolling likelihood, generation."""
    folder.mkdir()
    rows = [dict(text=text) for text in TEXTS]
    choices = [dict(text=text, options=options, best=best) for text, options, best in CHOICES]
    for name, lines in (("texts", rows), ("choices", choices)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}"}
    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "best",
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "tiny_write": {
            "output_type": "generate_until",
            "doc_to_target": "w4",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, fields in tasks.items():
        data = folder / ("choices.jsonl" if name == "tiny_choice" else "texts.jsonl")
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        text = yaml.safe_dump({"task": name} | shared | files | fields)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def write_tokenizer(folder: Path) -> None:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, VOCAB)}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **named).save_pretrained(folder)


@torch.no_grad()
def log_prob(model: PreTrainedModel, context: list[int], tokens: list[int]) -> float:
    """Of the tokens after the context, by the logits of one unpadded sequence."""
    log_probs = model(torch.tensor([context + tokens])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(tokens) - 1)
    return sum(float(log_probs[at, token]) for at, token in zip(places, tokens, strict=True))


def check(folder: Path, samples: dict[str, list[dict]], **chosen: str) -> None:
    """Compare what the harness was answered with the model, one unpadded sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, **chosen)
    encode = PreTrainedTokenizerFast.from_pretrained(folder).encode
    answers = {
        name: [
            [answer[0] for answer in line["resps"]]
            for line in sorted(lines, key=lambda line: line["doc_id"])
        ]
        for name, lines in samples.items()
    }
    for (text, options, _), got in zip(CHOICES, answers["tiny_choice"], strict=True):
        expected = [log_prob(model, encode(text), encode(option)) for option in options]
        assert [float(pair[0]) for pair in got] == pytest.approx(expected, abs=1e-4)
    for text, rolling, written in zip(
        TEXTS, answers["tiny_rolling"], answers["tiny_write"], strict=True
    ):
        scored = rolling[0][0] if isinstance(rolling[0], list | tuple) else rolling[0]
        assert float(scored) == pytest.approx(log_prob(model, [BOS], encode(text)), abs=1e-4)
        ids = torch.tensor([encode(text)])
        expected = model.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
        words = [f"w{token}" for token in expected.tolist() if token > 3]
        assert written[0].split() == words


@needs_harness
def test_the_command_on_the_folder_of_a_forest(tmp_path):
    with edit_forest(tmp_path) as experts:
        for name in ("law", "sql"):
            experts.append(
                Expert(domain=name, path=make_model(tmp_path / name, max_position_embeddings=32))
            )
    write_tokenizer(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "megamod.lm_eval", "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path}", "--device", "cpu", "--batch_size", "2"]
    command += ["--include_path", str(write_tasks(tmp_path / "tasks")), "--tasks", *TASKS]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for name in TASKS:
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = list(map(json.loads, file.open()))
    check(tmp_path, samples)


@needs_harness
def test_dense_models_experts_and_forests_through_the_library(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folders = {
        "dense": make_model(tmp_path / "dense", max_position_embeddings=32),
        "demix": make_model(tmp_path / "demix", "feedforward", max_position_embeddings=32),
        "forest": tmp_path / "forest",
        "stock": tmp_path / "stock",
    }
    ids = dict(vocab_size=VOCAB, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    tiny_stock("llama", **ids).save_pretrained(folders["stock"])
    with edit_forest(folders["forest"]) as experts:
        experts.append(Expert(domain="law", path=folders["demix"], member="law"))
        experts.append(Expert(domain="sql", path=folders["dense"]))
    tasks = TaskManager(include_path=str(write_tasks(tmp_path / "tasks")), include_defaults=False)
    for kind, chosen in (
        ("dense", {}),
        ("stock", {}),
        ("demix", {"domain": "law"}),
        ("forest", {"domain": "law"}),
    ):
        write_tokenizer(folders[kind])
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folders[kind])} | chosen,
            tasks=list(TASKS),
            task_manager=tasks,
            device="cpu",
            batch_size=2,
            bootstrap_iters=0,
        )
        check(folders[kind], results["samples"], **chosen)
        if kind == "forest":  # the expert alone, not the mixture
            check(folders["demix"], results["samples"], **chosen)


@needs_harness
def test_the_expert_of_a_demix_model_must_be_named(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "demix", "feedforward", max_position_embeddings=32)
    words = ["lm_eval", "run", "--model", "hf", "--tasks", "tiny_write", "--model_args"]
    others = ["--include_path", str(write_tasks(tmp_path / "tasks")), "--device", "cpu"]
    for arguments, sentence in (
        ([f"pretrained={folder}"], "add domain=NAME, NAME one of law, code, art"),
        ([f"pretrained={folder},dtype=float32"], "add domain=NAME, NAME one of law, code, art"),
        ([f"pretrained={folder},domain=news"], "domain=news; add domain=NAME, NAME one of law"),
        ([f"pretrained={folder}", "domain=news"], "domain=news; add domain=NAME, NAME one of law"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *arguments, *others])
        with pytest.raises(UserError) as error:
            main()
        assert sentence in str(error.value) and "\n" not in str(error.value)
    (folder / "config.json").write_text('{"model_type": "mux_bert"}')
    with pytest.raises(UserError, match="is a mux_bert, an encoder; the harness needs a causal"):
        main()


def test_without_the_harness_one_line_says_what_to_install():
    program = (
        "import sys, runpy\nsys.modules['lm_eval'] = None\n"
        "runpy.run_module('megamod.lm_eval', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "megamod[eval]"' in done.stderr and "Traceback" not in done.stderr
