"""The report: what it says of a run, that generated text stays text, and the page in a browser."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ks_2samp

from simnpo_pl.__main__ import main
from simnpo_pl.metrics.titles import TITLES, Title, title_of
from simnpo_pl.report import command, figures, latex, words
from simnpo_pl.report.robustness import OTHERS, Spread
from simnpo_pl.runs.record import Run, read_runs

HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 2'> =1+1 | & % _"


def row(split: str, index: int, probability: float, text: str) -> dict[str, Any]:
    """A row whose truth ratio is twice its probability."""
    return {
        "split": split,
        "index": index,
        "question": f"Question {index}?",
        "answer": f"answer {index}",
        "probability": probability,
        "truth_ratio": 2 * probability,
        "generation": text,
    }


def write_run(folder: Path, utility: float, p: float, **changes: Any) -> Path:
    """A run over six forget rows, as fit leaves it, unlearned to a fifth of the probability."""

    def entry(value: float, log10_p: float, probability: float) -> dict[str, Any]:
        named = {"model_utility": value, "forget_quality": 10**log10_p, "forget_quality/log10_p": log10_p}
        return {"metrics": {**named, "forget/probability": probability, "retain/probability": 0.9}}

    log10_p = math.log10(p)
    record = {
        "finished": True,
        "command": ["simnpo_pl", "fit", "--config", "configs/demo.yaml"],
        "seed": 3,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "settings": {
            "model": {"name": "org/start", "lr": 1e-5},
            "data": {"init_args": {"forget_split": "forget10", "path": "org/data"}},
        },
        "objective": {
            "name": "SimNPO",
            "settings": {"beta": 2.5, "gamma": 0.0},
            "forget_weight": 0.125,
            "retain_loss": "NLL",
            "retain_weight": 1.0,
        },
        "epochs": [
            {"epoch": 1, "step": 2, **entry(0.6, log10_p - 3, 0.5)},
            {"epoch": 2, **entry(utility, log10_p, 0.2)},
        ],
        "start": entry(0.7, -9.0, 0.99),
        "retrained": {"metrics": {"model_utility": 0.65, "forget/probability": 0.15}},
        "final": entry(utility, log10_p, 0.2),
        "counts": {"forget_quality": 6, "forget/probability": 6},
        "unavailable": {"privleak": "no holdout rows", "mia_loss": "no holdout rows"},
        "exported_epoch": 2,
        "seconds": {"total": 12.5},
        "peak_memory_gib": {"process": 1.25},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("seed_everything: 3\n")

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))

    lines("rows.jsonl", [row("forget", i, 0.1 + 0.1 * i, HOSTILE) for i in range(6)] + [row("retain", 0, 0.9, "kept")])
    lines("start_rows.jsonl", [row("forget", i, 0.95, f"answer {i}") for i in range(6)])
    retrained = [{"split": "forget", "index": i, "truth_ratio": 0.5 + 0.1 * i} for i in range(6)]
    lines("retrained_rows.jsonl", [{**row, "generation": f"the answer is not {row['index']}"} for row in retrained])
    lines(
        "history.jsonl", [{"step": s, "epoch": 1, "lr": 1e-3, "forget_loss": -s, "retain_loss": 1 / s} for s in (1, 2)]
    )
    lines("weights.jsonl", [{"index": i, "epoch": 1, "weight": float(i)} for i in range(5)])
    return folder


def attacked(folder: Path) -> Path:
    """A run that relearning, rounding and sampling were tried on."""

    def curve(seed: int, values: tuple[float, ...]) -> dict[str, Any]:
        epochs = [
            {"epoch": e, "metrics": {"forget/probability": v, "forget_quality": 0.5}} for e, v in enumerate(values)
        ]
        return {"seed": seed, "rows": [1, 2], "epochs": epochs}

    relearnt = {"subset": "random", "share": 0.2, "epochs": 1, "lr": 1e-5}
    leaks, best = {"leak@1": 0.2, "leak@2": 0.4, "leak@2/high": 0.9}, {"best_rouge@1": 0.3, "best_rouge@2": 0.5}
    leak = {"settings": {"k": 2, "temperature": 1.0, "seed": 0}, "n": 6, "metrics": best, "prompts": {"any": leaks}}
    return write_run(
        folder,
        0.5,
        0.5,
        relearn={"random": {"settings": relearnt, "repeats": [curve(0, (0.2, 0.4)), curve(1, (0.2, 0.6))]}},
        quantized={"4-bit": {"settings": {}, "metrics": {"forget/probability": 0.3, "model_utility": 0.4}}},
        leak={"k=2": leak},
    )


VERDICT = {
    "category": "partly forgotten",
    "reasons": ["47 of 200 answers are still given word for word", "3 of 200 answers are degenerate"],
    "untested": ["relearning", "rounded weights"],
    "advice": ["raise --model.forget_weight"],
}


def drawn(id: str, runs: list[Run]) -> Any:
    """The axis that a figure is drawn on."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    getattr(figures, id)(axis, runs)
    return axis


