"""SIGTERM and Ctrl-C as a wish to stop: noted while the Trainer works, so that it can save first."""

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """The run ends because a signal asked for it.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Handles the signals between `with` and its end.

    Outside the Trainer's loops a signal ends the run where it stands. Inside them the first one is only noted in
    `requested`; the second ends the run.

    Attributes:
        requested: Number of the signal that was noted; 0 for none.
        waiting: Whether signals are noted.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.waiting = False
        self._signals = [signal.SIGTERM, signal.SIGINT]
        self._before: dict[int, Any] = {}

    def also(self, signum: int) -> None:
        """Take another signal for a wish to stop."""
        if signum not in self._signals:
            self._signals.append(signal.Signals(signum))

    def wait(self, waiting: bool = True) -> None:
        """Start or end noting signals, with the handlers that a Trainer may have put in our place."""
        self.waiting = waiting
        if self._before:
            self._install()

    def __enter__(self) -> "StopSignals":
        # A process whose parent has it ignore interrupts goes on ignoring them.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: h for s in self._signals if (h := signal.getsignal(s)) != signal.SIG_IGN}
            self._install()
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _install(self) -> None:
        for signum in self._signals:
            if signum in self._before or signum not in (signal.SIGTERM, signal.SIGINT):
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.waiting or self.requested:
            raise Stopped(signum)
        self.requested = signum
        print(
            f"\n{signal.Signals(signum).name}: stopping as soon as the state is saved; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )
