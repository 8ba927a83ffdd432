"""Tries hostile and broken input by the thousand: each is refused with a message or handled right.

python scripts/hostile.py --examples 1000 --write docs/reliability.md
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from chaos import make_inputs, replace_block

from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.data.sources import load_split, load_table
from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate
from simnpo_pl.data.training import TrainingRows, TrainingSet, collate
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import generation_batches, scoring_batches
from simnpo_pl.metrics.logs import read_retain_log
from simnpo_pl.models.generation import generate
from simnpo_pl.models.loading import load_causal_lm, load_tokenizer
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.models.lora import LoraOptions
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import DPO, NPO, SimNPO
from simnpo_pl.runs.checkpoint import CheckpointOptions
from simnpo_pl.utils.errors import UserError

HANDLED, REFUSED = "handled", "refused"
FOLDER = Path(tempfile.gettempdir())

# -- what is tried -------------------------------------------------------------------------------------------

PIECES = (
    "a",
    "é",
    "\u2028",
    "\x00",
    "\u202e",
    "👩‍👩‍👧",
    "\ud800",
    "<|eos|>",
    "<|bos|>",
    "<|pad|>",
    "{answer}",
    "../",
    "|",
    "\r\n",
    "ﷺ",
)
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.just(""))
long_texts = st.integers(1, 100_000).map(lambda size: "word " * (size // 5) + "x")
values = st.one_of(texts, long_texts, st.none(), st.integers(), st.floats(), st.lists(texts, max_size=2))
likely = st.one_of(st.text(min_size=1, max_size=40), st.sampled_from(PIECES[:6]), st.just("Paris is where it is."))
pairs = st.fixed_dictionaries({"question": likely, "answer": likely})
broken = st.dictionaries(st.sampled_from(("question", "answer")), values)
several = st.lists(
    pairs, min_size=1, max_size=6, unique_by=lambda row: (row["question"].strip(), row["answer"].strip())
)
rows = st.one_of(several, several, several, st.lists(st.one_of(pairs, broken), max_size=6))
measured = {"question": likely, "answer": likely, "paraphrased_answer": likely}
measured["perturbed_answer"] = st.lists(likely, min_size=2, max_size=2)
any_measured = st.fixed_dictionaries({}, optional=dict.fromkeys(measured, values))
eval_rows = st.one_of(
    st.lists(st.fixed_dictionaries(measured), max_size=4),
    st.lists(st.fixed_dictionaries({name: measured[name] for name in ("question", "answer")}), max_size=4),
    st.lists(st.one_of(st.fixed_dictionaries(measured), any_measured), max_size=4),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
losses = st.one_of(st.floats(0, 20), st.floats(0, 20), values)
log_rows = st.fixed_dictionaries(
    {"split": st.just("forget"), "index": st.one_of(st.integers(0, 3), values)},
    optional={"paraphrase_nll": losses, "perturbed_nll": st.one_of(st.lists(losses, max_size=3), values)},
)
by_index = st.dictionaries(st.sampled_from(("0", "1", "x")), st.fixed_dictionaries({"avg_loss": losses}), max_size=2)
whole_rows = st.integers(1, 4).flatmap(
    lambda size: st.tuples(*[st.tuples(st.floats(0, 20), st.lists(st.floats(0, 20), min_size=1))] * size)
)
whole_logs = whole_rows.map(
    lambda found: [
        {"split": "forget", "index": i, "paraphrase_nll": right, "perturbed_nll": wrong}
        for i, (right, wrong) in enumerate(found)
    ]
)
logs = st.one_of(
    whole_logs,
    st.lists(log_rows, max_size=3),
    st.fixed_dictionaries(
        {
            "forget_Q_A_PARA_Prob": st.fixed_dictionaries({"value_by_index": by_index}),
            "forget_Q_A_PERT_Prob": st.fixed_dictionaries({"value_by_index": by_index}),
        }
    ),
)
numbers = st.one_of(st.integers(-5, 70), st.integers(), st.floats())


@cache
def inputs() -> tuple[Path, Path]:
    """A data folder and a tiny model, made once."""
    return make_inputs(Path(tempfile.mkdtemp(prefix="hostile-")))


@cache
def template(max_length: int | None = 128, truncate: bool = False) -> PromptTemplate:
    """Encoder of the tiny model."""
    return PromptTemplate(load_tokenizer(str(inputs()[1])), max_length=max_length, truncate=truncate)


@cache
def scorer() -> Scorer:
    """Scorer of the tiny model, in eval mode."""
    return Scorer(load_causal_lm(str(inputs()[1])))


def refusal(error: UserError) -> str:
    """A refusal says something, in one line once white space is folded."""
    assert str(error).strip()
    return REFUSED


# -- properties ----------------------------------------------------------------------------------------------


def training_rows(case: tuple[list[dict[str, Any]], list[dict[str, Any]], bool]) -> str:
    """Scored tokens decode to the answer and nothing else; the rest is not scored; padding is not attended to."""
    forget, retain, truncate = case
    encoder = template(128, truncate)
    try:
        if not forget:
            raise UserError("load_split refuses an empty split")
        encoded = TrainingRows(forget, retain).encode(encoder, ("forget", "retain"), seed=0)
    except UserError as error:
        return refusal(error)
    tokenizer = encoder.tokenizer
    for name, source in (("forget", forget), ("retain", retain)):
        assert len(encoded[name]) == len(source) > 0
        for row, text in zip(encoded[name], source, strict=True):
            scored = [i for i in row.labels if i != IGNORE_INDEX]
            cut = len(row.input_ids) == encoder.max_length and row.input_ids[-1] != tokenizer.eos_token_id
            answer = tokenizer.decode(scored[: None if cut else -1], skip_special_tokens=False)
            whole = tokenizer.decode(row.input_ids[: None if cut else -1], skip_special_tokens=False)
            # The first scored token may hold the end of the question, too.
            assert whole.endswith(answer)
            assert cut or (text["answer"] in answer and scored[-1] == tokenizer.eos_token_id)
            assert len(row.input_ids) <= encoder.max_length
    sampler = PairedSampler(len(forget), len(retain), 2, 1)
    batches = [TrainingSet(encoded)[micro] for micro in sampler]
    assert sorted(i for batch in batches for i in batch["forget"]["index"].tolist()) == list(range(len(forget)))
    return HANDLED


def scores(case: list[dict[str, Any]]) -> str:
    """Rows of any length scored together get what each gets alone from the model's own loss."""
    try:
        if not case:
            raise UserError("load_split refuses an empty split")
        encoded = TrainingRows(case).encode(template(), ("forget",), 0)["forget"]
    except UserError as error:
        return refusal(error)
    together = scorer()({"x": collate(encoded)})["x"].logps()
    for index, row in enumerate(encoded):
        with torch.no_grad():
            ids = torch.tensor([row.input_ids])
            loss = scorer().model(input_ids=ids, labels=torch.tensor([row.labels])).loss
        assert math.isclose(-together.mean[index].item(), loss.item(), rel_tol=1e-4, abs_tol=1e-5)
    return HANDLED


