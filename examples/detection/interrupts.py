"""Ctrl-C: a step that has begun ends whole, so that its checkpoint can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[list[bool]]:
    """Holds something once Ctrl-C was pressed, so that a step ends whole; a second one kills."""
    asked: list[bool] = []

    def note(*_: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        # Python hears signals in the main thread alone.
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def leave_interrupts_to_main(_: int) -> None:
    """Ctrl-C reaches the loader's processes too, whose batch the last step still wants."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
