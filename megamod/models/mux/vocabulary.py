"""Access to the two matrices of a multiplexed encoder that have a row per token."""

from torch import nn


class VocabularyAccess:
    """Methods by which transformers reads, replaces and resizes these matrices."""

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the word embeddings; None in a generator that uses the discriminator's."""
        embeddings = getattr(self.backbone, "embeddings", None)
        return None if embeddings is None else embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of word embeddings by `value`."""
        self.backbone.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the matrix of the retrieval head; None without a head."""
        return self.retrieval_head.decoder if hasattr(self, "retrieval_head") else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output matrix, which is the retrieval head's, by `value`."""
        self.retrieval_head.decoder = value

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """Resize the word embeddings as `PreTrainedModel` does, and return them.

        Arguments are those of that method.
        """
        table = super().resize_token_embeddings(*args, **kwargs)
        head, rows = self.get_output_embeddings(), table.weight.shape[0]
        if head is not None and head.weight.shape[0] != rows:
            self.set_output_embeddings(self._get_resized_lm_head(head, rows))
        return table
