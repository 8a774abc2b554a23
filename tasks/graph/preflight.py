"""What the configurations of model and dictionaries tell to be wrong, before any work is done."""

from __future__ import annotations

from infra.storage import Storage
from schemas.config import Config
from tasks.dictionaries.dictionaries import known_facts
from tasks.dictionaries.facts import Facts, check_facts, check_layer
from tasks.models.model import check_windows, context_length, model_dimensions, vocabulary_rows
from tasks.models.tokenizers import load_tokenizer, require_rows
from tasks.models.unembedding import final_norm


def check_model(config: Config, storage: Storage) -> None:
    """Whether its device can be, its files hold just its weights, and its blocks hand on one residual stream.

    Reads no weights. Whether this machine has the device is not asked: a worker may have it.

    Raises:
        ModelError: naming the model or the device and what is wrong.
    """
    if not config.sae and not config.needs_head:
        return
    from tasks.models.devices import device_called
    from tasks.models.loading import find_blocks, model_outline

    device_called(config.model.device)
    d_model, n_layers = model_dimensions(config.model, storage)
    outline = model_outline(config.model, storage, with_head=config.needs_head)
    if config.features.logits:
        final_norm(outline, config.model.name)
    find_blocks(outline, n_layers, d_model, config.model.name)


def check_dictionaries(config: Config, storage: Storage) -> dict[int, Facts]:
    """Whether layers, windows, tokenizer and dictionaries fit the model, as far as can be told without weights.

    Returns:
        What is known of the dictionaries that are not trained here, by layer.

    Raises:
        ModelError: if a window does not fit, the tokenizer cannot be loaded or has tokens that the model does not, or
            the model's configuration cannot be read.
        DictionaryError: if a layer does not exist, or a dictionary is missing, damaged, or another model's or layer's.
    """
    known: dict[int, Facts] = {}
    if not config.sae:
        return known
    d_model, n_layers = model_dimensions(config.model, storage)
    for entry in config.sae:
        check_layer(entry, n_layers, config.model.name)
    check_windows(config, context_length(config.model, storage))
    for entry in config.sae:
        facts = known_facts(config, storage, entry)
        if facts is None:
            continue
        check_facts(facts, entry, d_model, n_layers)
        if entry.train is None:
            known[entry.layer] = facts
    require_rows(load_tokenizer(config.model, storage), vocabulary_rows(config.model, storage), config)
    return known
