"""Timing of calls with cold caches, and the copy bandwidth and matrix product rate of a machine."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

CYCLES_PER_SECOND = 2e9  # of a GPU, about; sets the time that it is kept waiting
LONGEST_WAIT = 0.02  # seconds


@dataclass(frozen=True)
class MachineSpeed:
    """Measured copy bandwidth and matrix product rate of this machine."""

    device: str
    bytes_per_second: float
    flops_per_second: float
    software: str = ""

    def make_record(self) -> dict[str, object]:
        """Make the values for a JSON file, which `format_machine_speed` formats."""
        return asdict(self)


class Clock:
    """Timer of calls on one device, with cold caches: a large buffer is written before each.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        size = 256 << 20 if self.cuda else 64 << 20
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object], ahead: float = 0.0) -> float:
        """Time a call once and return seconds.

        Args:
            ahead: seconds that a GPU is kept busy before, so that the host has queued the whole
                call when the first of its kernels starts: launching is then not part of the time.
        """
        self.flush.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if ahead:
            torch.cuda._sleep(int(min(ahead, LONGEST_WAIT) * CYCLES_PER_SECOND))
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000

    def measure_host_time(self, call: Callable[[], object], rounds: int = 3) -> float:
        """Measure the seconds until a call returns on the host, done or not on the device.

        The least of `rounds` calls.
        """
        result = []
        for _ in range(rounds):
            synchronise(self.cuda)
            start = time.perf_counter()
            call()
            result.append(time.perf_counter() - start)
        synchronise(self.cuda)
        return min(result)


def synchronise(cuda: bool) -> None:
    """Wait until the GPU has finished; does nothing without `cuda`."""
    if cuda:
        torch.cuda.synchronize()


def measure_machine_speed(device: str) -> MachineSpeed:
    """Measure copy bandwidth (bytes read and written) and rate of a large GEMM, the best of ten.

    `device` is "cuda" or "cpu".
    """
    clock = Clock(device)
    cuda = device == "cuda"
    source = torch.empty(1 << 30 if cuda else 1 << 25, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(10))
    gemm = min(clock(lambda: a @ b) for _ in range(10))
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return MachineSpeed(
        name, 2 * source.numel() / copy, 2 * size**3 / gemm, format_software_versions()
    )


def format_machine_speed(speed: dict[str, object]) -> str:
    """Format the values of `MachineSpeed.make_record` in one line."""
    copy, gemm = speed["bytes_per_second"] / 1e9, speed["flops_per_second"] / 1e12
    return f"{speed['device']}, {speed['software']}: copy {copy:.0f} GB/s, GEMM {gemm:.3g} TFLOP/s"


def format_software_versions() -> str:
    """Format the versions of Python, torch and Triton in one line."""
    result = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    try:
        result.append(f"triton {version('triton')}")
    except PackageNotFoundError:
        result.append("no triton")
    return ", ".join(result)


def compute_percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Compute the 20th, 50th and 80th percentile of at least one time."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
