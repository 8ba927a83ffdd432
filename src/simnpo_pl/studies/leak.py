"""leak@k of finished runs: sample answers to the forget questions and see whether one of k is right.

Greedy answers may hide what sampled ones show. A sampled answer is right if its ROUGE-L recall reaches --correct and,
with a classifier of entailment, if it entails the true answer. leak@k is the mean over rows of the probability that one
of k answers is right, 1 - C(n - c, k) / C(n, k) for c right ones of n, with a 95 % interval by bootstrap over rows.
best_rouge@k is the mean of the expected best ROUGE-L recall of k answers. Each question is asked as it is, paraphrased
where the data has a paraphrase, and after examples of retain rows; under `any` a row leaks if one of these prompts
brings the answer back. The retrained model, if it is known, answers too, as the control. The answers go to
leak_*.jsonl, named by the settings, in the run's folder, the best one first. What a run's results.json already holds
is skipped.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import comb
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from simnpo_pl.data.text import Texts
from simnpo_pl.evaluation.data import EvalData
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.fluency import FluencyClassifier
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.metrics.chance import interval
from simnpo_pl.models.generation import Sampler, draws_of
from simnpo_pl.models.loading import find_model
from simnpo_pl.report.robustness import leak_table, shown_ks
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import among, measure_once, model_of, reopen, retrained_of, runs_of
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json_lines

SCORE = "rougeL_recall"
EXAMPLES = 3
"""Retain rows in front of a question."""


def run(options: Namespace) -> None:
    runs = runs_of(options)
    for one in runs:
        measure(one, options)
    rank_zero_only(print)(leak_table(runs))


def measure(run: Run, options: Namespace) -> None:
    """Add leak@k to a run's results, unless they hold it already."""
    least = options.correct if options.correct is not None else 0.1 if options.entailment else 0.8
    settings = {"k": options.k, "temperature": options.temperature, "seed": options.seed, "correct": least}
    judge = None
    if options.entailment:
        settings |= {"entailment": options.entailment, "entailment_label": options.entailment_label}
        named = ("--entailment", "--entailment_label")
        judge = FluencyClassifier(options.entailment, options.entailment_label, options=named)
    key = " ".join(map("=".join, _words(settings).items()))
    retrained = retrained_of(run, options.retrained)
    # What was sampled without this control is sampled again beside it.
    again = retrained not in (None, run.record.get("leak", {}).get(key, {}).get("retrained"))
    measure_once(run, "leak", key, sample, settings, judge, retrained, again=again)


def _words(settings: dict[str, Any]) -> dict[str, str]:
    """With all digits of a seed: entries of two seeds must not share a key."""
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in settings.items()}


def sample(
    run: Run, settings: dict[str, Any], judge: FluencyClassifier | None, retrained: str | None
) -> dict[str, Any]:
    """Sample the forget answers of a run into a file, and of its retrained model; settings, rows and metrics."""
    if retrained is not None:
        find_model(retrained, "--retrained")
    found = _sample(run, model_of(run), settings, judge, write=True)
    if retrained is not None:
        found |= {"retrained": retrained, "control": _sample(run, retrained, settings, judge)["prompts"]}
    return found


def _sample(
    run: Run, model: str, settings: dict[str, Any], judge: FluencyClassifier | None, write: bool = False
) -> dict[str, Any]:
    opened = reopen(run, "--eval.splits", "[forget]", "--eval.generate_rows", "null")
    data, k = opened.read_data(), settings["k"]
    (part,) = data.evaluation().splits
    plan = part.generation
    if plan is None:
        raise UserError(f"{run.folder}: its forget split has no answers to generate")
    # Rows that the run was not to forget come back by themselves.
    kept = sorted(among(part, data.token_rows(("forget",))["forget"])) or range(len(part.texts))
    part.texts, plan.prompts = ([rows[index] for index in kept] for rows in (part.texts, plan.prompts))
    part.paraphrases = part.paraphrases and [part.paraphrases[index] for index in kept]
    prompts, lacking = prompts_of(data, part, settings["seed"])
    count = len(part.texts)
    what = f"{k} answers to {' and '.join(prompts)} of each of {count} rows"
    rank_zero_only(print)(f"{run.name}: drawing {what}; {model}", *(lacking if write else ()), sep="\n", flush=True)
    decode = partial(data.tokenizer.decode, skip_special_tokens=True)
    evaluation = SampledAnswers([ids for kind in prompts.values() for ids in kind], k, plan, decode)
    evaluation.temperature, evaluation.seed = settings["temperature"], settings["seed"]
    policy = opened.model.like(model, "--model.name" if write else "--retrained")
    sampled = EvalData(data.eval, evaluation)
    sampled.end_ids = data.end_ids
    opened.trainer.predict(policy, datamodule=sampled)
    texts = [row["generation"] for row in policy.evaluation_result.rows]
    drawn = [texts[start : start + k] for start in range(0, len(texts), k)]
    answers = [text["answer"] for text in part.texts]
    found = [[plan.score(text, answers[row % count])[SCORE] for text in texts] for row, texts in enumerate(drawn)]
    scores = torch.tensor(found, dtype=torch.float64)
    correct = scores >= settings["correct"]
    if judge is not None:
        judge.device = policy.device
        pairs = [(text, answers[row % count]) for row, texts in enumerate(drawn) for text in texts]
        correct &= torch.tensor(judge(*zip(*pairs, strict=True))).view_as(correct) >= 0.5
    # Of scores that are right or wrong, the best of k is whether one of k is right.
    leaks = dict(zip(prompts, expected_best(correct).split(count), strict=True))
    leaks["any"] = 1 - torch.stack([1 - leak for leak in leaks.values()]).prod(dim=0)
    if write:
        rows = [
            {"split": part.name, "index": kept[row % count], "prompt": kind, **part.texts[row % count]}
            | {"samples": _best_first(drawn[row], scores[row].tolist(), correct[row].tolist())}
            for row, kind in enumerate(kind for kind in prompts for _ in range(count))
        ]
        name = "_".join(re.sub(r"[^\w.-]", "_", word)[-100:] for word in ("leak", *_words(settings).values()))
        rank_zero_only(write_json_lines)(run.folder / f"{name}.jsonl", rows)
    best = expected_best(scores[:count]).mean(dim=0).tolist()
    metrics = {f"best_rouge@{i}": value for i, value in enumerate(best, start=1)}
    by_prompt = {kind: with_bounds(leak) for kind, leak in leaks.items()}
    settings = {**settings, "max_new_tokens": plan.max_new_tokens}
    return {"settings": settings, "n": count, "metrics": metrics | by_prompt["question"], "prompts": by_prompt}


