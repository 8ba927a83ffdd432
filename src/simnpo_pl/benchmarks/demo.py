"""The demo: fictional authors in TOFU's layout, and small Llama models that are trained on them on first use.

Answers come from templates. A row's answer uses one template, its paraphrase and perturbed answers another, so a model
learns every wording from other rows, and only facts distinguish the rows it was trained on from the rest. Wordings are
short and values have three words, each drawn by itself: most of an answer cannot be guessed.

The model `start` has seen every author, `retrained` all but the forgotten ones, from the same initial weights:
unlearning starts from the first and is compared with the second.
"""

import copy
import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from simnpo_pl.benchmarks.pretraining import batches_of, new_llama, train
from simnpo_pl.benchmarks.tofu import TofuData
from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate
from simnpo_pl.models.loading import quiet_loading, save_model
from simnpo_pl.utils.files import read_json, read_json_lines, write_json, write_json_lines, write_text

VERSION = 2
"""Raise it when a change alters the generated data or models; older folders are then rebuilt."""
EPOCHS = 14
"""Passes over the training rows after which a model knows nearly every answer."""
VOCABULARY = 1536
MAX_LENGTH = 128
BATCH = 16
WARMUP_STEPS = 20
FACT_FILES = ("real_authors_perturbed.json", "world_facts_perturbed.json")
TRAINING_FILES = {"start": ("full.json", *FACT_FILES), "retrained": ("retain90.json", *FACT_FILES)}
MODELS = tuple(TRAINING_FILES)
N_AUTHORS = 60
N_FORGET_AUTHORS = 6
N_PERTURBED = 5
N_PERTURBED_FACTS = 3
N_RETAIN_PERTURBED = 80
Row = dict[str, Any]
"""`question`, `answer`, `paraphrased_answer` (none for true facts) and the list `perturbed_answer`."""


class Attribute(NamedTuple):
    """One thing to know about an author; a value has a word of each of the parts."""

    question: str
    templates: list[str]
    parts: list[list[str]]

    def draw(self, rng: random.Random) -> list[str]:
        """A value and N_PERTURBED others, which differ from it and from each other in every word."""
        drawn = [rng.sample(part, 1 + N_PERTURBED) for part in self.parts]
        return [" ".join(words) for words in zip(*drawn, strict=True)]


WORDS = json.loads(Path(__file__).with_name("demo_words.json").read_text(encoding="utf-8"))
_CHOICES = WORDS["words"] | {"days": [str(n) for n in range(1, 29)], "years": [str(n) for n in range(1931, 1991)]}
# Facts come last in every wording, so that one learnt in one wording carries over to the others.
ATTRIBUTES = [
    Attribute(entry["question"], entry["templates"], [_CHOICES[part] for part in entry["parts"]])
    for entry in WORDS["attributes"]
]


def author_rows(rng: random.Random) -> list[Row]:
    """All rows of all authors, author by author, with paraphrase and perturbed answers."""
    surnames = rng.sample([a + b for a in WORDS["surname_heads"] for b in WORDS["surname_tails"]], N_AUTHORS)
    firsts = rng.sample(WORDS["first_names"], N_AUTHORS)
    columns: list[list[Row]] = []
    for attribute in ATTRIBUTES:
        # Equal shares: a wording that only forgotten rows used would be a fact in itself.
        count = len(attribute.templates)
        wordings = [index % count for index in range(N_AUTHORS)]
        rng.shuffle(wordings)
        column: list[Row] = []
        for first, surname, wording in zip(firsts, surnames, wordings, strict=True):
            value, *others = attribute.draw(rng)
            paraphrase = attribute.templates[(wording + rng.randint(1, count - 1)) % count]
            column.append(
                {
                    "question": attribute.question.format(name=f"{first} {surname}"),
                    "answer": attribute.templates[wording].format(value=value),
                    "paraphrased_answer": paraphrase.format(value=value),
                    "perturbed_answer": [paraphrase.format(value=other) for other in others],
                }
            )
        columns.append(column)
    return [row for author in zip(*columns, strict=True) for row in author]


