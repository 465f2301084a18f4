"""What asks the job to end: a step that has begun ends whole, and its checkpoint is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Ctrl-C, a cluster or a container that is stopped, a terminal that is closed; Windows has no last.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def interrupts() -> Iterator[list[bool]]:
    """Holds something once a signal came, so that a step ends whole; a second of its kind kills."""
    asked: list[bool] = []
    before = {}

    def note(number: int, _: object) -> None:
        asked.append(True)
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)

    # Python hears signals in the main thread alone.
    if threading.current_thread() is threading.main_thread():
        for number in present():
            # `nohup` ignores SIGHUP; `&` ignores SIGINT, which a `kill` may still mean.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_interrupts_to_main(_: int) -> None:
    """Signals reach the loader's processes too, whose batch the last step still wants."""
    for number in present():
        signal.signal(number, signal.SIG_IGN)


def present() -> list[int]:
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
