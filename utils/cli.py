"""Command-line options of all scripts: checked values, clear errors, the device, the output folder."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class InputError(Exception):
    """Input that the user can correct. The message is one sentence that names the file and the remedy."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the unedited description of the script, and default values other than None, False and []."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser with this project's help and errors: an InputError of one sentence, without the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help} | options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        try:
            return super().parse_args(args, namespace)
        except InputError as error:
            for file in sys.argv[1:] if args is None else args:
                if file.startswith("-") and os.path.lexists(file):  # a shell expands * to such names
                    raise InputError(f"the file {file} is taken for an option; write ./{file}") from error
            raise


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The ``type=`` of an option: an integer from ``least`` to ``most`` (None: no upper limit)."""
    return _number(int, "a whole number", least, most)


def number(
    least: float | None, most: float | None = None, *, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """The ``type=`` of an option: a finite number from ``least`` to ``most``, both included.

    above, below: limits that are not included themselves, instead of ``least`` and ``most``.
    """
    return _number(float, "a number", least, most, above, below)


def _number(
    kind: Callable[[str], T],
    name: str,
    least: float | None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Callable[[str], T]:
    limits = {"of at least": least, "of at most": most, "above": above, "below": below}
    allowed = f"{name} {' and '.join(f'{word} {end:g}' for word, end in limits.items() if end is not None)}".strip()

    def parse(text: str) -> Any:
        value: Any
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (least is None or value >= least) and (most is None or value <= most)
        inside = inside and (above is None or value > above) and (below is None or value < below)
        if not (math.isfinite(value) and inside):
            raise argparse.ArgumentTypeError(f"{text!r} does not fit; give {allowed}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """The ``type=`` of an option that is one of several words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} does not fit; give {', '.join(choices[:-1])} or {choices[-1]}")
        return text

    return parse


def path_of(text: str) -> Path:
    """The ``type=`` of an option that is a path: a Path in which a leading ~ is expanded to the home folder.

    A file whose own name begins with ~ is kept as it is.
    """
    if text.startswith("~") and os.path.lexists(text):
        return Path(os.path.abspath(text))
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} names a home folder that is not known; write the path out")
    return Path(path)


def add_gpu_option(group: Any) -> None:
    """--gpu, for ``select_device``. group: an argparse parser or a group of its options."""
    text = "CUDA device; -1 is the CPU; default: the first GPU, or the CPU where there is none"
    group.add_argument("--gpu", type=integer(-1), metavar="N", help=text)


def select_device(gpu: int | None, offset: int = 0) -> "torch.device":
    """The torch.device of ``--gpu``: -1 is the CPU, n the n-th CUDA device, counted from 0.

    None is the first GPU, or the CPU where there is none; a line says which. offset: added to the number of a GPU, for
    a process that is not the first one of its machine.
    Raises InputError when that GPU is not there.
    """
    import torch  # here, so that wrong arguments are reported before torch is imported

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    first = 0 if found else -1
    number = first if gpu is None else gpu
    if number < 0:
        if gpu is None and not offset:
            _print_once("device: cpu (no GPU is visible)")
        return torch.device("cpu")
    number += offset
    if number >= found:
        raise InputError(f"--gpu {number} was asked for but {found} CUDA devices are visible; use --gpu -1 for the CPU")
    device = torch.device("cuda", number)
    if gpu is None and not offset:
        _print_once(f"device: {device} ({torch.cuda.get_device_name(device)})")
    return device


@cache
def _print_once(line: str) -> None:
    print(line)


def make_folder(path: str | Path, option: str = "--out") -> Path:
    """Create ``path`` (and its parents) and return it as a Path; InputError, which names ``option``, when it cannot be
    written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        remedy = f"choose another with {option}"
        raise InputError(f"cannot write to the folder {path} ({error.strerror}); {remedy}") from error
    return path
