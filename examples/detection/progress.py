"""How far a long piece of work is: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from contextlib import suppress

from tqdm import tqdm

SECONDS = 60.0


class Progress:
    """Counts to `total`; elsewhere than on a terminal the last count is a line too."""

    def __init__(self, name: str, total: int, done: int, unit: str, silent: bool = False) -> None:
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self.silent = silent
        # tqdm takes None as "no bar where the output is no terminal".
        disable = True if silent else None
        self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, disable=disable)
        self.lines = self.bar.disable and not silent
        self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, note: str = "") -> None:
        self.done += 1
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update()
        due = time.monotonic() - self.said >= SECONDS
        if self.lines and (due or self.done == self.total):
            self.said = time.monotonic()
            text = f"{self.name}: {self.unit} {self.done} of {self.total}"
            print(", ".join(filter(None, (text, note))), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.silent:
            return
        # The terminal or pipe that read it may be gone: what was trained is still to be saved.
        with suppress(OSError):
            self.bar.write(text)
            sys.stdout.flush()


def expected(seconds: float) -> str:
    """In words; evaluations are not counted."""
    if seconds < 100:
        return f"about {seconds:.0f} s of training"
    hours, minutes = divmod(round(seconds / 60), 60)
    return "about " + (f"{hours} h " if hours else "") + f"{minutes} min of training"
