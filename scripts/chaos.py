"""Kills runs of a tiny model at random moments, has them go on, and compares their ends bit for bit.

python scripts/chaos.py --kills 50 --write docs/reliability.md

Children are forked from a process that has imported everything, so a run costs seconds. A kill is `kill -9` from
outside, at a random moment after a random event: a training step, a batch of an evaluation, the start of a write.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KINDS = {
    "training": "in a training step",
    "evaluation": "in an evaluation",
    "checkpoint": "while a checkpoint is written",
    "disk": "by a full disk (a limit on the size of files)",
}
EVENTS = {"training": b"T", "evaluation": b"E", "checkpoint": b"C"}
LARGEST = 2**20
"""Bytes that no file of a run reaches."""
SETTINGS = {
    "SimNPO, all weights": ["--model.objective", "SimNPO"],
    "NPO, adapter with dropout": [
        *("--model.objective", "NPO", "--model.lora.rank", "4", "--model.lora.dropout", "0.2"),
    ],
}
IMPORTED = (
    *("simnpo_pl.cli.main", "peft", "peft.tuners.lora", "rouge_score.rouge_scorer", "torch.utils.tensorboard"),
    *("tensorboard.compat.proto.event_pb2", "transformers.models.llama.modeling_llama"),
)
COMPARED = ("start", "epochs", "final", "counts", "unavailable", "exported_epoch", "finished", "objective", "verdict")
FILES = ("rows.jsonl", "TOFU_EVAL.json", "history.jsonl", "weights.jsonl")


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A few generated rows in TOFU's layout and an untrained Llama of 32 dimensions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from simnpo_pl.benchmarks.demo import train_tokenizer, write_dataset

    data, model = folder / "data", folder / "model"
    write_dataset(data, 0)
    sizes = {"forget10": 12, "retain90": 40, "forget10_perturbed": 12, "retain_perturbed": 7}
    for name, rows in {**sizes, "real_authors_perturbed": 5, "world_facts_perturbed": 3}.items():
        file = data / f"{name}.json"
        file.write_text("\n".join(file.read_text().splitlines()[:rows]) + "\n")
    rows = [json.loads(line) for line in (data / "full.json").read_text().splitlines()[:60]]
    tokenizer = train_tokenizer([f"{row['question']} {row['answer']}" for row in rows])
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **settings, **ids)
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return data, model


def command(data: Path, model: Path, setting: str, run: Path) -> list[str]:
    """Arguments of a run; the same ones start it and go on with it."""
    return [
        *("fit", "--config", str(Path(__file__).parents[1] / "configs" / "tofu.yaml"), *SETTINGS[setting]),
        *("--data.path", str(data), "--model.name", str(model), "--run_dir", str(run), "--ckpt_path", "last"),
        # The model card has the run's name.
        *("--label", "chaos"),
        *("--data.effective_batch", "4", "--data.per_device_batch", "2", "--model.lr", "1e-2"),
        *("--eval.retain_log", "null", "--eval.max_new_tokens", "8", "--eval.cache_dir", "null"),
        *("--eval.tokens_per_batch", "1024", "--eval.prompts_per_batch", "8"),
        *("--checkpoint.every_steps", "1", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]


# -- one run -------------------------------------------------------------------------------------------------


def start(arguments: list[str], log: Path, slow_writes: bool = False, limit: int | None = None) -> tuple[int, int]:
    """Fork a run that reports its events.

    Args:
        arguments: Of the command line.
        log: Where it prints.
        slow_writes: Whether writes of a checkpoint take long enough to be hit.
        limit: Bytes at which files take no more.

    Returns:
        Process id, and the pipe of events, a byte each.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 70
    try:
        os.close(reading)
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        _report(writing, slow_writes)
        from simnpo_pl.__main__ import main

        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _report(pipe: int, slow_writes: bool) -> None:
    """Have steps, batches and writes of this process say when they begin."""
    import torch

    from simnpo_pl.module.policy import PolicyModule
    from simnpo_pl.module.unlearning import UnlearningModule
    from simnpo_pl.runs.checkpoint import AtomicCheckpointIO

    torch.set_num_threads(1)

    def announced(owner: Any, name: str, event: bytes) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            os.write(pipe, event)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    announced(UnlearningModule, "training_step", EVENTS["training"])
    announced(PolicyModule, "_evaluate", EVENTS["evaluation"])
    announced(AtomicCheckpointIO, "save_checkpoint", EVENTS["checkpoint"])
    if slow_writes:
        save = torch.save

        def slowly(content: Any, file: Any) -> None:
            save(content, _Slow(file))

        torch.save = slowly


