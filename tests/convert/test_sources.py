"""Model folders that commands take: released ones are converted, others are refused by name."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from megamod.convert.datamux import export
from megamod.convert.sources import resolve_model
from megamod.errors import UserError
from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.ca_mtl.model import CaMtlForMultiTask, load_from_encoder
from megamod.models.mux.bert import (
    MuxBertForMaskedLM,
    MuxBertForSequenceClassification,
    MuxBertModel,
)
from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig
from megamod.models.mux.electra import MuxElectraForSequenceClassification
from megamod.models.mux.roberta import MuxRobertaForTokenClassification
from megamod.models.pretrained import load_pretrained

SIZE = dict(vocab_size=800, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
SIZE |= dict(intermediate_size=24, max_position_embeddings=20, type_vocab_size=2)
IDS = dict(cls_token_id=2, mask_token_id=4, prefix_fill_token_id=5)  # of a small vocabulary
MUX = dict(**SIZE, num_instances=2, num_hidden_demux_layers=2)
LOAD = partial(load_pretrained, AutoModelForSequenceClassification)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def released(folder: Path, model: MuxBertForMaskedLM) -> Path:
    """The model in the layout of the release, which calls itself a BERT."""
    model.save_pretrained(folder / "ours")
    (folder / "theirs").mkdir()
    export(folder / "ours", folder / "theirs")
    (folder / "theirs" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder / "theirs"


def changed(folder: Path, **fields: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_released_model_is_converted_once(tmp_path, cache):
    torch.manual_seed(0)
    model = MuxBertForMaskedLM(MuxBertConfig(**MUX)).eval()
    folder = released(tmp_path, model)
    assert AutoConfig.from_pretrained(folder).model_type == "bert"  # what transformers takes it for
    source = resolve_model(str(folder), "--model")
    assert source.config.model_type == "mux_bert" and source.config.num_instances == 2
    ids = torch.randint(6, 50, (2, 8))
    ours = MuxBertForMaskedLM.from_pretrained(source.name).eval()
    assert torch.equal(ours(ids).logits, model(ids).logits)
    assert (Path(source.name) / "vocab.txt").exists() and Path(source.name).is_relative_to(cache)
    built = Path(source.name).stat().st_mtime_ns
    assert resolve_model(str(folder), "--model") == source
    assert Path(source.name).stat().st_mtime_ns == built
    weights = load_file(folder / "model.safetensors")
    weights["instance_embedding"] = weights["instance_embedding"] + 1
    save_file(weights, folder / "model.safetensors")
    assert resolve_model(str(folder), "--model").name != source.name  # other weights, other folder


def test_a_cache_that_cannot_be_written_names_the_command(tmp_path, monkeypatch):
    folder = released(tmp_path, MuxBertForMaskedLM(MuxBertConfig(**MUX)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"megamod convert --format datamux --input .* --output_dir DIR"
    ):
        resolve_model(str(folder), "--model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MuxedBertForEverything"]}, "names the class 'MuxedBertForEverything'"),
        ({"architectures": ["BertModel"], "num_instances": 2}, "names no multiplexed model"),
        ({"architectures": None, "muxing_variant": "x"}, "names no multiplexed model"),
        (
            {"num_tasks": 3},
            r"megamod convert --format ca_mtl --input .* --tasks A B --output_dir DIR",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised; dequantise them first"),
        ({"model_type": "no_such_type"}, "has model_type 'no_such_type'"),
    ],
)
def test_folders_that_are_not_what_they_say(tmp_path, fields, message):
    BertModel(BertConfig(**SIZE)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(changed(tmp_path, **fields)), "--model")
    assert len(str(caught.value)) < 400


def test_places_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"--model .*gone: there is no such folder"):
        resolve_model(str(tmp_path / "gone"), "--model")
    with pytest.raises(UserError, match=r"--model .*: there is no model \(no config.json\)"):
        resolve_model(str(tmp_path), "--model")
    (tmp_path / "checkpoint_last.pt").write_bytes(b"")
    for name in (tmp_path, tmp_path / "checkpoint_last.pt"):
        with pytest.raises(UserError, match=r"megamod convert --format fairseq_lm --input"):
            resolve_model(str(name), "--model")


def test_a_command_says_what_it_needs(tmp_path):
    folder = released(tmp_path, MuxBertForMaskedLM(MuxBertConfig(**MUX)))
    with pytest.raises(UserError, match="is a model of type 'mux_bert'; needed is 'bert'"):
        resolve_model(str(folder), "--model", "bert".__eq__, "'bert'")
    assert not (tmp_path / "cache").exists()  # refused before it was converted


STOCK = [
    (BertModel, BertConfig(**SIZE), MuxBertForMaskedLM, MuxBertConfig(**MUX)),
    (BertModel, BertConfig(**SIZE), MuxBertModel, MuxBertConfig(**MUX)),
    (BertForMaskedLM, BertConfig(**SIZE), MuxBertModel, MuxBertConfig(**MUX)),
    (
        ElectraModel,
        ElectraConfig(**SIZE, embedding_size=8),
        MuxElectraForSequenceClassification,
        MuxElectraConfig(**MUX, embedding_size=8),
    ),
    (
        RobertaModel,
        RobertaConfig(**SIZE),
        MuxRobertaForTokenClassification,
        MuxRobertaConfig(**MUX, **IDS),
    ),
]


@pytest.mark.parametrize(("stock", "config", "ours", "mux"), STOCK)
def test_a_stock_encoder_in_a_multiplexed_class(tmp_path, stock, config, ours, mux):
    model = stock(config)
    model.save_pretrained(tmp_path)
    loaded = dict(ours.from_pretrained(tmp_path, config=mux).named_parameters())
    body = model.base_model
    kept = {
        f"{ours.base_model_prefix}.{n}": p for n, p in body.named_parameters() if "pooler" not in n
    }
    assert len(kept) > 30 and kept.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], parameter) for name, parameter in kept.items())


@pytest.mark.parametrize("variant", ["base", "large", "plain"])
@pytest.mark.parametrize("stock", [BertModel, BertForPreTraining])
def test_a_stock_encoder_with_many_tasks(tmp_path, variant, stock):
    model = stock(BertConfig(**SIZE))
    model.save_pretrained(tmp_path)
    tasks = dict(tasks=["a"], task_kinds=["sequence"], task_labels=[["x", "y"]], max_seq_length=8)
    config = CaMtlConfig.make_from_encoder(model.config, variant=variant, **tasks)
    loaded, report = load_from_encoder(str(tmp_path), config)
    names = [name for name, _ in model.base_model.named_parameters()]
    kept = [name for name in names if f"bert.{name}" in report["loaded"]]
    # What conditions takes the place of LayerNorms in some blocks.
    assert len(kept) >= 0.75 * len(names)
    own_values = dict(loaded.bert.named_parameters())
    assert all(torch.equal(own_values[name], model.base_model.get_parameter(name)) for name in kept)


def test_weights_of_another_model_are_an_error_everywhere(tmp_path):
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=800, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        folder
    )
    changed(folder, **BertConfig(**SIZE).to_dict())
    for cls, config in (
        (MuxBertForSequenceClassification, MuxBertConfig(**MUX)),
        (CaMtlForMultiTask, CaMtlConfig(**SIZE, variant="plain", max_seq_length=8)),
    ):
        with pytest.raises(UserError, match="lacks 100% of the encoder of"):
            cls.from_pretrained(folder, config=config)
    with pytest.raises(UserError, match=r"--model .*lacks 100% of the encoder"):
        LOAD(str(folder), "--model", config=BertConfig(**SIZE))


def test_shares_of_weights(tmp_path):
    """A tenth of the encoder may be missing and a head may be left out, no more."""
    model = BertForPreTraining(BertConfig(**SIZE))
    model.save_pretrained(tmp_path)
    LOAD(str(tmp_path), "--model")  # drops three heads, draws a pooler or none
    state = load_file(tmp_path / "model.safetensors")
    lacking = {k: v for k, v in state.items() if not k.startswith("bert.encoder.layer.1.")}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d\d% of the encoder of BertForSequenceCl"):
        LOAD(str(tmp_path), "--model")
    more = {f"adapter.{n}.weight": torch.ones(2, 2) for n in range(4)}
    save_file(state | more, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"4 of its \d\d tensors, such as adapter"):
        LOAD(str(tmp_path), "--model")


def test_a_vocabulary_of_another_size_is_no_head(tmp_path):
    BertForSequenceClassification(BertConfig(**SIZE, num_labels=5)).save_pretrained(tmp_path)
    LOAD(str(tmp_path), "--model", config=BertConfig(**SIZE), ignore_mismatched_sizes=True)
    wider = BertConfig(**SIZE | {"vocab_size": 900})
    with pytest.raises(UserError, match=r"word_embeddings.weight has shape \(800, 16\), in this"):
        LOAD(str(tmp_path), "--model", config=wider, ignore_mismatched_sizes=True)


class OtherConfig(PreTrainedConfig):
    """A model type that a user registered, without a stock encoder."""

    model_type = "registered_by_a_user"


class OtherForSequenceClassification(PreTrainedModel):
    config_class = OtherConfig

    def __init__(self, config: OtherConfig):
        super().__init__(config)
        self.body, self.classifier = nn.Linear(4, 4), nn.Linear(4, config.num_labels)
        self.post_init()


def test_registered_types_are_loaded_as_they_are(tmp_path):
    AutoConfig.register("registered_by_a_user", OtherConfig)
    AutoModelForSequenceClassification.register(OtherConfig, OtherForSequenceClassification)
    model = OtherForSequenceClassification(OtherConfig(num_labels=2))
    model.save_pretrained(tmp_path)
    source = resolve_model(str(changed(tmp_path, num_instances=2)), "--model")
    wider = OtherConfig(num_labels=3)
    loaded, _ = LOAD(source.name, "--model", config=wider, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.body.weight, model.body.weight)
