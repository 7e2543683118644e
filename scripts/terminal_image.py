"""Runs a command in a pseudo terminal and draws what it printed as an SVG, for the README.

    python scripts/terminal_image.py docs/images/run-demo.svg -- moesaic run demo "What is 1234 + 4321?"

Lines typed into the program can be given with --type (one each; Ctrl-D is sent at the end). The picture shows what was
printed and nothing else. Needs rich (`pip install rich`), which Moesaic itself does not.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROMPT = ">>> "


def record(command: list[str], lines: list[str], columns: int, seconds: float) -> str:
    """Everything that the command writes to its terminal, errors included."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 100, columns, 0, 0))
    environment = os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    waiting = [*(f"{line}\r" for line in lines), "\x04"] if lines else []
    printed, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 1.0)[0]:
            continue
        try:
            printed += os.read(master, 65536).decode(errors="replace")
        except OSError:  # the program has ended and closed its terminal
            break
        if waiting and printed.endswith(PROMPT):
            os.write(master, waiting.pop(0).encode())
    else:
        process.kill()
        raise SystemExit(f"{shlex.join(command)} did not end within {seconds:.0f} seconds")
    process.wait()
    return printed


def on_screen(printed: str) -> str:
    """What is left to see: a carriage return without a line feed overwrites its line (progress bars)."""
    text = re.sub(r"\x1b\[\?[0-9;]*[a-z]", "", printed).replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(lines).rstrip().removesuffix(PROMPT.strip()).rstrip()


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--type", action="append", default=[], metavar="LINE", help="line to type at the prompt")
    parser.add_argument("--columns", type=int, default=110)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    printed = on_screen(record(arguments.command, arguments.type, arguments.columns, arguments.seconds))
    console = Console(record=True, width=arguments.columns, file=sys.stderr, force_terminal=True, highlight=False)
    console.print(Text(f"$ {shlex.join(arguments.command)}", style="bold green"))
    console.print(Text.from_ansi(printed))
    arguments.image.parent.mkdir(parents=True, exist_ok=True)
    # No font from a foreign server: the reader's own monospace font will do.
    svg = re.sub(r"@font-face \{.*?\}\n", "", console.export_svg(title="moesaic"), flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    arguments.image.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
