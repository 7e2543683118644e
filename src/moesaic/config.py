"""Settings of a process: the only place that reads environment variables.

    MOESAIC_ISA        force an instruction set ("generic", "avx2", "avx512")
    MOESAIC_THREADS    number of worker threads (default: the physical cores this process may use)
    MOESAIC_NUMA_NODES pretend so many memory nodes (default: those of the computer; 1: do not divide over nodes)
    MOESAIC_PIN        0: leave the threads to the system's scheduler instead of confining each to a core
    MOESAIC_API_KEY    key that `moesaic serve` asks its clients for
    CUDA_VISIBLE_DEVICES  graphics cards that this process may use, as NVIDIA's driver understands it
    XDG_STATE_HOME     folder for what programs remember, such as the chat's line history (default: ~/.local/state)

It does not know what the settings are used for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moesaic.errors import ConfigError

__all__ = ["Settings", "read_settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for; None leaves the choice to the program.

    Attributes:
        isa: name of the instruction set to force.
        threads: number of worker threads, at least 1.
        numa_nodes: number of memory nodes to pretend, at least 1.
        pin: whether threads are confined to cores.
        visible_gpus: numbers or UUIDs of the graphics cards to use; empty for none, None for all.
        state_dir: folder of what Moesaic remembers between runs; it need not exist.
        api_key: that a server asks its clients for.
    """

    isa: str | None = None
    threads: int | None = None
    numa_nodes: int | None = None
    pin: bool = True
    visible_gpus: tuple[str, ...] | None = None
    state_dir: Path = Path()
    api_key: str | None = field(default=None, repr=False)


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read `Settings` from the environment (or the mapping given, for tests).

    Raises:
        ConfigError: a variable is set to something that is not of its form.
    """
    env = os.environ if environ is None else environ
    pin = env.get("MOESAIC_PIN", "").strip() or "1"
    if pin not in ("0", "1"):
        raise ConfigError(f"MOESAIC_PIN is '{pin}': expected 0 or 1.")
    visible = env.get("CUDA_VISIBLE_DEVICES")
    state_home = env.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    state = Path(state_home) if state_home.startswith("/") else Path.home() / ".local" / "state"
    return Settings(
        isa=env.get("MOESAIC_ISA", "").strip().lower() or None,
        threads=_positive(env, "MOESAIC_THREADS"),
        numa_nodes=_positive(env, "MOESAIC_NUMA_NODES"),
        pin=pin == "1",
        visible_gpus=None if visible is None else tuple(word.strip() for word in visible.split(",") if word.strip()),
        state_dir=state / "moesaic",
        api_key=env.get("MOESAIC_API_KEY", "").strip() or None,
    )


def _positive(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} is '{text}': expected a whole number of at least 1.")
    return int(text)
