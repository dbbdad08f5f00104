"""Ctrl-C and SIGTERM, where they would do harm."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_in_order_on_sigterm() -> None:
    """Make SIGTERM, which schedulers send before they take a machine away, end the program as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the first Ctrl-C or SIGTERM to the end of the block (also usable as a decorator); a second one does not wait.

    For calls into code that does not expect an exception at any point: in the middle of a transaction it leaves a database
    locked, or is lost in a callback. Only the main thread gets signals; elsewhere this does nothing.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    # Handlers that Python does not call (ignored, default) stay as they are.
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if is_main and callable(signal.getsignal(number))}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted:
        signal.raise_signal(noted[0])
