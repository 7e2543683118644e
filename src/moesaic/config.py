"""Settings of a process: the only place that reads environment variables.

    MOESAIC_ISA        force an instruction set ("generic", "avx2", "avx512")
    MOESAIC_THREADS    number of worker threads (default: the physical cores this process may use)
    XDG_STATE_HOME     folder for what programs remember, such as the chat's line history (default: ~/.local/state)

It does not know what the settings are used for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesaic.errors import ConfigError

__all__ = ["Settings", "read_settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for; None leaves the choice to the program.

    Attributes:
        isa: name of the instruction set to force.
        threads: number of worker threads, at least 1.
        state_dir: folder of what Moesaic remembers between runs; it need not exist.
    """

    isa: str | None = None
    threads: int | None = None
    state_dir: Path = Path()


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read `Settings` from the environment (or the mapping given, for tests).

    Raises:
        ConfigError: a variable is set to something that is not of its form.
    """
    env = os.environ if environ is None else environ
    threads_text = env.get("MOESAIC_THREADS", "").strip()
    threads: int | None = None
    if threads_text:
        if not threads_text.isdecimal() or int(threads_text) < 1:
            raise ConfigError(f"MOESAIC_THREADS is '{threads_text}': expected a whole number of at least 1.")
        threads = int(threads_text)
    state_home = env.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    state = Path(state_home) if state_home.startswith("/") else Path.home() / ".local" / "state"
    return Settings(
        isa=env.get("MOESAIC_ISA", "").strip().lower() or None, threads=threads, state_dir=state / "moesaic"
    )