def _best_first(texts: list[str], scores: list[float], correct: list[bool]) -> list[dict[str, Any]]:
    order = sorted(range(len(texts)), key=lambda answer: -scores[answer])
    return [{SCORE: scores[i], "correct": correct[i], "generation": texts[i]} for i in order]


def prompts_of(data: Any, split: Split, seed: int) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Token ids of every way to ask for a split's answers, and a line for each way that the data does not allow."""
    assert split.generation is not None
    found, lacking = {"question": split.generation.prompts}, []
    answers = [text["answer"] for text in split.texts]

    def encode(questions: list[Any], name: str) -> list[list[int]]:
        return [row.prompt_ids for row in data.encoder.encode_rows(list(zip(questions, answers, strict=True)), name)]

    if split.paraphrases is None:
        lacking.append("not asked: paraphrased questions, the forget rows have no column paraphrased_question")
    else:
        found["paraphrase"] = encode(split.paraphrases, "paraphrased")
    retain = data.training_rows(("forget", "retain")).retain
    if isinstance(retain, Texts) or not retain:
        lacking.append("not asked: questions after examples, there are no retain rows with questions")
        return found, lacking
    drawn = np.random.default_rng(seed).choice(len(retain), min(EXAMPLES, len(retain)), replace=False)
    examples = [(retain[row]["question"], retain[row]["answer"]) for row in drawn.tolist()]
    try:
        asked = [data.encoder.after_examples(text["question"], examples) for text in split.texts]
        found["examples"] = encode(asked, "forget rows after examples:")
    except UserError as error:
        lacking.append(f"not asked: questions after examples ({error})")
    return found, lacking


def expected_best(scores: Tensor) -> Tensor:
    """Mean, over all choices of k out of the K scores of a row, of the best one chosen: `(N, K)`, k from 1 to K.

    The score at place i of the sorted ones, from 0, is the best of C(i, k - 1) choices out of C(K, k); so k = 1 gives
    the mean, k = K the maximum, and nothing depends on the order in which the answers were drawn. Of scores 1 for a
    right answer and else 0 it is leak@k of a row (arXiv 2511.04934): 1 - C(K - c, k) / C(K, k) for c right ones.

    Args:
        scores: `(N, K)`, numbers or bool.

    Example:
        >>> expected_best(torch.tensor([[3.0, 0.0, 0.0]]))
        tensor([[1., 2., 3.]], dtype=torch.float64)
    """
    count = scores.shape[1]
    weights = [[comb(i, k - 1) / comb(count, k) for k in range(1, count + 1)] for i in range(count)]
    return scores.double().sort(dim=1).values @ torch.tensor(weights, dtype=torch.float64)


def with_bounds(leaks: Tensor) -> dict[str, Any]:
    """Mean over rows of leak@k, `(N, n)`; for powers of two and the largest k with a 95 % interval by bootstrap."""
    count, n = leaks.shape
    found: dict[str, Any] = {f"leak@{k}": value for k, value in enumerate(leaks.mean(dim=0).tolist(), start=1)}
    if count > 1:
        low, high = interval(leaks)
        for k in shown_ks(n):
            found[f"leak@{k}/low"], found[f"leak@{k}/high"] = low[k - 1], high[k - 1]
    return found


class SampledAnswers(Evaluation):
    """`count` answers to each of some prompts, those to one prompt after another."""

    def __init__(self, prompts: list[list[int]], count: int, plan: Generation, decode: Callable[..., str]) -> None:
        cells = [ids for ids in prompts for _ in range(count)]
        unscored = replace(plan, prompts=cells, score=lambda text, answer: {}, fluency=None)
        super().__init__([Split("samples", [{"answer": ""}] * len(cells), [], {}, unscored)], {}, {}, decode)
        self.count = count

    def choice(self, batch: Mapping[str, Any]) -> Sampler:
        cells = [divmod(index, self.count) for index in batch["index"].tolist()]
        draws = [draws_of(self.seed, row, answer, batch["max_new_tokens"]) for row, answer in cells]
        return Sampler(torch.stack(draws), self.temperature)
