"""What a run would do now, and why: the answer of `functok status`, and what lets `functok run` do nothing fast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from infra.addresses import without_credentials
from infra.index import distrusted
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import Consolidation
from schemas.steering.section import Steering
from schemas.steering.work import SteeringResults
from schemas.work import STAGES, CorpusShards, Dictionary, FeatureShard, Stage, StagePlan

if TYPE_CHECKING:
    from tasks.pretraining.tables import ConsolidationResults


def stages_of(
    config: Config, only: Stage | None = None, start_from: Stage | None = None
) -> tuple[Stage, ...]:
    """The stages that a run walks through: all that apply, one, or one and those after it."""
    from tasks.pretraining.results import consolidation_stages
    from tasks.steering.results import steering_stages

    graph: tuple[Stage, ...] = ("dictionaries", "features") if config.sae else ()
    of_sections = (*steering_stages(config), *consolidation_stages(config))
    asked = {"tokenize", *graph, *of_sections, "tables", "report"}
    applying = tuple(stage for stage in STAGES if stage in asked)
    if only is not None:
        return tuple(stage for stage in applying if stage == only)
    if start_from is not None:
        return tuple(stage for stage in applying if STAGES.index(stage) >= STAGES.index(start_from))
    return applying


def plan_run(config: Config, storage: Storage, *, verify: bool = False) -> list[StagePlan]:
    """One `StagePlan` a stage, in order; stages behind an unfinished one are as far known as they can be.

    No weights are read and nothing of a stage is made. Hashes of the documents' tokens (`tasks.corpus.heldout`) are
    computed where a consolidation asks for them first, and kept where the root can be written.

    Args:
        config: The configuration.
        storage: Where everything is.
        verify: Whether every manifest is read itself, and the indexes (`infra.index`) are written anew.

    Raises:
        FunctokError: if the configuration does not fit its model or corpus.
        StorageError: if the storage cannot be asked; a bucket that is not there is named.
    """
    storage.require_place()
    with storage.listed_once(), distrusted() if verify else nullcontext():
        return _plan_stages(config, storage)


def _plan_stages(config: Config, storage: Storage) -> list[StagePlan]:
    from tasks.corpus.tokenizer_training import with_tokenizer
    from tasks.graph.preflight import check_fit
    from tasks.pretraining.results import plan_consolidation
    from tasks.steering.results import plan_steering

    check_fit(config, storage)
    plans: list[StagePlan] = []
    resolved = with_tokenizer(config, storage)
    if resolved is None:
        reason = "the tokenizer is still to be trained on the corpus"
        plans.append(StagePlan(stage="tokenize", done=0, missing=1, reason=reason))
        shards = None
    else:
        config = resolved
        shards = _plan_tokenize(config, storage, plans)
    dictionaries: list[Dictionary] | None = None
    features: list[FeatureShard] | None = None
    if config.sae:
        dictionaries = _plan_dictionaries(config, storage, shards, plans)
        features = _plan_features(config, storage, shards, dictionaries, plans)
    steered: SteeringResults | None = None
    if config.section(Steering) is not None:
        found, steered = plan_steering(config, storage, shards, dictionaries)
        plans += found
    results: ConsolidationResults | None = None
    if config.section(Consolidation) is not None:
        found, results = plan_consolidation(config, storage, shards)
        plans += found
    is_ready = (
        shards is not None
        and (not config.sae or features is not None)
        and (config.section(Steering) is None or steered is not None)
        and (config.section(Consolidation) is None or results is not None)
    )
    found_shards = shards if is_ready else None
    _plan_tables(config, storage, found_shards, features, dictionaries, results, steered, plans)
    return plans


def is_up_to_date(plans: Sequence[StagePlan], stages: Sequence[Stage]) -> bool:
    """Whether none of `stages` has anything to do."""
    return all(plan.missing == 0 for plan in plans if plan.stage in stages)


def _plan_tokenize(config: Config, storage: Storage, plans: list[StagePlan]) -> CorpusShards | None:
    from tasks.corpus.tokenization import find_corpus

    found = find_corpus(config, storage)
    details = tuple(f"tokenize {without_credentials(file.url)}" for file in found.missing)
    if found.missing:
        reason = "files are new or changed, or what tokenization reads of the configuration is"
        plans.append(
            StagePlan(
                stage="tokenize",
                done=len(found.finished),
                missing=len(found.missing),
                reason=reason,
                details=details,
            )
        )
        return None
    plans.append(
        StagePlan(
            stage="tokenize",
            done=len(found.finished),
            missing=0 if found.shards is not None else 1,
            reason="all files are tokenized"
            if found.shards is not None
            else "the tokenizer's vocabulary is missing",
        )
    )
    return found.shards


def _plan_dictionaries(
    config: Config, storage: Storage, shards: CorpusShards | None, plans: list[StagePlan]
) -> list[Dictionary] | None:
    from tasks.dictionaries.dictionaries import find_dictionaries, refused_dictionaries

    if shards is None and any(entry.train for entry in config.sae):
        reason = "dictionaries are trained here: known once the corpus is tokenized"
        plans.append(StagePlan(stage="dictionaries", done=0, missing=None, reason=reason))
        return None
    found = find_dictionaries(config, storage, shards) if shards is not None else None
    if shards is None:
        plans.append(
            StagePlan(stage="dictionaries", done=0, missing=None, reason="known once the corpus is tokenized")
        )
        return None
    if found is None:
        if refused := refused_dictionaries(config, storage, shards):
            reason = "; ".join(error.message for error in refused)
            details = tuple(f"{error.message}; way out: {error.hint}" for error in refused)
            plans.append(
                StagePlan(
                    stage="dictionaries", done=0, missing=len(config.sae), reason=reason, details=details
                )
            )
            return None
        layers = ", ".join(str(entry.layer) for entry in config.sae)
        reason = f"a dictionary of layers {layers} is new, or what makes it changed"
        plans.append(StagePlan(stage="dictionaries", done=0, missing=len(config.sae), reason=reason))
        return None
    plans.append(
        StagePlan(
            stage="dictionaries", done=len(found), missing=0, reason="all dictionaries are checked and stored"
        )
    )
    return found


def _plan_features(
    config: Config,
    storage: Storage,
    shards: CorpusShards | None,
    dictionaries: list[Dictionary] | None,
    plans: list[StagePlan],
) -> list[FeatureShard] | None:
    from tasks.graph.features import find_features

    if shards is None or dictionaries is None:
        reason = "known once the corpus and the dictionaries are there"
        plans.append(StagePlan(stage="features", done=0, missing=None, reason=reason))
        return None
    found = find_features(config, storage, shards, dictionaries)
    n_missing = sum(len(layers) for layers in found.missing.values())
    details = tuple(
        f"{part.shard.folder} ({part.n_tokens:,} tokens of {without_credentials(part.shard.source)}): "
        f"layers {', '.join(map(str, layers))}"
        for part, layers in found.missing.items()
    )
    reason = (
        "shards are new or damaged, or their model, windows or dictionary changed"
        if found.missing
        else "all feature shards are there"
    )
    plans.append(
        StagePlan(stage="features", done=found.done, missing=n_missing, reason=reason, details=details)
    )
    return found.shards


def _plan_tables(
    config: Config,
    storage: Storage,
    shards: CorpusShards | None,
    features: list[FeatureShard] | None,
    dictionaries: list[Dictionary] | None,
    results: ConsolidationResults | None,
    steered: SteeringResults | None,
    plans: list[StagePlan],
) -> None:
    from tasks.graph.tables import find_tables
    from tasks.report.report import is_report_current

    if shards is None:
        plans.append(
            StagePlan(stage="tables", done=0, missing=None, reason="known once the shards are there")
        )
        plans.append(
            StagePlan(stage="report", done=0, missing=None, reason="known once the tables are there")
        )
        return
    is_current = find_tables(config, storage, shards, features, dictionaries, results, steered)
    reason = (
        "the published tables are current"
        if is_current
        else "the published tables are missing or of other shards"
    )
    plans.append(StagePlan(stage="tables", done=int(is_current), missing=int(not is_current), reason=reason))
    if not is_current:
        plans.append(StagePlan(stage="report", done=0, missing=1, reason="the tables will change"))
        return
    is_written = is_report_current(storage)
    reason = "the report is of these tables" if is_written else "the report is missing or of other tables"
    plans.append(StagePlan(stage="report", done=int(is_written), missing=int(not is_written), reason=reason))