def test_titles_without_docstrings(monkeypatch: pytest.MonkeyPatch):
    """As under `python -OO`."""
    monkeypatch.setattr(figures.trade_off, "__doc__", None)
    one = Run("one", Path(), {"final": {"metrics": {"retain/probability": 0.5, "forget/probability": 0.5}}})
    ((name, title, caption, _),) = figures.drawn([one], "svg")
    assert (name, title) == ("trade_off", "Forgotten against kept")
    assert caption.startswith("Each line is a run, the numbers are its epochs, the ring is the exported model.")


def test_attacks_are_shown(tmp_path: Path):
    """By hand: two draws of 0.4 and 0.6 have mean 0.5 and standard deviation 0.1414."""
    run = read_runs([attacked(tmp_path / "attacked")])[0]
    relearning = drawn("relearning", [run])
    assert relearning.lines[0].get_ydata() == pytest.approx([0.2, 0.5])
    bars = [segment[:, 1] for segment in relearning.collections[0].get_segments()]
    assert (bars[1][1] - bars[1][0]) / 2 == pytest.approx(0.1414, abs=1e-4)
    assert [[bar.get_height() for bar in group] for group in drawn("quantized", [run]).containers] == [
        [0.2, 0.3],
        [0.5, 0.4],
    ]
    assert drawn("quantized", [run]).get_ylim()[1] < 0.6
    # A second rate and a control can be told apart.
    (draw,) = run.relearned[0]["repeats"][:1]
    fast = {"settings": {**run.relearned[0]["settings"], "lr": 1e-3}, "repeats": [{**draw, "control": draw["epochs"]}]}
    more = Run("more", tmp_path, run.record | {"relearn": {"slow": run.relearned[0], "fast": fast}})
    lines = [line for line in drawn("relearning", [more]).lines if line.get_linestyle() != "None"]
    assert [(line.get_linestyle(), line.get_color()) for line in lines] == [
        (":", figures.PALETTE[0]),
        ("-", figures.PALETTE[0]),
        ("-", figures.GREY),
    ]
    leak = drawn("leak", [run])
    assert leak.lines[0].get_xydata().tolist() == [[1, 0.2], [2, 0.4]]
    assert leak.get_ylim() == (0, 1)
    assert words.tiles(run)[2] == words.Tile(
        "May come back",
        "0.6",
        [
            "relearning, forget prob. 0.6",
            "rounded weights, forget prob. 0.3",
            "sampled answers, rows with a right one 0.4",
        ],
    )
    # Of relearned rows and others, the others are shown.
    for repeat in run.relearned[0]["repeats"]:
        for epoch in repeat["epochs"]:
            value = epoch["metrics"]["forget/probability"]
            epoch |= {"step": epoch["epoch"], "metrics": {"forget/probability": value, OTHERS: value / 2}}
    told = Run("told", tmp_path, run.record | {"relearn": {"random": {**run.relearned[0], "outcome": "comes back"}}})
    assert words.tiles(told)[2].value == "0.4"
    assert words.tiles(told)[2].lines[:2] == [
        "comes back: 0.1 → 0.25 after training on 2 of the rows",
        "relearning, forget prob. 0.3",
    ]
    main(["report", str(run.folder), "-o", str(tmp_path / "report.md"), str(tmp_path / "report.html")])
    text = (tmp_path / "report.md").read_text()
    assert "| attacked | SimNPO | 2 random rows, 2 draws | forget prob. | 0.2 ± 0 | 0.5 ± 0.141 |" in text
    assert "(report_figures/relearning.png)" in text
    assert "| attacked | SimNPO | 1 | 0 | 6 | any | 0.2 | 0.4 |" in text
    assert "| attacked | SimNPO | 1 | 0 | 6 | question, best ROUGE | 0.3 | 0.5 |" in text
    assert "| 4-bit |" in text


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "one", 0.55, 0.2), write_run(tmp_path / "two", 0.65, 1e-6)]


