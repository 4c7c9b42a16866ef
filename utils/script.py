"""How a script runs: its exit code, its error messages, SIGTERM, the standard streams."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, TypeVar

from utils.cli import InputError

T = TypeVar("T")


class Stopped(BaseException):
    """SIGTERM was received."""


def sigterm_event() -> AbstractContextManager[threading.Event]:
    """Context in which SIGTERM sets the returned threading.Event, so that the caller can finish its step and save."""
    event = threading.Event()
    return _on_sigterm(lambda *_: event.set(), event)


def raise_on_sigterm() -> AbstractContextManager[None]:
    """Context in which SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt, for work with nothing to save."""

    def stop(*_: Any) -> NoReturn:
        raise Stopped

    return _on_sigterm(stop, None)


@contextmanager
def _on_sigterm(handler: Callable[..., Any], value: T) -> Iterator[T]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield value
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield value
    finally:
        signal.signal(signal.SIGTERM, before)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main()`` and exit with its return code (None counts as 0).

    An InputError prints its sentence and exits with 2; Ctrl-C exits with 130, and SIGTERM, within the contexts above,
    with 143; any other exception is a bug and keeps its traceback. With several processes (utils.distributed) only the
    first that fails prints: the others fail of the same error, or because that one has ended. Where one was killed, or
    its machine is lost, another says so and exits with 1. A closed standard output is no error.
    """
    make_output_robust()
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
    except Exception as error:
        if _first_to_fail():
            if not _is_lost_connection(error):
                raise
            sentence = "another process of this run, or its machine, is gone; the same commands continue where it was"
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)


def report_problems(problems: Sequence[InputError], most: int | None = None) -> int:
    """Print the problems of single files, without which the work was done, to stderr, at most ``most`` one by one.

    Returns the exit code of the script: 1, or 0 where there is no problem.
    """
    for problem in problems[:most]:
        print(f"error: {problem}", file=sys.stderr)
    if most is not None and len(problems) > most:
        print(f"error: {len(problems) - most} more such", file=sys.stderr)
    return 1 if problems else 0


def _first_to_fail() -> bool:
    if "WORLD_SIZE" not in os.environ:  # a single process
        return True
    from utils.distributed import first_to_fail  # here, because torch takes long to import

    return first_to_fail()


def _is_lost_connection(error: Exception) -> bool:
    if "WORLD_SIZE" not in os.environ:
        return False
    from utils.distributed import is_lost_connection

    return is_lost_connection(error)


def make_output_robust() -> None:
    """Make stdout and stderr accept any text, and ignore that they are closed or that their reader has ended.

    Characters outside their encoding are written as escapes. Other errors, such as a full disk, are printed once to
    stderr.
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
    """A standard stream whose writes raise no error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.reported = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1 and not self.reported:
                self.reported = True
                print(f"cannot write to the standard output ({error.strerror}); it is lost", file=sys.stderr)
            return len(data)
