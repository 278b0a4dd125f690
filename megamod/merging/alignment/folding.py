"""Pre-norm models whose norms have no gain and no bias of their own, so that the residual stream
may be rotated.

The gain g and bias b of a norm are folded into the matrices that read it; of a LayerNorm, the mean
that it subtracts is folded into the matrices that write to the stream. The result is a model of the
same class. A LayerNorm with a reader that has no bias, as output matrices, keeps a bias of ones:
normalised features are orthogonal to it, so such a reader W holds its bias W b along ones. n(x) is
the norm without gain and bias, C = I - 1 1ᵀ / d:

    W (g ⊙ n(x) + b) = (W diag(g) C + W b 1ᵀ / d) (n(x) + 1)
Source: Ashkboos et al. 2024 (SliceGPT), section 3, for rotations of the residual stream.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megamod.dist.scope import parse_expert_domain
from megamod.errors import UserError
from megamod.merging.alignment.symmetry import Symmetry

ReadTensor = Callable[[str], Tensor]
"""Returns a tensor of a model by name; tied matrices under both names."""


@dataclass(frozen=True)
class Norm:
    """Tensors of a norm.

    Attributes:
        gain, shift: names of its vectors; None: it has none.
        ones: a reader without a bias makes it keep a bias of ones.
    """

    gain: str
    shift: str | None
    ones: bool


@dataclass(frozen=True)
class Folding:
    """Changes that fold the norms of a model.

    Attributes:
        norms: norms of the model.
        readers: matrix that reads a norm -> the norm, and the axis of its features.
        biases: bias of a reader -> the matrix.
        writers: tensor that writes to the stream -> axis of its features.
        rms: norms do not subtract the mean.
    """

    norms: tuple[Norm, ...]
    readers: Mapping[str, tuple[Norm, int]]
    biases: Mapping[str, str]
    writers: Mapping[str, int]
    rms: bool

    def compute_folded_tensor(self, name: str, read: ReadTensor) -> Tensor:
        """Compute a tensor of the folded model, in float64; one that no norm touches is unchanged.

        Args:
            name: name of the tensor.
            read: reads a stored tensor of the model by its name.
        """
        tensor = read(name).double()
        for norm in self.norms:
            if name == norm.gain:
                return tensor.new_ones(len(tensor))
            if name == norm.shift:
                return tensor.new_full((len(tensor),), float(norm.ones))
        if name in self.readers:
            norm, axis = self.readers[name]
            return self._fold_gain_into_reader(tensor.movedim(axis, -1), norm, read).movedim(
                -1, axis
            )
        if name in self.biases:
            matrix = self.biases[name]
            norm, axis = self.readers[matrix]
            if norm.shift is None or norm.ones:
                return tensor
            return tensor + read(matrix).double().movedim(axis, -1) @ read(norm.shift).double()
        if name in self.writers and not self.rms:
            axis = self.writers[name]
            return tensor - tensor.mean(axis, keepdim=True)
        return tensor

    def _fold_gain_into_reader(self, matrix: Tensor, norm: Norm, read: ReadTensor) -> Tensor:
        """Return a matrix [..., d] that reads a norm, multiplied by the norm's gain.

        With `norm.ones` the norm's bias is folded into it, too; otherwise it is folded into the
        bias of the reader, see `biases`.

        Args:
            read: reads a stored tensor of the model by its name.
        """
        scaled = matrix * read(norm.gain).double()
        if self.rms:
            return scaled
        scaled -= scaled.mean(-1, keepdim=True)
        if norm.ones:
            constant = matrix @ read(norm.shift).double() / matrix.shape[-1]
            scaled += constant[..., None]
        return scaled


def find_folding(symmetry: Symmetry) -> Folding:
    """Find the norms of a pre-norm model, their readers, and the writers to the residual stream.

    Args:
        symmetry: permutation groups of the model, with groups of the residual stream.
    Raises:
        UserError: if a norm of one expert is read by weights of all.
    """
    norms, readers, biases, writers = [], {}, {}, {}
    for group in symmetry.select_groups("res"):
        named: dict[str | None, tuple[str, str | None]] = {}
        for axis in group.producing_axes:
            domain = parse_expert_domain(axis.tensor)
            if axis.role == "gain":
                named[domain] = axis.tensor, None
            elif axis.role == "shift":
                named[domain] = named[domain][0], axis.tensor
            else:
                writers[axis.tensor] = axis.dim
        for domain, (gain, shift) in named.items():
            reading = [
                axis
                for axis in group.reading_axes
                if domain is None or parse_expert_domain(axis.tensor) == domain
            ]
            with_bias = {a.tensor: f"{a.tensor.removesuffix('weight')}bias" for a in reading}
            ones = shift is not None and not symmetry.tensors.issuperset(with_bias.values())
            norm = Norm(gain, shift, ones)
            norms.append(norm)
            readers |= {axis.tensor: (norm, axis.dim) for axis in reading}
            biases |= {b: w for w, b in with_bias.items() if b in symmetry.tensors}
        for axis in group.reading_axes:
            if axis.tensor not in readers:
                raise UserError(
                    f"{axis.tensor}: reads norms of several experts, which cannot be folded into "
                    "it; leave out 'res' from align.groups"
                )
    return Folding(tuple(norms), readers, biases, writers, symmetry.family.rms)
