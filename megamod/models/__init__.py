"""Configurations and models, registered with the Auto classes of transformers.

Importing this package is cheap: the classes are registered at once if transformers is loaded, else
right after it is. So `--help` does not wait for torch.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_configurations(auto: ModuleType) -> None:
    """Register all configurations with AutoConfig.

    Args:
        auto: module of transformers that defines AutoConfig.
    """
    from megamod.models.ca_mtl.configuration import CaMtlConfig
    from megamod.models.lm.configuration import DemixConfig, DemixMoeConfig, ForestConfig
    from megamod.models.lm.host_config import DemixHostConfig
    from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig

    of_mux = (MuxBertConfig, MuxElectraConfig, MuxRobertaConfig)
    of_lm = (DemixConfig, DemixMoeConfig, DemixHostConfig, ForestConfig)
    for configuration in (CaMtlConfig, *of_lm, *of_mux):
        auto.AutoConfig.register(configuration.model_type, configuration)


def _register_models(auto: ModuleType) -> None:
    """Register all models with the other Auto classes.

    Args:
        auto: module of transformers that defines them.
    """
    from megamod.models.ca_mtl.configuration import CaMtlConfig
    from megamod.models.ca_mtl.model import CaMtlForMultiTask
    from megamod.models.lm.configuration import DemixConfig, DemixMoeConfig, ForestConfig
    from megamod.models.lm.demix import DemixForCausalLM, DemixMoeForCausalLM
    from megamod.models.lm.demix_model import DemixModel
    from megamod.models.lm.forest import ForestForCausalLM

    auto.AutoModel.register(CaMtlConfig, CaMtlForMultiTask)
    auto.AutoModel.register(DemixConfig, DemixModel)
    auto.AutoModelForCausalLM.register(DemixConfig, DemixForCausalLM)
    auto.AutoModelForCausalLM.register(DemixMoeConfig, DemixMoeForCausalLM)
    auto.AutoModelForCausalLM.register(ForestConfig, ForestForCausalLM)
    _register_multiplexed(auto)


def _register_multiplexed(auto: ModuleType) -> None:
    """Register the multiplexed encoders with the Auto classes; `auto` as in `_register_models`."""
    from megamod.models.mux import bert as mux_bert
    from megamod.models.mux import electra as mux_electra
    from megamod.models.mux import generator as mux_generator
    from megamod.models.mux import roberta as mux_roberta
    from megamod.models.mux.configuration import MuxBertConfig, MuxElectraConfig, MuxRobertaConfig

    auto.AutoModel.register(MuxBertConfig, mux_bert.MuxBertModel)
    auto.AutoModel.register(MuxElectraConfig, mux_electra.MuxElectraModel)
    auto.AutoModelForMaskedLM.register(MuxBertConfig, mux_bert.MuxBertForMaskedLM)
    auto.AutoModelForMaskedLM.register(MuxElectraConfig, mux_generator.MuxElectraForMaskedLM)
    auto.AutoModelForPreTraining.register(MuxBertConfig, mux_bert.MuxBertForMaskedLM)
    # `architectures` in a folder's config.json selects one of the two.
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
"""Modules of transformers, and the functions to call with each after its first import."""


class _RegisterAfterImport(MetaPathFinder):
    """Calls a registration function right after the first import of its module."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Find a module of `_ON_IMPORT` by the other finders, and wrap its loader.

        Arguments as in `MetaPathFinder`; the last two are not used. Returns None for other modules,
        which the other finders then serve.
        """
        if name not in _ON_IMPORT:
            return None
        sys.meta_path.remove(self)  # else find_spec would call this finder again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, _ON_IMPORT[name])
        return spec


class _RegisteringLoader(Loader):
    """Loader that runs another one, `loader`, and then calls `register` with the module."""

    def __init__(self, loader: Loader, register: Callable[[ModuleType], None]):
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does; None: the import system creates it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code, then call `register` with it."""
        self.loader.exec_module(module)
        self.register(module)


for _name, _register in _ON_IMPORT.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
sys.meta_path.insert(0, _RegisterAfterImport())
