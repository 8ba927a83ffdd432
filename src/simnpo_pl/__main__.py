"""`python -m simnpo_pl`: runs the command line; a user's mistake is one line and exit code 2."""

import errno
import logging
import os
import socket
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from urllib.parse import urlsplit
from urllib.request import getproxies

from simnpo_pl.cli import RUNS
from simnpo_pl.studies import COMMANDS, module_of, parse
from simnpo_pl.utils.errors import UserError, nearest
from simnpo_pl.utils.files import causes, program

ASK_HUB = (*RUNS, "check", "leak", "lm-eval", "perturb", "quantize", "relearn", "task-vector")
"""Commands that may load a model or data from the hub in this process."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a full or read-only disk; libraries raise other errors after them."""
HELP = """usage: python -m simnpo_pl COMMAND --config FILE [--config OVERLAY ...] [--OPTION VALUE ...]

Trains a causal language model to forget chosen data, and measures what it forgot and what it kept.

commands:
{commands}

  --debug   show the traceback of an error

Each command lists its options with --help; start with
  {python} -m simnpo_pl fit --config configs/demo.yaml
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; None takes the arguments of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers imports torchao if it is installed, which lists the kernels that it lacks.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        # Lightning ends a loop that Ctrl-C stopped with exit code 1, and says nothing.
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("\ninterrupted; the same command goes on: what it finished is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if debug or message is None:
            raise
        print("error:", *message.split(), file=sys.stderr)
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    name = arguments[0]
    if name in ASK_HUB:
        _go_offline_without_network()
    if name in COMMANDS:
        options = parse(name, arguments[1:])
        import_module(module_of(name)).run(options)
    elif name in RUNS or name.startswith("-"):
        # What is shown may be redirected to a file, and other processes of the run have said it.
        if name in RUNS and "LOCAL_RANK" not in os.environ:
            print("loading ...", file=sys.stderr, flush=True)
        from simnpo_pl.cli.main import UnlearningCLI

        UnlearningCLI(arguments)
    else:
        known = (*RUNS, *COMMANDS)
        raise UserError(f"{name}: no such command{nearest(name, known)}; known are {', '.join(known)}")


def usage() -> str:
    """Help over all commands."""
    known = {**RUNS, **COMMANDS}
    width = max(map(len, known))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in known.items())
    return HELP.format(commands=commands, python=program())


def _go_offline_without_network() -> None:
    # Without network the hub's client retries every file for 24 seconds before it looks into its cache. It reads the
    # setting when it is imported, so this cannot wait until a model is loaded.
    proxies = getproxies()
    if "HF_HUB_OFFLINE" in os.environ or "https" in proxies or "all" in proxies:
        return
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def user_message(error: BaseException) -> str | None:
    """What to say of an error that the user can fix; None for a fault of the program."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            return _unwritten(cause)
        if type(cause).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(cause).partition("\n")[0]
            return f"torch.compile fails here ({reason}); leave --model.compile out"
    # Known by its name, since importing Lightning takes seconds.
    if isinstance(error, ArgumentError) or type(error).__name__ == "MisconfigurationException":
        return str(error)
    return _unwritten(error) if isinstance(error, OSError) and error.errno is not None else None


def _unwritten(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}; files written before are as they were"


if __name__ == "__main__":
    main()
