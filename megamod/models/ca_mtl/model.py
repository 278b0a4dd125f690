"""CA-MTL: BERT conditioned on the task of each row, with a head per task.

Source: Pilault et al. 2021 (Conditionally Adaptive Multi-Task Learning), and its release for
details the paper does not give.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from megamod.models.ca_mtl.configuration import CaMtlConfig
from megamod.models.calls import check_extra_arguments, format_output
from megamod.models.pretrained import CheckedLoading, load_pretrained
from megamod.nn.conditional_encoder import ConditionalEncoder, ConditionalLayer
from megamod.nn.conditioning import ConditionalLayerNorm, Film
from megamod.nn.encoder import Encoder, EncoderEmbeddings, initialise_weights, make_key_mask
from megamod.nn.task_heads import TaskHeads


@dataclass
class CaMtlOutput(ModelOutput):
    """Result of a batch of rows of several tasks.

    Attributes:
        loss: mean over the tasks in the batch of each task's mean loss.
        logits: one per task in the order of the configuration, [rows, C] or [rows, L, C] of its
            rows in the order of the batch; of no rows for a task that has none.
        task_totals, task_items: [T], summed loss and number of items of each task.
        entropy: [B], relative entropy of each row's prediction, see `TaskHeads.compute_entropy`.
        pooled: [B, D].
    """

    loss: Tensor | None = None
    logits: tuple[Tensor, ...] | None = None
    task_totals: Tensor | None = None
    task_items: Tensor | None = None
    entropy: Tensor | None = None
    pooled: Tensor | None = None


class ConditionalBert(nn.Module):
    """Embeddings aligned by the task, blocks and pooler; for the variant "plain" BERT itself."""

    def __init__(self, config: CaMtlConfig):
        super().__init__()
        size = config.hidden_size
        self.embeddings = EncoderEmbeddings(config, size)
        self.plain = config.variant == "plain"
        if self.plain:
            self.encoder = Encoder(config)
        else:
            self.task_type_embeddings = nn.Embedding(len(config.tasks), size)
            self.conditional_alignment = Film(size, size)
            self.encoder = ConditionalEncoder(config)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(size, size)})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        row_task_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Map ids [B, L] to states [B, L, D] and pooled state [B, D].

        Args:
            input_ids: [B, L].
            attention_mask, token_type_ids: [B, L], or None for no padding and one segment.
            row_task_ids: [B], task of each row; of no effect with the variant "plain".
        """
        x = self.embeddings(input_ids, token_type_ids)
        mask = None if attention_mask is None else make_key_mask(attention_mask)
        if self.plain:
            x = self.encoder(x, mask)
        else:
            tasks = self.task_type_embeddings.weight
            factor, shift = self.conditional_alignment(tasks)
            x = x * factor[row_task_ids][:, None] + shift[row_task_ids][:, None]
            x = self.encoder(x, mask, tasks, row_task_ids)
        return x, torch.tanh(self.pooler["dense"](x[:, 0]))