class _Slow:
    """A file to which every write takes a while."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, content: bytes) -> int:
        time.sleep(0.0005)
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def events(pipe: int, timeout: float = 120.0) -> Iterator[bytes]:
    """Events of a run, until it ends."""
    while select.select([pipe], [], [], timeout)[0]:
        event = os.read(pipe, 1)
        if not event:
            return
        yield event
    raise TimeoutError("a run said nothing for two minutes")


def finish(child: int, pipe: int) -> int:
    """Exit code of a run, waited for."""
    for _ in events(pipe):
        pass
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- kills ---------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What an uninterrupted run did.

    Args:
        folder: Its run folder.
        counts: Events by kind.
        seconds: Mean time from one event of a kind to what follows it.
    """

    folder: Path
    counts: dict[str, int]
    seconds: dict[str, float]


def trace(arguments: list[str], folder: Path, slow_writes: bool) -> Trace:
    """Run without a kill."""
    child, pipe = start(arguments, folder.with_suffix(".log"), slow_writes)
    seen = [(event, time.monotonic()) for event in events(pipe)]
    code = finish_quietly(child, pipe)
    if code:
        raise SystemExit(f"the run without a kill failed, see {folder.with_suffix('.log')}")
    times: dict[str, list[float]] = {kind: [] for kind in EVENTS}
    for (event, at), (_, after) in zip(seen, [*seen[1:], (b"", time.monotonic())], strict=True):
        kind = next(kind for kind, name in EVENTS.items() if name == event)
        times[kind].append(after - at)
    return Trace(folder, {k: len(t) for k, t in times.items()}, {k: sum(t) / len(t) for k, t in times.items()})


