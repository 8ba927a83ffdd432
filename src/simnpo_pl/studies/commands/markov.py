"""Mixtures of Markov chains (SimNPO paper, section 5): all methods and seeds, a table and the trade-off figure.

Three chains over ten states; a small Llama that knows them forgets two. Every method starts from the same models and
sees the same batches at the same seed. Forgetting is a distance in nats to the true chain, which is known.
"""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, default=Path("runs/markov"), help="where to write (default: %(default)s)")
    parser.add_argument(
        "--setting", choices=("small", "paper"), default="small", help="size of the study (default: small)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="default: 0 1 2 3")
    parser.add_argument("--processes", type=int, default=2, help="that share the work (default: %(default)s)")


def run(options: Namespace) -> None:
    """Run the study, or take up its results; write `study.json`, `table.md` and `trade_off.png`.

    Raises:
        UserError: An option is out of range, or the folder holds another study.
    """
    if options.processes < 1:
        raise UserError(f"--processes must be at least 1, got {options.processes}")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds must be different numbers of at least 0, got {options.seeds}")

    from simnpo_pl.studies.analysis import markov, markov_report
    from simnpo_pl.utils.files import write_json, write_text

    out = options.out.expanduser()
    setting = markov.SETTINGS[options.setting]
    asked = {"setting": asdict(setting), "seeds": options.seeds, "methods": list(markov.METHODS)}
    file = out / "study.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["asked"] != asked:
            raise UserError(f"--out {out} holds a study of other settings or seeds; give another folder")
        results = kept["results"]
    else:
        results = markov.study(out / "models", setting, options.seeds, options.processes, print)
        write_json(file, {"asked": asked, "results": results})
    text = markov_report.table(results)
    write_text(out / "table.md", text + "\n")
    markov_report.figure(results, out / "trade_off.png")
    print(text)
    print(f"written: {file}, {out / 'table.md'}, {out / 'trade_off.png'}")
