import pytest
from torch import nn

from megamod.models.lm.configuration import UNTIE, DemixConfig
from megamod.models.presets import PRESETS


def test_the_feed_forward_is_four_times_as_wide_unless_told():
    assert DemixConfig(hidden_size=24).intermediate_size == 96
    assert DemixConfig(hidden_size=24, intermediate_size=7).intermediate_size == 7


def test_presets_are_those_of_the_papers_table():
    shapes = {name: tuple(preset.values()) for name, preset in PRESETS["demix"].items()}
    assert shapes == {
        "tiny": (2, 64, 4),
        "125m": (12, 768, 12),
        "350m": (24, 1024, 16),
        "750m": (24, 1536, 16),
        "1.3b": (24, 2048, 32),
    }


@pytest.mark.parametrize("untie", UNTIE)
def test_json_keeps_everything(tmp_path, untie):
    config = DemixConfig(
        **PRESETS["demix"]["tiny"], vocab_size=100, domains=["z", "a"], untie=untie
    )
    config.save_pretrained(tmp_path)
    read = DemixConfig.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict()
    assert list(read.domains) == ["z", "a"]  # in the order given
    assert read.tie_word_embeddings is (untie != "transformer_output")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"untie": "ffn"}, "untie 'ffn' is unknown; choose one of none, feedforward, "),
        ({"untie": "feedforward"}, "'feedforward' needs the names of the domains"),
        ({"domains": ["law", "law"]}, "domain 'law' is named twice"),
        ({"domains": ["a.b"]}, "domain 'a.b'"),
        ({"domains": [""]}, "domain ''"),
        ({"domains": ["train"]}, "domain 'train'.*not the name of a method"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        DemixConfig(**fields)
    assert not isinstance(caught.value, (AttributeError, KeyError))


def test_every_allowed_name_can_be_a_module():
    for name in ("law", "1b", "legal_contracts", "a-b", "import", "None"):
        DemixConfig(domains=[name])
        nn.ModuleDict({name: nn.Identity()})
