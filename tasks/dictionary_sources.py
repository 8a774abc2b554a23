"""Dictionaries that others have made: from the SAELens registry, or saved on a disk or an object store.

Each is brought into a local folder as `cfg.json` and `sae_weights.safetensors`, checked there, and only
then kept. Nothing pickled is opened by this module.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from infra.addresses import storage_options, without_credentials
from infra.hashing import content_hash
from schemas.config import Sae
from tasks.dictionary_checks import (
    DictionaryUnavailableError,
    Facts,
    check_facts,
    facts_of,
    refusal,
    source_of,
)

FILES = ("cfg.json", "sae_weights.safetensors")

_HOW_TO_SAVE = (
    "give a folder (any fsspec URL) with cfg.json and sae_weights.safetensors, as SAELens' save_model writes"
)


def fetch_registered(entry: Sae, folder: Path, d_model: int, n_layers: int) -> Facts:
    """Have SAELens download and convert a dictionary of its registry, check it, and save it in `folder`.

    Raises:
        DictionaryError: if the registry does not have it, or it does not fit.
        DictionaryUnavailableError: if it cannot be downloaded now.
    """
    from sae_lens import SAE

    release, sae_id = str(entry.release), str(entry.sae_id)
    _check_registered(entry, release, sae_id)
    try:
        with quiet():
            sae: Any = SAE.from_pretrained(release, sae_id, device="cpu")
    except Exception as error:
        raise DictionaryUnavailableError(
            f"sae layer {entry.layer} ({source_of(entry)}) cannot be fetched: {first_line(error)}",
            hint="check the network, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, or give {layer, path} of a copy",
        ) from error
    facts = facts_of(sae.cfg.to_dict())
    check_facts(facts, entry, d_model, n_layers)
    sae.save_model(folder)
    return facts


def _check_registered(entry: Sae, release: str, sae_id: str) -> None:
    """Refuse ids that the registry does not have before any network is asked.

    A release with a slash that the registry does not know is a hub repository, and is left to SAELens.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory: dict[str, Any] = get_pretrained_saes_directory()
    if release not in directory:
        if "/" in release:
            return
        close = difflib.get_close_matches(release, directory, n=3, cutoff=0.5)
        raise refusal(
            entry,
            f"is unknown: SAELens {version('sae-lens')} has no release {release}",
            f"did you mean {', '.join(close)}?" if close else "SAELens' documentation lists its releases",
        )
    ids = list(directory[release].saes_map)
    if sae_id not in ids:
        close = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3]
        raise refusal(
            entry,
            f"is unknown: release {release} has {len(ids)} SAEs, but no {sae_id}",
            f"did you mean {', '.join(close)}?",
        )


def saved_content(entry: Sae, endpoint_url: str | None) -> dict[str, str]:
    """Content hashes of the two files of a saved SAE; asked again, they cost a stat each.

    Raises:
        DictionaryError: if a file is missing or cannot be read.
    """
    path = str(entry.path).rstrip("/")
    hashes: dict[str, str] = {}
    for name in FILES:
        try:
            hashes[name] = content_hash(f"{path}/{name}", endpoint_url)
        except (FileNotFoundError, NotADirectoryError) as error:
            place = without_credentials(path)
            raise refusal(entry, f"cannot be read: there is no {name} in {place}", _HOW_TO_SAVE) from error
        except Exception as error:
            raise refusal(entry, f"cannot be read: {first_line(error)}", _HOW_TO_SAVE) from error
    return hashes


def copy_saved(entry: Sae, endpoint_url: str | None, folder: Path, d_model: int, n_layers: int) -> Facts:
    """Copy a saved SAE byte for byte into `folder`, and load and check the copy.

    Raises:
        DictionaryError: if a file is missing or damaged, or the dictionary does not fit.
    """
    import fsspec
    from sae_lens import SAE

    path = str(entry.path).rstrip("/")
    for name in FILES:
        address = f"{path}/{name}"
        try:
            filesystem, inside = fsspec.core.url_to_fs(address, **storage_options(address, endpoint_url))
            filesystem.get_file(inside, str(folder / name))
        except Exception as error:
            raise refusal(entry, f"cannot be copied: {first_line(error)}", _HOW_TO_SAVE) from error
    _check_configuration(entry, folder / FILES[0])
    try:
        with quiet():
            sae: Any = SAE.load_from_disk(folder, device="cpu")
    except Exception as error:
        raise refusal(
            entry,
            f"does not load; {FILES[1]} is damaged, or not what {FILES[0]} says: {first_line(error)}",
            _HOW_TO_SAVE,
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values()):
        raise refusal(
            entry, "has weights that are not finite numbers", "save it again from a sound checkpoint"
        )
    facts = facts_of(sae.cfg.to_dict())
    check_facts(facts, entry, d_model, n_layers)
    return facts


def _check_configuration(entry: Sae, file: Path) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    try:
        architecture = json.loads(file.read_bytes()).get("architecture", "standard")
    except (ValueError, AttributeError) as error:
        raise refusal(
            entry, f"has a {file.name} that is no JSON object: {first_line(error)}", _HOW_TO_SAVE
        ) from error
    if architecture in SAE_CLASS_REGISTRY:
        return
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        raise refusal(
            entry,
            f"is saved in its training form ({architecture})",
            "save it with SAELens' save_inference_model",
        )
    raise refusal(
        entry,
        f"has the architecture {architecture}, which SAELens {version('sae-lens')} does not know",
        f"known: {', '.join(sorted(SAE_CLASS_REGISTRY))}",
    )


def first_line(error: BaseException) -> str:
    """An error of a library in one line, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Without SAELens' warnings: what they are about is refused by `dictionary_checks`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
