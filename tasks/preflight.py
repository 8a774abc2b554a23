"""What the configurations of model and dictionaries, and the cases, tell to be wrong, before any work is done."""

from __future__ import annotations

import json

import fsspec

from infra.addresses import storage_options
from infra.storage import Storage
from schemas.config import Config
from tasks.cases import check_cases, check_clamps
from tasks.dictionary_checks import Facts, check_facts, check_layer, facts_of
from tasks.models import check_windows, context_length, model_dimensions


def check_model(config: Config, storage: Storage) -> None:
    """Whether the model's files hold just its weights, and its blocks hand on one residual stream; reads no weights.

    Raises:
        ModelError: naming the model and what is wrong.
    """
    if not config.sae and config.steering is None:
        return
    from tasks.model_loading import find_blocks, model_outline

    d_model, n_layers = model_dimensions(config.model, storage)
    outline = model_outline(config.model, storage, with_head=config.steering is not None)
    find_blocks(outline, n_layers, d_model, config.model.name)


def check_fit(config: Config, storage: Storage) -> None:
    """Whether layers, windows, cases and the dictionaries on disk fit the model; reads no weights.

    Raises:
        ConfigError: if the file of cases cannot be used as asked.
        ModelError: if a window does not fit, or the model's configuration cannot be read.
        DictionaryError: if a layer does not exist, or a dictionary on disk does not fit it.
    """
    if not config.sae:
        return
    d_model, n_layers = model_dimensions(config.model, storage)
    for entry in config.sae:
        check_layer(entry, n_layers, config.model.name)
    check_windows(config, context_length(config.model, storage))
    known: dict[int, Facts] = {}
    for entry in config.sae:
        if entry.path is None:
            continue
        options = storage_options(entry.path, storage.endpoint_url)
        try:
            with fsspec.open(f"{entry.path.rstrip('/')}/cfg.json", "rb", **options) as file:
                facts = facts_of(json.load(file))
        except (OSError, ValueError, KeyError, TypeError):
            # The stage that copies it says what is missing or damaged, file by file.
            continue
        check_facts(facts, entry, d_model, n_layers)
        known[entry.layer] = facts
    if config.steering is not None:
        check_clamps(config, check_cases(config, storage), known)
