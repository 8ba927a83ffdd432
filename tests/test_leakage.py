"""leak@k: the draws, the best of k, and what stays the same however the answers are batched."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from simnpo_pl.__main__ import main
from simnpo_pl.models.generation import Sampler, draws_of, generate, greedy
from simnpo_pl.studies.leak import expected_best


def test_expected_best_by_hand():
    """Scores 1, 4, 2: single ones average 7/3; the best of pairs is 4, 4, 2; of all three 4."""
    assert expected_best(torch.tensor([[1.0, 4.0, 2.0]])).tolist() == [pytest.approx([7 / 3, 10 / 3, 4])]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_expected_best_is_the_mean_over_all_choices(scores: list[float]):
    expected = []
    for k in range(1, len(scores) + 1):
        best = [max(choice) for choice in itertools.combinations(scores, k)]
        expected.append(sum(best) / len(best))
    assert expected_best(torch.tensor([scores], dtype=torch.float64))[0].tolist() == pytest.approx(expected)


def test_sampler_by_hand():
    """Shares 0.2, 0 and 0.8 of the cumulated probabilities; at temperature 1/2 the probabilities are squared."""
    logits = torch.tensor([[0.2, 0.0, 0.8]]).log().expand(4, 3)
    draws = torch.tensor([[0.0], [0.19], [0.2], [0.999999]], dtype=torch.float64)
    rows = torch.arange(4)
    assert Sampler(draws)(logits, rows, 0).tolist() == [0, 0, 2, 2]
    # 0.04 / 0.68 = 0.0588.
    assert Sampler(draws, temperature=0.5)(logits, rows, 0).tolist() == [0, 2, 2, 2]
    # Rows that are still running name their own draws.
    assert Sampler(draws)(logits[:2], torch.tensor([3, 1]), 0).tolist() == [2, 0]


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    draws = torch.stack([draws_of(7, 0, sample, 1) for sample in range(4000)])
    taken = Sampler(draws)(probabilities.log().expand(4000, 3), torch.arange(4000), 0)
    shares = torch.bincount(taken, minlength=3) / 4000
    assert (shares - probabilities).abs().max() < 0.025
    assert len({tuple(draws_of(*key, 3).tolist()) for key in itertools.product((0, 1), repeat=3)}) == 8


def test_a_sample_does_not_depend_on_its_batch(model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompts = [[5, 9, 7], [3, 4, 8, 11, 12, 6], [20]]
    draws = torch.stack([draws_of(0, row, 0, 8) for row in range(3)])
    together = generate(model, prompts, 8, [1], Sampler(draws))
    alone = [generate(model, [p], 8, [1], Sampler(draws[i : i + 1]))[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != greedy(model, prompts, 8, [1])
    # Nearly all probability is the most probable token's.
    assert generate(model, prompts, 8, [1], Sampler(draws, temperature=1e-4)) == greedy(model, prompts, 8, [1])


def test_command(run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same answers in batches of 48 and of 3; another seed draws others; what is there is not drawn again."""
    one, other = tmp_path / "one", tmp_path / "other"
    options = ["--run_dir", str(one), "--trainer.max_epochs", "1", "--eval.start", "false", "--eval.generate_rows", "2"]
    main(["fit", *run_options, *options])
    shutil.copytree(one, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("prompts_per_batch: null", "prompts_per_batch: 3"))
    main(["leak", str(one), str(other), "--k", "5", "--debug"])
    main(["leak", str(one), "--k", "5", "--seed", "1", "--debug"])
    found = [json.loads((folder / "results.json").read_text())["leak"] for folder in (one, other)]
    first, second = found[0]["k=5 temperature=1 seed=0"], found[0]["k=5 temperature=1 seed=1"]
    assert found[1] == {"k=5 temperature=1 seed=0": first}
    assert first["n"] == 10
    values = [first["metrics"][f"leak@{k}"] for k in range(1, 6)]
    assert values == sorted(values)
    assert second["metrics"] != first["metrics"]
    rows = [json.loads(line) for line in (one / "leak_5_1_0.jsonl").read_text().splitlines()]
    assert (one / "leak_5_1_0.jsonl").read_text() == (other / "leak_5_1_0.jsonl").read_text()
    best = [max(sample["rougeL_recall"] for sample in row["samples"]) for row in rows]
    assert sum(best) / 10 == pytest.approx(values[-1])
    assert [row["samples"][0]["rougeL_recall"] for row in rows] == best
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| one | SimNPO | 1 | 0 | 10 |")
    )
    assert len(line.split(" | ")) == 6 + 4

    before = (one / "leak_5_1_0.jsonl").stat().st_mtime_ns
    main(["leak", str(one), "--k", "5", "--debug"])
    assert (one / "leak_5_1_0.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", "0"), "--k: must be at least 1, got 0"),
        (("--temperature", "0"), "--temperature: must be above 0, got 0"),
        (("--seed", "-1"), "--seed: must be at least 0, got -1"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["leak", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
