"""RSA demultiplexing, forward and backward: split first layer against the concatenated form.

    python tests/bench/demux_split.py --n 2 5 10 --json FILE

The peer is torch.compile of the published form, which concatenates key and hidden state. Both are
computed in turns, in one process and on one thread, in float32, L = 2, with all gradients. What is
compared is the thread's processor time: minima of the rounds, three times over. The count of
operations allows a ratio of 2.0, 2.5 and 2.73 at N = 2, 5 and 10.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

COUNTS = (2, 5, 10)
FLOORS = {2: 1.5, 5: 1.8, 10: 2.0}  # times the speed of the peer
GROUPS, LENGTH, SIZE, EPS = 4, 128, 768, 1e-12
ROUNDS, REPEATS = 5, 3


def row_name(instances: int) -> str:
    """The name of the ratio in the table of all benchmarks."""
    return f"demux split / concatenated, N = {instances}"


def make_inputs(instances: int, size: int = SIZE) -> list[Tensor]:
    """Mixed states, keys, and weights of both layers and the norm; all need gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(GROUPS, LENGTH, size), (instances, size), (size, 2 * size), (size,)]
    shapes += [(size, size), (size,), (size,), (size,)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    for folder in (2, 4):
        drawn[folder] *= size**-0.5
    return [item.requires_grad_() for item in drawn]


def concatenated(
    hidden: Tensor,
    key: Tensor,
    first: Tensor,
    first_bias: Tensor,
    last: Tensor,
    last_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
) -> Tensor:
    """The published form: [key ; hidden] for every instance and position, [B, N, L, D]."""
    keys = key[None, :, None].expand(len(hidden), -1, hidden.shape[1], -1)
    repeated = hidden[:, None].expand(-1, len(key), -1, -1)
    x = F.gelu(F.linear(torch.cat([keys, repeated], -1), first, first_bias))
    last_state = F.gelu(F.linear(x, last, last_bias))
    return F.layer_norm(last_state, norm.shape, norm, norm_bias, EPS) + x


def split(
    hidden: Tensor,
    key: Tensor,
    first: Tensor,
    first_bias: Tensor,
    last: Tensor,
    last_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
) -> Tensor:
    """The implementation that the models call."""
    from megamod_kernels.demux import Chain, rsa_demux, split_projection

    parts = split_projection(hidden, key, first, first_bias)
    return rsa_demux(*parts, Chain([], (last, last_bias), (norm, norm_bias), EPS))


def measure(counts: Sequence[int] = COUNTS, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Sorted ratios of the repeats: the middle one is the result, the others its spread."""
    return {
        row_name(instances): sorted(peer / ours for ours, peer in _seconds(instances, rounds))
        for instances in counts
    }


def _seconds(instances: int, rounds: int) -> list[tuple[float, float]]:
    """By repeat: seconds of forward and backward of ours and of the peer."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    peer = torch.compile(concatenated, fullgraph=True, dynamic=False)
    inputs = make_inputs(instances)
    upstream = torch.ones(GROUPS, instances, LENGTH, SIZE)

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, upstream)

    for ours, expected in zip(step(split), step(peer), strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
    result = []
    for _ in range(REPEATS):
        least = {split: float("inf"), peer: float("inf")}
        for _ in range(rounds):
            for function in least:
                started = time.thread_time()
                step(function)
                least[function] = min(least[function], time.thread_time() - started)
        result.append((least[split], least[peer]))
    return result


def main() -> None:
    """Measure what the flags ask for, and print it beside the floors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=COUNTS, help="instances of a group")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the least counts")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    record = []
    for instances in args.n:
        times = _seconds(instances, args.rounds)
        ratios = sorted(peer / ours for ours, peer in times)
        ours, peer = (min(item) for item in zip(*times, strict=True))
        floor = FLOORS.get(instances)
        record.append(
            {"num_instances": instances, "ratios": ratios, "floor": floor}
            | {"seconds": ours, "peer_seconds": peer}
        )
        print(
            f"{row_name(instances):40} {ratios[1]:6.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})  "
            f"{ours * 1e3:.0f} against {peer * 1e3:.0f} ms" + (f", floor {floor}" if floor else ""),
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
