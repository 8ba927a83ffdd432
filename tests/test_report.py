"""The report: what it says of a run, that generated text stays text, and the page in a browser."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ks_2samp

from simnpo_pl.__main__ import main
from simnpo_pl.metrics.titles import TITLES, Title, title_of
from simnpo_pl.report import figures, words
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
        "settings": {"data": {"init_args": {"forget_split": "forget10"}}},
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
        "unavailable": {"privleak": "no holdout rows"},
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
    lines("retrained_rows.jsonl", [{"split": "forget", "index": i, "truth_ratio": 0.5 + 0.1 * i} for i in range(6)])
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
    leaks, best = {"leak@1": 0.2, "leak@2": 0.4}, {"best_rouge@1": 0.3, "best_rouge@2": 0.5}
    leak = {"settings": {"k": 2, "temperature": 1.0, "seed": 0}, "n": 6, "metrics": best, "prompts": {"any": leaks}}
    return write_run(
        folder,
        0.5,
        0.5,
        relearn={"random": {"settings": relearnt, "repeats": [curve(0, (0.2, 0.4)), curve(1, (0.2, 0.6))]}},
        quantized={"4-bit": {"settings": {}, "metrics": {"forget/probability": 0.3, "model_utility": 0.4}}},
        leak={"k=2": leak},
    )


def test_attacks_are_shown(tmp_path: Path):
    """By hand: two draws of 0.4 and 0.6 have mean 0.5 and standard deviation 0.1414."""
    run = read_runs([attacked(tmp_path / "attacked")])[0]
    shown = {figure["id"]: figure["figure"]["data"] for figure in figures.figures([run])}
    assert shown["relearn-probability"][0]["y"] == pytest.approx([0.2, 0.5])
    assert shown["relearn-probability"][0]["error_y"]["array"] == pytest.approx([0, 0.1414], abs=1e-4)
    assert [bar["y"] for bar in shown["quantized"]] == [[0.2, 0.3], [0.5, 0.4]]
    assert (shown["leak"][0]["x"], shown["leak"][0]["y"]) == ([1, 2], [0.2, 0.4])
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
        assert "PrivLeak" not in text.split("<script")[0]


def test_title_of_a_custom_metric():
    class Politeness:
        title = "politeness"
        unit = "%"
        higher_is_better = True

    assert title_of("forget/polite", Politeness) == Title("forget/polite", "politeness", "%", True)
    assert title_of("forget/polite") == Title("forget/polite", "forget/polite")
    assert title_of("forget_quality", Politeness) is TITLES["forget_quality"]


def test_summary_in_words(runs: list[Path]):
    said = [words.summary(run) for run in read_runs(runs)]
    assert said[0] == (
        "SimNPO (beta 2.5, gamma 0; weights 0.125 / 1 (NLL)) on 6 rows of forget10. The probability of the answers to "
        "forget went from 0.99 to 0.2; a model that never saw them gives 0.15. Forget quality, the p-value of a test "
        "against the retrained model, is 0.2: the test finds no difference. Model utility is 0.55, -21 % "
        "against the start model. Not measured: privleak (no holdout rows)."
    )
    assert "is 1.0e-06: the test finds a difference" in said[1]


def test_summary_of_an_unfinished_run_and_of_an_evaluation(tmp_path: Path):
    half = read_runs([write_run(tmp_path / "half", 0.5, 0.5, finished=False, final=None)])[0]
    assert "The run is not finished." in words.summary(half)
    record = json.loads((tmp_path / "half" / "results.json").read_text())
    del record["objective"]
    only = Run("only", tmp_path, {**record, "finished": True, "epochs": []})
    assert words.summary(only).startswith("A model, evaluated.")


def test_trade_off(runs: list[Path]):
    points = figures.path_of(read_runs(runs)[0])
    assert [p.label for p in points] == ["epoch 1", "epoch 2", "exported, epoch 2"]
    assert [p.utility for p in points] == [0.6, 0.55, 0.55]
    assert points[-1].log10_p == pytest.approx(math.log10(0.2))


@pytest.mark.parametrize("other", [[0.3, 0.4, 2.0], [1.0], [5.0, 6.0, 7.0, 8.0]])
def test_gap_is_the_ks_statistic(other: list[float]):
    sample = [0.1, 0.35, 0.9, 1.0]
    gap = figures.largest_gap(sample, other)
    assert gap.high - gap.low == pytest.approx(ks_2samp(sample, other).statistic)


def test_distribution_and_quartiles(runs: list[Path]):
    """Weights 0 to 4: quartiles 1, 2 and 3."""
    assert figures.distribution([3.0, 1.0]) == ([1.0, 3.0], [0.5, 1.0])
    assert figures.weight_quantiles(read_runs(runs)[0].weights) == {1: [1.0, 2.0, 3.0]}
    assert figures.weight_quantiles([{"epoch": 2, "weight": 0.5}]) == {2: [0.5, 0.5, 0.5]}


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
    assert sum(tag == "script" for tag, _ in tags.found) == 4
    assert not [tag for tag, _ in tags.found if tag == "img"]
    assert not [
        a for _, a in tags.found if any(key in a for key in ("src", "onerror")) or "http" in (a.get("href") or "")
    ]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["rows"]["one"][0]["says"] == HOSTILE
    assert list(data["rows"]) == ["one", "two"]


def test_markdown_and_latex(runs: list[Path], tmp_path: Path):
    write_run(tmp_path / "a_b|c", 0.5, 0.5)
    folders = [*map(str, runs), str(tmp_path / "a_b|c")]
    main(["report", *folders, "-o", str(tmp_path / "report.md"), str(tmp_path / "rows.tex")])
    text = (tmp_path / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| run | model | n | forget quality | log10 p | model utility | forget prob. | retain prob. |"
    assert table[2] == "| one | unlearned | 6 | 0.2 | -0.699 | 0.55 | 0.2 | 0.9 |"
    assert table[8].startswith("| a_b\\|c | unlearned |")
    for name in ("trade_off", "truth_ratios"):
        assert f"(report_figures/{name}.png)" in text
        assert (tmp_path / "report_figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "rows.tex").read_text().splitlines()
    assert rows[1] == r"one & unlearned & 0.2 & -0.699 & 0.55 & 0.2 & 0.9 \\"
    assert rows[7].startswith(r"a\_b|c & unlearned &")


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
    assert "the ending must be .html, .md or .tex" in error("one", "-o", "report.pdf")
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

    main(["report", *map(str, runs), "-o", str(tmp_path / "report.html")])
    browser.get((tmp_path / "report.html").as_uri())

    def texts(css: str) -> list[str]:
        return [element.text for element in browser.find_elements(By.CSS_SELECTOR, css)]

    assert len(browser.find_elements(By.CSS_SELECTOR, ".plot .main-svg")) >= 4

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
