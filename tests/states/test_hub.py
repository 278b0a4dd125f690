"""Models of the hub by name: from its cache, to it by `push_to_hub`; no network is asked."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from launch import launch
from saved_models import DOMAINS, make_data, make_model
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

from megamod.errors import UserError
from megamod.states.hub import download_from_hub, find_or_download_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Function that puts a folder into the cache of the hub under a name; nothing is online."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def store(name: str, model: Path) -> None:
        repository = folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)

    yield store
    download_from_hub.cache_clear()


def test_a_name_is_found_in_the_cache(cache, tmp_path, capsys):
    model, data = make_model(tmp_path / "model", "feedforward"), make_data(tmp_path / "data")
    cache("org/name", model)
    assert (find_or_download_folder("org/name", "--model") / "config.json").is_file()
    assert find_or_download_folder(str(model), "--model") == model  # a path counts before a name
    results = []
    for name in (model, "org/name"):
        output = tmp_path / "scores.json"
        launch("eval_lm", "--model", name, "--data", data, "--output", output)
        results.append(json.loads(output.read_text())["models"])
    ours, theirs = (str(list(models.values())).replace(str(model), "") for models in results)
    assert ours == theirs and DOMAINS[0] in capsys.readouterr().out


def test_a_tokenizer_is_found_in_the_cache(cache, tmp_path):
    """Its files are asked for once, not one by one, which is slow where the hub does not answer."""
    text = tmp_path / "law.txt"
    text.write_text("\n\n".join(f"the court of case {case}" for case in range(300)))
    headers = {}
    for name, tokenizer in (
        ("trained", "wordpiece:120"),
        ("read", tmp_path / "trained" / "tokenizer"),
        ("cached", "org/name"),
    ):
        words = ("--input", f"law={text}", "--tokenizer", tokenizer)
        launch("preprocess", *words, "--output_dir", tmp_path / name)
        headers[name] = json.loads((tmp_path / name / "databin.json").read_text())
        if name == "trained":
            cache("org/name", tmp_path / "trained" / "tokenizer")
    for key in ("tokenizer", "domains"):
        assert headers["cached"][key] == headers["read"][key]
    with pytest.raises(UserError, match=r"--tokenizer org/absent: .* `hf download org/absent`"):
        words = ("--input", f"law={text}", "--tokenizer", "org/absent")
        launch("preprocess", *words, "--output_dir", tmp_path / "absent")


def test_without_a_network_the_message_says_how_to_fetch_it(cache):
    with pytest.raises(UserError, match="the hub: org/absent is not in the cache"):
        find_or_download_folder("org/absent", "--model")
    with pytest.raises(UserError, match=r"`hf download org/absent` where there is a network"):
        launch("generate", "--model", "org/absent", "--prompt", "x")
    words = ("--task", "mrpc", "--data_dir", "GLUE", "--do_train", "--output_dir", "out")
    with pytest.raises(UserError, match=r"--model org/absent: .* `hf download org/absent`"):
        launch("finetune_glue", "--model", "org/absent", *words)
    with pytest.raises(UserError, match=r"is no folder and no repository of the hub$"):
        find_or_download_folder("absent", "--model")


def test_what_push_to_hub_sends_is_the_model(cache, tmp_path, monkeypatch):
    """A DEMix model goes to the hub and comes back by its name."""
    sent = tmp_path / "sent"
    sent.mkdir()

    def create_commit(repo_id, operations, **_):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, sent / operation.path_in_repo)
        return f"commit to {repo_id}"

    api = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=create_commit
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(transformers_hub, "hf_api", lambda: api)
    monkeypatch.setattr(transformers_hub, "create_and_tag_model_card", lambda *_, **__: card)
    folder = make_model(tmp_path / "model", "feedforward")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.push_to_hub("org/demix") == "commit to org/demix"
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in sent.iterdir()}
    cache("org/demix", sent)
    back = AutoModelForCausalLM.from_pretrained(
        find_or_download_folder("org/demix", "--model"), domain="code"
    )
    for (name, ours), theirs in zip(
        model.state_dict().items(), back.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