def evaluations(case: tuple[str, list[dict[str, Any]]]) -> str:
    """Every row counts once, probabilities and overlaps are between 0 and 1, a truth ratio is at least 0."""
    name, given_rows = case
    build = EvaluationBuilder(template(), EvalOptions(max_new_tokens=3))
    try:
        if not given_rows:
            raise UserError("load_split refuses an empty split")
        split = build.questions(name, given_rows)
    except UserError as error:
        return refusal(error)
    evaluation = build.evaluation()
    for batch in scoring_batches([split], 256):
        evaluation.add_scores(batch, evaluation.score(scorer()({"x": batch})["x"], batch))
    for batch in generation_batches([split], 2):
        evaluation.add_generations(batch, generate(scorer().model, batch["prompts"], 3, [1]))
    result = evaluation.compute()
    assert [row["index"] for row in result.rows] == list(range(len(given_rows)))
    for metric in (f"{name}/probability", f"{name}/rouge"):
        assert 0 <= result.values[metric] <= 1
        assert result.counts[metric] == len(given_rows)
    if f"{name}/truth_ratio" in result.values:
        assert result.values[f"{name}/truth_ratio"] >= 0
    json.dumps(result.rows)
    return HANDLED


def data_files(case: tuple[bytes, str]) -> str:
    """Bytes as a file of rows: objects with the columns that were asked for."""
    content, suffix = case
    file = FOLDER / f"hostile-{os.getpid()}{suffix}"
    file.write_bytes(content)
    try:
        found = load_table(str(file), "--data.x", ("question",))
    except UserError as error:
        return refusal(error)
    finally:
        file.unlink()
    assert found
    assert all(isinstance(row, dict) and "question" in row for row in found)
    return HANDLED


def split_names(name: str) -> str:
    """No name of a split leads out of the data folder."""
    data, _ = inputs()
    try:
        found = load_split(str(data), name, ("question", "answer"))
    except UserError as error:
        return refusal(error)
    assert found
    return HANDLED


def retained_logs(content: Any) -> str:
    """JSON as the retrained model's log: truth ratios that are numbers."""
    file = FOLDER / f"hostile-{os.getpid()}-log.json"
    file.write_text(json.dumps(content))
    try:
        log = read_retain_log(file)
    except UserError as error:
        return refusal(error)
    finally:
        file.unlink()
    assert all(isinstance(row.get("truth_ratio", 0.0), float) for row in log.splits["forget"].values())
    return HANDLED


