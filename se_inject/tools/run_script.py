"""``se-inject run``: a script runs as ``python SCRIPT`` would run it, with the ``se_inject/...`` models in timm."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import types
from collections.abc import Sequence


def run(target: str, args: Sequence[str] = (), *, module: bool = False) -> None:
    """Run a script or a module as ``__main__`` in this process, and set ``sys.argv`` and ``sys.path[0]`` for it.

    Returns when the script has ended. An error that the script does not catch goes to ``sys.excepthook``, with a traceback
    that starts in the script.

    Args:
        target: The script's file, or with `module` the module's dotted name.
        args: The script's arguments.
        module: Run it as ``python -m`` does.

    Raises:
        SystemExit: Where ``python`` would end with an exit code other than 0: the script's own code, 1 after an error, 130
            after an interrupt.
    """
    sys.argv[:] = [target, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(target))
    try:
        if module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            _run_file(os.path.abspath(target))
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _from_script(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _run_file(path: str) -> None:
    """Run a file as ``__main__``. It stays ``__main__`` afterwards, for the script's threads, exit handlers and pickles."""
    main = types.ModuleType("__main__")
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __loader__=loader, __cached__=None, __builtins__=builtins)
    sys.modules["__main__"] = main
    with io.open_code(path) as file:
        source = file.read()
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


def _from_script(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames before the script's own."""
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        traceback = traceback.tb_next
    return traceback
