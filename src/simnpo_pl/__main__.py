"""`python -m simnpo_pl`: runs the command line; a mistake of the user is one line and exit code 2."""

import errno
import logging
import os
import socket
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from simnpo_pl.studies.commands import COMMANDS
from simnpo_pl.studies.commands import run as run_command
from simnpo_pl.utils.errors import UserError

RUNS = {
    "fit": "evaluate the start model, unlearn, export the model, evaluate it",
    "validate": "evaluate a model",
    "test": "evaluate a model",
    "predict": "write a model's greedy answers",
}
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk says that takes no more; libraries raise errors of their own after it."""
HELP = """usage: python -m simnpo_pl COMMAND --config FILE [--config OVERLAY ...] [--OPTION VALUE ...]

Makes a causal language model forget question-answer pairs, and measures what it forgot and what it kept.

commands:
{commands}

  --debug   show the traceback of an error

Each command lists its options with --help; start with
  python -m simnpo_pl fit --config configs/demo.yaml
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: Arguments; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    if arguments[0] in RUNS and not {"-h", "--help"}.isdisjoint(arguments):
        from simnpo_pl.cli.help import options_help

        print(options_help(arguments[0], RUNS[arguments[0]]))
        return
    arguments = ["--help" if word == "--help_all" else word for word in arguments]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torchao, where it is installed, is imported by transformers and lists the kernels it has no use for here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not hub_has_a_name():
        # Without network the hub's client would retry for half a minute before it looks into its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if arguments[0] in COMMANDS:
            run_command(arguments[0], arguments[1:])
        elif not arguments[0].startswith("-") and arguments[0] not in RUNS:
            raise UserError(f"{arguments[0]}: no such command; known are {', '.join((*RUNS, *COMMANDS))}")
        else:
            from simnpo_pl.cli.main import run

            run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if debug or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """Help over all commands."""
    known = {**RUNS, **COMMANDS}
    width = max(map(len, known))
    return HELP.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in known.items()))


def hub_has_a_name() -> bool:
    """Whether the hub's host name resolves; behind a proxy that is for the proxy to know."""
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def user_message(error: BaseException) -> str | None:
    """One line for an error that the user can mend; None for a fault of the program."""
    from argparse import ArgumentError

    from simnpo_pl.utils.files import causes

    for seen in causes(error):
        if isinstance(seen, UserError):
            return _line(str(seen))
        if isinstance(seen, OSError) and seen.errno in UNWRITABLE:
            return _unwritten(seen)
    # Lightning is not imported for its name: a run that fails before has not loaded it either.
    if isinstance(error, ArgumentError) or type(error).__name__ == "MisconfigurationException":
        return _line(str(error))
    return _unwritten(error) if isinstance(error, OSError) and error.errno is not None else None


def _unwritten(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return _line(f"{error.strerror or error}{where}; files written before are as they were")


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
