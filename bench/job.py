"""A whole job from a folder on disk: evaluation, epochs of SimNPO, evaluation, the unlearned model saved."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bench import baseline
from bench.cases import Case
from bench.data import Rows, batch_of, real_model
from bench.measure import thread_environment
from bench.sides import CLIP, EOS, LR, NEW_TOKENS, SIDES
from simnpo_pl.data.sources import load_split
from simnpo_pl.data.tokenization import PromptTemplate, TokenRow

TEMPLATE = "{question} {answer}"
BATCH = 8
SPLITS = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed",
    "authors": "real_authors_perturbed",
    "facts": "world_facts_perturbed",
}


def write_files(folder: Path, rows: int, counts: dict[str, int], layers: int = 30) -> None:
    """The model, a tokenizer of one token a word, and TOFU-shaped files of random words."""
    words = {"<pad>": 0, "<unk>": 1, "</s>": EOS} | {f"w{n}": n for n in range(3, Case.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    real_model(layers).save_pretrained(folder / "model")
    made = Rows(Case.vocabulary)
    for name in ("forget01", "retain99"):
        _write(folder / f"{name}.json", [[row] for row in made.training(rows)])
    for name, file in SPLITS.items():
        is_long = name in ("forget", "retain")
        _write(folder / f"{file}.json", made.questions(counts[name], 7) if is_long else made.facts(counts[name]))


def _write(file: Path, questions: list[list[TokenRow]]) -> None:
    lines = []
    for answers in questions:
        # The template puts the end.
        first, *others = (_words(row.input_ids[len(row.prompt_ids) : -1]) for row in answers)
        row: dict[str, Any] = {"question": _words(answers[0].prompt_ids), "answer": first}
        if len(others) > 3:
            row["paraphrased_answer"] = others.pop(0)
        if others:
            row["perturbed_answer"] = others
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n")


def _words(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def timed(side: str, folder: Path, epochs: int) -> dict[str, float]:
    """Seconds and peak resident memory, MiB, of one side's job in a process of its own."""
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", *(own_command if side == "own" else public_command)(folder, Path(out), epochs)]
        start = time.perf_counter()
        process = subprocess.Popen(command, env=thread_environment(), stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-2000:]}")
    times = {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "system": used.ru_stime}
    return {**times, "mib": used.ru_maxrss / 1024}


def own_command(folder: Path, out: Path, epochs: int) -> list[str]:
    """The package's command line."""
    options = {
        "model.name": folder / "model",
        "model.lr": LR,
        "data.path": folder,
        "data.retain_split": "retain99",
        "data.retain_eval_split": SPLITS["retain"],
        "data.template": TEMPLATE,
        "eval.retrained": "null",
        "eval.max_new_tokens": NEW_TOKENS,
        "run_dir": out / "run",
        "trainer.max_epochs": epochs,
        "trainer.check_val_every_n_epoch": epochs,
        "trainer.accelerator": "cpu",
        "trainer.gradient_clip_val": CLIP,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["simnpo_pl", "fit", "--config", "configs/tofu_smollm2.yaml", *words]


def public_command(folder: Path, out: Path, epochs: int) -> list[str]:
    """The public recipe."""
    return ["bench", "child", "job", json.dumps({"folder": str(folder), "out": str(out), "epochs": epochs})]


def public_job(folder: str, out: str, epochs: int) -> None:
    """What the public recipe does, in this process."""
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    encoder = PromptTemplate(tokenizer, TEMPLATE)
    splits = {name: _answers(folder, file, encoder) for name, file in SPLITS.items()}
    rows = [
        encoder.encode_rows([(row["question"], row["answer"]) for row in load_split(folder, name, [])], name)
        for name in ("forget01", "retain99")
    ]
    _evaluate(model, splits)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01, fused=True)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(BATCH):
            forget, retain = (batch_of([part[i] for i in chosen.tolist()]) for part in rows)
            baseline.simnpo(model, None, forget, retain).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    _evaluate(model.eval(), splits)
    model.save_pretrained(f"{out}/model")
    tokenizer.save_pretrained(f"{out}/model")


def _answers(folder: str, file: str, encoder: PromptTemplate) -> list[list[TokenRow]]:
    questions = []
    for row in load_split(folder, file, []):
        paraphrase = [row["paraphrased_answer"]] if "paraphrased_answer" in row else []
        texts = [row["answer"], *paraphrase, *row["perturbed_answer"]]
        questions.append(encoder.encode_rows([(row["question"], text) for text in texts], file))
    return questions


def _evaluate(model: Any, splits: dict[str, list[list[TokenRow]]]) -> None:
    baseline.scores(model, splits)
    for questions in splits.values():
        prompts = [answers[0].prompt_ids for answers in questions]
        baseline.generate(model, prompts, [NEW_TOKENS] * len(prompts), EOS, 32)


def compare(rows: int, counts: dict[str, int], epochs: int, layers: int = 30) -> dict[str, dict[str, float]]:
    """Both sides' jobs on the same files."""
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), rows, counts, layers)
        return {side: timed(side, Path(name), epochs) for side in SIDES}
