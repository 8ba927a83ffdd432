"""Measures time and memory, and writes the tables and the figure of docs/performance.md."""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the chosen parts, write what they found."""
    if sys.argv[1:2] == ["child"]:
        from bench.children import CHILDREN

        print(json.dumps(CHILDREN[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    options = _options()
    from bench.measure import machine
    from bench.parts import PARTS, SLOW
    from bench.report import write

    started, found, failed = time.monotonic(), {}, {}
    for name in options.only or [name for name in PARTS if name != "gpu" and not (options.quick and name in SLOW)]:
        say(f"{name} ...")
        try:
            found[name] = PARTS[name](options)
        except Exception as error:
            # The other parts are worth having.
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        say(f"{name}: {time.monotonic() - started:.0f} s in all")
    record: dict[str, Any] = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": machine(),
        "texts": "TOFU's" if options.data else "random tokens of TOFU's lengths",
        "failed": failed,
        **found,
    }
    earlier = Path(options.out) / "results.json"
    if options.only and earlier.is_file():
        # Parts that are measured again take the place of those of the whole run.
        whole, again = json.loads(earlier.read_text()), [record["command"], record["machine"]["load_average"]]
        failed = {name: why for name, why in {**whole.get("failed", {}), **failed}.items() if name not in found}
        again_all = {**whole.get("again", {}), **dict.fromkeys(found, again)}
        record = {**whole, **found, "failed": failed, "again": again_all}
    write(record, Path(options.out), options.write and Path(options.write))
    if failed:
        sys.exit(1)


def say(line: str) -> None:
    """Prints progress to stderr, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    from bench.parts import PARTS

    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, smaller cases and models, fewer parts: a rough look"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(PARTS),
        help="parts to measure, in addition to those in --out; default: all but gpu",
    )
    parser.add_argument("--data", help="folder with TOFU's files; random tokens of TOFU's lengths by default")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for them, of at most 49152 tokens")
    parser.add_argument("--out", default=str(ROOT / "runs" / "bench"), help="folder for results.json and figure")
    parser.add_argument("--write", metavar="PAGE", help="page whose measured part, and whose figure, are replaced")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model; the targets are for 8")
    parser.add_argument("--threads", type=int, help="threads; torch's own choice by default")
    options = parser.parse_args()
    whole = not options.only or (Path(options.out) / "results.json").is_file()
    if options.write and not (whole and Path(options.write).is_file()):
        parser.error("--write takes a page that exists, and all parts, measured now or held by --out")
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    main()
