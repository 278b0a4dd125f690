"""Reasons to end a run before its last step, and the signals that are one of them."""

import signal
from enum import IntEnum


class Stop(IntEnum):
    """Reason to end a run before its last step; of two reasons the larger counts."""

    NO = 0
    SIGNAL = 1
    NONFINITE = 2


class StopSignals:
    """Handler of SIGTERM, SIGUSR1 (Slurm's notice of preemption) and Ctrl-C: save and stop.

    The second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.stop_reason = Stop.NO
        self.previous_handlers = {
            number: signal.signal(number, self._record_signal)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def _record_signal(self, signal_number: int, frame: object) -> None:
        """Record that the run must stop; the second Ctrl-C raises KeyboardInterrupt.

        A handler of `signal`: `signal_number` is that of the signal, `frame` is not used.
        """
        if signal_number == signal.SIGINT and self.stop_reason:
            raise KeyboardInterrupt
        self.stop_reason = Stop.SIGNAL

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were installed before the loop."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
