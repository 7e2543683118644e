"""Entry point of the `moesaic` command: the parser, and how errors end.

Only argparse is imported here; a subcommand's module imports what it needs when it runs, so that `moesaic --help` and
`--version` answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moesaic import __version__
from moesaic.cli import bench, doctor, plan, quantize, run, serve
from moesaic.cli.terminal import abandon_output, prepare_streams, printable
from moesaic.errors import ConfigError, MoesaicError

__all__ = ["build_parser", "main"]

_FAILURE, _USAGE, _INTERRUPTED = 1, 2, 130
_EXAMPLES = """\
examples:
  moesaic run demo                               talk to the built-in model
  moesaic run org/name:Q4_K_M "Why is the sky blue?"
  moesaic serve org/name:Q4_K_M                  the same for programs, over HTTP
  moesaic plan ./model.gguf                      what it would take, before anything is loaded
  moesaic doctor                                 what this computer can do
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each subcommand sets `run`, which takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="moesaic",
        description="Run mixture-of-experts language models on the hardware you have.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moesaic {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, serve, plan, doctor, quantize, bench):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show a traceback when something fails")
        command.set_defaults(run=module.run)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; an optional positional (PROMPT of run, MODEL of bench) may also stand behind options.

    argparse takes an optional positional as absent as soon as an option follows the required ones.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    late = getattr(arguments, "optional_positional", None)
    if (
        late is not None
        and getattr(arguments, late) is None
        and len(rest) == 1
        and (rest == ["-"] or rest[0][:1] != "-")
    ):
        setattr(arguments, late, rest.pop())
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    prepare_streams()
    arguments = _parse(argv)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # what cannot be written is an error of this run, not of the interpreter's end
        return code
    except MoesaicError as error:
        if arguments.debug:
            raise
        print(f"moesaic: {printable(str(error))}", file=sys.stderr)
        return _USAGE if isinstance(error, ConfigError) else _FAILURE
    except BrokenPipeError:  # the reader of our output (head, less) has left
        abandon_output()
        return _FAILURE
    except OSError as error:  # a disk that is full or fails
        if arguments.debug:
            raise
        abandon_output()
        print(f"moesaic: {printable(_reason(error))}", file=sys.stderr)
        return _FAILURE
    except KeyboardInterrupt:
        print("moesaic: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _reason(error: OSError) -> str:
    """What the system said, of which file; without a file it was standard output or a device behind it."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"{reason}, when reading or writing (standard output, or a temporary file)."
    return f"{error.filename}: {reason}."


if __name__ == "__main__":
    sys.exit(main())
