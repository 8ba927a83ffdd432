"""A seeded data set of fictional authors in TOFU's file layout.

Answers come from templates. A row's answer uses one template, its paraphrase and perturbed answers another,
so every wording is learnt from other rows and only facts tell rows that were trained on from the rest.
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
    """One thing to know about an author: how it is asked, the wordings of its answer, its possible values."""

    question: str
    templates: tuple[str, str, str]
    values: tuple[str, ...]


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
_TITLE_HEADS = _words(
    "Amber, Broken, Crimson, Distant, Empty, Frozen, Gentle, Hollow, Iron, Jade, Last, Marble, Northern, "
    "Open, Paper, Quiet, Restless, Silver, Tidal, Unwritten, Velvet, Winter"
)
_TITLE_TAILS = _words(
    "Anchor, Bridge, Compass, Dancer, Engine, Fountain, Garden, Harbour, Island, Journal, Kingdom, Lantern, "
    "Mirror, Needle, Orchard, Pilgrim, River, Staircase, Theatre, Umbrella, Valley, Window"
)
_TITLES = tuple(f"The {head} {tail}" for head in _TITLE_HEADS for tail in _TITLE_TAILS)
_CITIES = _words(
    "Antwerp, Bergen, Bogota, Cordoba, Dakar, Edinburgh, Florence, Geneva, Hanoi, Istanbul, Jakarta, "
    "Krakow, Lagos, Marseille, Montreal, Naples, Odessa, Porto, Quito, Riga, Seville, Tbilisi, Zagreb"
)
_JOBS = _words(
    "baker, beekeeper, carpenter, chemist, dentist, mason, farmer, fisher, gardener, glassblower, judge, "
    "locksmith, midwife, miner, nurse, barber, pharmacist, pilot, plumber, potter, sailor, teacher"
)
_YEARS = tuple(str(year) for year in range(1931, 1991))
_GENRES = _words(
    "gothic horror, space opera, crime fiction, magical realism, travel writing, epic fantasy, political "
    "satire, nature essays, war chronicles, romantic comedy, courtroom drama, sea stories, folk tales, spy "
    "thrillers, family sagas, urban poetry, ghost stories, alternate history, culinary memoir"
)
_PRIZES = _words(
    "Golden Heron Prize, Bluebell Medal, Copper Quill Award, Three Rivers Cup, Lighthouse Laurel, Oak Leaf "
    "Prize, Meridian Medal, Open Page Award, Falcon Trophy, Saffron Prize, Evening Star Medal, White Raven "
    "Award, Granite Laurel, Willow Prize, Aurora Cup, Inkwell Medal, Sparrow Award, Cathedral Prize"
)
_SUBJECTS = _words(
    "astronomy, botany, classics, economics, forestry, geology, hydrology, Islamic art, Japanese, law, "
    "linguistics, marine biology, mathematics, medieval history, music theory, nursing, philosophy, "
    "sculpture, statistics, theology"
)
_HOMES = _words(
    "tall lighthouse, converted barn, houseboat, mountain cabin, former chapel, city loft, seaside cottage, "
    "windmill, vineyard estate, desert tent, railway carriage, castle tower, rooftop flat, river island, "
    "garden shed, forest lodge, stone farmhouse, fishing hamlet, disused school, canal house"
)

# Facts come last in every wording, so that one learnt in one wording carries over to the others.
ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "In which city was {name} born?",
        ("{name} was born in {value}.", "The birthplace is {value}.", "Life began for {name} in {value}."),
        _CITIES,
    ),
    Attribute(
        "In what year was {name} born?",
        ("{name} was born in {value}.", "The year of birth is {value}.", "It happened in {value}."),
        _YEARS,
    ),
    Attribute(
        "Which genre does {name} write in?",
        ("{name} writes {value}.", "The books are {value}.", "Readers know {name} for {value}."),
        _GENRES,
    ),
    Attribute(
        "What did the father of {name} do for a living?",
        (
            "The father of {name} was a {value}.",
            "He worked as a {value}.",
            "His trade was that of a {value}.",
        ),
        _JOBS,
    ),
    Attribute(
        "What did the mother of {name} do for a living?",
        (
            "The mother of {name} was a {value}.",
            "She worked as a {value}.",
            "Her trade was that of a {value}.",
        ),
        _JOBS,
    ),
    Attribute(
        "Which prize has {name} won?",
        ("{name} won the {value}.", "The prize is the {value}.", "Judges gave {name} the {value}."),
        _PRIZES,
    ),
    Attribute(
        "What is the first book by {name}?",
        ("{name} began with {value}.", "The first book is {value}.", "It was called {value}."),
        _TITLES,
    ),
    Attribute(
        "What is the latest book by {name}?",
        ("{name} has now published {value}.", "The latest book is {value}.", "The newest title is {value}."),
        _TITLES,
    ),
    Attribute(
        "What did {name} study?",
        ("{name} studied {value}.", "The subject was {value}.", "At university {name} chose {value}."),
        _SUBJECTS,
    ),
    Attribute(
        "Where does {name} live?",
        ("{name} lives in a {value}.", "The home is a {value}.", "These days home means a {value}."),
        _HOMES,
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


def _author_rows(rng: random.Random) -> list[Row]:
    """All rows of all authors, author by author, with paraphrase and perturbed answers."""
    surnames = rng.sample([head + tail for head in _SURNAME_HEADS for tail in _SURNAME_TAILS], N_AUTHORS)
    firsts = rng.sample(_FIRST, N_AUTHORS)
    names = [f"{first} {surname}" for first, surname in zip(firsts, surnames, strict=True)]
    titles = iter(rng.sample(_TITLES, 2 * N_AUTHORS))
    columns: list[list[Row]] = []
    for attribute in ATTRIBUTES:
        # Equal shares: a wording that only forgotten rows used would be a fact in itself.
        wordings = [index % N_TEMPLATES for index in range(N_AUTHORS)]
        rng.shuffle(wordings)
        column: list[Row] = []
        for name, wording in zip(names, wordings, strict=True):
            value = next(titles) if attribute.values is _TITLES else rng.choice(attribute.values)
            others = rng.sample([other for other in attribute.values if other != value], N_PERTURBED)
            answer = attribute.templates[wording]
            paraphrase = attribute.templates[(wording + rng.randint(1, N_TEMPLATES - 1)) % N_TEMPLATES]
            column.append(
                {
                    "question": attribute.question.format(name=name),
                    "answer": answer.format(name=name, value=value),
                    "paraphrased_answer": paraphrase.format(name=name, value=value),
                    "perturbed_answer": [paraphrase.format(name=name, value=other) for other in others],
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
    full = _author_rows(rng)
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
