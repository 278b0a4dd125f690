"""megamod: modular language models on DeepSpeed.

Importing it makes the project's models known to the Auto classes of transformers: at once if they
are loaded, else in the moment they are. So `--help` need not wait for torch. `megamod.MuxPipeline`
is imported when it is asked for.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name != "MuxPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megamod.mux_pipeline import MuxPipeline

    return MuxPipeline


def _register_configurations(auto: ModuleType) -> None:
    from megamod.models.ca_mtl_configuration import CaMtlConfig
    from megamod.models.configuration import DemixConfig, ForestConfig
    from megamod.models.mux_configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig

    of_mux = (MuxBertConfig, MuxElectraConfig, MuxRobertaConfig)
    for configuration in (CaMtlConfig, DemixConfig, ForestConfig, *of_mux):
        auto.AutoConfig.register(configuration.model_type, configuration)


def _register_models(auto: ModuleType) -> None:
    from megamod.models.ca_mtl import CaMtlForMultiTask
    from megamod.models.ca_mtl_configuration import CaMtlConfig
    from megamod.models.configuration import DemixConfig, ForestConfig
    from megamod.models.demix_lm import DemixForCausalLM, DemixModel
    from megamod.models.forest_lm import ForestForCausalLM

    auto.AutoModel.register(CaMtlConfig, CaMtlForMultiTask)
    auto.AutoModel.register(DemixConfig, DemixModel)
    auto.AutoModelForCausalLM.register(DemixConfig, DemixForCausalLM)
    auto.AutoModelForCausalLM.register(ForestConfig, ForestForCausalLM)
    _register_multiplexed(auto)


def _register_multiplexed(auto: ModuleType) -> None:
    from megamod.models import mux_bert, mux_electra, mux_generator, mux_roberta
    from megamod.models.mux_configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig

    auto.AutoModel.register(MuxBertConfig, mux_bert.MuxBertModel)
    auto.AutoModel.register(MuxElectraConfig, mux_electra.MuxElectraModel)
    auto.AutoModelForMaskedLM.register(MuxBertConfig, mux_bert.MuxBertForMaskedLM)
    auto.AutoModelForMaskedLM.register(MuxElectraConfig, mux_generator.MuxElectraForMaskedLM)
    auto.AutoModelForPreTraining.register(MuxBertConfig, mux_bert.MuxBertForMaskedLM)
    # Which of the two is meant, the name of the architecture in a folder's config.json says.
    both = (mux_generator.MuxElectraForReplacedTokens, mux_electra.MuxElectraForPreTraining)
    auto.AutoModelForPreTraining.register(MuxElectraConfig, both)
    for configuration, family, name in (
        (MuxBertConfig, mux_bert, "MuxBert"),
        (MuxElectraConfig, mux_electra, "MuxElectra"),
        (MuxRobertaConfig, mux_roberta, "MuxRoberta"),
    ):
        for task in ("SequenceClassification", "TokenClassification"):
            model = getattr(family, f"{name}For{task}")
            getattr(auto, f"AutoModelFor{task}").register(configuration, model)


_ON_IMPORT = {
    "transformers.models.auto.configuration_auto": _register_configurations,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _AfterImport(MetaPathFinder):
    """Runs a function on a module right after its first import."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _ON_IMPORT:
            return None
        sys.meta_path.remove(self)  # while the search runs that this finder stands in front of
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, _ON_IMPORT[name])
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader, then: object):
        self.loader = loader
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)


for _name, _register in _ON_IMPORT.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
sys.meta_path.insert(0, _AfterImport())
