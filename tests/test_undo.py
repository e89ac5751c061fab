"""What is undone at any rate, and that the package undoes in no other manner."""

from __future__ import annotations

import ast
import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import se_inject
from se_inject.undo import entered, undone

PACKAGE = Path(se_inject.__file__).parent
FILES = [p for p in PACKAGE.rglob("*.py") if p.name != "undo.py" and not {"cli", "tools"} & set(p.relative_to(PACKAGE).parts)]


def unsure(tree: ast.AST) -> Iterator[ast.AST]:
    """`finally`, and each `with` of what is neither a generator of this package, nor a file, nor without effect."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.finalbody:
            yield node
        for item in node.items if isinstance(node, ast.With) else ():
            call = item.context_expr
            function = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if not function.islower() or "torch." in function.replace("torch.random.fork_rng", ""):
                yield call


def test_undoing_goes_through_this_file_alone():
    found = [f"{path}:{node.lineno}" for path in FILES for node in unsure(ast.parse(path.read_text()))]
    assert not found, "write it with `undone` or `entered` of undo.py"


def test_what_the_rule_finds():
    code = ("with lock: pass\nwith torch.no_grad(): pass\nwith Mode() as m: pass\nwith entered(lock), open(p): pass\n"
            "try: a\nfinally: b")
    assert [n.lineno for n in unsure(ast.parse(code))] == [1, 2, 3, 5]


def test_a_lack_of_memory_is_no_refusal():
    """Where any error becomes a refusal, a MemoryError does not. Files are left out whose errors all end the call."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [ast.unparse(h.type) for h in node.handlers if h.type] if isinstance(node, ast.Try) else []
            if "Exception" in names and path.name not in ("export.py", "reading.py", "rebuild.py", "timm_names.py"):
                assert "MemoryError" in names, f"{path}:{node.lineno}"


def interrupted(function, line: int) -> None:
    """Call a function and interrupt it before a line of its own or of undo.py, the n-th that it runs."""
    left = [line]
    mine = function.__code__.co_filename, sys.modules["se_inject.undo"].__file__

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in mine:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    was = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(was)


def test_an_interrupt_at_each_line():
    lock, undone_to, state = threading.Lock(), [0], []

    @contextlib.contextmanager
    def changed():
        def undo():
            state.clear()
            state.extend(undone_to)

        with undone(undo):
            state.append(1)
            yield

    def body():
        with entered(lock), changed():
            state.append(2)
        state.append(3)
        state.pop()

    for line in range(1, 100):
        state[:] = [0]
        try:
            interrupted(body, line)
        except KeyboardInterrupt:
            assert state in ([0], [0, 3]), line
            assert not lock.locked(), line
        else:
            break
    assert 20 < line < 99
