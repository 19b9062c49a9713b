"""Sees whether others than the owner could read what is written, at any moment."""

import os
import stat
import sys
import threading
from contextlib import contextmanager
from pathlib import Path


def open_to_others(directory):
    """What others may read, write or enter, below a directory; and itself, if it is not empty."""
    found = {}
    for base, directories, names in os.walk(directory):
        for path in (Path(base, name) for name in (*directories, *names)):
            if os.path.lexists(path):  # still
                found[path] = path.lstat().st_mode
    if found:
        found[directory] = directory.stat().st_mode
    return {f"{path} {stat.filemode(mode)}" for path, mode in found.items() if mode & 0o077}


class _Hook:
    """Looks whenever this process opens, makes, renames or changes a file.

    So it also sees a file that anybody may read and that is made private a moment later.
    """

    def __init__(self):
        self.directory, self.found = None, set()
        self._looking = threading.local()

    def __call__(self, event, _):
        directory, looking = self.directory, self._looking.__dict__
        if directory is None or looking or not (event == "open" or event.startswith("os.")):
            return
        looking["now"] = True  # which has such events too
        try:
            self.found |= open_to_others(directory)
        finally:
            looking.clear()


_hooks = []


@contextmanager
def watched(directory):
    """A set that gets what others could read in a directory at any moment inside, without umask."""
    if not _hooks:
        _hooks.append(_Hook())
        sys.addaudithook(_hooks[0])  # for ever; without a directory it does nothing
    (hook,) = _hooks
    hook.directory, hook.found = directory, set()
    umask = os.umask(0)
    try:
        yield hook.found
    finally:
        os.umask(umask)
        hook.directory = None
        hook.found |= open_to_others(directory)