class CaMtlForMultiTask(CheckedLoading):
    """Task-conditioned encoder with the heads of all tasks."""

    config: CaMtlConfig
    base_model_prefix = "bert"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # Trainer counts labels, the loss is a mean over tasks
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("ConditionalLayer", "EncoderLayer")
    _keys_to_ignore_on_load_unexpected = (r"position_ids$", r"^cls\.", r"^classifier\.")

    def __init__(self, config: CaMtlConfig):
        super().__init__(config)
        self.bert = ConditionalBert(config)
        self.heads = TaskHeads(
            config.hidden_size, config.task_sizes, config.task_kinds, config.classifier_dropout
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of word embeddings."""
        return self.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings by `value`."""
        self.bert.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        return_dict: bool | None = None,
        **more: object,
    ) -> CaMtlOutput | tuple:
        """Score rows of any tasks.

        Args:
            input_ids: [B, S], S at most `max_seq_length`.
            task_ids: [B] int64, index of each row's task in the configuration; may be None for a
                model of one task.
            attention_mask: [B, S], 0 at padding, which is on the right; None: no padding.
            token_type_ids: [B, S]; None: one segment.
            labels: [B], class or value of each row; or [B, S] int64, -100 where there is none, if
                all rows are of tasks with labels of tokens.
            num_items_in_batch: [T], divisor of the summed loss of each task; None for the numbers
                of items in this batch. The loss is the mean over tasks with items. A single number,
                as Trainer counts, is not used.
            more: `token_labels` [B, S], with labels [B] in a batch of both kinds of tasks. It is
                no parameter of its own, because Trainer takes every parameter with "label" in its
                name for a field that all batches have.
        Returns:
            `CaMtlOutput` (a tuple if `return_dict` is False); loss, totals and items only with
            labels.
        Raises:
            ValueError: if there are no ids, if rows are longer than `max_seq_length`, if a model of
                several tasks gets no task ids, or if the model does not take an argument of `more`.
        """
        token_labels = more.pop("token_labels", None)
        check_extra_arguments(self, more)
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} needs input_ids")
        if labels is not None and labels.dim() == 2 and token_labels is None:
            labels, token_labels = None, labels
        task_ids = self._require_task_ids(input_ids, task_ids)
        longest = self.config.max_seq_length
        if input_ids.shape[1] > longest:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than max_seq_length {longest}")
        states, pooled = self.bert(input_ids, attention_mask, token_type_ids, task_ids)
        row_logits = self.heads.compute_row_logits(pooled, task_ids)
        token_logits = self.heads.compute_token_logits(states, task_ids)
        output = CaMtlOutput(
            logits=self._split_logits_by_task(row_logits, token_logits, task_ids),
            entropy=self.heads.compute_entropy(row_logits, token_logits, task_ids, token_labels),
            pooled=pooled,
        )
        if labels is not None or token_labels is not None:
            scores = self.heads.compute_losses(
                row_logits, token_logits, task_ids, labels, token_labels
            )
            output["task_totals"], output["task_items"] = scores
            by_task = num_items_in_batch is not None and torch.is_tensor(num_items_in_batch)
            by_task = by_task and num_items_in_batch.dim() == 1
            items = num_items_in_batch if by_task else scores.items
            counted = items > 0
            means = torch.where(counted, scores.totals / torch.where(counted, items, 1.0), 0.0)
            output["loss"] = means.sum() / counted.sum().clamp(min=1)
        return format_output(self, output, return_dict)

    def _require_task_ids(self, input_ids: Tensor, task_ids: Tensor | None) -> Tensor:
        """Return task ids [B], 0 for a single task; raise ValueError if they are missing.

        `input_ids` [B, L] gives the number of rows.
        """
        if task_ids is None:
            if len(self.config.tasks) > 1:
                raise ValueError(
                    f"task_ids is missing; it numbers the tasks {', '.join(self.config.tasks)} "
                    "from 0 (PEFT passes it on if its configuration has no task_type)"
                )
            task_ids = input_ids.new_zeros(len(input_ids))
        return task_ids

    def _split_logits_by_task(
        self, row_logits: Tensor, token_logits: Tensor | None, row_task_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Split logits into a tensor per task, of its rows and its outputs only.

        Args:
            row_logits: [B, C], for tasks with labels of rows.
            token_logits: [B, L, C], for tasks with labels of tokens; None if there is no such task.
            row_task_ids: [B], task of each row.
        Returns:
            [rows, outputs] or [rows, L, outputs] of each task.
        """
        logits = []
        for task, (size, kind) in enumerate(zip(self.heads.sizes, self.heads.kinds, strict=True)):
            source = token_logits if kind == "token" else row_logits
            logits.append(source[row_task_ids == task][..., :size])
        return tuple(logits)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module as BERT does, in place, from torch's global generator.

        Conditional norms start as plain ones, and weights of the attention bias at 0.
        """
        initialise_weights(module, self.config.initializer_range)
        if isinstance(module, TaskHeads):
            module.initialise(self.config.initializer_range)
        elif isinstance(module, ConditionalLayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "random_weight_matrix"):
            nn.init.zeros_(module.random_weight_matrix)


class SingleTaskModel(nn.Module):
    """Classifier of one task of a multi-task model, with the interface of transformers.

    Args:
        model: held, not copied.
        task: number of the task in its configuration.
    """

    def __init__(self, model: CaMtlForMultiTask, task: int):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, input_ids: Tensor, **fields: Tensor) -> CaMtlOutput:
        """Map ids [B, L] to `logits` [B, C], or [B, L, C] for labels of tokens.

        Args:
            input_ids: [B, L].
            fields: further arguments of `CaMtlForMultiTask.forward`; labels give no loss here.
        """
        task_ids = torch.full((len(input_ids),), self.task, device=input_ids.device)
        output = self.model(input_ids, task_ids=task_ids, **fields)
        return CaMtlOutput(logits=output.logits[self.task])


