"""A GPU with a model of 1.2 billion random weights in bf16-mixed precision: `python -m bench --only gpu`, two minutes.

A part that fails, or takes longer than its time, leaves its error in place of its numbers; weights are never written.
"""

import json
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from bench import baseline
from bench.data import Rows, freeze
from bench.measure import interleave, median
from simnpo_pl.data.pairing import MicroBatch
from simnpo_pl.data.training import TrainingSet
from simnpo_pl.evaluation.data import EvalData
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.models.generation import generate
from simnpo_pl.models.layers import compile_layers
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.models.reference import REFERENCE_KEY
from simnpo_pl.module.optimization import adamw
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, Models, SimNPO
from simnpo_pl.objectives.base import batch_losses
from simnpo_pl.objectives.retain import KL, NLL
from simnpo_pl.utils import markdown

LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""Of Llama-3.2-1B."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s of a card by its data sheet."""
FORMULA = (
    "FLOPs of a step: 3 F of the policy, and F of the reference on the retain rows with KL; F = 2 * weights of the "
    "layers * tokens + 2 * weights of the head * scored tokens + 2 * layers * heads * head width * sum of squared row "
    "lengths (attention, the causal half); padding counts nothing"
)
BETA = 2.5
STEPS = 9
"""Of the Trainer: two to warm up, six that are timed, one whose host waits are counted."""

EXACT = 8
"""Prompts whose answers in float32 are compared."""
LARGEST = 256
"""Forget rows of a step."""

Found = dict[str, Any]
Loss = Callable[[], Tensor]
Work = Callable[[], None]


def simnpo_kl(model: Any, reference: Any, forget: Any, retain: Any) -> Tensor:
    """The public recipe's SimNPO with a divergence from the reference on the retain rows."""
    losses, lengths = baseline.row_losses(model, forget)
    return -2 / BETA * logsigmoid(BETA * losses / lengths).mean() + baseline.kl(model, reference, retain)


METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Tensor]]] = {
    "SimNPO+NLL": (partial(SimNPO, beta=BETA), NLL, baseline.simnpo),
    "NPO+NLL": (NPO, NLL, baseline.npo),
    "SimNPO+KL": (partial(SimNPO, beta=BETA), KL, simnpo_kl),
}


def gpu(options: Any) -> Found:
    """All parts on the first GPU that CUDA sees."""
    if not torch.cuda.is_available():
        raise SystemExit("bench: the part gpu needs a GPU, and CUDA sees none on this machine")
    return Card(torch.device("cuda"), Path(options.out)).run()