def test_a_report_is_made_without_torch(runs: list[Path], tmp_path: Path):
    """Importing it takes several seconds."""
    code = (
        "import sys; from simnpo_pl.__main__ import main\n"
        "main(['report', *sys.argv[1:-1], '-o', sys.argv[-1]])\n"
        "assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, *runs, tmp_path / "report.html"], check=True)


def test_columns_are_those_measured(runs: list[Path], tmp_path: Path):
    """All six attacks are columns where there are values, on the page, in Markdown and in LaTeX."""
    from simnpo_pl.metrics.membership import ATTACKS

    assert [name for name in TITLES if name.startswith("mia_")] == list(ATTACKS)
    assert words.measured(read_runs(runs)) == [
        "forget_quality",
        "forget_quality/log10_p",
        "model_utility",
        "forget/probability",
        "retain/probability",
    ]
    found = {name: 0.1 * number for number, name in enumerate(ATTACKS, start=1)}
    attacked = write_run(tmp_path / "attacked", 0.5, 0.5, final={"metrics": {**found, "privleak": None}})
    assert words.measured(read_runs([attacked]))[-7:-1] == list(ATTACKS)
    out = [str(tmp_path / name) for name in ("report.html", "report.md", "rows.tex")]
    main(["report", str(runs[0]), str(attacked), "-o", *out])
    for file in out:
        text = Path(file).read_text()
        assert all(title_of(name).short in text for name in ATTACKS)
        assert "0.6" in text
        assert not re.search(r"[>|&] *PrivLeak *[<|&]", text)


def test_title_of_a_custom_metric():
    class Politeness:
        title = "politeness"
        unit = "%"
        higher_is_better = True

    assert title_of("forget/polite", Politeness) == Title("forget/polite", "forget politeness", "%", True)
    assert title_of("forget/polite") == Title("forget/polite", "forget/polite")
    assert title_of("forget_quality", Politeness) is TITLES["forget_quality"]


def test_a_run_in_words(runs: list[Path], tmp_path: Path):
    one, two = read_runs(runs)
    method = "SimNPO (beta 2.5, gamma 0; forget weight 0.125, retain weight 1 (NLL)) on 6 rows of forget10."
    assert words.tiles(one) == [
        words.Tile("Forgotten", "0.99 → 0.2", ["forget prob. (retrained model 0.15)", "forget quality 1.0e-09 → 0.2"]),
        words.Tile("Kept", "0.7 → 0.55", ["model utility (retrained model 0.65)", "retain prob. 0.9 → 0.9"]),
        words.Tile("May come back", "not tested", ["relearning; rounded weights; sampled answers"]),
    ]
    assert words.summary(one).startswith(f"{method} Forgotten: 0.99 → 0.2, forget prob.")
    judged = read_runs([write_run(tmp_path / "judged", 0.5, 0.5, verdict=VERDICT)])[0]
    assert words.summary(judged) == f"{method} Partly forgotten; {'; '.join(VERDICT['reasons'])}."
    assert words.tiles(judged)[2].lines == ["relearning; rounded weights"]
    assert words.not_measured([one, two]) == ["PrivLeak, MIA loss: no holdout rows"]
    other = Run("other", tmp_path, {**one.record, "unavailable": {}})
    assert words.not_measured([one, other]) == ["PrivLeak, MIA loss (one): no holdout rows"]


def test_an_unfinished_run_and_an_evaluation_in_words(tmp_path: Path):
    half = read_runs([write_run(tmp_path / "half", 0.5, 0.5, finished=False, final=None)])[0]
    assert "The run is not finished." in words.summary(half)
    assert words.tiles(half)[0].value == "not measured"
    record = json.loads((tmp_path / "half" / "results.json").read_text())
    del record["objective"]
    only = Run("only", tmp_path, {**record, "finished": True, "epochs": []})
    assert words.summary(only).startswith("A model, evaluated.")


def test_sampled_answers_in_words(tmp_path: Path):
    settings = {"model": {"name": "org/start"}, "eval": {"temperature": 0.7}}
    run = read_runs([write_run(tmp_path / "hot", 0.5, 0.5, settings=settings)])[0]
    assert words.method(run).endswith("rows of forget. Metrics of answers sampled at temperature 0.7.")
    assert words.method(run) in command.html([run], words.measured([run]))


def test_settings_that_are_words(tmp_path: Path):
    objective = {"name": "RMU", "settings": {"layer": 7, "average_over": "answers"}, "forget_weight": 1.0}
    objective |= {"retain_loss": None, "retain_weight": 1.0}
    run = read_runs([write_run(tmp_path / "rmu", 0.5, 0.5, objective=objective)])[0]
    assert run.settings == "layer 7, average_over answers; forget weight 1, no retain loss"


def test_names_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The label, or the folder's name without the time; with the seed or the folder above where two are alike."""

    def names(*folders: Path, labels: tuple[str, ...] = ()) -> list[str]:
        return [run.name for run in read_runs(folders, labels)]

    stamped = write_run(tmp_path / "2026-11-26_08-16-48_fit_SimNPO", 0.5, 0.5)
    other = write_run(tmp_path / "2026-11-26_09-16-48-123_fit_SimNPO", 0.5, 0.5, seed=4)
    named = write_run(tmp_path / "x", 0.5, 0.5, label="ours, 1B")
    assert names(stamped, named) == ["SimNPO", "ours, 1B"]
    assert names(stamped, other) == ["SimNPO, seed 3", "SimNPO, seed 4"]
    same = [write_run(tmp_path / group / "seed-0", 0.5, 0.5) for group in ("NPO", "SimNPO")]
    assert names(*same) == ["NPO/seed-0", "SimNPO/seed-0"]
    assert names(stamped, named, labels=("one", "two")) == ["one", "two"]
    with pytest.raises(SystemExit):
        main(["report", str(stamped), "--label", "one", "two"])
    assert "--label: expected a name for each of 1 runs, got 2" in capsys.readouterr().err


def test_trade_off(runs: list[Path], tmp_path: Path):
    path = figures.path_of(read_runs(runs)[0])
    assert [point.epoch for point in path] == [1, 2, 2]
    assert [point.kept for point in path] == [0.6, 0.55, 0.55]
    assert path[-1].forgotten == pytest.approx(math.log10(0.2))
    axis = drawn("trade_off", read_runs(runs))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("model utility", "forget quality, log10 p-value")
    assert [text.get_text() for text in axis.texts] == ["1", "2", "1", "2"]


def test_trade_off_without_forget_quality(tmp_path: Path):
    """Probabilities of own rows; where nothing was kept or forgotten, there is no figure."""
    entry = {"metrics": {"forget/probability": 0.1, "retain/probability": 0.8}}
    own = write_run(tmp_path / "own", 0.5, 0.5, start=None, retrained=None, final=entry, epochs=[])
    axis = drawn("trade_off", read_runs([own]))
    assert axis.lines[0].get_xydata().tolist() == [[0.8, 0.1]]
    assert axis.get_ylabel() == "forget prob."
    losses = {"metrics": {"forget/nll": 3.0, "retain/nll": 2.0}}
    text = write_run(tmp_path / "text", 0.5, 0.5, start=None, retrained=None, final=losses, epochs=[])
    assert drawn("trade_off", read_runs([text])).xaxis_inverted()
    nothing = write_run(tmp_path / "nothing", 0.5, 0.5, start=None, retrained=None, final=None, epochs=[])
    assert not drawn("trade_off", read_runs([nothing])).has_data()


@pytest.mark.parametrize("other", [[0.3, 0.4, 2.0], [1.0], [5.0, 6.0, 7.0, 8.0]])
def test_gap_is_the_ks_statistic(other: list[float]):
    sample = [0.1, 0.35, 0.9, 1.0]
    _, low, high = figures.largest_gap(sample, other)
    assert high - low == pytest.approx(ks_2samp(sample, other).statistic)


def test_quartiles(runs: list[Path]):
    """Weights 0 to 4: quartiles 1, 2 and 3."""
    assert figures.weight_quartiles(read_runs(runs)[0].weights) == {1: [1.0, 2.0, 3.0]}
    assert figures.weight_quartiles([{"epoch": 2, "weight": 0.5}]) == {2: [0.5, 0.5, 0.5]}


class Tags(HTMLParser):
    """Start tags outside of scripts, and what the data scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_page_escapes_what_a_model_generated(runs: list[Path], tmp_path: Path):
    main(["report", *map(str, runs), "-o", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "script" for tag, _ in tags.found) == 2
    assert not [tag for tag, _ in tags.found if tag == "img"]
    assert not [
        a for _, a in tags.found if any(key in a for key in ("src", "onerror")) or "http" in (a.get("href") or "")
    ]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["rows"]["one"][0]["says"] == HOSTILE
    assert list(data["rows"]) == ["one", "two"]
    assert len(page) < 1_000_000


def test_names_in_figures_stay_names(tmp_path: Path):
    """They are neither formulas nor elements of the page."""
    write_run(tmp_path / "hostile", 0.5, 0.5, label="_ #000000 $x$ <script>window.taken = 1</script> $")
    main(["report", str(tmp_path / "hostile"), "-o", str(tmp_path / "report.html")])
    tags = Tags()
    tags.feed((tmp_path / "report.html").read_text())
    assert sum(tag == "script" for tag, _ in tags.found) == 2
    page = (tmp_path / "report.html").read_text()
    assert "> _ #000000 $x$ &lt;script&gt;" in page
    assert "fill: currentColor" in page
    assert "fill: #000000" not in page


def test_markdown_and_latex(runs: list[Path], tmp_path: Path):
    write_run(tmp_path / "a_b|c", 0.5, 0.5)
    folders = [*map(str, runs), str(tmp_path / "a_b|c")]
    main(["report", *folders, "-o", str(tmp_path / "my report.md"), str(tmp_path / "rows.tex")])
    text = (tmp_path / "my report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| run | model | n | forget quality | log10 p | model utility | forget prob. | retain prob. |"
    assert table[2] == "| one | unlearned | 6 | 0.2 | -0.699 | 0.55 | 0.2 | 0.9 |"
    assert table[8].startswith("| a_b\\|c | unlearned |")
    for name in ("trade_off", "truth_ratios"):
        assert f"(my%20report_figures/{name}.png)" in text
        assert (tmp_path / "my report_figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "* PrivLeak, MIA loss: no holdout rows" in text
    rows = (tmp_path / "rows.tex").read_text().splitlines()
    # The runs have one seed.
    bold = [r"$\mathbf{0.2}$", r"$\mathbf{0.9}$"]
    assert " & ".join(["one", "1", "$0.2$", "$-0.699$", "$0.55$", *bold]) + r" \\" in rows
    assert rows[-3].startswith(r"a\_b|c & 1 & ")


def test_latex_table(tmp_path: Path):
    """By hand: seeds of 0.5 and 0.7 have mean 0.6 and standard deviation 0.1414; bold is the best by direction."""
    folders = [write_run(tmp_path / f"a{seed}", 0.5 + 0.2 * seed, 0.1, seed=seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{lr: 1}}\nlabel: run {seed}\n")
    other = write_run(tmp_path / "b_c", 0.55, 1e-6)
    (other / "config.yaml").write_text("seed_everything: 0\nmodel: {lr: 2}\n")
    main(
        [
            *("report", *map(str, folders), str(other), "-o", str(tmp_path / "rows.tex")),
            *("--columns", "model_utility", "forget_quality", "forget/probability"),
        ]
    )
    lines = (tmp_path / "rows.tex").read_text().splitlines()
    assert lines[2:] == [
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"model & $n$ & model utility $\uparrow$ & forget quality $\uparrow$ & forget prob. \\",
        r"\midrule",
        r"start &  & $0.7$ & $1.0 \cdot 10^{-9}$ & $0.99$ \\",
        r"retrained &  & $0.65$ & - & $0.15$ \\",
        r"\midrule",
        r"SimNPO & 2 & $\mathbf{0.6 \pm 0.141}$ & $\mathbf{0.1 \pm 0}$ & $\mathbf{0.2 \pm 0}$ \\",
        r"b\_c & 1 & $0.55$ & $1.0 \cdot 10^{-6}$ & $\mathbf{0.2}$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_counts_values_and_keeps_models_apart(tmp_path: Path):
    """One of two seeds has a value; two evaluations of one start model differ and are not averaged."""
    entries = [
        {"metrics": {"model_utility": 0.5 + 0.2 * seed, "forget/rouge": value}}
        for seed, value in ((0, None), (1, 0.25))
    ]
    starts = [{"metrics": {"model_utility": value}} for value in (0.7, 0.8)]
    folders = [
        write_run(tmp_path / f"a{seed}", 0.5, 0.1, seed=seed, final=entries[seed], start=starts[seed], retrained=None)
        for seed in (0, 1)
    ]
    for seed, folder in enumerate(folders):
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\n")
    runs = read_runs(folders, ["a", "a"])
    lines = latex.table(runs, ["model_utility", "forget/rouge"]).splitlines()
    assert lines[6:10] == [
        r"start of a, seed 0 &  & $0.7$ & - \\",
        r"start of a, seed 1 &  & $0.8$ & - \\",
        r"\midrule",
        r"a & 2 & $0.6 \pm 0.141$ & $0.25$ (1 of 2) \\",
    ]


def retained(folder: Path, retain: str, **changes: Any) -> Path:
    """A run that keeps these rows."""
    settings = {
        "eval": {"truth_ratio": "geometric", "start": True},
        "model": {"name": "org/start", "lr": 1e-5, "forget_weight": 0.5},
        "data": {"init_args": {"forget": "rows.jsonl", "retain": retain, "seed": 3, "effective_batch": 8}},
    }
    for group, name, value in changes.pop("options", ()):
        (settings[group].get("init_args") or settings[group])[name] = value
    return write_run(folder, 0.5, 0.1, settings=settings, **changes)


def test_latex_of_runs_measured_on_different_data(tmp_path: Path):
    """Neither averaged nor compared; what is set for training alone makes no difference."""
    low, high = ({"metrics": {"retain/probability": value}} for value in (0.2, 0.8))
    training = [("data", "effective_batch", 16), ("model", "lr", 1e-3)]
    folders = [
        retained(tmp_path / "a", "auto", start=high, retrained=None, final=low),
        retained(tmp_path / "b", "b.jsonl", start=low, retrained=None, final=high),
        retained(tmp_path / "c", "auto", start=high, retrained=None, final=high, options=training),
    ]
    main(["report", *map(str, folders), "-o", str(tmp_path / "rows.tex")])
    lines = [line for line in (tmp_path / "rows.tex").read_text().splitlines() if "&" in line or ".retain" in line]
    head = r"model & $n$ & retain prob. $\uparrow$ \\"
    assert lines == [
        *("% data.retain auto", head, r"start &  & $0.8$ \\", r"a & 1 & $0.2$ \\", r"c & 1 & $\mathbf{0.8}$ \\"),
        *("% data.retain b.jsonl", head, r"start &  & $0.2$ \\", r"b & 1 & $0.8$ \\"),
    ]


def test_latex_of_runs_measured_in_different_ways(tmp_path: Path):
    """Their values are not compared, and a line break in a setting stays in its comment."""
    low, high = ({"metrics": {"retain/probability": value}} for value in (0.2, 0.8))
    changes = [[], [("eval", "start", False)], [("eval", "truth_ratio", "arithmetic"), ("data", "prefix", "a\nb")]]
    folders = [
        retained(tmp_path / name, "auto", start=None, retrained=None, final=final, options=options)
        for name, final, options in zip("abc", (low, high, low), changes, strict=True)
    ]
    lines = latex.tables(read_runs(folders), ["retain/probability"]).splitlines()
    assert lines[0] == "% eval.truth_ratio geometric, data.prefix None"
    shown = [line for line in lines if line.startswith(("a &", "b &", "c &", "% eval"))][1:]
    assert shown == [
        *(r"a & 1 & $0.2$ \\", r"b & 1 & $\mathbf{0.8}$ \\"),
        *("% eval.truth_ratio arithmetic, data.prefix a b", r"c & 1 & $0.2$ \\"),
    ]


def test_settings_tell_runs_apart(tmp_path: Path):
    """Options that `settings` holds already, and those in which no run differs, are not named."""
    one = retained(tmp_path / "one", "auto")
    two = retained(tmp_path / "two", "b.jsonl", options=[("model", "lr", 1e-3), ("model", "forget_weight", 0.7)])
    told = "beta 2.5, gamma 0; forget weight 0.125, retain weight 1 (NLL)"
    assert [run.settings for run in read_runs([one])] == [told]
    assert [run.settings for run in read_runs([one, two])] == [
        f"{told}; model.lr 1e-05, data.retain auto",
        f"{told}; model.lr 0.001, data.retain b.jsonl",
    ]
    main(["report", str(one), str(two), "-o", str(tmp_path / "report.html")])
    assert "; model.lr 0.001, data.retain b.jsonl</td>" in (tmp_path / "report.html").read_text()


def test_kept_answers_to_neutral_prompts(tmp_path: Path):
    """The tile says what was measured, as the verdict does."""
    kept, counts = {"metrics": {"retain/probability": 0.9}}, {"retain/probability": 120}
    folders = [retained(tmp_path / name, name, final=kept, start=kept, counts=counts) for name in ("auto", "b.jsonl")]
    tiles = [words.tiles(run)[1] for run in read_runs(folders)]
    said = "retain prob. of answers to 120 neutral prompts (your other data was not measured)"
    assert tiles == [words.Tile("Kept", "0.9 → 0.9", [line]) for line in (said, "retain prob.")]


@pytest.mark.parametrize(
    ("name", "values", "retrained", "best"),
    [
        ("model_utility", [0.5, 0.7], None, {1}),
        ("forget/extraction_strength", [0.1, 0.3], None, {0}),
        ("forget/probability", [0.05, 0.3, 0.18], 0.15, {2}),
        ("forget/probability", [0.05, 0.3], None, set()),
        ("model_utility", [0.70001, 0.70002, None], None, {0, 1}),
        ("model_utility", [0.7], None, set()),
    ],
)
def test_best_of_a_column(name: str, values: list[float | None], retrained: float | None, best: set[int]):
    def as_spread(value: float | None) -> Spread | None:
        return None if value is None else Spread(value, 0.0, 1)

    assert latex._best(title_of(name), [as_spread(value) for value in values], as_spread(retrained)) == best


def test_figures_as_pdf(runs: list[Path], tmp_path: Path):
    main(["report", *map(str, runs), "-o", str(tmp_path / "figures")])
    files = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert files.keys() == {"trade_off.pdf", "truth_ratios.pdf", "losses.pdf", "weights.pdf"}
    assert all(content.startswith(b"%PDF") for content in files.values())


def test_newest_run_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import os

    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("late", "early")):
        write_run(tmp_path / "runs" / name, 0.5, 0.5)
        os.utime(tmp_path / "runs" / name / "results.json", (1e9 - number, 1e9 - number))
    main(["report"])
    assert capsys.readouterr().out == f"written: {tmp_path / 'runs' / 'late' / 'report.html'}\n"
    assert (tmp_path / "runs" / "late" / "report.html").is_file()


def test_mistakes(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"finished": tr')
    assert "holds no results.json; give folders that fit or test wrote" in error("empty")
    assert "results.json is damaged" in error("broken")
    assert "no run to report on" in error()
    assert "the ending must be .html, .md or .tex; a name without" in error("one", "-o", "report.pdf")
    assert "--columns utility: not measured; known are forget_quality, " in error("one", "--columns", "utility")
    (runs[0] / "rows.jsonl").write_text('{"split": "forg')
    assert "rows.jsonl is damaged" in error("one")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that logs its console and its requests."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


def test_page_in_a_browser(browser: Any, runs: list[Path], tmp_path: Path):
    """No console message, no request but the page itself; sorting, filters, row browser and both themes work."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    judged = json.loads((runs[0] / "results.json").read_text()) | {"verdict": VERDICT}
    (runs[0] / "results.json").write_text(json.dumps(judged))
    main(["report", *map(str, runs), "-o", str(tmp_path / "report.html")])
    browser.get((tmp_path / "report.html").as_uri())

    def texts(css: str) -> list[str]:
        return [element.text for element in browser.find_elements(By.CSS_SELECTOR, css)]

    assert len(browser.find_elements(By.CSS_SELECTOR, ".plot svg")) == 4
    tips = [title.get_attribute("textContent") for title in browser.find_elements(By.CSS_SELECTOR, ".plot title")]
    assert "one: model utility 0.55, log10 p -0.699" in tips
    # No toolbar, nothing that could send a chart anywhere.
    known = ["dark", *texts("th button"), "download all metrics as csv"]
    shown = [button.text for button in browser.find_elements(By.TAG_NAME, "button") if button.is_displayed()]
    assert shown in (known, ["light", *known[1:]])
    assert not browser.find_elements(By.CSS_SELECTOR, "a, form, iframe")

    assert texts(".verdict b") == ["partly forgotten"]
    assert texts(".tile .value")[:2] == ["0.99 → 0.2", "0.7 → 0.55"]
    assert texts("#not-measured li") == [""]
    browser.find_element(By.CSS_SELECTOR, "#not-measured summary").click()
    assert texts("#not-measured li") == ["PrivLeak, MIA loss: no holdout rows"]

    heading = next(h for h in browser.find_elements(By.CSS_SELECTOR, "th button") if h.text == "forget prob.")
    column = texts("th button").index("forget prob.")
    cells = f"tbody td:nth-child({column + 1})"
    heading.click()
    rising = [float(t) for t in texts(cells)]
    heading.click()
    falling = [float(t) for t in texts(cells)]
    assert rising == sorted(rising)
    assert falling == sorted(rising, reverse=True)
    assert len(rising) == 6

    assert texts("#count") == ["6 rows"]
    assert texts(".card .question")[0] == "Question 0?"
    assert HOSTILE in texts(".card dd")
    assert "the answer is not 0" in texts(".card dd")
    # The true answer is "answer 0".
    marked = [found.text for found in browser.find_element(By.CSS_SELECTOR, ".card").find_elements(By.TAG_NAME, "mark")]
    assert marked == ["answer", "0"] * 2
    assert browser.execute_script("return window.taken") is None
    Select(browser.find_element(By.ID, "order")).select_by_value("now")
    assert texts(".card .question")[0] == "Question 5?"
    Select(browser.find_element(By.ID, "order")).select_by_value("change")
    assert texts(".card .question")[0] == "Question 0?"
    browser.find_element(By.ID, "search").send_keys("answer 4")
    assert texts("#count") == ["1 rows"]
    browser.find_element(By.ID, "search").clear()
    Select(browser.find_element(By.ID, "split")).select_by_value("retain")
    assert "kept" in texts(".card dd")

    back = "return getComputedStyle(document.body).backgroundColor"
    first = browser.execute_script(back)
    browser.find_element(By.ID, "theme").click()
    assert {first, browser.execute_script(back)} == {"rgb(255, 255, 255)", "rgb(20, 23, 27)"}

    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [(tmp_path / "report.html").as_uri()]


def test_page_on_a_phone(browser: Any, runs: list[Path], tmp_path: Path):
    """Nothing but the table, which scrolls by itself, is wider than the screen."""
    main(["report", str(runs[0]), "-o", str(tmp_path / "report.html")])
    browser.set_window_size(500, 900)
    browser.get((tmp_path / "report.html").as_uri())
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) == 0


def test_what_a_cell_holds_stays_in_its_cell():
    from simnpo_pl.utils.markdown import table

    shown = table(["a", "b"], [["1|2", "x\ny"]]).splitlines()
    assert shown == ["| a | b |", "|---|---|", "| 1\\|2 | x y |"]