def load_from_encoder(
    source: str, config: CaMtlConfig, *, load_last_block: bool = True
) -> tuple[CaMtlForMultiTask, dict[str, list[str]]]:
    """Load a model from BERT's weights; other parameters are drawn from torch's generator.

    Args:
        source: folder or name on the hub, of BERT or of a CA-MTL model.
        config: of the model to build.
        load_last_block: False: with the variant "base" reinitialise the last block, as the
            release does, where the names of that block do not match BERT's.
    Returns:
        the model in float32; names of parameters by "loaded", "new" and "unused" (in the file
        only).
    Raises:
        UserError: if the source cannot be read, lacks weights or has other shapes, holds weights
            that are not finite, or holds those of another kind of model.
    """
    model, report = load_pretrained(CaMtlForMultiTask, source, "--model", config=config)
    new_names = set(report["missing_keys"])
    if not load_last_block and config.variant == "base":
        last = model.bert.encoder.layer[-1]
        for name, module in last.named_modules():
            # The parts of BERT, without those that only CA-MTL has.
            if isinstance(module, nn.Linear | ConditionalLayerNorm) and not _is_conditioning_module(
                name
            ):
                model._init_weights(module)
                prefix = f"bert.encoder.layer.{len(model.bert.encoder.layer) - 1}.{name}"
                new_names |= {f"{prefix}.weight", f"{prefix}.bias"}
    names = [name for name, _ in model.named_parameters()]
    return model, {
        "loaded": [name for name in names if name not in new_names],
        "new": [name for name in names if name in new_names],
        "unused": sorted(report["unexpected_keys"]),
    }


def freeze_blocks(
    model: CaMtlForMultiTask, first_block: int, last_block: int, *, as_released: bool = False
) -> Mapping[str, int]:
    """Freeze embeddings and blocks `first_block` to `last_block`, except their conditioning layers.

    The model is changed in place: frozen parameters require no gradient.

    Args:
        first_block, last_block: numbers from 0, both included.
        as_released: freeze the layer of the attention bias too, as the release does against the
            paper; it keeps its initial weights.
    Returns:
        numbers of parameters: "trained", "frozen".
    Raises:
        ValueError: if there are no such blocks.
    Source: Pilault et al. 2021 (CA-MTL), section 2 and appendix A.3.
    """
    blocks = model.bert.encoder.layer
    if not 0 <= first_block <= last_block < len(blocks):
        raise ValueError(
            f"blocks {first_block}-{last_block}: the model has blocks 0-{len(blocks) - 1}"
        )
    model.bert.embeddings.requires_grad_(False)
    for block in blocks[first_block : last_block + 1]:
        block.requires_grad_(False)
        if isinstance(block, ConditionalLayer):
            _unfreeze_conditioning(block, as_released)
    counts = {"trained": 0, "frozen": 0}
    for parameter in model.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def _unfreeze_conditioning(block: ConditionalLayer, as_released: bool) -> None:
    """Let the conditioning layers of a block require gradients.

    `as_released`: see `freeze_blocks`.
    """
    attention = block.attention["self"]
    attention.random_weight_matrix.requires_grad_(True)
    attention["cond_block_diag_attn"].requires_grad_(not as_released)
    for module in block.modules():
        if isinstance(module, ConditionalLayerNorm):
            module.ln_weight_modulation.requires_grad_(True)
    if block.adapter is not None:
        block.adapter.requires_grad_(True)


def _is_conditioning_module(name: str) -> bool:
    """Return True for a module that BERT does not have; `name` is relative to the block."""
    return name.startswith("adapter") or "gb_weights" in name
