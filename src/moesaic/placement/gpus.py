"""Graphics cards and their memory, from `nvidia-smi` and from the kernel's files; torch is not imported.

Whether the installed PyTorch can use a card is not known here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic.config import read_settings

__all__ = ["Gpu", "detect_gpus"]

_NVIDIA_SMI_SECONDS = 10.0
_FIELDS = ("name", "memory.total", "driver_version", "memory.free", "uuid")
_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card.

    Attributes:
        name: as its driver calls it.
        memory_total: bytes of VRAM, 0 if unknown.
        driver: version of the driver, "" if unknown.
        problem: why it cannot be asked or used, "" if it can.
        memory_free: bytes of VRAM that no process holds, 0 if unknown.
        index: number by which a process addresses it, after CUDA_VISIBLE_DEVICES.
        fixed_memory: why its memory cannot be moved between addresses, "" if it can.
    """

    name: str
    memory_total: int
    driver: str = ""
    problem: str = ""
    memory_free: int = 0
    index: int = 0
    fixed_memory: str = "its driver was not asked"


def detect_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """The cards that this process may use, NVIDIA's first; starts `nvidia-smi` where it is installed (0.1 s and more).

    Args:
        root: folder that holds `proc` and `sys`.
    """
    return _nvidia_gpus(root) + _amd_gpus(root)


def _nvidia_gpus(root: Path) -> tuple[Gpu, ...]:
    listed = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        names = [re.search(r"^Model:\s*(.+)$", _read(path), re.MULTILINE) for path in listed]
        problem = "nvidia-smi is not installed, so its memory is unknown"
        return tuple(
            Gpu(found[1] if found else "NVIDIA GPU", 0, problem=problem, index=index)
            for index, found in enumerate(names)
        )
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return (Gpu("NVIDIA GPU", 0, problem=f"nvidia-smi failed: {error}"),)
    rows = [[*(part.strip() for part in line.split(",")), *[""] * len(_FIELDS)] for line in answer.stdout.splitlines()]
    cards = [(row[4], Gpu(row[0], _mib(row[1]), row[2], memory_free=_mib(row[3]))) for row in rows]
    visible = read_settings().visible_gpus
    chosen = [card for _, card in cards] if visible is None else _visible(cards, visible)
    return tuple(replace(card, index=index) for index, card in enumerate(chosen))


def _mib(text: str) -> int:
    """Bytes of a number of MiB; 0 for "[N/A]"."""
    return int(text) * _MIB if text.isdecimal() else 0


def _visible(cards: Sequence[tuple[str, Gpu]], visible: Sequence[str]) -> list[Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order: numbers or beginnings of UUIDs, up to the first unknown one."""
    chosen: list[Gpu] = []
    for word in visible:
        found = [
            card
            for number, (uuid, card) in enumerate(cards)
            if word == str(number) or (not word.isdecimal() and uuid.startswith(word))
        ]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _amd_gpus(root: Path) -> tuple[Gpu, ...]:
    gpus: list[Gpu] = []
    for device in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        if _read(device / "vendor") == "0x1002":
            total, used = (_read(device / f"mem_info_vram_{what}") for what in ("total", "used"))
            size = int(total) if total.isdecimal() else 0
            free = size - int(used) if used.isdecimal() else 0
            gpus.append(
                Gpu(_read(device / "product_name") or "AMD GPU", size, memory_free=max(0, free), index=len(gpus))
            )
    return tuple(gpus)


def _read(path: Path) -> str:
    """Text of a kernel file, "" where it is absent or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
