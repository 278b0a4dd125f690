"""megamod: modular language models on DeepSpeed.

Importing it registers the project's models with the Auto classes of transformers, at once or when
transformers is imported, see `megamod.models`. `megamod.MuxPipeline` is imported on first use.
"""

from megamod import models as models
from megamod.version import __version__ as __version__


def __getattr__(name: str) -> object:
    """Import `MuxPipeline` on first use; raise AttributeError for any other name."""
    if name != "MuxPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megamod.evaluation.mux_pipeline import MuxPipeline

    return MuxPipeline