SAMPLER = {"forget_rows": 9, "retain_rows": 5, "effective_batch": 4, "per_device_batch": 2}
OPTIONS: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
    (SimNPO, {"beta": numbers, "gamma": numbers}),
    (NPO, {"beta": numbers}),
    (DPO, {"beta": numbers}),
    (LoraOptions, {"rank": st.integers(), "alpha": numbers, "dropout": numbers, "target_modules": st.lists(texts)}),
    (CheckpointOptions, {"every_steps": st.integers()}),
    (
        EvalOptions,
        {
            **dict.fromkeys(("max_new_tokens", "tokens_per_batch", "prompts_per_batch"), st.integers()),
            **{"generate_rows": st.integers(), "min_k": numbers, "splits": st.lists(texts, max_size=2)},
        },
    ),
    (
        lambda **options: UnlearningModule("x", **options),
        dict.fromkeys(("forget_weight", "retain_weight", "lr", "weight_decay", "warmup_epochs"), numbers),
    ),
    (
        lambda **options: list(PairedSampler(**{**SAMPLER, **options})),
        {
            **dict.fromkeys(("forget_rows", "retain_rows", "effective_batch", "per_device_batch"), st.integers(-2, 30)),
            **{"world_size": st.integers(-1, 5), "rank": st.integers(-1, 5), "seed": st.integers()},
        },
    ),
    (
        lambda **options: PromptTemplate(load_tokenizer(str(inputs()[1])), **options),
        {"template": texts, "max_length": st.integers(), "date": texts},
    ),
)


def options(case: tuple[int, dict[str, Any]]) -> str:
    """Settings make an object or are refused; numbers that pass are finite."""
    number, chosen = case
    try:
        OPTIONS[number][0](**chosen)
    except UserError as error:
        return refusal(error)
    assert all(math.isfinite(v) for v in chosen.values() if isinstance(v, float))
    return HANDLED


@dataclass(frozen=True)
class Property:
    """What is tried, and what must hold.

    Args:
        check: Gives `handled` or `refused`; anything it raises is a mismatch.
        cases: Makes input.
    """

    check: Callable[[Any], str]
    cases: st.SearchStrategy


def _lines(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


file_bytes = st.one_of(st.binary(max_size=60), rows.map(_lines), json_values.map(lambda v: json.dumps(v).encode()))
PROPERTIES = {
    "rows to train on": Property(training_rows, st.tuples(rows, rows, st.booleans())),
    "rows scored together and alone": Property(scores, rows),
    "splits to measure": Property(evaluations, st.tuples(st.sampled_from(("forget", "retain")), eval_rows)),
    "data files": Property(data_files, st.tuples(file_bytes, st.sampled_from((".json", ".jsonl")))),
    "names of splits": Property(
        split_names,
        st.one_of(texts, st.from_regex(r"(forget10|\.\./|retain90)(\[-?[0-9]{0,2}%?:[0-9]?\])?", fullmatch=True)),
    ),
    "logs of a retrained model": Property(retained_logs, st.one_of(json_values, logs)),
    "options": Property(
        options,
        st.integers(0, len(OPTIONS) - 1).flatmap(
            lambda number: st.tuples(st.just(number), st.fixed_dictionaries({}, optional=OPTIONS[number][1]))
        ),
    ),
}


def run(name: str, examples: int) -> Counter[str]:
    """Try one property; counts of handled and refused inputs.

    Raises:
        Exception: What the first mismatch raised, with the input as hypothesis has reduced it.
    """
    counts: Counter[str] = Counter()
    tried = PROPERTIES[name]

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(tried.cases)
    def test(case: Any) -> None:
        counts[tried.check(case)] += 1

    test()
    return counts


def main() -> int:
    """Try all properties and print the counts; exit code 1 after a mismatch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="of each property (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the counts into the block `hostile` of a file")
    chosen = parser.parse_args()
    lines = ["| input | tried | refused with a message | handled | mismatches |", "|---|---|---|---|---|"]
    failed = 0
    for name in PROPERTIES:
        mismatches, counts = 0, Counter[str]()
        try:
            counts = run(name, chosen.examples)
        except Exception as error:
            mismatches = 1
            print(f"{name}: {error!r} {getattr(error, '__notes__', '')}", file=sys.stderr)
        failed += mismatches
        lines.append(f"| {name} | {counts.total()} | {counts[REFUSED]} | {counts[HANDLED]} | {mismatches} |")
        print(lines[-1], flush=True)
    if chosen.write is not None:
        replace_block(chosen.write, "hostile", "\n".join(lines))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
