"""Memory consolidation along pre-training (PAPER 1.4): checkpoints, losses, SAEs, texts, and their tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from infra.addresses import without_credentials
from infra.storage import Storage
from infra.terminal import printable
from schemas.config import Config
from schemas.pretraining.section import Series, consolidation_of, losses_of
from schemas.sections import Sae
from tasks.corpus.heldout import heldout_parts
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.facts import Facts
from tasks.dictionaries.start import start_facts
from tasks.engine.run import Run
from tasks.experiment import Experiment
from tasks.pretraining import report
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.generations import GENERATIONS
from tasks.pretraining.growth import GROWTH
from tasks.pretraining.losses import LOSSES
from tasks.pretraining.pages import BRINGS, PAGES
from tasks.pretraining.tables import CONSOLIDATION

if TYPE_CHECKING:
    from rich.console import Console


def facts(run: Run) -> Mapping[str, object]:
    """What `run_info` says of the series and the held-out documents."""
    config, section = run.config, consolidation_of(run.config)
    parts = heldout_parts(config, run.storage, run.result(TOKENIZE), losses_of(config).max_tokens)
    values: dict[str, object] = {
        "series": "; ".join(_told(config, series) for series in section.series),
        "heldout_share": section.heldout_share,
        "heldout_documents": sum(len(part.documents) for part in parts),
        "heldout_tokens": sum(part.n_tokens for part in parts),
        "loss_resamples": losses_of(config).resamples,
    }
    if section.train is not None and section.trains_here:
        values["training_tokens"] = section.train.tokens
    if section.train is not None and section.trains_tokenizer:
        values["tokenizer"] = (
            f"byte-level BPE of {section.train.vocabulary_size} tokens, trained on the corpus"
        )
    return values


def _told(config: Config, series: Series) -> str:
    if series.shape is not None:
        return (
            f"{series.name}: {series.shape.layers} blocks of width {series.shape.hidden_size}, trained here"
        )
    if series.revisions is not None:
        name = without_credentials(series.model or config.model.name)
        return f"{series.name}: {len(series.revisions)} revisions of {name}"
    return f"{series.name}: {series.folder}"


def check_fit(config: Config, storage: Storage, known: Mapping[int, Facts]) -> None:
    """Whether the SAE that the SAE series starts from is there and can be.

    Raises:
        DictionaryError: if it is missing or damaged.
    """
    growth = consolidation_of(config).growth
    if growth is not None and growth.train.start_from is not None:
        start_facts(Sae(layer=growth.layer, train=growth.train), storage.endpoint_url)


def closing(connection: Any, console: Console) -> None:
    """Print the last checkpoints' losses by token group."""
    from rich.table import Table
    from rich.text import Text

    losses = report.final_losses(connection)
    table = Table(title="Loss by token group (current → next), nats on held-out documents, 95 % intervals")
    table.add_column("group")
    series = {(row["model"], row["step"]): f"{row['model']}, step {row['step']:,}" for row in losses}
    for title in series.values():
        table.add_column(Text(printable(title)), justify="right")
    cells = {(row["bucket"], row["model"]): _interval(row) for row in losses}
    for bucket in dict.fromkeys(row["bucket"] for row in losses):
        table.add_row(bucket, *(cells.get((bucket, model), "") for model, _ in series))
    console.print(table)


def _interval(row: Mapping[str, Any]) -> str:
    mean, low, high = (row[f"mean_loss{end}"] for end in ("", "_low", "_high"))
    if mean is None:
        return "–"
    return f"{mean:.3f}" + ("" if low is None else f" ({low:.3f}–{high:.3f})")


EXPERIMENT = Experiment(
    name="pretraining",
    stages=(CHECKPOINTS, LOSSES, GROWTH, GENERATIONS),
    tables=CONSOLIDATION,
    report=report,
    facts=facts,
    check_fit=check_fit,
    closing=closing,
    pages=PAGES,
    brings=BRINGS,
)
