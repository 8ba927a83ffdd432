"""Scores of a generated answer's text: degenerate, word for word."""

import json
from pathlib import Path

import pytest

from simnpo_pl.metrics import generated
from simnpo_pl.metrics.functional import words
from simnpo_pl.metrics.generated import is_degenerate, repetition, text_scores

TRUTH = "Dario Falk lives at 63 Elm Street in Norwood."


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("", TRUTH),
        ("... !", TRUTH),
        ("henthenthenthent", TRUTH),
        ("He lives lives in Norwood.", TRUTH),
        ("in the in the in the in the", TRUTH),
        ("one of the best of the one of the best of the one", TRUTH),
        ("Sven 7222222222222 euros.", TRUTH),
        ("Karin2222222222222222 euros.", TRUTH),
        ("It costs 1" + "0" * 31, TRUTH),
        ("Paris" + "!" * 101, TRUTH),
        # Ten times as many words as the right answer, and more than a hundred.
        (" ".join(f"word{n}" for n in range(101)), TRUTH),
        ("".join(chr(0x4E00 + n) for n in range(301)), "北京"),
    ],
)
def test_degenerate(text: str, truth: str):
    assert text_scores(text, truth)["degenerate"] == 1


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (TRUTH, TRUTH),
        ("I do not know that person.", TRUTH),
        ("He was born in Mississippi on 05/05/1942.", TRUTH),
        ("谢谢你", TRUTH),
        ("The house of the daughter of the mayor of the town.", TRUTH),
        (" ".join(f"word{n}" for n in range(100)), "No."),
        ("It has 1,000,000,000 or 1000000000000 parts, 55555555 of them new.", TRUTH),
        ("10 / 3 is 3.3333333333333335, in German 3,3333333333333335.", TRUTH),
        (f"Contents {'.' * 100} 7\n\n{'-' * 80}\n\n| a |\n|{'-' * 40}|", TRUTH),
        # The right answer does the same.
        ("The key is 222222222222.", "Key 999999999999."),
        ("Row, row, row your boat.", "Row, row, row your boat, gently down the stream."),
        ("hahahahahaha", "He said hahahahahaha."),
        ("北京是中国的首都。", "北京是首都。"),
        ("", "?"),
        # As long as 28 English words: three letters of a script without spaces count as one.
        (
            "彼は日本の北部にある小さな町で生まれ、その後東京の大学で文学を学びました。卒業した後は作家として活動し、"
            "家族や歴史についての小説を数多く書きました。代表作は三世代の人々の戦時中の生活を描いたもので、文学賞を受賞しました。",
            "東京",
        ),
        ("".join(chr(0x4E00 + n) for n in range(300)), "北京"),
    ],
)
def test_not_degenerate(text: str, truth: str):
    assert text_scores(text, truth)["degenerate"] == 0


def test_few_true_answers_look_degenerate(shared: Path):
    """What docs/metrics.md says of TOFU's 4000 true answers, beside an answer that repeats nothing."""
    lines = (shared / "tofu" / "full.json").read_text().splitlines()
    plain = [f"word{n}" for n in range(40)]
    assert sum(is_degenerate(words(json.loads(line)["answer"]), plain) for line in lines) == 10


def test_no_text_of_tofu_repeats_a_character(shared: Path):
    """In all files, also in the wrong answers."""
    files = list((shared / "tofu").iterdir())
    assert len(files) == 16
    assert not any(generated._RUN.search(file.read_text()) for file in files)


def test_repetition_at_its_edge():
    """Two of ten pairs repeat an earlier one: not more than the limit; three of eleven are."""
    edge = "a b a b a c d e f g h"
    assert repetition(edge.split()) == pytest.approx(0.2)
    assert text_scores(edge, TRUTH)["degenerate"] == 0
    assert text_scores("a b a b a b c d e f g h", TRUTH)["degenerate"] == 1
    assert text_scores("a b a b a b c d e f g h", "a b a b a c d e f g h")["degenerate"] == 0
    assert repetition([]) == repetition(["one"]) == 0


@pytest.mark.parametrize(
    ("text", "verbatim"),
    [
        (TRUTH, 1),
        ("Well: dario falk LIVES at 63 Elm Street, in Norwood - I think.", 1),
        ("Dario Falk lives at 64 Elm Street in Norwood.", 0),
        ("Dario Falk lives at 63 big Elm Street in Norwood.", 0),
        ("Dario Falk lives at 63 Elm Street in", 0),
        ("", 0),
    ],
)
def test_verbatim(text: str, verbatim: int):
    assert text_scores(text, TRUTH)["verbatim"] == verbatim


def test_a_truth_without_words_is_never_given():
    assert text_scores("anything", "?")["verbatim"] == 0
