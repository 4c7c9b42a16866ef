"""What every script needs at its edge: options that are checked, clear errors, the device, the output folder."""

import argparse
import io
import math
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's own description as it stands, and with default values where there are any."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser with this project's help and errors: InputError, one sentence without the usage."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help} | options)

    def error(self, message):
        raise InputError(f"{message}; see --help")

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except InputError as error:
            for file in sys.argv[1:] if args is None else args:
                if file.startswith("-") and os.path.lexists(file):  # as a shell makes it of *
                    raise InputError(f"the file {file} is taken for an option; write ./{file}") from error
            raise


def integer(least, most=None):
    """The ``type=`` of an option that is a whole number from ``least`` to ``most``, or without an upper end."""
    return _number(int, "a whole number", least, most)


def number(least, most=None, *, above=None, below=None):
    """The ``type=`` of an option that is a finite number from ``least`` to ``most``; both are allowed themselves.

    above, below: ends that are not allowed themselves, in place of ``least`` and ``most``.
    """
    return _number(float, "a number", least, most, above, below)


def _number(kind, name, least, most=None, above=None, below=None):
    ends = {"of at least": least, "of at most": most, "above": above, "below": below}
    allowed = f"{name} {' and '.join(f'{word} {end:g}' for word, end in ends.items() if end is not None)}".strip()

    def parse(text):
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


def path_of(text):
    """The ``type=`` of an option that is a path: a Path whose ~ is the home folder, wherever the shell left it.

    What exists as it is named is no home folder.
    """
    if text.startswith("~") and os.path.lexists(text):
        return Path(os.path.abspath(text))
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} names a home folder that is not known; write the path out")
    return Path(path)


class InputError(Exception):
    """Input the user can mend. The message is one sentence naming the file and the remedy."""


class Stopped(BaseException):
    """SIGTERM came, and everything is saved."""


def stop_signal():
    """Within it SIGTERM sets the threading.Event it gives, for the caller to finish what it is at."""
    event = threading.Event()
    return _on_sigterm(lambda *_: event.set(), event)


def stop_at_once():
    """Within it SIGTERM raises Stopped, as Ctrl-C does KeyboardInterrupt: for work that has nothing to save."""

    def stop(*_):
        raise Stopped

    return _on_sigterm(stop)


@contextmanager
def _on_sigterm(handler, value=None):
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield value
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield value
    finally:
        signal.signal(signal.SIGTERM, before)


def run(main):
    """Call ``main()`` and exit with its return code (None counts as 0).

    An InputError prints its sentence and exits with 2; Ctrl-C exits with 130 and SIGTERM, where something is being
    trained or labelled, with 143; anything else is a bug of ours and keeps its traceback. Of several processes
    (utils.distributed) only the first that fails speaks: the others fail of the same, or because it has gone. Output
    that nobody can take makes no failure of what is done.
    """
    settle_output()
    try:
        sys.exit(main() or 0)
    except InputError as error:
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Stopped) as error:
        if _first_to_fail():
            print("stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(143 if isinstance(error, Stopped) else 130)
    except Exception:
        if _first_to_fail():
            raise
        sys.exit(1)


def _first_to_fail():
    if "WORLD_SIZE" not in os.environ:  # one process alone
        return True
    from utils.distributed import first_to_fail  # here, because it needs this module, and torch

    return first_to_fail()


def settle_output():
    """Make stdout and stderr take any text, and go on when they are closed or the program that reads them has ended.

    What their encoding does not know is written as a backslash and its number. Other errors, as of a full disk, are
    told once on stderr.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        elif stream is not getattr(sys, f"__{name}__"):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        elif isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer = io.BufferedWriter(_Output(stream.fileno()))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True))


class _Output(io.FileIO):
    """A standard stream that does not raise when it is written to."""

    def __init__(self, number):
        super().__init__(number, "wb", closefd=False)
        self.told = False

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1 and not self.told:
                self.told = True
                print(f"cannot write to the standard output ({error.strerror}); it is lost", file=sys.stderr)
            return len(data)


def select_device(gpu):
    """Return the torch.device for ``--gpu``: -1 is the CPU, n the n-th CUDA device.

    Raises InputError when that GPU is not there.
    """
    import torch  # here, because wrong arguments are told without it

    if gpu < 0:
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= found:
        raise InputError(f"--gpu {gpu} was asked for but {found} CUDA devices are visible; use --gpu -1 for the CPU")
    return torch.device("cuda", gpu)


def make_folder(path):
    """Create ``path`` (and its parents) and return it as a Path; InputError when it cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path} ({error.strerror}); choose another with --out") from error
    return path
