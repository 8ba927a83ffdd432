"""The demo: TOFU's layout with fictional authors, and small models that are trained on them on first use.

`start` has seen every author, `retrained` all but the forgotten ones, from the same initial weights: unlearning starts
from the first and is compared with the second.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from simnpo_pl.benchmarks.demo.authors import write_dataset
from simnpo_pl.benchmarks.pretraining import batches_of, new_llama, train
from simnpo_pl.benchmarks.tofu import TofuData
from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate
from simnpo_pl.models.loading import quiet_loading, save_model
from simnpo_pl.utils.files import read_json, read_json_lines, write_json

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
        self,
        path: str = "runs/demo-data",
        forget_split: str = "forget10",
        data_seed: int | None = None,
        **kwargs: Any,
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bos, eos, pad = "<|bos|>", "<|eos|>", "<|pad|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[bos, eos, pad],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
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
