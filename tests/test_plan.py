"""What an evaluation generates: prompts of their own, lengths of their own, texts cut and scored as a split says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate, TokenRow
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Generation, Split, generation_batches, scoring_batches
from simnpo_pl.metrics.answers import AnswerProbability, RowMean
from simnpo_pl.metrics.functional import rouge_l


def prompted(name: str, prompts: list[list[int]], limit: int, **settings) -> Split:
    """A split that is only generated."""
    texts = [{"question": "q", "answer": "the cats sat"} for _ in range(3)]
    return Split(name, texts, [], {f"{name}/score": RowMean("same", 3)}, Generation(prompts, limit, **settings))


def test_batches_hold_prompts_of_one_length_limit():
    splits = [prompted("a", [[1], [2, 3]], 7), prompted("b", [[4, 5, 6]], 9), prompted("c", [[7, 8, 9], [1, 1]], 7)]
    batches = generation_batches(splits, 3)
    held = [(b["prompts"], b["max_new_tokens"], b["split"].tolist(), b["index"].tolist()) for b in batches]
    assert held == [
        ([[7, 8, 9], [2, 3], [1, 1]], 7, [2, 0, 2], [0, 1, 1]),
        ([[1]], 7, [0], [0]),
        ([[4, 5, 6]], 9, [1], [0]),
    ]
    assert scoring_batches(splits, 100) == []
    assert [part.generate for part in splits] == [2, 1, 2]


def test_texts_are_cut_and_scored_as_the_split_says():
    """A split without scored answers beside one without generations."""
    row = TokenRow([0, 1], [IGNORE_INDEX, 1])
    scored = Split("scored", [{"question": "q", "answer": "a"}], [[row]], {"scored/probability": AnswerProbability(1)})
    cut = prompted(
        "cut", [[1], [1]], 5, finish=lambda text: text.split(" stop")[0], score=lambda t, a: {"same": t in a}
    )
    evaluation = Evaluation([scored, cut], {}, {}, decode=lambda ids: "the cats stop here" if ids else "dogs")
    generated = {"split": torch.tensor([1, 1]), "index": torch.tensor([1, 0])}
    evaluation.add_generations(generated, [[5], []])
    one = torch.tensor([0])
    evaluation.add_scores({"split": one, "index": one, "kind": one}, {"nll": torch.zeros(1)})
    result = evaluation.compute()
    assert result.values == {"scored/probability": 1.0, "cut/score": 0.5, "cut/degenerate": 0.0}
    assert result.counts == {"scored/probability": 1, "cut/score": 2, "cut/degenerate": 2}
    assert [(r["split"], r["index"], r.get("generation"), r.get("same")) for r in result.rows] == [
        ("scored", 0, None, None),
        ("cut", 0, "dogs", 0.0),
        ("cut", 1, "the cats", 1.0),
    ]
    texts = evaluation.texts_only().rows
    assert all(set(row) <= {"split", "index", "question", "answer", "generation"} for row in texts)
    assert [row.get("generation") for row in texts] == [None, "dogs", "the cats"]


def test_an_infinite_loss_is_told():
    """It is null in the file, where nothing is null without a reason."""
    row, one = TokenRow([0, 1], [IGNORE_INDEX, 1]), torch.tensor([0])
    scored = Split("retain", [{"question": "q", "answer": "a"}], [[row]], {"retain/nll": RowMean("nll", 1)})
    evaluation = Evaluation([scored], {}, {}, decode=str)
    evaluation.add_scores({"split": one, "index": one, "kind": one}, {"nll": torch.tensor([torch.inf])})
    with pytest.warns(UserWarning, match="the model's loss on retain row 0 is not finite"):
        assert evaluation.compute().unavailable == {"retain/nll": "one of its scores is not a number"}


def test_a_paraphrase_is_no_choice(model_folder: Path):
    """It is as right as the answer; elsewhere it takes the answer's place in the truth ratio."""
    build = EvaluationBuilder(PromptTemplate(AutoTokenizer.from_pretrained(model_folder)), EvalOptions())
    row = {"question": "Where?", "answer": "In Rome.", "perturbed_answer": ["In Oslo.", "In Bonn."]}
    reworded = {**row, "paraphrased_answer": "Rome, of course."}
    split = build.questions("facts", [reworded], choice=True)
    assert split.answers == build.questions("plain", [row], choice=True).answers
    assert (split.kinds, split.has_paraphrase) == (3, False)
    assert build.questions("retain", [reworded]).has_paraphrase


def test_rouge_without_stemming():
    """By hand: of "the cat sat" and "the cats sat" two of three words agree, all three with stemming."""
    assert rouge_l("the cat sat", "the cats sat")["rougeL_f1"] == 1
    plain = rouge_l("the cat sat", "the cats sat", stem=False)
    assert plain == {"rougeL_recall": 2 / 3, "rougeL_f1": 2 / 3, "rouge1_recall": 2 / 3}


@pytest.mark.parametrize(("device", "sizes"), [("cpu", (2048, 48)), ("cuda", (8192, 256))])
def test_batches_are_larger_on_a_gpu(device: str, sizes: tuple[int, int]):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    assert EvalOptions().batch_sizes(trainer) == sizes
    assert EvalOptions(tokens_per_batch=7, prompts_per_batch=3).batch_sizes(trainer) == (7, 3)
