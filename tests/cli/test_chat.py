"""The conversation in a real (pseudo) terminal: line editing, history, multi-line input, commands, Ctrl-C, Ctrl-D."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("chat_driver.py")
PROMPT = ">>> "
SECONDS = 60.0  # only bounds a hang; nothing is asserted about time


class Terminal:
    """A process whose input, output and errors are one pseudo terminal."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        # A shell starts background jobs with SIGINT ignored, and children inherit that; a terminal's programs take it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, close_fds=True
        )
        signal.signal(signal.SIGINT, before)
        os.close(slave)
        self._unread = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def expect(self, text: str) -> str:
        """Read until `text` appears; everything up to and including it."""
        deadline = time.monotonic() + SECONDS
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no '{text}' in {self._unread!r}"
            self._unread += self._decoder.decode(os.read(self._master, 65536))  # a read may end within a character
        end = self._unread.index(text) + len(text)
        seen, self._unread = self._unread[:end], self._unread[end:]
        return re.sub(r"\x1b\[\??[0-9;]*[a-zA-Z]", "", seen)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode("utf-8", "surrogateescape"))

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_at_prompt(self) -> None:
        """Ctrl-C while the process waits for a key: CPython misses a signal between its last check and that wait."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        deadline = time.monotonic() + SECONDS
        waiting = 0
        while waiting < 5:
            assert time.monotonic() < deadline, "the process never waits for a key"
            time.sleep(0.02)
            state = stat.read_text().rpartition(")")[2].split()[0]
            waiting = waiting + 1 if state == "S" else 0
        self.interrupt()

    def ask(self, line: str) -> str:
        """Send a line; what is printed until the next prompt, without the echo."""
        self.send(line + "\r")
        return self.expect(PROMPT)

    def leave(self) -> int:
        self.send("\x04")
        return self.process.wait(SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "dumb", "INPUTRC": "/dev/null"}


@pytest.fixture
def terminal(env: dict[str, str]) -> Iterator[Terminal]:
    terminal = Terminal([sys.executable, str(DRIVER)], env)
    terminal.expect(PROMPT)
    yield terminal
    terminal.close()


def messages(printed: str) -> list[dict[str, str]]:
    """What the echo session was asked."""
    start = printed.index("<[{") + 1
    data: list[dict[str, str]] = json.JSONDecoder().raw_decode(printed, start)[0]
    return data


def test_a_conversation_keeps_its_turns_and_prints_rates(terminal: Terminal) -> None:
    printed = terminal.ask("hello 你好")
    assert messages(printed) == [{"role": "user", "content": "hello 你好"}]
    assert "[prefill 4 tokens at 8.0 tok/s, decode 3 tokens at 8.0 tok/s]" in printed
    assert "[5m" in printed  # the escape character before it is gone, or the terminal would have taken it
    roles = [message["role"] for message in messages(terminal.ask("again"))]
    assert roles == ["user", "assistant", "user"]
    assert terminal.leave() == 0


def test_multi_line_input(terminal: Terminal) -> None:
    terminal.send("'''first\r")
    terminal.expect("... ")
    terminal.send("second\\\r")
    terminal.expect("... ")
    assert messages(terminal.ask("third'''"))[-1]["content"] == "first\nsecond\\\nthird"
    terminal.send("one \\\r")
    terminal.expect("... ")
    assert messages(terminal.ask("two"))[-1]["content"] == "one \ntwo"
    assert messages(terminal.ask("'''all in one'''"))[-1]["content"] == "all in one"


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.send("slow\r")
    terminal.expect("w5 ")
    terminal.interrupt()
    assert "interrupted]" in terminal.expect(PROMPT)
    # What was said until then belongs to the conversation.
    answer = messages(terminal.ask("next"))[1]["content"]
    assert answer.startswith("w0 w1 w2 w3 w4 w5 ")
    assert "w999" not in answer


def test_ctrl_c_in_prefill_stops_at_once(terminal: Terminal) -> None:
    terminal.send("prefill\r")
    terminal.expect("prefill\r\n")
    time.sleep(0.5)  # until the handler is in place
    terminal.interrupt()
    assert "interrupted]" in terminal.expect(PROMPT)
    assert len(messages(terminal.ask("next"))) == 1  # the question was taken back


def test_ctrl_c_at_the_prompt_clears_the_line(terminal: Terminal) -> None:
    terminal.send("half a li")
    terminal.expect("half a li")
    terminal.interrupt_at_prompt()
    terminal.expect("(Ctrl-D leaves)")
    terminal.expect(PROMPT)
    assert messages(terminal.ask("whole"))[-1]["content"] == "whole"


def test_commands(terminal: Terminal, tmp_path: Path) -> None:
    assert "/save FILE" in terminal.ask("/help")
    assert "/nonsense is no command" in terminal.ask("/nonsense")
    assert "[forgotten]" in terminal.ask("/system Be brief.")
    assert messages(terminal.ask("hi"))[0] == {"role": "system", "content": "Be brief."}
    file = tmp_path / "talk.txt"
    assert "saved 3 messages" in terminal.ask(f"/save {file}")
    assert file.read_text().startswith("system: Be brief.\n\nuser: hi\n\nassistant: ")
    assert "cannot write" in terminal.ask(f"/save {tmp_path}/missing/talk.txt")
    assert "new conversation" in terminal.ask("/reset")
    assert len(messages(terminal.ask("fresh"))) == 2  # the system message stays
    assert "no system message" in terminal.ask("/system")
    assert len(messages(terminal.ask("bare"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_may_be_saved_to(terminal: Terminal) -> None:
    assert "cannot write /dev/full: No space left on device" in terminal.ask("/save /dev/full")


def test_a_refused_prompt_leaves_the_conversation_as_it_was(terminal: Terminal) -> None:
    assert "context is 8" in terminal.ask("too long")
    assert len(messages(terminal.ask("short"))) == 1


def test_bytes_that_are_no_text_are_refused_and_the_conversation_goes_on(terminal: Terminal) -> None:
    assert "not UTF-8 text" in terminal.ask("a\udcff")
    assert len(messages(terminal.ask("short"))) == 1


def test_history_survives_the_program(env: dict[str, str]) -> None:
    for start in range(2):
        terminal = Terminal([sys.executable, str(DRIVER)], env)
        try:
            terminal.expect(PROMPT)
            if start == 0:
                terminal.ask("remember me")
            else:
                terminal.send("\x10")  # Ctrl-P: the line before
                terminal.expect("remember me")
                assert messages(terminal.ask(""))[-1]["content"] == "remember me"
            assert terminal.leave() == 0
        finally:
            terminal.close()
    history = Path(env["XDG_STATE_HOME"]) / "moesaic" / "history"
    assert "remember me" in history.read_text()
    assert history.parent.stat().st_mode & 0o077 == 0
