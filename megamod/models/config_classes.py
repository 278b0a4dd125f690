"""Configuration classes of transformers, loaded without its model classes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import CONFIG_MAPPING, PreTrainedConfig

_WRITER = "auto_class_docstring"


def load_config_class(model_type: str) -> type[PreTrainedConfig]:
    """Load the configuration class of a model type that transformers or megamod knows.

    A class of transformers that was not imported before has no docstring then.

    Raises:
        KeyError: if neither knows the type.
    """
    with _skip_docstrings():
        return CONFIG_MAPPING[model_type]


@contextmanager
def _skip_docstrings() -> Iterator[None]:
    """Let transformers write no docstrings of classes in a `with` block.

    For the docstring of a configuration it imports every model class's table, generation,
    scikit-learn and torch's compiler, which takes seconds.
    """
    module = sys.modules.get("transformers.utils.auto_docstring")
    write = getattr(module, _WRITER, None)
    if write is None:  # a version of transformers without it
        yield
        return
    setattr(module, _WRITER, lambda kind, **_: kind)
    try:
        yield
    finally:
        setattr(module, _WRITER, write)
