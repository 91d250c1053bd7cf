"""thread_state.py, in threads that Python did not start: the state stays, and leaves with its thread."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, threading
from nbd_qcow2j import thread_state

interpreter = ctypes.pythonapi
interpreter.PyInterpreterState_Get.restype = ctypes.c_void_p
interpreter.PyInterpreterState_ThreadHead.restype = interpreter.PyThreadState_Next.restype = ctypes.c_void_p
interpreter.PyInterpreterState_ThreadHead.argtypes = interpreter.PyThreadState_Next.argtypes = (ctypes.c_void_p,)

def states():
    found, state = set(), interpreter.PyInterpreterState_ThreadHead(interpreter.PyInterpreterState_Get())
    while state:
        found.add(state)
        state = interpreter.PyThreadState_Next(state)
    return found

libc = ctypes.CDLL(None)
libc.pthread_create.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
libc.pthread_join.argtypes = (ctypes.c_ulong, ctypes.c_void_p)
at_thread_end = libc["__cxa_thread_atexit_impl"]

def in_foreign_thread(*callbacks):
    # The first as the thread's routine, the others when it ends, last one first; each is a call from C to Python.
    later = [ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _, each=each: each()) for each in callbacks[1:]]
    def routine(_):
        for each in later:
            assert at_thread_end(each, None, thread_state._library) == 0
        callbacks[0]()
    routine = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(routine)
    thread = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(thread), None, routine, None) == 0
    assert libc.pthread_join(thread, None) == 0

local = threading.local()
def was_here():
    return getattr(local, "here", False)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("how", "stays"), [("thread_state.keep()", True), ("pass", False)])
def test_the_state_of_a_connections_own_thread_stays_until_it_closes(how: str, stays: bool) -> None:
    out = run(f"""
def first():
    local.here = True
    thread_state.connection_opens()
    {how}
def closes():
    print(was_here())
    thread_state.connection_closes()
in_foreign_thread(first, lambda: print(was_here()), closes)
assert not thread_state.kept and not thread_state.ready and not thread_state._opening
""")
    assert out.split() == [str(stays), "False"]


def test_the_state_of_another_thread_stays_until_it_ends() -> None:
    out = run("""
def first():
    local.here = True
    assert thread_state.keep() and len(thread_state.ready) == 1
    # Registered after what takes the state away, and so called before.
    assert at_thread_end(last, None, thread_state._library) == 0
last = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: print(was_here()))
in_foreign_thread(first)
assert not thread_state.kept
""")
    assert out.split() == ["True"]


def test_a_thousand_threads_leave_nothing_behind() -> None:
    run("""
before = states()
for number in range(1000):
    in_foreign_thread(thread_state.keep)
    in_foreign_thread(lambda: [thread_state.connection_opens(), thread_state.keep()], thread_state.connection_closes)
    assert states() == before, len(states())
assert not thread_state.kept and not thread_state.ready
""")


def test_without_a_word_of_the_threads_end_nothing_is_kept() -> None:
    run("""
thread_state._at_thread_end = None
before = states()
in_foreign_thread(lambda: [thread_state.keep(), print(thread_state.kept)])
assert states() == before and not thread_state.kept and not thread_state.ready
""")
