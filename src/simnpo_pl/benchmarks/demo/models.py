"""Small Llama models, with their tokenizer, that have learnt the demo's data set.

`start` has seen every author, `retrained` all but the forgotten ones, from the same initial weights:
what unlearning starts from, and what it is measured against.
"""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from simnpo_pl.benchmarks.demo import EPOCHS
from simnpo_pl.data.collate import collate
from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate, TokenRow
from simnpo_pl.models.loading import save_model
from simnpo_pl.models.logprobs import Scorer

VOCABULARY = 1536
MAX_LENGTH = 128
BATCH = 16
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
FACT_FILES = ("real_authors_perturbed.json", "world_facts_perturbed.json")
TRAINING_FILES = {"start": ("full.json", *FACT_FILES), "retrained": ("retain90.json", *FACT_FILES)}


def _read_pairs(folder: Path, files: tuple[str, ...]) -> list[tuple[str, str]]:
    """(question, answer) of every row of some JSON-lines files."""
    lines = [line for name in files for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that puts BOS in front and pads on the right.

    Args:
        texts: What to learn merges from.

    Returns:
        A tokenizer with at most `VOCABULARY` tokens and distinct BOS, EOS and padding tokens.
    """
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


def _new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model, about 1 million parameters, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        # The library's 0.02 is meant for wide models and needs many more steps here.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: list[TokenRow], seed: int, epochs: int, bar: tqdm) -> None:
    """Trains a model in place on the answers of some rows.

    Args:
        model: The model; ends in evaluation mode.
        rows: What to learn.
        seed: Chooses the order of the rows.
        epochs: Passes over the rows.
        bar: Progress bar, advanced by one a step; shows the loss in nats per token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    total = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (total - step) / total)
    )
    scorer = Scorer(model)
    model.train()
    for _ in range(epochs):
        for drawn in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = collate([rows[index] for index in drawn.tolist()], pad_id=0)
            loss = -scorer({"rows": batch})["rows"].token_logps().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()


def build_models(folder: Path, seed: int = 0, progress: bool = True, epochs: int = EPOCHS) -> None:
    """Trains the tokenizer and both models and saves them as `start` and `retrained`.

    Args:
        folder: Holds the data set's files; receives the two model folders (safetensors, float32).
        seed: Chooses the initial weights and the order of the rows.
        progress: Shows a progress bar with the loss in nats per token.
        epochs: Passes of each model over its training rows.
    """
    pairs = _read_pairs(folder, TRAINING_FILES["start"])
    tokenizer = train_tokenizer([PLAIN_TEMPLATE.format(question=question, answer=answer) for question, answer in pairs])
    template = PromptTemplate(tokenizer)
    initial = _new_model(tokenizer, seed)

    def build(position: int, name: str) -> None:
        # One core each: matrices this small lose more to the threads' waiting than they gain, and the sums
        # then do not depend on the machine's number of cores.
        torch.set_num_threads(1)
        rows = template.encode_rows(_read_pairs(folder, TRAINING_FILES[name]), name)
        model = copy.deepcopy(initial)
        steps = epochs * -(-len(rows) // BATCH)
        with tqdm(total=steps, desc=f"training {name}", position=position, disable=not progress) as bar:
            train(model, rows, seed, epochs, bar)
        save_model(model, tokenizer, folder / name)

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    # The library's bar for writing files would stand between those of training.
    logging.disable_progress_bar()
    try:
        with ThreadPoolExecutor(len(TRAINING_FILES)) as pool:
            list(pool.map(build, range(len(TRAINING_FILES)), TRAINING_FILES))
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()
