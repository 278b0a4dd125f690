"""Configuration of CA-MTL: one encoder for many tasks."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from megamod.nn.conditioning import compute_block_shape

VARIANTS = ("base", "large", "plain")
"""Values of `CaMtlConfig.variant`."""
KINDS = ("sequence", "regression", "token")
"""Values of `CaMtlConfig.task_kinds`."""


@strict
class CaMtlConfig(PreTrainedConfig):
    """CA-MTL, or plain multi-task BERT.

    Args:
        variant: "base" (adapter after the last block), "large" (bottleneck after every block), or
            "plain" (BERT, shared by all tasks).
        tasks: names, in the order of the task ids.
        task_kinds: "sequence" for labels of rows, "regression", "token" for labels of tokens.
        task_labels: names of the labels of each task; none for a regression.
        max_seq_length: L, longest sequence; it sets the shape of the attention blocks and must
            divide the hidden size (not with "plain").
        classifier_dropout: before the heads.
    Raises:
        ValueError: for an unknown variant, activation or kind of task; for sizes that do not divide
            or exceed each other; for an odd number of layers with "base"; for tasks without a kind
            or labels, named twice, or with a number of labels that the kind does not have.
    Source: Pilault et al. 2021 (CA-MTL).
    """

    model_type = "ca_mtl"
    first_position = 0  # row of the position table for the first token; see `EncoderEmbeddings`
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "task_totals",
        "task_items",
        "entropy",
        "pooled",
    ]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    variant: str = "base"
    tasks: list[str] | tuple[str, ...] = ()
    task_kinds: list[str] | tuple[str, ...] = ()
    task_labels: list[list[str]] | tuple[tuple[str, ...], ...] = ()
    max_seq_length: int = 128

    def __post_init__(self, **kwargs):
        """Raise ValueError for values that contradict each other; `kwargs` go to the base class."""
        self.tasks, self.task_kinds = list(self.tasks), list(self.task_kinds)
        self.task_labels = [list(labels) for labels in self.task_labels]
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r}: choose one of {', '.join(VARIANTS)}")
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r}: only 'gelu' is supported")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.max_seq_length > self.max_position_embeddings:
            raise ValueError(
                f"max_seq_length {self.max_seq_length} is more than max_position_embeddings "
                f"{self.max_position_embeddings}"
            )
        if self.variant != "plain":
            compute_block_shape(self.hidden_size, self.max_seq_length)
        if self.variant == "base" and self.num_hidden_layers % 2:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} of variant 'base' must be even"
            )
        self._check_tasks()
        super().__post_init__(**kwargs)

    @classmethod
    def make_from_encoder(cls, encoder: PreTrainedConfig, **more: object) -> "CaMtlConfig":
        """Make a configuration with the encoder's sizes, rates and constants.

        Args:
            encoder: configuration of a stock BERT.
            more: fields that the encoder does not have, or that replace its own.
        Raises:
            ValueError: for values that contradict each other.
        """
        same = {
            name: getattr(encoder, name)
            for name in cls.__annotations__
            if getattr(encoder, name, None) is not None
        }
        return cls(**{**same, **more})

    @property
    def task_sizes(self) -> list[int]:
        """Number of outputs of each task's head: its labels, or 1 for a regression."""
        return [len(labels) or 1 for labels in self.task_labels]

    def _check_tasks(self) -> None:
        """Raise ValueError for tasks, kinds and labels that do not fit each other."""
        if not len(self.tasks) == len(self.task_kinds) == len(self.task_labels):
            raise ValueError(
                f"{len(self.tasks)} tasks, {len(self.task_kinds)} task_kinds and "
                f"{len(self.task_labels)} task_labels: each task needs one of each"
            )
        for name, kind, labels in zip(self.tasks, self.task_kinds, self.task_labels, strict=True):
            if self.tasks.count(name) > 1:
                raise ValueError(f"task {name!r} appears twice")
            if kind not in KINDS:
                raise ValueError(f"task {name}: kind {kind!r} is not one of {', '.join(KINDS)}")
            if (len(labels) < 2) != (kind == "regression") or (kind == "regression" and labels):
                raise ValueError(f"task {name} of kind {kind} has {len(labels)} labels")
