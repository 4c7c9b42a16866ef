"""How far a loop is: a bar in a terminal, a line now and then in a log file."""

import sys
import time

import tqdm as library


def tqdm(items, desc, *, total=None, initial=0, **options):
    """``tqdm.tqdm``; where standard error is no terminal, an iterable with its ``set_postfix`` that prints a line once
    a minute."""
    if sys.stderr is not None and sys.stderr.isatty():
        options = {"mininterval": 2, "dynamic_ncols": True} | options
        return library.tqdm(items, desc, total=total, initial=initial, **options)
    return _Lines(items, desc, total if total is not None else len(items), initial, **options)


class _Lines:
    def __init__(self, items, desc, total, initial, disable=False, **of_a_bar):
        self.items, self.desc, self.total, self.initial, self.disable = items, desc, total, initial, disable
        self.postfix = ""

    def set_postfix(self, refresh=True, **values):
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def __iter__(self):
        told = time.monotonic()
        for done, item in enumerate(self.items, self.initial + 1):
            yield item
            if not self.disable and time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{self.desc}: {done} of {self.total}{self.postfix}", file=sys.stderr, flush=True)
