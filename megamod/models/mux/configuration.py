"""Configurations of the multiplexed encoders; defaults are the published checkpoints' values."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from megamod_kernels.dispatch import IMPLEMENTATIONS
from transformers import PreTrainedConfig

from megamod.nn.multiplexer import KEYED, MULTIPLEXERS


@strict
class MuxConfig(PreTrainedConfig):
    """Configuration shared by all multiplexed encoders.

    Args:
        num_instances: N, rows that share a forward pass.
        muxing_variant: the multiplexer, which makes one sequence of N instances; a name in
            `MULTIPLEXERS`, and not every family has every one.
        demuxing_variant: the demultiplexer, which computes the states of each instance from mixed
            ones: "index_pos" (RSA), "index" (prefix tokens), or "mlp" (a network per instance,
            RoBERTa only).
        num_hidden_demux_layers: L, layers the RSA demultiplexer shares with the retrieval head; at
            least 2.
        gaussian_hadamard_norm: length of a key.
        binary_hadamard_epsilon: overlap of the chunks of binary keys, 0 to 1.
        learn_muxing: whether the keys are trained.
        unmixed_layers: first layers that each instance passes by itself, before the multiplexer; 0
            (as published): embeddings are mixed. At least one layer must be left.
        task_loss_coeff, retrieval_loss_coeff: weights of the two terms of the loss.
        retrieval_percentage: share of the tokens to retrieve (classification and generators).
        filler: rows that fill up the last group of a batch: "deterministic" takes the batch's
            rows in order, "random" draws them, as the release does.
        use_token_type_ids: whether classifiers see the segment of a token; the release ignores it.
        mask_padding: whether positions that are padding in all instances are masked in attention;
            the release masks none.
        padding_logits: whether token classifiers compute logits at padding in evaluation; if not
            they are 0, which is faster.
        kernels: implementation of multiplexer and demultiplexer: "triton", "reference" (plain
            torch), or "auto", which is Triton on a GPU.
        output_logits: False: a masked LM that is given labels computes no logits.
        cls_token_id: id that overwrites column 0 of a row, and ends a prefix.
        mask_token_id: id of the tokens that the replaced-token model replaces.
        prefix_fill_token_id: fills a prefix.
        prefix_first_token_id: marks instance 0 in a prefix, one less instance 1, and so on.
    Raises:
        ValueError: for a name that does not exist or that the family does not have, a size or share
            out of its range, heads that do not divide the hidden size, more instances than a
            multiplexer can divide the features among, or special ids outside the vocabulary.
    """

    # Values of `muxing_variant` and `demuxing_variant` that the family has.
    multiplexers = KEYED
    demultiplexers = ("index_pos", "index")
    first_position = 0  # row of the position table for the first token; see `EncoderEmbeddings`
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("task_loss", "retrieval_loss", "retrieval_correct", "retrieval_count"),
    ]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    num_instances: int = 2
    muxing_variant: str = "gaussian_hadamard"
    demuxing_variant: str = "index_pos"
    num_hidden_demux_layers: int = 3
    gaussian_hadamard_norm: float | int = 1.0
    binary_hadamard_epsilon: float | int = 0.0
    learn_muxing: bool | int = False
    unmixed_layers: int = 0
    task_loss_coeff: float | int = 1.0
    retrieval_loss_coeff: float | int = 0.0
    retrieval_percentage: float | int = 1.0
    filler: str = "deterministic"
    use_token_type_ids: bool = False
    mask_padding: bool = False
    padding_logits: bool = True
    output_logits: bool = True
    kernels: str = "auto"
    cls_token_id: int = 101
    mask_token_id: int = 103
    prefix_fill_token_id: int = 680
    prefix_first_token_id: int = 678

    def __post_init__(self, **kwargs):
        """Set fields that follow from others; raise ValueError for values that do not go together.

        `kwargs` go to the base class.
        """
        self.learn_muxing = bool(self.learn_muxing)
        self._check_choice("muxing_variant", self.multiplexers)
        self._check_choice("demuxing_variant", self.demultiplexers)
        self._check_choice("filler", ("deterministic", "random"))
        self._check_choice("hidden_act", ("gelu",))
        self._check_choice("kernels", IMPLEMENTATIONS)
        for name in ("num_instances", "num_hidden_layers", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_hidden_demux_layers < 2 and self.demuxing_variant == "index_pos":
            raise ValueError(
                f"num_hidden_demux_layers {self.num_hidden_demux_layers} must be at least 2"
            )
        if not 0 <= self.unmixed_layers < self.num_hidden_layers:
            raise ValueError(
                f"unmixed_layers {self.unmixed_layers} must be 0 to {self.num_hidden_layers - 1}, "
                "fewer than the layers"
            )
        for name in ("binary_hadamard_epsilon", "retrieval_percentage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie between 0 and 1")
        divides = MULTIPLEXERS[self.muxing_variant].divides_features
        if divides and self.num_instances > self.mixed_size:
            narrow = hasattr(self, "embedding_size") and not self.unmixed_layers
            raise ValueError(
                f"{self.muxing_variant} divides {'embedding_size' if narrow else 'hidden_size'} "
                f"{self.mixed_size} among the instances; num_instances {self.num_instances} is "
                "larger"
            )
        self._check_ids()
        super().__post_init__(**kwargs)

    @property
    def mixed_size(self) -> int:
        """Features of the vectors that are mixed: embeddings, or states after unmixed layers."""
        narrow = 0 if self.unmixed_layers else getattr(self, "embedding_size", 0)
        return narrow or self.hidden_size

    @property
    def prefix_length(self) -> int:
        """Number of tokens before each row: N + 1 with demuxing_variant "index", else 0."""
        return self.num_instances + 1 if self.demuxing_variant == "index" else 0

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise ValueError unless the value of the field `name` is one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"{name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}"
                f" ({type(self).model_type})"
            )

    def _check_ids(self) -> None:
        """Raise ValueError if `cls_token_id`, or an id of the prefix, is not in the vocabulary."""
        ids = {"cls_token_id": self.cls_token_id}
        if self.demuxing_variant == "index":
            ids["prefix_fill_token_id"] = self.prefix_fill_token_id
            ids["prefix_first_token_id"] = self.prefix_first_token_id
            last = self.prefix_first_token_id - self.num_instances + 1
            ids["prefix_first_token_id - num_instances + 1"] = last
        for name, value in ids.items():
            if not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} {value} is not in the vocabulary of {self.vocab_size} tokens"
                )


@strict
class MuxBertConfig(MuxConfig):
    """MUX-BERT: fields of `MuxConfig`, and one contextual multiplexer more.

    Source: Murahari et al. 2023.
    """

    model_type = "mux_bert"
    multiplexers = (*MuxConfig.multiplexers, "gaussian_attention_v2")


@strict
class MuxElectraConfig(MuxConfig):
    """MUX-ELECTRA; its other fields are those of `MuxConfig`.

    Args:
        embedding_size: width of the embeddings. The multiplexers whose keys are matrices
            ("random_ortho", "random_ortho_low_rank") need it to equal `hidden_size`.
        generator: source of the replaced tokens in pretraining: "none" (drawn uniformly from the
            vocabulary), "plain" (a stock generator) or "multiplexed".
        generator_config: fields in which the generator differs; by default it is of the same size.
        gen_loss_weight, disc_loss_weight: weights of the losses of generator and discriminator.
    Raises:
        ValueError: as `MuxConfig`; for an unknown `generator`; for a multiplexer with matrices and
            embeddings of another width than the states.
    Source: Murahari et al. 2023; Clark et al. 2020 (ELECTRA).
    """

    model_type = "mux_electra"
    multiplexers = (*MuxConfig.multiplexers, "gaussian_attention")
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *MuxConfig.keys_to_ignore_at_inference,
        *("generator_loss", "discriminator_loss", "input_ids", "corrupted"),
    ]

    embedding_size: int = 768
    generator: str = "none"
    generator_config: dict | None = None
    gen_loss_weight: float | int = 1.0
    disc_loss_weight: float | int = 50.0

    def __post_init__(self, **kwargs):
        """Raise ValueError for a generator that does not fit; `kwargs` go to the base class."""
        self._check_choice("generator", ("none", "plain", "multiplexed"))
        self._check_choice("muxing_variant", self.multiplexers)
        matrices = MULTIPLEXERS[self.muxing_variant].matrices
        if matrices and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"{self.muxing_variant} needs embedding_size {self.embedding_size} to be "
                f"hidden_size {self.hidden_size}"
            )
        super().__post_init__(**kwargs)

    def get_text_config(self, *args: object, **kwargs: object) -> "MuxElectraConfig":
        """Return this configuration itself; the base class's arguments have no effect."""
        return self

    def make_generator_config(self) -> "MuxElectraConfig":
        """Make the generator's configuration: this one with the changes of `generator_config`.

        Raises:
            ValueError: if `generator_config` names a field that does not exist, or its values do
                not fit the others.
        """
        fields = {k: v for k, v in self.to_dict().items() if k not in ("model_type", "generator")}
        changed = self.generator_config or {}
        if unknown := sorted(changed.keys() - fields.keys()):
            raise ValueError(f"generator_config: {unknown[0]} is no field of the configuration")
        return MuxElectraConfig(**fields | {"generator_config": None} | changed)


@strict
class MuxRobertaConfig(MuxConfig):
    """DataMUX on RoBERTa: fields of `MuxConfig` with RoBERTa's defaults.

    A negative `prefix_first_token_id` stands for `vocab_size` - 2. Source: Murahari et al. 2022.
    """

    model_type = "mux_roberta"
    multiplexers = ("gaussian_hadamard", "binary_hadamard", "random_ortho")
    demultiplexers = (*MuxConfig.demultiplexers[1:], "mlp")
    first_position = 2

    vocab_size: int = 50265
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    demuxing_variant: str = "index"
    cls_token_id: int = 49923
    mask_token_id: int = 50264
    prefix_fill_token_id: int = 50000
    prefix_first_token_id: int = -1

    def __post_init__(self, **kwargs):
        """Set the first prefix token, unless it is set, to the id before the last.

        `kwargs` go to the base class.
        """
        if self.prefix_first_token_id < 0:
            self.prefix_first_token_id = self.vocab_size - 2
        super().__post_init__(**kwargs)
