"""Progress of a loop: a bar in a terminal, a line once a minute in a log file."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import tqdm as library


def tqdm(items: Any, desc: str, *, total: int | None = None, initial: int = 0, **options: Any) -> Any:
    """``tqdm.tqdm``; where standard error is no terminal, an iterable with ``set_postfix`` that prints a line to it
    once a minute.

    items: an iterable, with a length unless ``total`` is given; initial: how many items were done before.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        options = {"mininterval": 2, "dynamic_ncols": True} | options
        return library.tqdm(items, desc, total=total, initial=initial, **options)
    return _Lines(items, desc, total if total is not None else len(items), initial, **options)


class _Lines:
    def __init__(
        self, items: Any, desc: str, total: int, initial: int, disable: bool | None = False, **bar_options: Any
    ) -> None:
        self.items, self.desc, self.total, self.initial, self.disable = items, desc, total, initial, disable
        self.postfix = ""

    def set_postfix(self, refresh: bool = True, **values: Any) -> None:
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def __iter__(self) -> Iterator[Any]:
        printed = time.monotonic()
        for done, item in enumerate(self.items, self.initial + 1):
            yield item
            if not self.disable and time.monotonic() - printed > 60:
                printed = time.monotonic()
                print(f"{self.desc}: {done} of {self.total}{self.postfix}", file=sys.stderr, flush=True)
