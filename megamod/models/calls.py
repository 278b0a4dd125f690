"""Conventions of transformers that all models follow: extra arguments, output, length of text."""

from collections.abc import Mapping

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

WITHOUT_EFFECT = ("use_cache", "cache_position")
"""Arguments that do not change a result, only its computation, so models may ignore them."""


def check_extra_arguments(model: PreTrainedModel, extra_arguments: Mapping[str, object]) -> None:
    """Refuse arguments that a model does not have, unless they are None, False or have no effect.

    Trainer, PEFT and TRL pass every model the same arguments, most of them None.

    Args:
        model: for the message.
        extra_arguments: arguments of its `forward` that are not among its parameters, by name.
    Raises:
        ValueError: naming the argument.
    """
    for name, value in extra_arguments.items():
        if value is not None and value is not False and name not in WITHOUT_EFFECT:
            shown = f"{name}={value!r}"
            if isinstance(value, Tensor):
                shown = f"{name} of shape {tuple(value.shape)}"
            raise ValueError(f"{type(model).__name__}.forward does not support {shown}")


def format_output(
    model: PreTrainedModel, output: ModelOutput, return_dict: bool | None
) -> ModelOutput | tuple:
    """Return a copy of an output with its fields in the order of the class, or a tuple of them.

    Without the copy, fields that were set after construction would come last.

    Args:
        return_dict: False for a tuple of the fields that are not None; None: as the model's
            configuration says.
    """
    output = type(output)(**output)
    wants_dict = model.config.return_dict if return_dict is None else return_dict
    return output if wants_dict else output.to_tuple()


def check_positions(position_ids: Tensor, columns: int, positions: int) -> None:
    """Refuse text that is longer than a model's position table.

    Args:
        position_ids: [B, L], the first position being 0.
        columns: tokens of a row so far, padding and cached ones included.
        positions: `max_position_embeddings`.
    Raises:
        ValueError: if a token's position is not in the table.
    """
    # Reading the largest position waits for the device, so only where it can be too large.
    if columns > positions and (longest := int(position_ids.max()) + 1) > positions:
        raise ValueError(
            f"a text of {longest} tokens is longer than the {positions} positions of the model "
            "(max_position_embeddings)"
        )


def select_logit_positions(values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select the positions that logits are computed for: [B, L, ...] -> [B, kept, ...].

    Args:
        values: states [B, L, D], or another value of each position, such as weights [B, L].
        logits_to_keep: number of last positions, 0 for all; or a tensor of positions [kept] int64.
    """
    if isinstance(logits_to_keep, Tensor):
        return values[:, logits_to_keep]
    return values[:, -logits_to_keep:]


class BoundedGeneration(GenerationMixin):
    """Generation that stops at the last position of a learned position table.

    GPT-2 of transformers continues and ends with an IndexError. A prompt that fills all positions
    gets one more token, which needs no position.
    """

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, **prompt: object
    ) -> GenerationConfig:
        """Set the lengths as `GenerationMixin` does, then lower them to the last position.

        Logs a warning, once, if a longer text was requested. `generate` calls it.

        Args:
            generation_config: of the call, changed in place.
            prompt: further arguments of the method that this one replaces, by name.
        Returns:
            the generation configuration, whose `max_length` and `min_length` are changed.
        """
        settled = super()._prepare_generated_length(generation_config, **prompt)
        length, limit = prompt["input_ids_length"], self.config.max_position_embeddings
        if prompt["model_input_name"] == "inputs_embeds":
            limit -= prompt["inputs_tensor"].shape[1] - length
        limit = max(limit, length + 1)
        if prompt["has_default_max_length"] and settled.max_length <= length:
            settled.max_length = limit  # the stock default has no token for a prompt this long
        if settled.max_length > limit:
            if self.config.max_position_embeddings > length:
                logging.get_logger("transformers").warning_once(
                    f"generation stops at {limit} tokens, {settled.max_length} were asked for: "
                    f"max_position_embeddings is {self.config.max_position_embeddings}"
                )
            settled.max_length = limit
            settled.min_length = min(settled.min_length or 0, limit)
        return settled