def _fact_rows(rng: random.Random, facts: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Rows of true facts by question; wrong answers are the right ones to the same question about other keys."""
    return [
        {
            "question": question.format(key=key),
            "answer": answer,
            "perturbed_answer": rng.sample([a for a in answers.values() if a != answer], N_PERTURBED_FACTS),
        }
        for question, answers in facts.items()
        for key, answer in answers.items()
    ]


def write_dataset(folder: Path, seed: int = 0) -> None:
    """Writes the data set's files with TOFU's names and keys; all choices follow from the seed."""
    rng = random.Random(seed)
    full = author_rows(rng)
    split = (N_AUTHORS - N_FORGET_AUTHORS) * len(ATTRIBUTES)
    facts = _fact_rows(rng, WORDS["world_facts"])
    perturbed = {
        "forget10_perturbed": full[split:],
        "retain_perturbed": rng.sample(full[:split], N_RETAIN_PERTURBED),
        "real_authors_perturbed": _fact_rows(rng, WORDS["real_authors"]),
        "world_facts_perturbed": facts,
    }
    plain = {"full": full, "retain90": full[:split], "forget10": full[split:]}
    trained = {name: [{k: row[k] for k in ("question", "answer")} for row in rows] for name, rows in plain.items()}
    for name, rows in (trained | perturbed).items():
        write_json_lines(folder / f"{name}.json", rows)
    write_text(folder / "idontknow.jsonl", "\n".join(WORDS["refusals"]) + "\n")


class DemoData(TofuData):
    """Fictional authors and the models that know them, made in `path` if they are missing.

    The start model is `path`/start, the retrained one `path`/retrained.

    Args:
        path: Folder for data and models.
        forget_split: forget10, the one split the demo has.
        data_seed: Seed of authors and models; null takes the run's. Runs of several seeds over one folder need it.
        kwargs: Passed on to `TofuData`.
    """

    def __init__(
        self, path: str = "runs/demo-data", forget_split: str = "forget10", data_seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(path=path, forget_split=forget_split, **kwargs)
        self.data_seed = data_seed

    def prepare_data(self) -> None:
        """Makes data and models once; other processes that share the folder wait."""
        folder = Path(self.path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            prepare(folder, self.seed if self.data_seed is None else self.data_seed)


def prepare(folder: Path, seed: int = 0, epochs: int = EPOCHS) -> None:
    """Makes the data set and both models, unless the folder has those of this version, seed and number of epochs."""
    marker = folder / "fingerprint.json"
    fingerprint = {"version": VERSION, "seed": seed, "epochs": epochs}
    complete = all(file.is_file() for file in (marker, *(folder / name / "model.safetensors" for name in MODELS)))
    if complete and read_json(marker) == fingerprint:
        return
    # An interrupted rebuild must not look complete.
    marker.unlink(missing_ok=True)
    write_dataset(folder, seed)
    build_models(folder, seed, epochs)
    write_json(marker, fingerprint)


def build_models(folder: Path, seed: int, epochs: int) -> None:
    """Trains the tokenizer and both models on the folder's data set and saves them as `start` and `retrained`."""
    pairs = _read_pairs(folder, TRAINING_FILES["start"])
    tokenizer = train_tokenizer([PLAIN_TEMPLATE.format(question=question, answer=answer) for question, answer in pairs])
    template = PromptTemplate(tokenizer)
    # About a million parameters.
    initial = new_llama(
        seed,
        tokenizer,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        tie_word_embeddings=True,
    )

    def build(position: int, name: str) -> None:
        # One core each: matrices this small lose more to the threads' waiting than they gain, and the sums
        # then do not depend on the machine's number of cores.
        torch.set_num_threads(1)
        rows = template.encode_rows(_read_pairs(folder, TRAINING_FILES[name]), name)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(rows), generator=generator).tolist() for _ in range(epochs)]
        batches = batches_of(rows, orders, BATCH)
        total = len(batches)
        model = copy.deepcopy(initial)
        train(
            model,
            tqdm(batches, desc=f"training {name}", position=position),
            lr=2e-3,
            betas=(0.9, 0.99),
            schedule=lambda step: min((step + 1) / WARMUP_STEPS, (total - step) / total),
            clip=1.0,
        )
        save_model(model, tokenizer, folder / name)

    # Transformers' bar for writing files would appear between those of training.
    quiet_loading()
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(MODELS)) as pool:
            list(pool.map(build, range(len(MODELS)), MODELS))
    finally:
        torch.set_num_threads(threads)


def _read_pairs(folder: Path, files: Sequence[str]) -> list[tuple[str, str]]:
    """(question, answer) of every row."""
    return [(row["question"], row["answer"]) for name in files for row in read_json_lines(folder / name)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens that puts BOS in front and pads on the right."""
    bos, eos, pad = special = "<|bos|>", "<|eos|>", "<|pad|>"
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, VOCABULARY, min_frequency=0, show_progress=False, special_tokens=list(special))
    tokenizer = Tokenizer.from_str(made.to_str())
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
