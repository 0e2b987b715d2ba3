"""Stop a run on SIGTERM or SIGINT where nothing that was computed is lost, and say how it goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from trl_tafs.processes import any_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Raised at a safe point after a signal; `Stopper.listening` turns it into what the signal asked for."""


class Stopper:
    """Hears SIGTERM and SIGINT while a run trains.

    The first one is remembered until a safe point; a second one stops at once. A handler that isn't Python's own (a
    scheduler's, a signal that is ignored) stays as it is.

    Attributes:
        command: a line that resumes the run, where one is known.
        saved: what was saved, for the last message.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.signal: signal.Signals | None = None
        self.command: str | None = None
        self.saved = "nothing was saved"
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process was told to stop; all processes ask together."""
        return any_process(self.accelerator, self.requested) if self.accelerator.num_processes > 1 else self.requested

    def check_alone(self) -> None:
        """Stop here if this process is the only one: where several don't do the same steps."""
        if self.requested and self.accelerator.num_processes == 1:
            raise Stopped

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are heard.

        Raises:
            KeyboardInterrupt: it stopped for SIGINT.
            SystemExit: it stopped for SIGTERM, or since another process did; the code is 128 and the signal's number.
        """
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            usual = (signal.SIG_DFL, signal.default_int_handler)
            heard = [number for number in SIGNALS if signal.getsignal(number) in usual]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        except Stopped:
            number = self.signal or signal.SIGTERM
            self.accelerator.print(f"stopped by {number.name}: {self.saved}. {self._remedy()}", flush=True)
            raise _of(number) from None
        finally:
            self._restore()
        if self.signal is not None:
            self.accelerator.print(f"stopped by {self.signal.name} at the run's end: everything is written", flush=True)
            raise _of(self.signal)

    def _hear(self, number: int, frame: Any) -> None:
        first, self.signal = self.signal is None, signal.Signals(number)
        if not first:
            self._restore()
            raise _of(self.signal)
        said = "stopping at the next safe point; a second signal stops at once, and what isn't saved is lost"
        with suppress(RuntimeError):  # it came in the middle of another print
            self.accelerator.print(f"{self.signal.name}: {said}", flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remedy(self) -> str:
        if self.command is None:
            return "Go on with TAFSGRPOConfig(..., resume_from='latest')"
        launcher = " under the same launcher" if self.accelerator.num_processes > 1 else ""
        return f"Go on{launcher} with:\n  {self.command}"


def _of(number: signal.Signals) -> BaseException:
    """Return what a process that doesn't hear a signal ends with, or as a shell counts it."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
