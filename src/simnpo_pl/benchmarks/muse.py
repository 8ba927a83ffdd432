"""MUSE: forget news articles or books, keep others like them (arXiv 2407.06460).

Trained on is plain text; measured are verbatim and knowledge memorization and privacy leakage, on MUSE's scale of 100.
"""

from collections.abc import Sequence
from typing import Any, Literal

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.membership import add_attacks
from simnpo_pl.benchmarks.splits import decode_with
from simnpo_pl.data.sources import check_disjoint, load_split
from simnpo_pl.data.text import Texts, text_ids, text_rows
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalSet, Generation
from simnpo_pl.metrics.answers import Balance, RowMean
from simnpo_pl.metrics.functional import rouge_l
from simnpo_pl.utils.errors import UserError

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32
"""Length of a generated continuation and of a generated answer."""
STOP_WORDS = ("\n\n", "\nQuestion", "Question:")
"""A generated answer ends before the first of these, then before the second, then before the third."""


class MuseData(UnlearningData):
    """MUSE's texts, questions and metrics, from the hub or from a folder in the same layout.

    Read are splits `raw/forget` and `raw/retain1` (text), `verbmem/forget` (`prompt`, `gt`), `knowmem/forget_qa`,
    `knowmem/retain_qa` and the two with `_icl` (`question`, `answer`), `privleak/forget` and `privleak/holdout` (text).

    Args:
        path: Hub data set (muse-bench/MUSE-News, muse-bench/MUSE-Books) or folder.
        forget_split: Text to forget, such as "raw/forget", "scal/forget_2", or a part of it as in "raw/forget[:50%]".
        retain_split: Text of the retain loss.
        rows: `blocks` joins the documents of a split and cuts the whole into rows of `max_length` tokens;
            `documents` makes a row of each.
        last_block: The last block may be shorter: `short` leaves it so, `filled` completes it from the first one's
            start, as muse_bench does.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(
        self,
        path: str = "muse-bench/MUSE-News",
        forget_split: str = "raw/forget",
        retain_split: str = "raw/retain1",
        rows: Literal["blocks", "documents"] = "blocks",
        last_block: Literal["short", "filled"] = "short",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.forget_split = forget_split
        self.retain_split = retain_split
        self.rows: Literal["blocks", "documents"] = rows
        self.last_block: Literal["short", "filled"] = last_block

    def training_rows(self) -> TrainingRows:
        """The forget text and, where the losses ask for it, the retain text."""
        forget = Texts(self._documents(self.forget_split), self.rows, self.last_block)
        if "retain" not in self.wanted_parts:
            return TrainingRows(forget)
        return TrainingRows(forget, Texts(self._documents(self.retain_split), self.rows, self.last_block))

    def build_evaluation(self, encode: PromptTemplate) -> Evaluation:
        """VerbMem, KnowMem of forget and retain, membership inference and PrivLeak."""
        tokenizer, limit = self.tokenizer, self.context()
        verbmem = verbmem_set(load_split(self.path, "verbmem/forget", ("prompt", "gt")), tokenizer, self.eval)
        forget, retain = (self._knowmem_set(split) for split in ("forget", "retain"))
        for part in (verbmem, forget, retain):
            _check_length(part, limit)
        own, *lost = (part.metrics[part.name] for part in (retain, forget, verbmem))
        seen, unseen = (self._text_set(split, limit) for split in ("forget", "holdout"))
        check_disjoint([t["answer"] for t in seen.texts], [t["answer"] for t in unseen.texts], "holdout")
        attacks = add_attacks(seen, unseen, self.eval, self.find_retain_log(), self.reference_losses)
        return Evaluation(
            [verbmem, forget, retain, seen, unseen],
            {"balance": Balance([own], lost, largest=100), **attacks.metrics},
            attacks.unavailable,
            decode_with(tokenizer),
        )

    def _documents(self, split: str) -> list[str]:
        return [row["text"] for row in load_split(self.path, split, ("text",))]

    def _text_set(self, split: str, limit: int | None) -> EvalSet:
        """Texts that membership inference scores; every token but the first counts."""
        documents = self._documents(f"privleak/{split}")
        rows = text_rows(self.tokenizer, documents, limit, self.truncate, f"privleak/{split}")
        # The beginning of a text stands for a question, by which rows of two evaluations are known to be the same.
        texts = [{"question": d[:80], "answer": d} for d in documents]
        return EvalSet(split, texts, [[row] for row in rows], {})

    def _knowmem_set(self, split: str) -> EvalSet:
        rows, shots = (
            load_split(self.path, f"knowmem/{split}_qa{suffix}", ("question", "answer")) for suffix in ("", "_icl")
        )
        return knowmem_set(f"knowmem_{split}", rows, shots, self.tokenizer, self.eval)


def verbmem_set(rows: Sequence[dict[str, Any]], tokenizer: Any, options: EvalOptions) -> EvalSet:
    """Passages whose continuation is generated.

    The right continuation is its first tokens only, as many as are generated, a beginning-of-sequence token counted
    among them as in muse_bench.

    Args:
        rows: With `prompt` and `gt`, the true continuation.
        tokenizer: Of the model.
        options: What is measured.
    """
    _check_texts(rows, ("prompt", "gt"), "verbmem/forget")
    limit = min(VERBMEM_TOKENS, options.max_new_tokens)
    truths = [tokenizer.decode(ids[:limit], skip_special_tokens=True) for ids in _ids(rows, "gt", tokenizer)]
    texts = [{"question": r["prompt"], "answer": truth} for r, truth in zip(rows, truths, strict=True)]
    generation = Generation(_ids(rows[: options.generate_rows], "prompt", tokenizer), limit, score=plain_rouge)
    return EvalSet("verbmem_forget", texts, [], _rouge_metric("verbmem_forget", len(rows)), generation)


def knowmem_set(
    name: str,
    rows: Sequence[dict[str, Any]],
    shots: Sequence[dict[str, Any]],
    tokenizer: Any,
    options: EvalOptions,
) -> EvalSet:
    """Questions that are answered after some examples.

    Args:
        name: Of the split and its metric.
        rows: With `question` and `answer`.
        shots: The examples, of the same form.
        tokenizer: Of the model.
        options: What is measured.
    """
    for checked, split in ((rows, name), (shots, f"{name}, examples")):
        _check_texts(checked, ("question", "answer"), split)
    before = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    prompts = [{"prompt": f"{before}Question: {row['question']}\nAnswer: "} for row in rows[: options.generate_rows]]
    limit = min(KNOWMEM_TOKENS, options.max_new_tokens)
    generation = Generation(_ids(prompts, "prompt", tokenizer), limit, cut_answer, plain_rouge)
    texts = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return EvalSet(name, texts, [], _rouge_metric(name, len(rows)), generation)


def cut_answer(text: str) -> str:
    """A generated answer without the next question the model may go on to ask itself.

    Example:
        >>> cut_answer("Paris.\\n\\nQuestion: And")
        'Paris.'
    """
    for word in STOP_WORDS:
        text = text.split(word)[0]
    return text


def plain_rouge(text: str, answer: str) -> dict[str, float]:
    """ROUGE without stemming."""
    return rouge_l(text, answer, stem=False)


def _rouge_metric(name: str, rows: int) -> dict[str, Any]:
    return {name: RowMean("rougeL_f1", rows, scale=100)}


def _ids(rows: Sequence[dict[str, Any]], column: str, tokenizer: Any) -> list[list[int]]:
    return text_ids(tokenizer, [row[column] for row in rows])


def _check_texts(rows: Sequence[dict[str, Any]], columns: Sequence[str], split: str) -> None:
    for index, row in enumerate(rows):
        for column in columns:
            if not isinstance(row[column], str) or not row[column].strip():
                raise UserError(
                    f"{split} row {index}, counted from 0: expected text as {column}, got {row[column]!r}; mend the row"
                )


def _check_length(part: EvalSet, limit: int | None) -> None:
    """Refuses prompts that leave no room for what is generated."""
    generation = part.generation
    longest = max(map(len, generation.prompts), default=0) if generation is not None else 0
    if generation is not None and limit is not None and longest + generation.max_new_tokens > limit:
        raise UserError(
            f"{part.name}: the longest prompt has {longest} tokens and {generation.max_new_tokens} more are generated, "
            f"but the model takes {limit}: lower --eval.max_new_tokens or shorten the prompts"
        )
