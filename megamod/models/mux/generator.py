"""MUX-ELECTRA with the replacement of tokens: random, by a plain or by a multiplexed generator.

Names of a generator's weights begin with `generator.`; the discriminator's weights have the same
names as in a model without a generator, so that classifiers load from both.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamod.models.calls import check_extra_arguments, format_output
from megamod.models.mux.bert import MuxMaskedLM
from megamod.models.mux.configuration import MuxElectraConfig
from megamod.models.mux.electra import MuxElectraForPreTraining
from megamod.models.mux.types import MixedStates, MuxOutput, PreparedBatch
from megamod.nn.encoder import (
    EncoderEmbeddings,
    EncoderModel,
    make_key_mask,
    mark_default_initialisation,
)
from megamod.nn.retrieval import IGNORED, build_row_pairs, score_tokens

_SAMPLED_TOGETHER = 2**24  # logits of a chunk of positions for which tokens are drawn


@dataclass
class MuxElectraOutput(MuxOutput):
    """`MuxOutput` of the discriminator, with its input and the loss of the generator.

    Attributes:
        loss: weighted sum of the two losses below.
        generator_loss, discriminator_loss: weighted sum of task and retrieval loss of each; a plain
            generator has no retrieval loss, and without a generator `generator_loss` is None.
        input_ids: [R, S] with replaced tokens.
        corrupted: [R, S] bool, True at tokens that the discriminator must detect.
    """

    generator_loss: Tensor | None = None
    discriminator_loss: Tensor | None = None
    input_ids: Tensor | None = None
    corrupted: Tensor | None = None


class MuxElectraForMaskedLM(MuxMaskedLM):
    """A multiplexed generator, or a masked language model with ELECTRA's retrieval head.

    Args:
        own_embeddings: False for a generator without embeddings; the discriminator's are then
            passed to `compute_decoder_inputs`.
    """

    config: MuxElectraConfig
    base_model_prefix = "electra"
    ties_vocabulary: ClassVar[bool] = False
    residual_retrieval: ClassVar[bool] = True
    retrieves_padding: ClassVar[bool] = False

    def __init__(self, config: MuxElectraConfig, own_embeddings: bool = True):
        super().__init__(config, own_embeddings)
        self.add_retrieval_head()
        for module in (getattr(self, "demux_module", None), self.retrieval_head):
            for part in module.modules() if module is not None else ():
                if isinstance(part, nn.Linear):
                    mark_default_initialisation(part)
        self.post_init()

    @property
    def decoder(self) -> nn.Linear:
        """Linear layer from states [..., D] to logits of tokens [..., V]."""
        return self.retrieval_head.decoder

    def compute_decoder_inputs(
        self, batch: PreparedBatch, selected: Tensor, embeddings: EncoderEmbeddings | None
    ) -> tuple[Tensor, MixedStates]:
        """Compute the inputs of `decoder` at selected tokens.

        Args:
            batch: result of `prepare_batch`.
            selected: [R, S] bool, the tokens in the caller's columns, before the prefix.
            embeddings: used in place of the model's own; None: its own.
        Returns:
            the inputs [C, D] of C selected tokens, and the mixed states of the batch.
        """
        hidden = self.encode(batch, embeddings=embeddings)
        length = self.config.prefix_length
        shifted = F.pad(selected, (length, -length)) if length else selected
        pairs = build_row_pairs(shifted, self.config.num_instances)
        return self.compute_vocabulary_states(hidden, pairs), hidden


class PlainGenerator(nn.Module):
    """ELECTRA's generator, which does not multiplex rows; attention masks padding.

    Args:
        config: configuration of the generator, see `MuxElectraConfig.make_generator_config`.
        own_embeddings: False if embeddings are passed to `compute_decoder_inputs`.
    """

    def __init__(self, config: MuxElectraConfig, own_embeddings: bool):
        super().__init__()
        self.electra = EncoderModel(config, own_embeddings)
        width = config.embedding_size
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        dense = nn.Linear(config.hidden_size, width)
        self.generator_predictions = nn.ModuleDict({"LayerNorm": norm, "dense": dense})
        self.generator_lm_head = nn.Linear(width, config.vocab_size)

    @property
    def decoder(self) -> nn.Linear:
        """Linear layer from states [..., D] to logits of tokens [..., V]."""
        return self.generator_lm_head

    def compute_decoder_inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        selected: Tensor,
        embeddings: EncoderEmbeddings | None,
    ) -> Tensor:
        """Compute the inputs of `decoder` at selected tokens.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: [R, S]; all but the ids may be
                None.
            selected: [R, S] bool.
            embeddings: used in place of the generator's own; None: its own.
        Returns:
            [C, D'] of C selected tokens, D' the width of the embeddings.
        """
        embed = embeddings or self.electra.embeddings
        mask = make_key_mask(attention_mask) if attention_mask is not None else None
        hidden = self.electra.encode(embed(input_ids, token_type_ids, position_ids), mask)[selected]
        head = self.generator_predictions
        return head["LayerNorm"](F.gelu(head["dense"](hidden)))


class MuxElectraForReplacedTokens(MuxElectraForPreTraining):
    """Discriminator that replaces the masked tokens itself, at random or by a generator.

    Generator and discriminator share embeddings if width, vocabulary, position table and token
    types have equal sizes.

    Source: Murahari et al. 2023, section 3.2; Clark et al. 2020, section 2.
    """

    _keys_to_ignore_on_load_unexpected = (r"position_ids$",)

    def _finish_init(self) -> None:
        """Create the generator that the configuration names, if any; then run `post_init`.

        The matrix of a plain generator is tied to the word embeddings it uses, if the configuration
        ties them.
        """
        config = self.config
        if config.generator != "none":
            settings = config.make_generator_config()
            same = ("embedding_size", "vocab_size", "max_position_embeddings", "type_vocab_size")
            self.shares_embeddings = all(getattr(settings, n) == getattr(config, n) for n in same)
            kind = PlainGenerator if config.generator == "plain" else MuxElectraForMaskedLM
            self.generator = kind(settings, not self.shares_embeddings)
            if config.generator == "plain" and settings.tie_word_embeddings:
                prefix = "" if self.shares_embeddings else "generator."
                self._tied_weights_keys = {
                    "generator.generator_lm_head.weight": (
                        f"{prefix}electra.embeddings.word_embeddings.weight"
                    )
                }
        self.post_init()

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """Resize the vocabulary as `VocabularyAccess.resize_token_embeddings`.

        Arguments and result are those of that method.
        """
        changes = bool(args) or kwargs.get("new_num_tokens") is not None
        if changes and self.config.generator != "none":
            raise ValueError("a model with a generator cannot be resized; set vocab_size instead")
        return super().resize_token_embeddings(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        retrieved_instances: Tensor | None = None,
        num_retrieval_items: Tensor | float | None = None,
        random_ids: Tensor | None = None,
        num_generator_items: Tensor | float | None = None,
        generator_retrieved_instances: Tensor | None = None,
        num_generator_retrieval_items: Tensor | float | None = None,
        return_dict: bool | None = None,
        **more: object,
    ) -> MuxElectraOutput | tuple:
        """Replace the masked tokens and detect the replaced ones.

        Without a generator every masked token counts as replaced, also by its own id; with one,
        only those whose new id differs from the label.

        Args:
            input_ids: [R, S] with `mask_token_id` at the tokens to replace.
            attention_mask, token_type_ids, position_ids: [R, S], of the tokens, or None.
            labels: [R, S] the original tokens, -100 where the generator is not scored; not needed
                without a generator.
            random_ids: [R, S] replacements of the masks; None to draw them.
            num_items_in_batch, num_retrieval_items, num_generator_items,
            num_generator_retrieval_items: divisors of the summed losses of discriminator and
                generator; None for the numbers of items in this batch.
            retrieved_instances, generator_retrieved_instances: [B, T], the instance of each mixed
                position, for discriminator and generator, see `draw_retrieved_instances`; None:
                drawn.
        Returns:
            `MuxElectraOutput`; a tuple if `return_dict` is False.
        Raises:
            ValueError: if a model with a generator gets no labels; and as in
                `MuxElectraForPreTraining.forward`.
        """
        check_extra_arguments(self, more)
        fields = (attention_mask, token_type_ids, position_ids)
        masked = input_ids == self.config.mask_token_id
        generator_loss = None
        if self.config.generator == "none":
            if random_ids is None:
                random_ids = torch.randint_like(input_ids, self.config.vocab_size)
            replaced, corrupted = torch.where(masked, random_ids, input_ids), masked
        else:
            if labels is None:
                raise ValueError("labels are missing: the generator must know the masked tokens")
            generator_loss, replaced = self._replace_masked_tokens(
                (input_ids, *fields),
                labels,
                masked,
                random_ids,
                num_generator_items,
                generator_retrieved_instances,
                num_generator_retrieval_items,
            )
            corrupted = masked & (replaced != labels)
        detected = self.discriminate(
            self.prepare_batch(replaced, *fields),
            corrupted,
            num_items_in_batch,
            retrieved_instances,
            num_retrieval_items,
        )
        loss = self.config.disc_loss_weight * detected.loss
        if generator_loss is not None:
            loss = loss + self.config.gen_loss_weight * generator_loss
        output = MuxElectraOutput(
            **{name: value for name, value in detected.items() if name != "loss"},
            loss=loss,
            generator_loss=generator_loss,
            discriminator_loss=detected.loss,
            input_ids=replaced,
            corrupted=corrupted,
        )
        return format_output(self, output, return_dict)

    def _replace_masked_tokens(
        self,
        fields: tuple[Tensor | None, ...],
        labels: Tensor,
        masked: Tensor,
        random_ids: Tensor | None,
        num_items: Tensor | float | None,
        retrieved_instances: Tensor | None,
        num_retrieval_items: Tensor | float | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the generator's loss, and ids [R, S] with its tokens in place of the masks.

        Masks in columns that a prefix drops stay masks.

        Args:
            fields: input_ids, attention_mask, token_type_ids, position_ids, as in `forward`.
            labels, random_ids, retrieved_instances: `labels`, `random_ids` and
                `generator_retrieved_instances` of `forward`.
            masked: [R, S] bool, the tokens to replace.
            num_items, num_retrieval_items: divisors of the summed losses; None for the numbers of
                items in this batch.
        """
        generator, embeddings = self.generator, None
        if self.shares_embeddings:
            embeddings = self.backbone.embeddings
        selected, retrieval = masked | (labels != IGNORED), None
        if self.config.generator == "plain":
            states = generator.compute_decoder_inputs(*fields, selected, embeddings)
        else:
            if length := generator.config.prefix_length:
                selected = F.pad(selected[:, :-length], (0, length))  # those columns are dropped
            batch = generator.prepare_batch(*fields)
            states, hidden = generator.compute_decoder_inputs(batch, selected, embeddings)
            if generator.config.retrieval_loss_coeff > 0:
                retrieved = MuxOutput()
                generator.add_retrieval_loss(
                    retrieved, hidden, batch.ids, retrieved_instances, num_retrieval_items
                )
                retrieval = retrieved.retrieval_loss
        scored = labels[selected] != IGNORED
        targets = labels[selected][scored]
        total, *_ = score_tokens(
            states[scored], generator.decoder, targets, return_logits=False, count_correct=False
        )
        loss = total / (max(targets.numel(), 1) if num_items is None else num_items)
        if self.config.generator == "multiplexed":
            loss = generator.combine_losses(loss, retrieval)
        replaced = fields[0].clone()
        if random_ids is None:
            replaced[selected & masked] = sample_tokens(states[masked[selected]], generator.decoder)
        else:
            replaced[selected & masked] = random_ids[selected & masked]
        return loss, replaced


@torch.no_grad()
def sample_tokens(states: Tensor, decoder: nn.Linear) -> Tensor:
    """Draw tokens from softmax(decoder(states)): [R, D] -> [R] int64, without gradient.

    The draws are those of torch's global generator. Rows are scored in chunks of about
    `_SAMPLED_TOGETHER` logits, to bound the memory.
    """
    rows = max(1, _SAMPLED_TOGETHER // decoder.out_features)
    sampled = [
        torch.multinomial(decoder(part).float().softmax(-1), 1)[:, 0]
        for part in (states.split(rows) if len(states) else ())
    ]
    return torch.cat(sampled) if sampled else states.new_zeros(0, dtype=torch.long)
