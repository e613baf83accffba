# SPDX-License-Identifier: Apache-2.0
"""The entry point: the parser of all subcommands, configuration files, and errors as one sentence with exit "
"code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from vlmkernels._version import __version__
from vlmkernels.cli import anomalies, bench, caption, classify, index, info, quantize, search, systems
from vlmkernels.cli import eval as evaluate
from vlmkernels.cli import train as training
from vlmkernels.cli._config import read_config
from vlmkernels.train.loop import TrainingFailed

COMMANDS: dict[str, ModuleType] = {
    "train": training,
    "eval": evaluate,
    "classify": classify,
    "anomalies": anomalies,
    "caption": caption,
    "index": index,
    "search": search,
    "quantize": quantize,
    "bench": bench,
    "systems": systems,
    "info": info,
}


class _Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong, and leaves with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or isinstance(action.default, list):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command."""
    parser = _Parser(prog="vlmkernels", description="Train, evaluate and use vision-language models.")
    parser.add_argument("--version", action="version", version=f"vlmkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=_Formatter, allow_abbrev=False
        )
        module.add_arguments(sub)
        sub.add_argument("--config", metavar="FILE", help="a .json or .toml file with any of these options")
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        sub.add_argument(
            "--verbose", action="store_true", help="log which backend serves which call, and why"
        )
        sub.set_defaults(subparser=sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0 done, 1 failed or stopped before the end, 2 bad input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        args = parser.parse_args(arguments)
        if args.config:
            args = _with_config(parser, arguments, args)
        logging.basicConfig(
            level=logging.DEBUG if args.verbose else logging.ERROR,
            format="%(levelname)s %(name)s: %(message)s",
        )
        return int(COMMANDS[args.command].run(args))
    except SystemExit as stop:  # argparse: --help, --version, an error
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # The reader (head, less) left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("vlmkernels: stopped", file=sys.stderr)
        return 130
    except TrainingFailed as error:
        print(f"vlmkernels: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            logging.getLogger(__name__).debug("where it came from", exc_info=True)
        print(f"vlmkernels: {error}", file=sys.stderr)
        return 2


def _with_config(
    parser: argparse.ArgumentParser, arguments: Sequence[str], args: argparse.Namespace
) -> argparse.Namespace:
    """Reads the options file and parses again: what is on the command line wins over the file."""
    args.subparser.set_defaults(**read_config(args.config, args.command, args.subparser))
    return parser.parse_args(arguments)
