"""The command line: parses, runs the command of that name in `commands/`, and tells errors in plain lines."""

from __future__ import annotations

import contextlib
import importlib
import io
import operator
import re
import sys
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from qcsbm_fast.memory import keep_freed_memory
from qcsbm_fast.ops import split_float32
from qcsbm_fast.train.config import describe
from qcsbm_fast.train.errors import ConfigError, RunError

COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "compare",
    "reproduce",
    "convert",
    "bench",
    "info",
)

_NOT_TOLD = ("For full help", "Argument help")
_DESCRIPTION = """Quasi-conservative score-based generative models: train, sample, look.

Start with `qcsbm train`: two minutes on two cores, on scikit-learn's handwritten digits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv`, by default that of the process, and return its exit status."""
    keep_freed_memory()
    try:
        command = _parse(list(sys.argv[1:] if argv is None else argv) or ["--help"])
        with split_float32():
            sys.modules[type(command).__module__].run(command)
    except ConfigError as error:
        return _complain(str(error), status=2)
    except RunError as error:
        return _complain(str(error), status=1)
    except KeyboardInterrupt:
        return _complain("aborted; the checkpoints saved so far are whole", status=130)
    return 0


def _parse(arguments: list[str]) -> Any:
    """The `Command` that the arguments describe. Leaves by SystemExit after printing help or an error."""
    commands = reduce(operator.or_, (_subcommand(name, arguments) for name in COMMANDS))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(commands, prog="qcsbm", description=_DESCRIPTION, args=arguments)
    except ValidationError as error:  # tyro lets that of the settings as a whole through
        raise ConfigError(describe(error)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise SystemExit(_complain(_explain(stop, errors.getvalue()), status=2)) from None


def _subcommand(name: str, arguments: list[str]) -> Any:
    """The command's type, annotated with its name and with the defaults that the arguments give it."""
    module = importlib.import_module(f"qcsbm_fast.commands.{name}")
    if not hasattr(module, "defaults"):
        return Annotated[module.Command, tyro.conf.subcommand(name)]
    own = arguments[1:] if arguments[0] == name else []
    return Annotated[module.Command, tyro.conf.subcommand(name, default=module.defaults(own))]


def _explain(stop: SystemExit, message: str) -> str:
    """Why tyro refused the arguments, in plain lines; `message` is the framed text that it wrote."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValidationError):
            return describe(cause)
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__context__
    # a box with its title in the frame and rules between its sections; without Unicode, the frame is blank
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    sections: list[list[str]] = [[]]
    for line in plain.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        sections.append([]) if set(text) <= {"─", "-"} else sections[-1].append(text)
    told = [section for section in sections if section and not section[0].startswith(_NOT_TOLD)]
    # of a list of similar options, the first is enough
    lines = [" ".join(section[:2] if section[0].startswith("Perhaps") else section) for section in told]
    return "\n".join(lines) or message


def _complain(message: str, status: int) -> int:
    print(f"qcsbm: {message}", file=sys.stderr)
    return status
