"""How a command ends: exit codes, and mistakes and failures in one line each."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable

from cocomix.cli.options import USER_ERROR, command_line
from cocomix.common import starting
from cocomix.common.console import Verbosity, end_progress_bars, verbosity
from cocomix.common.errors import InputError, error_message
from cocomix.common.interruption import Interrupted

PIPE_CLOSED = 141
_RESUME = "; finished work is kept, and the same command resumes from there"
REMEDIES = {
    errno.ENOSPC: f": free some space{_RESUME}",
    errno.EDQUOT: f": free some space{_RESUME}",
    errno.EFBIG: f": raise the limit on the size of a file (ulimit -f){_RESUME}",
    errno.EACCES: ": grant the right to read or write it, or choose another folder",
    errno.EROFS: ": choose a writable output folder",
}
"""What to do about a failure of the system, by its error number."""


def exit_code_of(action: Callable[[], int | None]) -> int:
    """Perform an action, and print how it fails.

    Returns:
        Its exit code, 0 if it returns none; 2 for a mistake in the input, a failure of the system or the end of another
        process, one line each on stderr; 130 when interrupted, 143 when terminated, 129 when the terminal closes; 141
        when the reader of the results has closed the pipe.
    """
    try:
        return action() or 0
    except BrokenPipeError:
        return PIPE_CLOSED
    except (InputError, OSError) as error:
        end_progress_bars()
        if verbosity() == Verbosity.VERBOSE:
            traceback.print_exc()
        for line in error_lines(error):
            sys.stderr.write(f"cocomix: {line}\n")
        return USER_ERROR
    except KeyboardInterrupt as interrupted:
        end_progress_bars()
        sys.stderr.write(f"\ncocomix: interrupted; to resume, run: {command_line()}\n")
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else starting.INTERRUPTED
    except RuntimeError as error:
        from cocomix.common import distributed  # not at the top: it imports torch

        if not distributed.is_connection_lost(error):
            raise
        end_progress_bars()
        sys.stderr.write(
            f"cocomix: process {distributed.rank()} lost the connection to another one, which was killed or reports "
            f"why it ended; to resume, run: {command_line()}\n"
        )
        return USER_ERROR


def error_lines(error: InputError | OSError) -> list[str]:
    """Return the lines of an InputError, or one line that names what the system refused."""
    if isinstance(error, InputError):
        return str(error).splitlines()
    if error.errno is None or error.strerror is None:  # raised by a library
        return [error_message(error)]
    where = "" if error.filename is None else f"{error.filename}: "
    return [f"{where}{error.strerror}{REMEDIES.get(error.errno, '')}"]
