"""A merge recipe in one normal form: models, and the parts that the result consists of.

Whole models are one part, `modules:` one part each, and `slices:` one part for each group of
layers, so that one function assembles all of them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megamod.errors import UserError
from megamod.merging.settings import Scope, Setting
from megamod.merging.vocabulary import VocabularyRequest
from megamod.states.adapter import is_adapter, resolve_seed_folder

GREEDY_SOUP = "greedy_soup"
"""The method that first selects models whose uniform average is best on held-out data."""


@dataclass(frozen=True)
class InputModel:
    """One model of a merge.

    Attributes:
        path: folder of the model; `member`: expert of a DEMix folder, None: all of it.
        parameters: settings of this model by name.
        domain: domain that the model was trained on, for the record.
        statistics: file for methods that weight by statistics; None: compute them.
        calibration: block that names the text to compute them on; None: that of the recipe, if any.
        adapter: folder of a LoRA adapter that is merged into the model first; None: no adapter.
        beside_anchor: take the feed-forwards of `member`, or (None) of the anchor, out of an
            anchored model.
    """

    path: Path
    member: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    domain: str | None = None
    statistics: Path | None = None
    calibration: Mapping[str, Setting] | None = None
    adapter: Path | None = None
    beside_anchor: bool = False

    def __str__(self) -> str:
        text = str(self.path) if self.adapter is None else f"{self.path}+{self.adapter}"
        return text if self.member is None else f"{text} ({self.member})"


@dataclass(frozen=True)
class PartSource:
    """One model within a part.

    Attributes:
        model: its number among the inputs.
        parameters: settings by name.
        layers: first layer, and that after the last; None: the whole model.
    """

    model: int
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class RecipePart:
    """Tensors of the result that are merged from the same sources.

    Attributes:
        sources: at least one; with layers, all of the same number.
        parameters: settings by name, for all sources.
        base: number of the input that is the base of this part; None: that of the recipe.
        module: part of the names of the tensors, whole words between dots; None: all tensors.
    """

    sources: tuple[PartSource, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    base: int | None = None
    module: str | None = None

    @property
    def depth(self) -> int:
        """Number of layers of a slice; for recipes whose layers are stacked."""
        first, last = self.sources[0].layers
        return last - first


@dataclass(frozen=True)
class MergeRecipe:
    """A merge.

    Attributes:
        method: a key of `METHODS`, or `GREEDY_SOUP`.
        inputs: the models.
        parameters: settings for all models, by name.
        dtype: name of the dtype that weights are rounded to first; None: no rounding.
        out_dtype: name of the dtype that is stored; None: `dtype`, else that of the template.
        base: number of the base model; None: the recipe has no base.
        tokenizer: number of the model whose tokenizer files the result gets.
        origin: file or flag that the recipe comes from, for messages.
        parts: parts of the result; empty: one part, all tensors of all models.
        module_parameters: settings of the only module, which precede `parameters`.
        copy_chat_template: give the result the chat template that most models have.
        cut_vocabularies: cut vocabularies of unequal size to their common rows.
        vocabulary_request: vocabulary of the result; None: that of its template.
        evaluation: held-out data of `greedy_soup`.
        calibration: text to compute statistics on, for models without text of their own.
        align: the `align:` block; None: do not align.
    """

    method: str
    inputs: tuple[InputModel, ...]
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    base: int | None = None
    tokenizer: int = 0
    origin: str = "--models"
    parts: tuple[RecipePart, ...] = ()
    module_parameters: Mapping[str, Setting] = field(default_factory=dict)
    copy_chat_template: bool = False
    cut_vocabularies: bool = False
    vocabulary_request: VocabularyRequest | None = None
    evaluation: Mapping[str, Setting] | None = None
    calibration: Mapping[str, Setting] | None = None
    align: Mapping[str, Setting] | None = None

    @property
    def document(self) -> str | None:
        """The recipe file, for messages about models that it names; None: flags name them."""
        return None if self.origin.startswith("--") else self.origin

    @property
    def is_stacked(self) -> bool:
        """True if the layers of the result are stacked from layers of the models."""
        return bool(self.parts) and self.parts[0].sources[0].layers is not None

    @property
    def template_model(self) -> int:
        """Number of the model whose configuration and tensor names the result has."""
        if self.base is not None:
            return self.base
        return self.parts[0].sources[0].model if self.is_stacked else 0

    @property
    def all_parts(self) -> tuple[RecipePart, ...]:
        """The parts, each with all of its sources.

        A base that is in no module takes part in all of them.
        """
        if not self.parts:
            sources = (PartSource(n, model.parameters) for n, model in enumerate(self.inputs))
            return (RecipePart(tuple(sources)),)
        if self.is_stacked or self.base is None:
            return self.parts
        base = PartSource(self.base)
        return tuple(
            part
            if any(source.model == self.base for source in part.sources)
            else replace(part, sources=(*part.sources, base))
            for part in self.parts
        )

    def find_lead_source(self, part: RecipePart) -> int:
        """Find the source that gives a part its names, shapes, dtypes and layer settings.

        Returns:
            index of the base if it is a source, else of the template of whole models, else 0.
        """
        models = [source.model for source in part.sources]
        candidates = [self.base if part.base is None else part.base]
        candidates += [] if self.is_stacked else [self.template_model]
        return next((models.index(number) for number in candidates if number in models), 0)

    def describe_part(self, part: RecipePart) -> str:
        """Return the position of a part in the recipe, for messages: file or flag, then the key."""
        if self.is_stacked:
            return f"{self.origin}, slices"
        return self.origin if part.module is None else f"{self.origin}, modules, {part.module}"

    def list_scopes(self, part: RecipePart) -> list[Scope]:
        """List the levels of the recipe that hold parameters for all sources of a part, by
        precedence.
        """
        return [
            (self.describe_part(part), part.parameters),
            (f"{self.origin}, modules", self.module_parameters),
            (f"{self.origin}, parameters", self.parameters),
        ]

    def make_source_scope(self, part: RecipePart, source: PartSource) -> Scope:
        """Make the level of the recipe that holds the parameters of one source of a part."""
        return f"{self.describe_part(part)}, {self.inputs[source.model]}", source.parameters


def split_adapter(text: str, folder: Path = Path()) -> tuple[Path, Path | None]:
    """Split `MODEL+ADAPTER`, mergekit's spelling of a model with a LoRA adapter.

    A folder whose name is the whole text, plus included, is one model. If the text is the folder of
    a LoRA adapter alone, the model is the seed that it names.

    Args:
        text: as a recipe or flag has it.
        folder: in which names are looked up that the working directory does not have.
    Returns:
        folder of the model, which may not exist, and folder of the adapter or None.
    Raises:
        UserError: as `resolve_seed_folder`, for an adapter alone.
    """
    whole = resolve_recipe_path(text, folder)
    if "+" in text and not os.path.exists(whole):
        for position in (number for number, letter in enumerate(text) if letter == "+"):
            model = resolve_recipe_path(text[:position], folder)
            adapter = resolve_recipe_path(text[position + 1 :], folder)
            if text[:position] and os.path.exists(model) and os.path.exists(adapter):
                return model, adapter
    return (resolve_seed_folder(whole), whole) if is_adapter(whole) else (whole, None)


def resolve_recipe_path(text: str, folder: Path) -> Path:
    """Resolve a path in a recipe, `text`: it is in the working directory, or else in `folder`.

    The result need not exist.
    """
    # os.path: a name that is too long does not exist, where Path raises.
    is_only_in_folder = not os.path.exists(text) and os.path.exists(folder / text)
    return folder / text if is_only_in_folder else Path(text)


def build_weighted_recipe(
    sources: Iterable[tuple[Path, str | None]],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    domains: Sequence[str] | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    origin: str = "--weights",
) -> MergeRecipe:
    """Build the recipe of a weighted average.

    Args:
        sources: folder, or model and adapter as `MODEL+ADAPTER`; and the domain of one expert of a
            DEMix folder, None: all of it.
        weights: weight of each source.
        normalize: divide by the sum of the weights.
        domains: domains that each source was trained on, for the record; None: those of experts.
        dtype, out_dtype: see `MergeRecipe`.
        origin: flag or file of the weights, for messages.
    Raises:
        UserError: if there is no source, not as many weights as sources, or an adapter without a
            seed.
    """
    models = [(*split_adapter(str(path)), member) for path, member in sources]
    if not models:
        raise UserError(f"{origin}: there is no model to merge")
    if len(weights) != len(models):
        raise UserError(
            f"{origin}: gives {len(weights)} weights, but there are {len(models)} models"
        )
    names = domains or [member for _, _, member in models]
    inputs = tuple(
        InputModel(path, member, {"weight": weight}, name, adapter=adapter)
        for (path, adapter, member), weight, name in zip(models, weights, names, strict=True)
    )
    return MergeRecipe("linear", inputs, {"normalize": normalize}, dtype, out_dtype, origin=origin)
