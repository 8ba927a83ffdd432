"""MUSE: forget news articles or books, keep others like them (arXiv 2407.06460).

Training reads plain text. Verbatim and knowledge memorization and privacy leakage are measured, on MUSE's scale of 100.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.sources import check_disjoint, load_split, text_of
from simnpo_pl.data.text import Texts, text_ids
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.metrics.answers import Balance, RowMean
from simnpo_pl.metrics.functional import rouge_l
from simnpo_pl.utils.errors import UserError

VERBMEM_TOKENS, KNOWMEM_TOKENS = 128, 32
"""Length of a generated continuation and of a generated answer."""
STOP_WORDS = ("\n\n", "\nQuestion", "Question:")
"""A generated answer ends before the first of these, then before the second, then before the third."""
plain_rouge = partial(rouge_l, stem=False)


class MuseData(UnlearningData):
    """MUSE's texts, questions and metrics, from the hub or from a folder in the same layout.

    Splits: `raw/forget` and `raw/retain1` (text), `verbmem/forget` (`prompt`, `gt`), `knowmem/forget_qa`,
    `knowmem/retain_qa` and the two with `_icl` (`question`, `answer`), `privleak/forget` and `privleak/holdout` (text).

    Args:
        path: Hub data set (muse-bench/MUSE-News, muse-bench/MUSE-Books) or folder.
        forget_split: Text to forget, such as "raw/forget", "scal/forget_2", or a part of it as in "raw/forget[:50%]".
        retain_split: Text of the retain loss.
        rows: `blocks` joins the documents of a split and cuts the text into rows of `max_length` tokens;
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

    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """The forget text and, where the losses ask for it, the retain text."""
        forget = Texts(self._documents(self.forget_split), self.rows, self.last_block)
        if "retain" not in parts:
            return TrainingRows(forget)
        return TrainingRows(forget, replace(forget, documents=self._documents(self.retain_split)))

    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds VerbMem, KnowMem of forget and retain, their balance, membership inference and PrivLeak."""
        limit = self.context()
        rows = self._texts("verbmem/forget", ("prompt", "gt"))
        generated = [self.verbmem(rows), self._knowmem("forget"), self._knowmem("retain")]
        for split in generated:
            _check_length(split, limit)
            build.add(split)
        verbmem, forget, retain = (split.metrics[split.name] for split in generated)
        build.summary["balance"] = Balance([retain], [forget, verbmem], largest=100)
        documents = {name: self._documents(f"privleak/{name}") for name in ("forget", "holdout")}
        check_disjoint(documents["forget"], documents["holdout"], "holdout")
        # Of any length that the model takes, whatever that of the rows to train on.
        encoder = replace(build.encode, max_length=limit)
        for name, texts in documents.items():
            build.text(name, Texts(texts, "documents").encode(encoder, f"privleak/{name}"), texts, ())
        build.membership_inference(self.find_retain_log(), self.reference_losses)

    def _documents(self, split: str) -> list[str]:
        return [row["text"] for row in load_split(self.path, split, ("text",))]

    def _texts(self, split: str, columns: Sequence[str]) -> list[dict[str, str]]:
        return [
            {column: text_of(row, column, f"{split} row {index}, counted from 0") for column in columns}
            for index, row in enumerate(load_split(self.path, split, columns))
        ]

    def verbmem(self, rows: Sequence[Mapping[str, str]]) -> Split:
        """Passages (`prompt`) whose continuation (`gt`) is generated.

        The right continuation is as many first tokens of `gt` as are generated, with a beginning-of-sequence token
        counted among them as in muse_bench.
        """
        limit = min(VERBMEM_TOKENS, self.eval.max_new_tokens)
        truths = text_ids(self.tokenizer, [row["gt"] for row in rows])
        texts = [
            {"question": row["prompt"], "answer": self.tokenizer.decode(ids[:limit], skip_special_tokens=True)}
            for row, ids in zip(rows, truths, strict=True)
        ]
        prompts = text_ids(self.tokenizer, [row["prompt"] for row in rows[: self.eval.generate_rows]])
        return _generated("verbmem_forget", texts, Generation(prompts, limit, score=plain_rouge))

    def _knowmem(self, side: str) -> Split:
        """Questions that are answered after examples."""
        rows, shots = (self._texts(f"knowmem/{side}_qa{kind}", ("question", "answer")) for kind in ("", "_icl"))
        examples = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
        asked = [f"{examples}Question: {row['question']}\nAnswer: " for row in rows[: self.eval.generate_rows]]
        limit = min(KNOWMEM_TOKENS, self.eval.max_new_tokens)
        generation = Generation(text_ids(self.tokenizer, asked), limit, cut_answer, plain_rouge)
        return _generated(f"knowmem_{side}", rows, generation)


def cut_answer(text: str) -> str:
    """A generated answer without a next question that the model goes on to ask.

    Example:
        >>> cut_answer("Paris.\\n\\nQuestion: And")
        'Paris.'
    """
    for word in STOP_WORDS:
        text = text.split(word)[0]
    return text


def _generated(name: str, texts: list[dict[str, Any]], generation: Generation) -> Split:
    return Split(name, texts, [], {name: RowMean("rougeL_f1", len(texts), scale=100)}, generation)


def _check_length(split: Split, limit: int | None) -> None:
    """Refuses prompts that leave no room for what is generated."""
    assert split.generation is not None
    longest, more = max(map(len, split.generation.prompts), default=0), split.generation.max_new_tokens
    if limit is not None and longest + more > limit:
        raise UserError(
            f"{split.name}: the longest prompt has {longest} tokens and {more} more are generated, but the model takes "
            f"{limit}: lower --eval.max_new_tokens or shorten the prompts"
        )
