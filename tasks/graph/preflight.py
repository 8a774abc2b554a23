"""What the configurations of model and dictionaries, and the cases, tell to be wrong, before any work is done."""

from __future__ import annotations

from infra.storage import Storage
from schemas.config import Config, Sae
from schemas.pretraining.section import Consolidation
from schemas.steering.section import Steering
from tasks.dictionaries.dictionaries import known_facts
from tasks.dictionaries.facts import Facts, check_facts, check_layer
from tasks.dictionaries.start import start_facts
from tasks.models.model import check_windows, context_length, model_dimensions, vocabulary_rows
from tasks.models.tokenizers import load_tokenizer, require_rows
from tasks.steering.cases import check_cases, check_clamps


def check_model(config: Config, storage: Storage) -> None:
    """Whether the model's files hold just its weights, and its blocks hand on one residual stream; reads no weights.

    Raises:
        ModelError: naming the model and what is wrong.
    """
    if not config.sae and not config.needs_head:
        return
    from tasks.models.loading import find_blocks, model_outline

    d_model, n_layers = model_dimensions(config.model, storage)
    outline = model_outline(config.model, storage, with_head=config.needs_head)
    find_blocks(outline, n_layers, d_model, config.model.name)


def check_fit(config: Config, storage: Storage) -> None:
    """Whether layers, windows, tokenizer, cases and dictionaries fit the model, as far as can be told without weights.

    Raises:
        ConfigError: if the file of cases cannot be used as asked.
        ModelError: if a window does not fit, the tokenizer cannot be loaded or has tokens that the model does not, or
            the model's configuration cannot be read.
        DictionaryError: if a layer does not exist, or a dictionary is missing, damaged, or another model's or layer's.
    """
    consolidation = config.section(Consolidation)
    growth = None if consolidation is None else consolidation.growth
    if growth is not None and growth.train.start_from is not None:
        start_facts(Sae(layer=growth.layer, train=growth.train), storage.endpoint_url)
    if not config.sae:
        return
    d_model, n_layers = model_dimensions(config.model, storage)
    for entry in config.sae:
        check_layer(entry, n_layers, config.model.name)
    check_windows(config, context_length(config.model, storage))
    known: dict[int, Facts] = {}
    for entry in config.sae:
        facts = known_facts(config, storage, entry)
        if facts is None:
            continue
        check_facts(facts, entry, d_model, n_layers)
        if entry.train is None:
            known[entry.layer] = facts
    require_rows(load_tokenizer(config.model, storage), vocabulary_rows(config.model, storage), config)
    if config.section(Steering) is not None:
        check_clamps(config, check_cases(config, storage), known)
