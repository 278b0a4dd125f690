"""Matrices of a language model that Muon may train."""

from torch import nn

from megamod.models.lm.demix import OutputHead


def mark_hidden_matrices(model: nn.Module) -> None:
    """Set the attribute `use_muon` of every parameter of a language model, which DeepSpeed reads.

    True for parameters of two or more dimensions outside the embeddings (tables of positions among
    them) and the output head, else False.

    Args:
        model: a causal language model, changed in place.
    """
    head = model.get_output_embeddings()
    outside = {
        parameter
        for module in model.modules()
        if isinstance(module, (nn.Embedding, OutputHead)) or module is head
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        parameter.use_muon = parameter.dim() > 1 and parameter not in outside
