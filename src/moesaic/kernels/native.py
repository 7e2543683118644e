"""The native extension, set up as the process's settings ask. It knows no kernel by name.

The settings are applied when this package is imported, so that an instruction set forced by MOESAIC_ISA and a number of
threads are in force before the first kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moesaic import _native
from moesaic.config import Settings, read_settings
from moesaic.errors import ConfigError

__all__ = [
    "active_isa",
    "apply_settings",
    "binds_memory",
    "independent_rows",
    "isas",
    "native_seconds",
    "num_nodes",
    "num_threads",
    "set_isa",
    "set_num_nodes",
    "set_num_threads",
    "set_pinning",
]


def isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""
    return list(_native.isas())


def active_isa() -> str:
    """The instruction set that kernels run with."""
    return str(_native.active_isa())


def set_isa(name: str) -> None:
    """Run all kernels with the instruction set `name`, for the whole process.

    Raises:
        ConfigError: it is unknown or this processor cannot run it.
    """
    if name not in _native.isas():
        raise ConfigError(f"The instruction set '{name}' cannot run here: expected one of {', '.join(_native.isas())}.")
    _native.set_isa(name)


def num_threads() -> int:
    """Threads that the kernels run on."""
    return int(_native.num_threads())


def native_seconds() -> float:
    """Seconds that native calls have spent computing so far, whichever thread of Python made them."""
    return float(_native.native_seconds())


def set_num_threads(count: int) -> None:
    """Run all kernels on `count` threads, for the whole process.

    Raises:
        ConfigError: it is not between 1 and 1024.
    """
    if not 1 <= count <= 1024:
        raise ConfigError(f"The number of threads is {count}: expected 1 to 1024.")
    _native.set_num_threads(count)


def num_nodes() -> int:
    """Memory nodes that threads and experts are divided over."""
    return len(_native.numa_nodes())


def binds_memory() -> bool:
    """Whether weights are bound to memory nodes: there are several, and they are not pretended."""
    nodes = _native.numa_nodes()
    return len(nodes) > 1 and nodes[0][0] >= 0


def set_num_nodes(count: int) -> None:
    """Pretend that the cores belong to `count` memory nodes, for the whole process; 0: the nodes of the system.

    Memory is not bound to pretended nodes: 1 therefore leaves it to the system, and more serve tests.

    Raises:
        ConfigError: it is not between 0 and 64.
    """
    if not 0 <= count <= 64:
        raise ConfigError(f"The number of memory nodes is {count}: expected 0 to 64.")
    _native.set_num_nodes(count)


def set_pinning(pin: bool) -> None:
    """Whether each thread of the kernels but the caller's is confined to a core; more threads than cores never are."""
    _native.set_pinning(pin)


def apply_settings(settings: Settings) -> None:
    """Force what the settings ask for and leave the rest to the extension.

    Raises:
        ConfigError: the instruction set, the number of threads or that of nodes cannot be used.
    """
    if settings.isa is not None:
        set_isa(settings.isa)
    if settings.threads is not None:
        set_num_threads(settings.threads)
    if settings.numa_nodes is not None:
        set_num_nodes(settings.numa_nodes)
    if not settings.pin:
        set_pinning(False)


apply_settings(read_settings())


@contextmanager
def independent_rows(on: bool = True) -> Iterator[None]:
    """Inside, products of this thread give a token the same numbers, to the bit, whatever else is in a call.

    They do so anyway, but for those by tiles of many tokens (AMX), which round weights and are left out here.
    """
    before = _native.set_independent_rows(on)
    try:
        yield
    finally:
        _native.set_independent_rows(before)