def finish_quietly(child: int, pipe: int) -> int:
    """Exit code of a run whose events were read."""
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def differences(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ, times aside."""
    records = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    found = [key for key in COMPARED if records[0].get(key) != records[1].get(key)]
    names = [*FILES, *sorted({f"model/{f.name}" for folder in (one, other) for f in (folder / "model").iterdir()})]
    for name in names:
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other)]
        if contents[0] != contents[1]:
            found.append(name)
    return found


def cycle(kind: str, traced: Trace, arguments: Callable[[Path], list[str]], folder: Path, seed: int) -> dict[str, Any]:
    """Kill a run once, go on with it, compare.

    Returns:
        `hit` (whether the run was ended by it), `within` (whether it left an unfinished checkpoint behind, or finished
        batches of an evaluation; of a disk, whether the run ended with one line that says so), `differs`.
    """
    import torch

    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    options, log = arguments(folder), folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    if kind == "disk":
        # Small files are as likely to be hit as large ones.
        limit = round(LARGEST ** draw.uniform(0.5, 1))
        ended = finish(*start(options, log, limit=limit))
        hit = ended == 2
        errors = [line for line in log.read_text().splitlines() if line.startswith(("error:", "Traceback"))]
        within = len(errors) == 1 and "File too large" in errors[0]
    else:
        ended = _kill(kind, traced, options, log, draw)
        hit = ended == -signal.SIGKILL
    last = folder / "last.ckpt"
    if last.exists():
        torch.load(last, weights_only=True)
    if kind != "disk":
        evaluated = any((folder / ".evaluation").glob("*/*.jsonl"))
        writing = any("last.ckpt." in file.name for file in folder.iterdir())
        within = {"training": hit, "evaluation": hit and evaluated, "checkpoint": hit and writing}[kind]
    # A run that came to its end all the same has nothing left to go on with.
    code = ended and finish(*start(options, log))
    differs = differences(traced.folder, folder) if code == 0 else [f"exit code {code}, see {log}"]
    left = [f.name for f in folder.iterdir() if f.name.startswith(".")] if folder.is_dir() else []
    if not (differs or left):
        shutil.rmtree(folder)
        log.unlink()
    return {"kind": kind, "seed": seed, "hit": hit, "within": within, "differs": [*differs, *left]}


def _kill(kind: str, traced: Trace, options: list[str], log: Path, draw: random.Random) -> int:
    """Start a run and kill it; how it ended."""
    child, pipe = start(options, log, slow_writes=kind == "checkpoint")
    chosen, delay = draw.randrange(traced.counts[kind]), draw.random() * traced.seconds[kind]
    passed = 0
    for event in events(pipe):
        if event == EVENTS[kind]:
            if passed == chosen:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                break
            passed += 1
    return finish(child, pipe)


def work(jobs: list[tuple[str, str, int]], traces: dict[Any, Trace], make: Any, folder: Path, out: int) -> None:
    """Do some cycles and write what came of them, a line each."""
    for kind, setting, seed in jobs:
        name = f"{kind}-{seed}"
        try:
            found = cycle(
                kind, traces[setting, kind == "checkpoint"], lambda f, s=setting: make(s, f), folder / name, seed
            )
        except Exception as error:
            found = {"kind": kind, "seed": seed, "hit": True, "within": True, "differs": [repr(error)]}
        os.write(out, (json.dumps(found) + "\n").encode())


def chaos(kills: int, folder: Path, data: Path, model: Path, seed: int = 0, workers: int = 2) -> list[dict[str, Any]]:
    """As many kills of every kind, over all settings in turn.

    Args:
        kills: Of each kind.
        folder: Where runs go; those that differ are left there.
        data: Folder in TOFU's layout.
        model: Start model.
        seed: Of the moments.
        workers: Runs at the same time.

    Returns:
        What came of each kill, see `cycle`.
    """
    # Children find everything imported.
    for name in IMPORTED:
        import_module(name)

    def make(setting: str, run: Path) -> list[str]:
        return command(data, model, setting, run)

    folder.mkdir(parents=True, exist_ok=True)
    traces = {}
    for number, setting in enumerate(SETTINGS):
        for slow in (False, True):
            run = folder / f"uninterrupted-{number}{'-slow' if slow else ''}"
            shutil.rmtree(run, ignore_errors=True)
            traces[setting, slow] = trace(make(setting, run), run, slow)
    jobs = [(kind, list(SETTINGS)[i % len(SETTINGS)], seed + i) for i in range(kills) for kind in KINDS]
    pipes = []
    for worker in range(workers):
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                work(jobs[worker::workers], traces, make, folder, writing)
            finally:
                os._exit(0)
        os.close(writing)
        pipes.append(os.fdopen(reading))
    found = [json.loads(line) for pipe in pipes for line in pipe]
    for _ in pipes:
        os.wait()
    return found


def markdown(found: list[dict[str, Any]], seconds: float) -> str:
    """Counts as a table."""
    lines = ["| interrupted | runs | before their end | evidence | resumed, same result bit for bit |"]
    lines.append("|---|---|---|---|---|")
    for kind, what in KINDS.items():
        own = [one for one in found if one["kind"] == kind]
        hits, within = (sum(one[key] for one in own) for key in ("hit", "within"))
        alike = sum(not one["differs"] for one in own)
        lines.append(f"| {what} | {len(own)} | {hits} | {within} | {alike} |")
    lines.append("")
    lines.append(f"{len(found)} runs ended, {sum(bool(one['differs']) for one in found)} mismatches, ")
    lines[-1] += f"{seconds / max(1, len(found)):.1f} seconds a run."
    return "\n".join(lines)


def replace_block(file: Path, name: str, text: str) -> None:
    """Put text between the marks of a block of a Markdown file."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = file.read_text().partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{file} has no block {begin} ... {end}")
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> int:
    """Kill, print the counts; exit code 1 if a run ended in another way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where runs go (default: a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the counts into the block `chaos` of this file")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    data, model = make_inputs(folder)
    begun = time.monotonic()
    found = chaos(options.kills, folder, data, model, options.seed, options.workers)
    text = markdown(found, time.monotonic() - begun)
    print(text)
    if options.write is not None:
        replace_block(options.write, "chaos", text)
    for one in found:
        if one["differs"]:
            print(f"{one['kind']}, seed {one['seed']}: {', '.join(one['differs'])}", file=sys.stderr)
    failed = any(one["differs"] for one in found)
    if options.folder is None and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    elif failed:
        print(f"runs are left in {folder}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
