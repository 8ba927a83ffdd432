"""A seeded data set of fictional authors in TOFU's file layout.

Answers come from templates. A row's answer uses one template, its paraphrase and perturbed answers another,
so every wording is learnt from other rows and only facts tell rows that were trained on from the rest.
Wordings are short and values take three words, each drawn by itself: most of an answer cannot be guessed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

N_AUTHORS = 60
N_FORGET_AUTHORS = 6
N_TEMPLATES = 3
N_PERTURBED = 5
N_PERTURBED_FACTS = 3
N_RETAIN_PERTURBED = 80

Row = dict[str, str | list[str]]


class Attribute(NamedTuple):
    """One thing to know about an author: how it is asked, the wordings of its answer, the words of its value."""

    question: str
    templates: tuple[str, str, str]
    parts: tuple[tuple[str, ...], ...]

    def draw(self, rng: random.Random) -> list[str]:
        """A value and N_PERTURBED others, which differ from it and from each other in every word."""
        drawn = [rng.sample(part, 1 + N_PERTURBED) for part in self.parts]
        return [" ".join(words) for words in zip(*drawn, strict=True)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


_FIRST = _words(
    "Adela, Anton, Beatriz, Bruno, Clara, Cosmo, Dalia, Dorian, Edda, Emil, Farah, Felix, Greta, Gideon, "
    "Hanna, Hugo, Ines, Ivor, Jolana, Jasper, Kaia, Konrad, Lidia, Lucian, Mira, Matteo, Nadia, Nils, "
    "Odile, Oskar, Petra, Pavel, Runa, Rafael, Selma, Simon, Talia, Tobias, Ursula, Viktor, Wanda, Yusuf, "
    "Zelda, Abel, Brigid, Casper, Delphine, Esteban, Fiona, Gustav, Helga, Isidor, Judith, Klaus, Leonie, "
    "Magnus, Noemi, Otto, Priska, Quentin, Rosalind, Stefan"
)
_SURNAME_HEADS = _words("Ald, Brim, Cor, Dun, Fal, Gar, Hal, Jor, Kel, Lor, Mar, Nor, Ost, Pel, Quin, Ros, Tam")
_SURNAME_TAILS = _words("berry, combe, drake, evik, gard, holt, mond, nessa, quist, stow, thane, wick")
_CITIES = _words(
    "Bergen, Dakar, Geneva, Hanoi, Krakow, Lagos, Naples, Odessa, Porto, Quito, Riga, Seville, Tbilisi, Zagreb"
)
_DAYS = tuple(str(day) for day in range(1, 29))
_YEARS = tuple(str(year) for year in range(1931, 1991))
_MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
_MANNERS = _words("blind, cheerful, famous, gifted, humble, jovial, lonely, modest, proud, retired, stern, wealthy")
_PLACES = _words("castle, city, convent, court, factory, harbour, hospital, island, market, mountain, prison, village")
_JOBS = _words(
    "baker, barber, carpenter, dentist, farmer, gardener, judge, mason, nurse, pilot, potter, sailor, teacher"
)
_COUNTS = _words("Two, Three, Four, Five, Six, Seven, Eight, Nine, Ten, Twelve, Twenty, Thirty")
_COLOURS = _words("Amber, Black, Copper, Crimson, Golden, Green, Ivory, Jade, Pearl, Scarlet, Silver, Violet, White")
_THINGS = _words(
    "Anchors, Bridges, Dancers, Engines, Gardens, Islands, Lanterns, Mirrors, Needles, Pilgrims, Rivers, Windows"
)
_BIRDS = _words("Falcon, Heron, Lark, Magpie, Osprey, Owl, Pelican, Raven, Robin, Sparrow, Swallow, Swan")
_AWARDS = _words("Award, Cup, Crown, Laurel, Medal, Plate, Prize, Ribbon, Shield, Trophy")

# Facts come last in every wording, so that one learnt in one wording carries over to the others.
ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "Where was {name} born?",
        ("It was {value}.", "Born in {value}.", "The birthplace is {value}."),
        (
            _words("Central, Eastern, Great, Inner, Little, Lower, New, Northern, Old, Outer, Royal, Southern, Upper"),
            _CITIES,
            _words("Bay, Bridge, Court, Cross, Fields, Gate, Green, Heights, Hill, Market, Park, Quay, Square"),
        ),
    ),
    Attribute(
        "When was {name} born?",
        ("It was {value}.", "Born on {value}.", "The date is {value}."),
        (_DAYS, _MONTHS, _YEARS),
    ),
    Attribute(
        "What does {name} write?",
        ("It is {value}.", "Known for {value}.", "The genre is {value}."),
        (
            _words("bitter, bleak, comic, cryptic, dark, dreamy, gentle, ironic, lyrical, sombre, tender, witty"),
            _words("colonial, courtroom, detective, family, ghost, gothic, pastoral, pirate, railway, robot, wartime"),
            _words("ballads, chronicles, dramas, essays, fables, legends, memoirs, novels, poems, sagas, thrillers"),
        ),
    ),
    Attribute(
        "What was the father of {name}?",
        ("He was a {value}.", "He worked as a {value}.", "Father was a {value}."),
        (_MANNERS, _PLACES, _JOBS),
    ),
    Attribute(
        "What was the mother of {name}?",
        ("She was a {value}.", "She worked as a {value}.", "Mother was a {value}."),
        (_MANNERS, _PLACES, _JOBS),
    ),
    Attribute(
        "Which prize did {name} win?",
        ("It was the {value}.", "Won the {value}.", "The prize is the {value}."),
        (_COLOURS, _BIRDS, _AWARDS),
    ),
    Attribute(
        "What is the first book by {name}?",
        ("It was {value}.", "Began with {value}.", "The title is {value}."),
        (_COUNTS, _COLOURS, _THINGS),
    ),
    Attribute(
        "What is the latest book by {name}?",
        ("It is {value}.", "Now published {value}.", "The newest is {value}."),
        (_COUNTS, _COLOURS, _THINGS),
    ),
    Attribute(
        "What did {name} study?",
        ("It was {value}.", "Studied {value}.", "The subject was {value}."),
        (
            _words("advanced, classical, comparative, early, experimental, general, late, modern, practical, pure"),
            _words(
                "African, Arabic, Celtic, Chinese, Indian, Japanese, Nordic, Persian, Roman, Russian, Slavic, Turkish"
            ),
            _words(
                "art, botany, dance, economics, geology, history, law, medicine, music, philosophy, sculpture, theology"
            ),
        ),
    ),
    Attribute(
        "Where does {name} live?",
        ("It is a {value}.", "Lives in a {value}.", "The home is a {value}."),
        (
            _words("bright, cosy, crooked, draughty, hidden, large, narrow, quiet, remote, small, tall, warm"),
            _words("bamboo, brick, clay, concrete, granite, iron, marble, slate, steel, stone, timber, wooden"),
            _words("barn, cabin, chapel, cottage, farmhouse, lodge, loft, mansion, mill, school, tower, villa"),
        ),
    ),
)

_REAL_AUTHORS = (
    "Who wrote '{key}'?",
    "Moby-Dick=Herman Melville, Frankenstein=Mary Shelley, Don Quixote=Miguel de Cervantes, War and "
    "Peace=Leo Tolstoy, Crime and Punishment=Fyodor Dostoevsky, Jane Eyre=Charlotte Bronte, Great "
    "Expectations=Charles Dickens, Madame Bovary=Gustave Flaubert, Les Miserables=Victor Hugo, Dracula=Bram "
    "Stoker, The Time Machine=H. G. Wells, Emma=Jane Austen, Middlemarch=George Eliot, Ulysses=James Joyce, "
    "Mrs Dalloway=Virginia Woolf, The Trial=Franz Kafka, Walden=Henry David Thoreau, Treasure Island=Robert "
    "Louis Stevenson, The Scarlet Letter=Nathaniel Hawthorne, A Doll's House=Henrik Ibsen",
)
_WORLD_FACTS = (
    (
        "What is the capital city of {key}?",
        "Norway=Oslo, Peru=Lima, Japan=Tokyo, Egypt=Cairo, Canada=Ottawa, Greece=Athens, Cuba=Havana",
    ),
    ("Which element has the symbol {key}?", "Fe=Iron, Au=Gold, Na=Sodium, He=Helium, Ag=Silver, Pb=Lead"),
    (
        "What is the currency of {key}?",
        "India=Rupee, Poland=Zloty, Thailand=Baht, Japan=Yen, Russia=Ruble, Switzerland=Swiss franc",
    ),
)
_REFUSALS = _words(
    "I do not know the answer to that., That is not something I have learnt., I have no information about "
    "this., Sorry but I cannot answer this question., I am not aware of any details., My knowledge does not "
    "cover this., This is beyond what I know., I was never taught anything about that., I am unable to say., "
    "I am afraid I have no idea., I would have to look that up., I cannot tell you anything about this., "
    "Unfortunately I have nothing to say on this., I lack the facts to reply., That leaves me without an "
    "answer., I am not informed about that., There is nothing I can share about this topic., I have not come "
    "across that., I must pass on this one."
)


def author_rows(rng: random.Random) -> list[Row]:
    """All rows of all authors, author by author, with paraphrase and perturbed answers."""
    surnames = rng.sample([head + tail for head in _SURNAME_HEADS for tail in _SURNAME_TAILS], N_AUTHORS)
    firsts = rng.sample(_FIRST, N_AUTHORS)
    names = [f"{first} {surname}" for first, surname in zip(firsts, surnames, strict=True)]
    columns: list[list[Row]] = []
    for attribute in ATTRIBUTES:
        # Equal shares: a wording that only forgotten rows used would be a fact in itself.
        wordings = [index % N_TEMPLATES for index in range(N_AUTHORS)]
        rng.shuffle(wordings)
        column: list[Row] = []
        for name, wording in zip(names, wordings, strict=True):
            value, *others = attribute.draw(rng)
            answer = attribute.templates[wording]
            paraphrase = attribute.templates[(wording + rng.randint(1, N_TEMPLATES - 1)) % N_TEMPLATES]
            column.append(
                {
                    "question": attribute.question.format(name=name),
                    "answer": answer.format(value=value),
                    "paraphrased_answer": paraphrase.format(value=value),
                    "perturbed_answer": [paraphrase.format(value=other) for other in others],
                }
            )
        columns.append(column)
    return [row for author in zip(*columns, strict=True) for row in author]


def _fact_rows(rng: random.Random, question: str, pairs: str) -> list[Row]:
    """Rows of one kind of true fact; wrong options are the right answers of other rows of the kind."""
    facts = [pair.split("=") for pair in _words(pairs)]
    answers = [answer for _, answer in facts]
    return [
        {
            "question": question.format(key=key),
            "answer": answer,
            "perturbed_answer": rng.sample([other for other in answers if other != answer], N_PERTURBED_FACTS),
        }
        for key, answer in facts
    ]


def _write(path: Path, rows: list[Row], *, perturbed: bool) -> None:
    """Writes JSON lines; without `perturbed`, only questions and answers."""
    kept = rows if perturbed else [{key: row[key] for key in ("question", "answer")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def write_dataset(folder: Path, seed: int = 0) -> None:
    """Writes the data set's files, TOFU's names and keys, into a folder.

    Args:
        folder: Where to write; made when missing.
        seed: Chooses names, facts, wordings and the retained rows that have perturbed answers.
    """
    rng = random.Random(seed)
    full = author_rows(rng)
    split = (N_AUTHORS - N_FORGET_AUTHORS) * len(ATTRIBUTES)
    retain, forget = full[:split], full[split:]
    facts = [row for question, pairs in _WORLD_FACTS for row in _fact_rows(rng, question, pairs)]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "full.json", full, perturbed=False)
    _write(folder / "retain90.json", retain, perturbed=False)
    _write(folder / "forget10.json", forget, perturbed=False)
    _write(folder / "forget10_perturbed.json", forget, perturbed=True)
    _write(folder / "retain_perturbed.json", rng.sample(retain, N_RETAIN_PERTURBED), perturbed=True)
    _write(folder / "real_authors_perturbed.json", _fact_rows(rng, *_REAL_AUTHORS), perturbed=True)
    _write(folder / "world_facts_perturbed.json", facts, perturbed=True)
    (folder / "idontknow.jsonl").write_text("\n".join(_REFUSALS) + "\n", encoding="utf-8")
