"""KV caches of the experts of a forest during generation."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class ExpertCache:
    """One expert's share of a cache: the keys and values of its layers, then its evidence.

    The evidence is a layer too. Its keys are the states before the output matrix [B, 1, S, D], of
    which the last gives the next token's probability once that token is known. Its values
    [B, 1, S, 2] are the log-probability of each token after those before it, and 1 where a token
    is real.

    Args:
        cache: the cache of all experts; None: nothing is kept.
        first_layer: index in it of the expert's first layer.
        layer_count: layers of the expert, the evidence not counted.
    """

    def __init__(self, cache: Cache | None, first_layer: int, layer_count: int):
        self.cache = cache
        self.first = first_layer
        self.layers = layer_count

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of cached tokens; 0 without a cache."""
        return self.cache.get_seq_length(self.first + layer) if self.cache is not None else 0

    # Stock models read the following before they build masks. Every layer keeps all positions;
    # windows of attention are applied by the masks.
    is_compileable = False

    @property
    def is_sliding(self) -> list[bool]:
        """False for each layer: none drops positions."""
        return [False] * self.layers

    def get_query_offset(self, layer: int = 0) -> int:
        """Return the position of the first new token."""
        return self.get_seq_length(layer)

    def get_mask_sizes(self, queries: int, layer: int) -> tuple[int, int]:
        """Return how many keys `queries` new tokens attend to, and the first key's position."""
        return self.get_seq_length(layer) + queries, 0

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, H, L, K] of a layer to the cache; return all of it [B, H, S, K].

        `layer` counts the layers of this expert, from 0; other arguments are ignored.
        """
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, self.first + layer)

    def get_last_states(self) -> Tensor:
        """Return the state of the last cached token before the output matrix, [B, 1, D].

        There must be a cache with tokens in it, which `get_seq_length` tells.
        """
        return self._get_evidence_layer().keys[:, 0, -1:]

    def get_real_tokens(self) -> Tensor:
        """Return a mask of cached tokens that are not padding, [B, S] bool; there must be some."""
        return self._get_evidence_layer().values[:, 0, :, 1] > 0

    def add_evidence(self, states: Tensor, log_probs: Tensor, real_tokens: Tensor) -> Tensor:
        """Add the evidence of L new tokens; return the log-probabilities of all tokens [B, S].

        S counts cached and new tokens; without a cache these are the new ones alone.

        Args:
            states: [B, L, D] before the output matrix.
            log_probs: [B, L], of each token after those before it.
            real_tokens: [B, L], nonzero where a token is not padding.
        """
        values = torch.stack([log_probs, real_tokens.to(log_probs.dtype)], dim=-1)
        _, values = self.update(states[:, None], values[:, None], self.layers)
        return values[:, 0, :, 0]

    def _get_evidence_layer(self) -> CacheLayerMixin:
        """Return the layer of the cache that follows the expert's own layers."""
        return self.cache.layers[self.first + self.layers]


def split_cache(cache: Cache | None, layer_counts: Sequence[int]) -> list[ExpertCache]:
    """Split a cache into the parts of the experts, in their order.

    Args:
        cache: an empty one, or one that the same experts filled; None: parts that keep nothing.
        layer_counts: number of layers of each expert, without its layer of evidence.
    Raises:
        ValueError: if the cache is of a kind that cannot grow, or has layers and their number is
            not that of these experts.
    """
    if cache is not None and getattr(cache, "layer_class_to_replicate", None) is None:
        raise ValueError(
            f"a forest needs a cache that grows: DynamicCache() in place of {type(cache).__name__}"
        )
    firsts = list(accumulate((depth + 1 for depth in layer_counts), initial=0))
    if cache is not None and len(cache.layers) not in (0, firsts[-1]):
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the experts in use need {firsts[-1]}: it "
            "was filled under another prior, or by another model"
        )
    return [
        ExpertCache(cache, first, depth) for first, depth in zip(firsts, layer_counts, strict=False)
    ]


def fill_mask_and_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    expert_cache: ExpertCache,
    pad_id: int | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Complete the attention mask and the positions of a pass.

    Without a mask, padding is recognised by its id in the first pass, and remembered by the cache
    in later ones, whose new tokens all count as real.

    Args:
        input_ids: [B, L], the new tokens.
        attention_mask: [B, S], S cached and new tokens, or None.
        position_ids: [B, L] or None. If they are passed without a mask and nothing is cached,
            nothing is taken for padding.
        expert_cache: cached keys, values and real tokens of one expert.
        pad_id: None: no id is padding.
    Returns:
        the mask [B, S], None if all tokens are real; and the positions [B, L], None if the models
        are to derive them from the mask.
    """
    if attention_mask is None and expert_cache.get_seq_length():
        real_tokens = torch.ones_like(input_ids, dtype=torch.bool)
        attention_mask = torch.cat([expert_cache.get_real_tokens(), real_tokens], dim=1)
    elif attention_mask is None and position_ids is None:
        real_tokens = input_ids != (-1 if pad_id is None else pad_id)
        attention_mask = None if bool(real_tokens.all()) else real_tokens
    if attention_mask is None and position_ids is None:
        length = input_ids.shape[1]
        position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    return attention_mask, position_ids