class Card:
    """Measures a device.

    Args:
        device: To measure.
        folder: For profiles, and for what was found so far.
        shape: Of the model.
        sizes: Forget rows of a step; as many retain rows come with them.
        questions: To evaluate, with six answers each.
        prompts: Generated at once.
        new: Tokens of a generated answer.
        seconds: After which no further part begins.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        shape: Mapping[str, Any] = LLAMA_1B,
        sizes: Sequence[int] = (8, 32),
        questions: int = 200,
        prompts: Sequence[int] = (48, 256, 512),
        new: int = 32,
        seconds: float = 110,
    ) -> None:
        self.device, self.folder, self.shape, self.sizes = device, folder, dict(shape), sizes
        self.questions, self.prompts, self.new = questions, prompts, new
        self.end = time.monotonic() + seconds
        self.found: Found = {"formula": FORMULA}
        self.ways = ["package", "recipe"]

    def run(self) -> Found:
        """All parts, each kept on disk when it is done."""
        parts: dict[str, tuple[Callable[[Found], None], float]] = {
            "card": (self.card, 10),
            "model": (self.build, 30),
            "compiling": (self.compiling, 35),
            "step": (self.steps, 40),
            "generation": (self.generation, 25),
            "changing rows": (self.changing_rows, 15),
            "waits": (self.waits, 15),
            "larger batches": (self.larger_batches, 25),
            "scoring": (self.scoring, 15),
            "profile": (self.profile, 20),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (part, limit) in parts.items():
            start = time.monotonic()
            self.found[name] = {}
            # Compiled layers run as they are written but where a step asks for the others.
            with torch.compiler.set_stance("force_eager"):
                error = _error_of(part, min(limit, self.end - start), self.found[name])
            self.found[name] |= {"seconds": round(time.monotonic() - start, 1), **({"error": error} if error else {})}
            print(f"{name}: {json.dumps(self.found[name])}", file=sys.stderr, flush=True)
            (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        return self.found

    # -- parts -------------------------------------------------------------------------------------------

    def card(self, found: Found) -> None:
        """The rate that products of matrices reach, and what the data sheet says."""
        size = 8192 if self._is_cuda else 256
        one, other = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        self._seconds(lambda: one @ other, 3)
        seconds = self._seconds(lambda: one @ other, 20)
        name = torch.cuda.get_device_name() if self._is_cuda else str(self.device)
        rate = 2 * size**3 / seconds
        found |= {"name": name, "torch": torch.__version__, "matmul": rate}
        found["peak"] = next((peak for card, peak in PEAK.items() if card in name), rate)

    def build(self, found: Found) -> None:
        """Policy, reference and optimizer."""
        torch.manual_seed(0)
        config = LlamaConfig(**self.shape)
        config._attn_implementation = "sdpa"
        with self.device:
            self.model, self.reference = LlamaForCausalLM(config).train(), freeze(LlamaForCausalLM(config))
        self.rows = Rows(config.vocab_size)
        self.batches = {size: self._batch(size) for size in self.sizes}
        with self._autocast(), torch.no_grad():
            self.scorer, self.other = Scorer(self.model), Scorer(self.reference)
        self.optimizer = adamw(self.model, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.01)
        # All answers then have the same length.
        self.model.generation_config.eos_token_id = None
        found |= {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "packs": self.scorer.forward.way == "packed",
        }

    def compiling(self, found: Found) -> None:
        """Seconds of the first steps with compiled layers; where they fail, no later part takes them."""
        compile_layers(self.model)
        for size, batch in self.batches.items():
            for method in METHODS:
                seconds = self._seconds(self._work("compiled", method, batch), 1)
                found[f"{method} {size}+{size}"] = {"first_step_s": round(seconds, 2)}
        self.ways.append("compiled")

    def steps(self, found: Found) -> None:
        """Optimizer steps of the package, of the public recipe and with compiled layers, in turns, on the same rows."""
        for size, batch in self.batches.items():
            for method in METHODS:
                works = {way: self._work(way, method, batch) for way in self.ways}
                times: dict[str, list[float]] = {way: [] for way in works}
                peaks: Found = {}
                for turn in range(3):
                    for way, work in works.items():
                        self._forget_peak()
                        seconds = self._seconds(work, 2 if turn else 1)
                        times[way] += [seconds] if turn else []
                        peaks[way] = self._peak(method, way)
                for way in works:
                    found[f"{method} {size}+{size} {way}"] = {
                        **self._entry(batch, median(times[way]), kl=method.endswith("KL")),
                        "spread": round(max(times[way]) / min(times[way]) - 1, 3),
                        "peak_gib": peaks[way],
                    }

    def waits(self, found: Found) -> None:
        """Time, and host waits, of a step and of a scored batch by the Trainer; host waits of a generated token."""
        counter = _Counter(self._synchronize)
        trainer = pl.Trainer(
            accelerator="cpu" if self.device.type == "cpu" else "gpu",
            devices=1,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[counter],
        )
        # The same rows in each, those of the steps without the Trainer.
        batches = [self.batches[self.sizes[0]]] * STEPS
        self.optimizer.state.clear()
        trainer.fit(self._module(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        found["step"] = {"ms": round(1000 * counter.seconds, 1), **counter.waits()}
        with _host_waits() as seen:
            self._generate(self._prompts(self.prompts[0]))
        found["token"] = {"waits": seen.total() / self.new, "lines": dict(seen.most_common(6))}

    def scoring(self, found: Found) -> None:
        """Answers a second of an evaluation by the Trainer, and of the public recipe's passes in batches of 32."""
        self.model.eval()
        questions = self.rows.questions(self.questions)
        answers = sum(map(len, questions))
        for tokens in (8192, 16384):
            counter = _Counter(self._synchronize)
            trainer = pl.Trainer(
                accelerator="cpu" if self.device.type == "cpu" else "gpu",
                devices=1,
                precision="bf16-mixed",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[counter],
            )
            module = self._module()
            for _ in range(2):
                seconds = self._seconds(partial(self._validate, trainer, module, questions, tokens), 1)
            found[f"package, {tokens} tokens"] = {"rows_per_s": round(answers / seconds, 1), **counter.waits()}
        some = questions[: max(1, self.questions // 4)]
        with self._autocast():
            recipe = partial(baseline.truth_ratio_losses, self.model, some)
            self._seconds(recipe, 1)
            found["recipe"] = {"rows_per_s": round(sum(map(len, some)) / self._seconds(recipe, 1), 1)}

    def generation(self, found: Found) -> None:
        """Milliseconds a token of so many prompts at once, by the package and by transformers, in turns."""
        self.model.eval()
        self._empty()
        ways: dict[str, Callable[..., Any]] = {"package": self._generate, "transformers": self._transformers}
        prompts = self._prompts(EXACT)
        own, other = (torch.tensor(work(prompts, exact=True)) for work in ways.values())
        found[f"float32, {EXACT}"] = {"equal_tokens": round((own == other).double().mean().item(), 4)}
        for count in self.prompts:
            prompts = self._prompts(count)
            works = {way: partial(self._seconds, partial(work, prompts), 1) for way, work in ways.items()}
            for way, times in interleave(works, 3, warm=False).items():
                # In the first round each takes its memory.
                first, seconds = times.wall[0], median(times.wall[1:])
                found[f"{way}, {count}"] = {
                    "first_ms_per_token": round(1000 * first / self.new, 2),
                    "ms_per_token": round(1000 * seconds / self.new, 2),
                    "tokens_per_s": round(count * self.new / seconds),
                }

    def profile(self, found: Found) -> None:
        """The 25 kernels that take longest, in a file."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        order = f"self_{'device' if self._is_cuda else 'cpu'}_time_total"
        for way in self.ways:
            work = self._work(way, "SimNPO+NLL", self.batches[self.sizes[-1]])
            work()
            with profile(activities=kinds) as seen:
                work()
                self._synchronize()
            table = seen.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
            (self.folder / f"profile-{way}.txt").write_text(table)
            found[way] = {"kernels": f"profile-{way}.txt"}

    def larger_batches(self, found: Found) -> None:
        """Steps of SimNPO and NLL with twice as many rows each time, until one does not fit."""
        for way in self.ways:
            size = 2 * self.sizes[-1]
            while size <= LARGEST:
                batch = self._batch(size)
                work = self._work(way, "SimNPO+NLL", batch)
                try:
                    work()
                    self._forget_peak()
                    seconds = self._seconds(work, 2)
                except torch.OutOfMemoryError:
                    break
                found[f"{size}+{size} {way}"] = {**self._entry(batch, seconds), "peak_gib": self._peak("SimNPO", way)}
                size *= 2 if self._is_cuda else LARGEST
            self._empty()

    def changing_rows(self, found: Found) -> None:
        """Milliseconds of a step on rows of a new shape, the first time and the second.

        Each way has batches of its own: what is kept of a shape would help the next one.
        """
        for way in self.ways:
            works = [self._work(way, "SimNPO+NLL", self._batch(self.sizes[0])) for _ in range(6)]
            self._empty()
            first, again = ([1000 * self._seconds(work, 1) for work in works] for _ in range(2))
            found[way] = {"first_ms": round(median(first), 1), "slowest_first_ms": round(max(first), 1)}
            found[way] |= {"second_ms": round(median(again), 1), "slowest_second_ms": round(max(again), 1)}

    # -- work --------------------------------------------------------------------------------------------

    def _batch(self, size: int) -> dict[str, Any]:
        """Random rows of TOFU's lengths, as the package's loader gives them, on the CPU."""
        rows = {"forget": self.rows.training(size), "retain": self.rows.training(size)}
        chosen = tuple(range(size))
        return TrainingSet(rows)[MicroBatch(chosen, chosen, (True,) * size, chosen, chosen)]

    def _work(self, way: str, method: str, batch: dict[str, Any]) -> Work:
        """An optimizer step."""
        loss = self._plain(method, batch) if way == "recipe" else self._own(method, batch)

        def work() -> None:
            # The backward pass, too, is compiled when it first runs.
            with torch.compiler.set_stance("default" if way == "compiled" else "force_eager"):
                self._step(loss)

        return work

    def _own(self, method: str, batch: dict[str, Any]) -> Loss:
        objective, retain = (kind() for kind in METHODS[method][:2])
        if objective.caches_reference:
            with torch.no_grad(), self._autocast():
                forget = move_data_to_device(batch["forget"], self.device)
                totals = self.other({"forget": forget})["forget"].logps().total.cpu()
            batch = {**batch, "forget": {**batch["forget"], REFERENCE_KEY: totals}}
        module, models = self._module(), Models(self.scorer, self.other)

        def loss() -> Tensor:
            # As the Trainer copies it.
            moved = module.transfer_batch_to_device(batch, self.device, 0)
            losses = batch_losses(objective, retain, moved, models)
            return losses.forget + losses.retain

        return loss

    def _plain(self, method: str, batch: Mapping[str, Any]) -> Loss:
        names = ("input_ids", "labels", "attention_mask")
        parts = [{name: batch[part][name] for name in names} for part in ("forget", "retain")]
        return lambda: METHODS[method][2](self.model, self.reference, *move_data_to_device(parts, self.device))

    def _step(self, loss: Loss) -> None:
        self.model.train()
        try:
            with self._autocast():
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _module(self) -> "_Module":
        module = _Module("random weights", SimNPO(beta=BETA), lr=1e-6)
        module.made = self.model
        return module

    def _validate(self, trainer: pl.Trainer, module: "_Module", questions: list[Any], tokens: int) -> None:
        metrics = {"loss": RowMean("nll", len(questions))}
        split = Split("forget", [{} for _ in questions], questions, metrics)  # type: ignore[arg-type]
        data = EvalData(EvalOptions(tokens_per_batch=tokens), Evaluation([split], {}, {}, str))
        trainer.validate(module, datamodule=data, verbose=False)

    def _prompts(self, count: int) -> list[list[int]]:
        return [row.prompt_ids for row in self.rows.training(count)]

    def _generate(self, prompts: list[list[int]], exact: bool = False) -> list[list[int]]:
        with self._autocast(not exact):
            return generate(self.model, prompts, self.new, [])

    @torch.no_grad()
    def _transformers(self, prompts: list[list[int]], exact: bool = False) -> Any:
        rows = [torch.tensor(prompt) for prompt in prompts]
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids, mask = (pad(parts).to(self.device) for parts in (rows, [torch.ones_like(row) for row in rows]))
        length = {"max_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}
        with self._autocast(not exact):
            return self.model.generate(ids, attention_mask=mask, **length)[:, ids.shape[1] :].tolist()

    # -- measuring ---------------------------------------------------------------------------------------

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _autocast(self, enabled: bool = True) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled)

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()

    def _empty(self) -> None:
        if self._is_cuda:
            torch.cuda.empty_cache()

    def _seconds(self, work: Callable[[], Any], times: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self._synchronize()
        return (time.perf_counter() - start) / times

    def _forget_peak(self) -> None:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def _peak(self, method: str, way: str) -> float | None:
        """GiB, weights and optimizer included, the reference only where this way holds one."""
        if not self._is_cuda:
            return None
        held = method.endswith("KL") or (way == "recipe" and method.startswith("NPO"))
        reference = 0 if held else sum(p.numel() * p.element_size() for p in self.reference.parameters())
        return round((torch.cuda.max_memory_allocated() - reference) / 2**30, 2)

    def _entry(self, batch: Mapping[str, Any], seconds: float, kl: bool = False) -> Found:
        tokens = sum(int(part["attention_mask"].sum()) for part in batch.values())
        rates = {"tokens_per_s": round(tokens / seconds), "ms": round(1000 * seconds, 1)}
        return {**rates, "utilisation": round(self._flops(batch, kl) / seconds / self.found["card"]["peak"], 3)}

    def _flops(self, batch: Mapping[str, Any], kl: bool) -> float:
        body = sum(p.numel() for p in self.model.model.layers.parameters() if p.ndim == 2)
        config, head = self.model.config, self.model.lm_head.weight.numel()
        attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim

        def forward(part: Mapping[str, Tensor]) -> float:
            lengths = part["attention_mask"].sum(dim=1).double()
            scored = (part["labels"] != -100).sum()
            return float(2 * body * lengths.sum() + 2 * head * scored + 2 * attention * lengths.square().sum())

        return 3 * (forward(batch["forget"]) + forward(batch["retain"])) + kl * forward(batch["retain"])


class _Module(UnlearningModule):
    """Trains a model that is already there, and leaves it on its device."""

    made: Any

    def load_policy(self) -> Any:
        return self.made

    def cpu(self) -> Any:
        return self

    def on_fit_end(self) -> None:
        super().on_fit_end()
        for optimizer in self.trainer.optimizers:
            # The Trainer would copy it to the CPU.
            optimizer.state.clear()


class _Counter(pl.Callback):
    """Seconds of a training step, then host waits of later ones, or of every validation batch."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.seconds, self.counts = synchronize, 0.0, [Counter[str]()]
        self.counting = _host_waits()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.synchronize()
            self.start = time.perf_counter()
        elif batch_idx == STEPS - 1:
            self.synchronize()
            self.seconds = (time.perf_counter() - self.start) / (STEPS - 3)
            self.on_validation_batch_start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS - 1:
            self.on_validation_batch_end()

    def on_validation_batch_start(self, *args: Any) -> None:
        self.counting = _host_waits()
        self.counts.append(self.counting.__enter__())

    def on_validation_batch_end(self, *args: Any) -> None:
        self.counting.__exit__(None, None, None)

    def waits(self) -> Found:
        """Of the last batch."""
        return {"waits": self.counts[-1].total(), "lines": dict(self.counts[-1].most_common(12))}


@contextmanager
def _host_waits() -> Iterator[Counter[str]]:
    """Counts by line of this repository where the host waits for CUDA."""
    seen: Counter[str] = Counter()
    root = f"{Path(__file__).parents[1]}/"

    def note(*args: Any, **kwargs: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(root):
            frame = frame.f_back
        seen["elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchroniz")
        warnings.showwarning = note
        is_cuda = torch.cuda.is_available()
        try:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("warn")
            yield seen
        finally:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def _error_of(part: Callable[[Found], None], seconds: float, found: Found) -> str | None:
    """Runs a part for so many seconds at most; what went wrong, in a line."""
    if seconds < 1:
        return "no time was left"

    def stop(*args: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: a compiler may take what is raised in it for its own.
    signal.setitimer(signal.ITIMER_REAL, seconds, 2)
    try:
        part(found)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


def tables(found: Found) -> list[str]:
    """What was found, as Markdown."""
    card, weights = found["card"], found["model"].get("parameters", 0)
    rates = [f"{card.get(name, 0) / 1e12:.0f}" for name in ("matmul", "peak")]
    lines = [
        f"{card.get('name')}: {rates[0]} TFLOP/s in a bf16 product, {rates[1]} by its data sheet. "
        f"{weights / 1e9:.2f} billion weights, bf16-mixed. {found['formula']}.",
        "",
    ]
    for name, part in found.items():
        if name == "formula":
            continue
        entries = {key: value for key, value in part.items() if isinstance(value, dict)}
        keys = [key for key in dict.fromkeys(k for value in entries.values() for k in value) if key != "lines"]
        rows = [[key, *(str(value.get(k, "-")) for k in keys)] for key, value in entries.items()]
        lines += [*markdown.table([name, *keys], rows).split("\n"), ""] if rows else []
        lines += [f"{name}: {part['error']}", ""] if "error" in part else []
    return lines
