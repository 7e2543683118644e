"""Kernels that are compiled before they are needed, by threads; for a GPU that need not be there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fake_gpu import in_process
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

from moesaic.kernels.triton.ahead import KernelsAhead


class Kernel:
    """Compiled, to whoever does not look closely."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.src = self.metadata = None


def submit(ahead: KernelsAhead, key: str, compile: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What a launch gets, and what was put in place for later launches."""
    put: list[Any] = []
    return ahead.submit(key, compile, put.append, None), put


def test_threads_compile_side_by_side_and_each_kernel_once() -> None:
    ahead, both, count = KernelsAhead(2), threading.Barrier(2, timeout=20), [0]

    def compile() -> Kernel:
        both.wait()
        count[0] += 1
        return Kernel("one")

    with ahead.note():
        first, put = submit(ahead, "a", compile)
        assert submit(ahead, "a", compile)[0] is first and put == [first]
        second, _ = submit(ahead, "b", compile)
    seen: list[tuple[int, int]] = []
    ahead.wait(lambda done, total: seen.append((done, total)))
    ahead.close()
    assert (ahead.num_noted, ahead.num_failed, count) == (2, 0, [2])
    assert seen[-1] == (2, 2) and sorted(seen) == seen
    assert put[-1] is first.result() and first.name == second.name == "one"


def test_who_launches_what_a_thread_is_at_waits_for_it() -> None:
    ahead, may_go = KernelsAhead(1), threading.Event()

    def compile() -> Kernel:
        assert may_go.wait(20)
        return Kernel("slow")

    with ahead.note():
        kernel, _ = submit(ahead, "a", compile)
    threading.Timer(0.1, may_go.set).start()
    assert kernel.name == "slow"
    ahead.close()


def test_who_launches_what_failed_gets_the_error() -> None:
    ahead, calls = KernelsAhead(1), [0]

    def compile() -> Kernel:
        calls[0] += 1
        raise ValueError(f"no {calls[0]}")

    with ahead.note():
        kernel, put = submit(ahead, "a", compile)
    ahead.wait()
    assert ahead.num_failed == 1 and put == [kernel]
    with pytest.raises(ValueError, match="no 2"):
        _ = kernel.name
    ahead.close()


def test_what_nobody_began_with_is_compiled_where_it_is_launched() -> None:
    ahead = KernelsAhead(0)
    with ahead.note():
        kernel, _ = submit(ahead, "a", lambda: Kernel("late"))
    ahead.close()
    assert ahead.num_failed == 1 and kernel.name == "late"


def test_launches_are_noted_in_one_thread_and_for_a_while() -> None:
    run = JITFunction.run
    ahead, seen = KernelsAhead(1), []
    with pytest.raises(KeyError), ahead.note():
        assert JITFunction.run is not run
        other = threading.Thread(target=lambda: seen.append(_async_compile.active_mode.get()))
        other.start()
        other.join()
        assert _async_compile.active_mode.get() is ahead
        raise KeyError
    assert seen == [None] and JITFunction.run is run and _async_compile.active_mode.get() is None


NORMS = """
import json, threading, torch
from triton import knobs
from moesaic.kernels.triton.ahead import KernelsAhead
from moesaic.kernels.triton.loading import num_loaded
from moesaic.kernels.triton.norm import _norm_kernel, add_rms_norm, rms_norm
inner, heard = knobs.compilation.listener, []
def listen(*, cache_hit, **what):
    heard.append((cache_hit, threading.current_thread().name))
    inner(cache_hit=cache_hit, **what)
knobs.compilation.listener = listen
x, out = torch.ones(3, 64), torch.full((3, 64), 7.0)
ahead = KernelsAhead(2)
with ahead.note():
    rms_norm(x, None, 1e-6, out=out)
    rms_norm(x[:2], None, 1e-5)
    add_rms_norm(x, x, None, 1e-6)
ahead.wait()
ahead.close()
(kernels, *_), = _norm_kernel.device_caches.values()
print(json.dumps({
    "noted": ahead.num_noted, "failed": ahead.num_failed, "heard": heard, "loaded": num_loaded(),
    "untouched": bool((out == 7).all() and (x == 1).all()), "kinds": [type(each).__name__ for each in kernels.values()],
}))
"""


def test_noted_launches_do_nothing_and_their_kernels_are_there_at_the_next_start(tmp_path: Path) -> None:
    first, second = (json.loads(in_process(NORMS, tmp_path).splitlines()[-1]) for _ in range(2))
    expected = {"noted": 2, "failed": 0, "loaded": 0, "untouched": True, "kinds": ["CompiledKernel"] * 2}
    for found, is_kept in ((first, False), (second, True)):
        heard = found.pop("heard")
        assert found == expected
        assert heard == [[is_kept, "moesaic-compile"]] * 2


UNTOLD = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from moesaic.kernels.triton.ahead import KernelsAhead
from moesaic.kernels.triton.norm import rms_norm
x, ahead = torch.ones(3, 64), KernelsAhead(1)
with ahead.note():
    rms_norm(x, None, 1e-6)
ahead.wait()
ahead.close()
print("so far")
try:
    rms_norm(torch.ones(3, 128), None, 1e-6)
except Exception as error:
    print("launched:", type(error).__name__)
"""


def test_what_was_not_noted_is_compiled_when_it_is_launched_and_that_is_told(tmp_path: Path) -> None:
    lines = in_process(UNTOLD, tmp_path).splitlines()
    assert lines[0] == "so far"
    assert lines[1].startswith("compiling kernels for this GPU")
    assert lines[2].startswith("launched: ")  # which nobody can, here
