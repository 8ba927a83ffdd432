"""`model/README.md`: the model card that the Hugging Face hub expects, without paths of this machine or forget rows."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from jinja2 import Template

from simnpo_pl.data.tokenization import PLAIN_TEMPLATE
from simnpo_pl.metrics import titles
from simnpo_pl.models.lora import ADAPTER_CONFIG
from simnpo_pl.runs.record import Run
from simnpo_pl.runs.verdict import exported, unlearned
from simnpo_pl.utils import markdown
from simnpo_pl.utils.files import read_json, write_text

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ASKING = Path(__file__).with_name("asking.md.j2")


def write_card(run: Run) -> None:
    """Write the card of a run's exported model."""
    base = _card_of(run.start_model)
    write_text(run.folder / "model" / "README.md", f"---\n{_front_matter(run, base).to_yaml()}\n---\n\n{_body(run)}")


def _front_matter(run: Run, base: ModelCardData) -> ModelCardData:
    given = run.record["settings"].get("data", {}).get("init_args", {})
    sources = (str(given[key]).split(":")[0] for key in ("path", "forget", "retain") if given.get(key))
    datasets = list(dict.fromkeys(source for source in sources if _is_hub_id(source))) or None
    count = f", {run.forget_rows} rows" if run.forget_rows else ""
    rows = (datasets or ["own"])[0], f"{run.forget_split}{count}"
    final = run.metrics("final")
    metrics = {name: final[name] for name in titles.measured([final]) if math.isfinite(final[name])}
    results = [
        EvalResult("text-generation", *rows, metric_type=name, metric_name=titles.title_of(name).short, metric_value=v)
        for name, v in metrics.items()
    ]
    return ModelCardData(
        # A folder is nothing that the hub knows; the folder's own card may name its base.
        base_model=run.start_model if _is_hub_id(run.start_model) else base.base_model,
        license=base.license,
        library_name="peft" if (run.folder / "model" / ADAPTER_CONFIG).is_file() else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["unlearning"] if unlearned(run.record) else []), run.method.lower(), "simnpo_pl"],
        datasets=datasets,
        metrics=list(metrics) or None,
        model_name=run.title if metrics else None,
        eval_results=results or None,
    )


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _card_of(model: str) -> Any:
    """Front matter of the start model's own card, in its folder or the hub's cache; nothing is downloaded."""
    try:
        folder = Path(model).expanduser()
        file: Any = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(model, "README.md")
        return ModelCard(Path(file).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:
        # No card on this machine, or none that can be read: what it says is left out.
        return ModelCardData()


def _body(run: Run) -> str:
    shown = {exported(run.record) if model == "final" else model: metrics for model, metrics in run.models.items()}
    names = titles.measured(shown.values())
    rows = [[titles.title_of(name).short, *(titles.number(m.get(name)) for m in shown.values())] for name in names]
    start = run.start_model if _is_hub_id(run.start_model) else f"in the folder {Path(run.start_model).name}"
    parts = [
        f"# {run.title}",
        f"{run.method} ({run.settings}) was applied to {run.trained}, starting from the model {start}, with learning "
        f"rate {run.record['settings']['model']['lr']} and seed {run.record['seed']}. It is the model after epoch "
        f"{run.record.get('exported_epoch')}.",
        *_asking(run),
    ]
    if run.verdict:
        parts += [f"## Verdict: {run.headline}", "\n".join(f"* {reason}" for reason in run.verdict["reasons"])]
    if rows:
        parts += ["## Metrics", markdown.table(["metric", *shown], rows)]
    proof = f"Metrics of {titles.answers_at(run.temperature)} do not prove that the rows are removed."
    parts += ["## What may come back", proof] if unlearned(run.record) else []
    if found := run.recovered.items():
        lines = "\n".join(f"* {name} {titles.number(value)}" for name, value in found)
        parts += ["Most that an attack brought back:", lines]
    if run.untested and unlearned(run.record):
        parts.append(f"Not tested: {'; '.join(run.untested)}.")
    versions = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
    return "\n\n".join([*parts, "## Versions", f"{versions}.\n"])


def _asking(run: Run) -> list[str]:
    """Python that asks the model a question, in the form of prompt of the run; none for a model without tokenizer."""
    file = run.folder / "model" / "tokenizer_config.json"
    if not file.is_file():
        return []
    given = run.record["settings"]["data"]["init_args"]
    is_text = run.rows and all(row["answer"].startswith(row["question"]) for row in run.rows)
    form = "{question}" if is_text else given.get("template")
    chat = read_json(file).get("chat_template") if form is None else None
    prompt = (form or PLAIN_TEMPLATE).removesuffix("{answer}").rstrip(" ")
    return [Template(ASKING.read_text(encoding="utf-8")).render(chat=chat, prompt=prompt, given=given, repr=repr)]
