"""What is to be merged and how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamod.errors import UserError
from megamod.merging.settings import Setting
from megamod.merging.vocabulary import Words

GREEDY_SOUP = "greedy_soup"
"""The method that first looks for models whose uniform average is best on held-out data."""


@dataclass(frozen=True)
class Input:
    """One model of a merge.

    Attributes:
        path: its folder; `member`: an expert of a DEMix folder, None for the whole.
        adapter: folder of a LoRA adapter that is merged into it first; None: none.
        parameters: settings by name.
        domain: what it was trained on, to be recorded.
        statistics: file with what was measured on data, for methods that weigh by it;
            `calibration`: text to measure it on, None: that of the recipe, if any.
    """

    path: Path
    member: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    domain: str | None = None
    statistics: Path | None = None
    calibration: Mapping[str, Setting] | None = None
    adapter: Path | None = None

    def __str__(self) -> str:
        text = str(self.path) if self.adapter is None else f"{self.path}+{self.adapter}"
        return text if self.member is None else f"{text} ({self.member})"


def split_adapter(text: str, beside: Path = Path()) -> tuple[Path, Path | None]:
    """Split `MODEL+ADAPTER`, mergekit's spelling of a model with a LoRA adapter.

    A folder that exists under the whole text, plus included, is one model.

    Args:
        beside: folder in which names are looked up that the working directory does not have.
    """
    whole = find_path(text, beside)
    if "+" in text and not whole.exists():
        for place in (number for number, letter in enumerate(text) if letter == "+"):
            model, adapter = (find_path(t, beside) for t in (text[:place], text[place + 1 :]))
            if text[:place] and model.exists() and adapter.exists():
                return model, adapter
    return whole, None


def find_path(text: str, beside: Path) -> Path:
    """The path if it exists, else the one in the other folder if that exists."""
    return Path(text) if Path(text).exists() or not (beside / text).exists() else beside / text


@dataclass(frozen=True)
class Source:
    """Some layers of one model.

    Attributes:
        model: its number among the inputs.
        layers: the first of them, and that after the last.
        parameters: settings by name.
    """

    model: int
    layers: tuple[int, int]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Some layers of the result, merged from as many of each source.

    Attributes:
        sources: at least one, all of the same number of layers.
        parameters: settings by name, for all sources.
        base: number of the input that is the base here; None: that of the recipe.
    """

    sources: tuple[Source, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    base: int | None = None

    @property
    def depth(self) -> int:
        """Number of layers."""
        first, last = self.sources[0].layers
        return last - first

    def leading(self, base: int | None) -> Source:
        """The source that has the names, shapes and settings: the base, else the first.

        Args:
            base: number of the input that is the base of the recipe; None: there is none.
        """
        base = base if self.base is None else self.base
        return next((one for one in self.sources if one.model == base), self.sources[0])


@dataclass(frozen=True)
class Module:
    """Some tensors of the result, merged from those of whole models.

    Attributes:
        name: part of the names of its tensors, whole words between dots; "": all tensors.
        models: number of each input that takes part, with its settings by name.
        parameters: settings by name, for all of them.
    """

    name: str
    models: tuple[tuple[int, Mapping[str, Setting]], ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole merge.

    Attributes:
        method: a key of `METHODS`, or `GREEDY_SOUP`.
        inputs: the models; `slices`: layers to stack, else whole models are merged.
        parameters: settings for all models, by name; `module`: those that go before them.
        dtype: name of the dtype that weights are rounded to first; None: none.
        out_dtype: name of the dtype that is stored; None: `dtype`, else that of the template.
        base: number of the model that the others are compared with; None: none.
        tokenizer: number of the model whose tokenizer files the result has.
        origin: where all this was said, for messages.
        modules: parts of the model that are merged each for itself; empty: all of it is one.
        chat: whether the chat template is that of most models.
        cut: whether vocabularies of unequal size are cut to what they have in common.
        words: which vocabulary the result has; None: that of its template.
        evaluation: held-out data that `greedy_soup` chooses by; `calibration`: text that statistics
            are measured on where a model has none.
        align: how to reorder the neurons of models before they are merged; None: not at all.
    """

    method: str
    inputs: tuple[Input, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    base: int | None = None
    tokenizer: int = 0
    origin: str = "--models"
    slices: tuple[Slice, ...] = ()
    module: Mapping[str, Setting] = field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    chat: bool = False
    cut: bool = False
    words: Words | None = None
    evaluation: Mapping[str, Setting] | None = None
    calibration: Mapping[str, Setting] | None = None
    align: Mapping[str, Setting] | None = None

    @property
    def template(self) -> int:
        """Number of the model whose configuration and names of tensors the result has."""
        if self.base is not None:
            return self.base
        return self.slices[0].sources[0].model if self.slices else 0


def weighted(
    sources: Iterable[tuple[Path, str | None]],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    domains: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    origin: str = "--weights",
) -> Recipe:
    """The recipe of a weighted average.

    Args:
        sources: folder, or model and adapter as `MODEL+ADAPTER`; and for an expert of a DEMix
            folder its domain.
        weights: of each source; `origin`: where they come from, for messages.
    Raises:
        UserError: if there are not as many weights as sources.
    """
    sources = [(*split_adapter(str(path)), member) for path, member in sources]
    if not sources:
        raise UserError(f"{origin}: there is no model to merge")
    if len(weights) != len(sources):
        raise UserError(
            f"{origin}: gives {len(weights)} weights, but there are {len(sources)} models"
        )
    inputs = tuple(
        Input(
            path,
            member,
            {"weight": weight},
            domains[place] if domains else member,
            adapter=adapter,
        )
        for place, ((path, adapter, member), weight) in enumerate(
            zip(sources, weights, strict=True)
        )
    )
    return Recipe("linear", inputs, {"normalize": normalize}, dtype, out_dtype, origin=origin)
