"""What tests of whole runs read off a run's folder, and the golden values."""

import gzip
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> Any:
    """Content of a file of `tests/goldens`."""
    data = (GOLDENS / name).read_bytes()
    return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)


def results(folder: Path) -> dict[str, Any]:
    """Content of results.json."""
    return json.loads((folder / "results.json").read_text())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs exported the same model, bit for bit."""
    a, b = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(folder: Path) -> list[float]:
    """Logged loss of every optimizer step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def history(folder: Path) -> list[dict[str, float]]:
    """Losses and whatever else a run kept of every optimizer step."""
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@contextmanager
def killed_in_epoch(epoch: int, batch: int = 0) -> Iterator[None]:
    """Ends the run inside, as by a kill, at a batch of an epoch, from 1."""
    from simnpo_pl.runs.folder import RunFolder

    class Killed(BaseException):
        pass

    def kill(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == epoch - 1 and args[-1] >= batch:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "on_train_batch_start", kill, raising=False)
        with pytest.raises(Killed):
            yield


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs ended alike, bit for bit: results but for times, rows, logs of steps and weights."""
    names = ("start", "retrained", "epochs", "final", "counts", "unavailable", "exported_epoch", "finished")
    names += ("objective", "verdict")
    a, b = (results(folder) for folder in (one, other))
    for name in names:
        assert a.get(name) == b.get(name), name
    for name in ("rows.jsonl", "TOFU_EVAL.json", "history.jsonl", "weights.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    files = sorted(f.name for f in (one / "model").iterdir())
    assert files == sorted(f.name for f in (other / "model").iterdir())
    # The model card names its run.
    return all(
        (one / "model" / f).read_bytes() == (other / "model" / f).read_bytes() for f in files if f != "README.md"
    )


def run_processes(
    count: int,
    arguments: list[str],
    log: Path,
    then: Callable[[list[int]], None] | None = None,
    seconds: float = 300,
) -> int:
    """Run the command line on several gloo processes, forked from this one, which has imported everything.

    Args:
        count: Processes.
        arguments: Of the command line.
        log: What each prints goes to a file of this name and its rank.
        then: Called with the processes' ids once they run.
        seconds: After which they are killed.

    Returns:
        The exit code that all of them had.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _process(rank, count, port, arguments, log)
        children.append(child)
    if then is not None:
        then(children)
    codes: dict[int, int] = {}
    limit = time.monotonic() + seconds
    while len(codes) < count:
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    # The others may wait for it in vain.
                    limit = min(limit, time.monotonic() + 10)
        if time.monotonic() > limit:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            limit = math.inf
        time.sleep(0.01)
    texts = [log.with_name(f"{log.name}.{rank}").read_text() for rank in range(count)]
    assert len(set(codes.values())) == 1, "\n".join([str(codes), *texts])
    return codes[children[0]]


def _process(rank: int, count: int, port: int, arguments: list[str], log: Path) -> None:
    code = 70
    try:
        sys.stdout = sys.stderr = log.with_name(f"{log.name}.{rank}").open("a", buffering=1)
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        place = {
            "LOCAL_RANK": rank,
            "NODE_RANK": 0,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Renews torch's thread pool, which a fork leaves invalid; transformers loads with several threads.
        torch.set_num_threads(1)
        from simnpo_pl.__main__ import main

        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def match_rows(log: Any, questions: list[str], answers: list[str], split: str, tokens: str = "") -> torch.Tensor:
    """Truth ratios of a retrained model's log, matched with forget rows."""
    texts = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    rows = log.match("forget", texts, [tokens] * len(texts), split)
    return torch.tensor([row["truth_ratio"] for row in rows], dtype=torch.float64)


def beyond_ascii(rows: list[dict[str, Any]], score: str, stem: bool) -> list[float]:
    """What each row's score gains by letters that rouge-score's own tokenizer drops; 0 where all are ASCII."""
    from rouge_score.rouge_scorer import RougeScorer

    kind, part = score.split("_")
    scorer = RougeScorer([kind], use_stemmer=stem)
    gains = []
    for row in rows:
        theirs = scorer.score(row["answer"], row["generation"])[kind]
        gains.append(row[score] - (theirs.recall if part == "recall" else theirs.fmeasure))
        if row["answer"].isascii() and row["generation"].isascii():
            assert gains[-1] == pytest.approx(0, abs=1e-6)
    return gains


def on_second_device(function: Callable[..., Any], *args: Any) -> tuple[int, str]:
    """Call a function of a module where there is the second device: in a process of its own, since it changes torch.

    The process is forked from one that has imported all, but has run no backward pass: autograd's threads are counted
    at the first one, and would be too few for another device.

    Returns:
        Exit code, and what was printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simnpo_pl.cli.main", "simnpo_pl.benchmarks", "tensorboard"])
    with tempfile.NamedTemporaryFile("r") as output:
        child = context.Process(target=_on_second_device, args=(output.name, function, args))
        child.start()
        child.join()
        return child.exitcode or 0, output.read()


def _on_second_device(output: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    code: Any = 70
    with open(output, "w") as file:
        sys.stdout = sys.stderr = file
        try:
            import second_device  # noqa: F401

            function(*args)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
    os._exit(code)


def command_on_gpu(arguments: list[str]) -> None:
    """Run the command line, which asks torch for a GPU to choose the precision, as where one computes in bfloat16."""
    from simnpo_pl.__main__ import main

    def for_precision(*args: Any, **kwargs: Any) -> bool:
        return sys._getframe(1).f_code.co_name in ("precision", "check_accelerator")

    torch.cuda.is_available = torch.cuda.is_bf16_supported = for_precision
    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    main(arguments)
