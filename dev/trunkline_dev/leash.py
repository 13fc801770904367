"""Processes that cannot outlive the one that started them."""

import shutil
import sys
from collections.abc import Sequence
from typing import Final

# Does what setpriv does, for a Linux without it: PR_SET_PDEATHSIG (1) survives execve(2).
_IN_PYTHON: Final = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"
)


def _leash() -> tuple[str, ...]:
    if sys.platform != "linux":
        return ()
    if setpriv := shutil.which("setpriv"):
        return (setpriv, "--pdeathsig", "KILL", "--")
    return (sys.executable, "-I", "-S", "-c", _IN_PYTHON)


LEASH: Final = _leash()


def leashed(command: Sequence[str]) -> list[str]:
    """The command, to be killed by the kernel when the thread that starts it ends, however it ends.

    So start it from the main thread, or from one that lives as long. Only Linux has such a leash;
    elsewhere the command comes back as it is, and only an orderly end takes it along.
    """
    return [*LEASH, *command]
