"""The conversation in the terminal: line editing with history, multi-line input, commands, Ctrl-C and Ctrl-D.

Ctrl-C while the model answers stops the answer after the token that is being computed (a second one stops at once);
at the prompt it clears the line. Ctrl-D leaves. It knows the terminal, and of the model only its `Session`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from moesaic.cli.run import rates
from moesaic.cli.terminal import given_text, printable, stream
from moesaic.config import read_settings
from moesaic.errors import ConfigError, GenerationError
from moesaic.files import write_whole

if TYPE_CHECKING:
    from moesaic.engine.answer import Answer, Sampling
    from moesaic.engine.session import Session

__all__ = ["chat"]

_QUOTES = "'''"
_HISTORY_LINES = 1000
_HELP = f"""\
{_QUOTES} begins and ends a message of several lines; a line that ends in \\ goes on in the next.
/system TEXT   set the system message and start over (without TEXT: none)
/reset         start a new conversation
/save FILE     write the conversation to a text file
/help          this text
Ctrl-C stops the answer, Ctrl-D leaves."""


def chat(session: Session, sampling: Sampling, *, system: str | None, raw: bool, title: str) -> int:
    """Hold a conversation until the user leaves; returns the exit code."""
    print(f"{title}: /help shows the commands, Ctrl-D leaves.", file=sys.stderr)
    with _line_history(read_settings().state_dir / "history"):
        _Chat(session, sampling, system, raw).run()
    return 0


class _Chat:
    """One conversation: its messages, and what the lines that are typed do to them."""

    def __init__(self, session: Session, sampling: Sampling, system: str | None, raw: bool) -> None:
        self._session, self._sampling, self._raw = session, sampling, raw
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._reset()

    def run(self) -> None:
        while True:
            try:
                message = given_text(_read_message(), "this message")
            except EOFError:
                print()
                return
            except (ConfigError, UnicodeDecodeError) as error:
                print(f"moesaic: {printable(str(error))}", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)", file=sys.stderr)
                continue
            if message.startswith("/"):
                self._command(message)
            elif message.strip():
                self._answer(message)

    def _answer(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        try:
            answer = self._generate()
        except GenerationError as error:
            self._messages.pop()
            print(f"moesaic: {printable(str(error))}", file=sys.stderr)
            return
        if answer.finish_reason == "interrupted" and not answer.generated_tokens:
            self._messages.pop()  # taken back before anything was said
        else:
            self._messages.append({"role": "assistant", "content": answer.text})
        print(flush=True)
        print(rates(answer), file=sys.stderr)

    def _generate(self) -> Answer:
        if self._raw:
            ids = self._session.encode_raw("".join(message["content"] for message in self._messages))
        else:
            ids = self._session.encode_chat(self._messages)
        with _stop_on_interrupt() as interrupts:
            return self._session.answer(
                ids,
                self._sampling,
                on_text=stream,
                should_stop=interrupts.asked_after_token,
            )

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name == "/help":
            print(_HELP, file=sys.stderr)
        elif name == "/reset":
            self._reset()
            print("(new conversation)", file=sys.stderr)
        elif name == "/system" and self._raw:
            print("/system needs the chat template, which --raw leaves out.", file=sys.stderr)
        elif name == "/system":
            self._system = argument or None
            self._reset()
            print(f"(new conversation with {'this' if argument else 'no'} system message)", file=sys.stderr)
        elif name == "/save":
            self._save(argument)
        else:
            print(f"{name} is no command: /help shows them.", file=sys.stderr)

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []
        self._session.forget()

    def _save(self, file: str) -> None:
        if not file:
            print("/save needs the name of a file.", file=sys.stderr)
            return
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in self._messages)
        try:
            write_whole(Path(file).expanduser(), text + "\n")
        except OSError as error:
            print(f"cannot write {file}: {error.strerror}", file=sys.stderr)
        else:
            print(f"(saved {len(self._messages)} messages to {file})", file=sys.stderr)


def _read_message() -> str:
    """One message: a line, lines joined by trailing backslashes, or everything between two lines of quotes."""
    line = input(">>> ")
    if line.strip().startswith(_QUOTES):
        first = line.strip().removeprefix(_QUOTES)
        if first.endswith(_QUOTES):
            return first.removesuffix(_QUOTES)
        lines = [first] if first else []
        while not (line := input("... ")).rstrip().endswith(_QUOTES):
            lines.append(line)
        last = line.rstrip().removesuffix(_QUOTES)
        return "\n".join([*lines, last] if last else lines)
    lines = []
    while line.endswith("\\"):
        lines.append(line.removesuffix("\\"))
        line = input("... ")
    return "\n".join([*lines, line])


class _Interrupts:
    """Ctrl-C while the model answers: the first waits for the token in work, the second, or one in prefill, raises."""

    def __init__(self) -> None:
        self._decoding = False
        self._asked = False

    def asked_after_token(self) -> bool:
        """Whether to stop; called after every token."""
        self._decoding = True
        return self._asked

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take the signal."""
        if self._asked or not self._decoding:
            raise KeyboardInterrupt
        self._asked = True


@contextmanager
def _stop_on_interrupt() -> Iterator[_Interrupts]:
    """Within it Ctrl-C is taken by the `_Interrupts` that it gives."""
    interrupts = _Interrupts()
    previous = signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _line_history(file: Path) -> Iterator[None]:
    """Line editing whose history is kept in `file`, where this Python has readline."""
    try:
        import readline
    except ImportError:  # some builds of Python come without; input() then works without editing
        yield
        return
    try:
        if file.is_file():
            readline.read_history_file(file)
        readline.set_history_length(_HISTORY_LINES)
        yield
    finally:
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            print(f"cannot keep the line history in {file}: {error.strerror}", file=sys.stderr)
