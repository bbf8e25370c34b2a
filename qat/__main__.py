"""`python -m qat COMMAND`: what can be asked without writing code. A new command is a module and a line of COMMANDS."""

import argparse
import sys
from collections.abc import Sequence

from qat import comparison, inspection
from qat.analysis import leaderboard_page, show, targets

COMMANDS = {"show": show, "inspect": inspection, "compare": comparison, "targets": targets,
            "report": leaderboard_page}  # fmt: skip
"""Name -> module with a docstring (its first line is the help), `arguments(parser)` and `run(args)`, which
returns the exit code, or None for 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Input that cannot be used ends it with exit code 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m qat",
        description="Quantization-aware training for PyTorch: what trains is what runs.",
        epilog="Training itself is `python train.py`; see `python train.py --help`.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for name, module in COMMANDS.items():
        summary, _, more = (module.__doc__ or "").partition("\n\n")
        parsers[name] = commands.add_parser(
            name, help=summary, description=f"{summary}\n\n{more}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.arguments(parsers[name])
    args = parser.parse_args(argv)
    try:
        code: int | None = COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError) as error:
        parsers[args.command].error(str(error))
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
