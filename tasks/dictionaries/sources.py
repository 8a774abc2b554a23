"""Dictionaries that others have made: from the SAELens registry, or saved on a disk or an object store.

Each is brought into a local folder as `cfg.json` and `sae_weights.safetensors`, checked there, and only
then kept. Nothing pickled is opened by this module.
"""

from __future__ import annotations

import difflib
import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import torch

from infra.addresses import storage_options, without_credentials
from infra.hashing import content_hash
from schemas.config import Sae
from schemas.errors import DictionaryError, whole_message
from tasks.dictionaries.facts import (
    DictionaryUnavailableError,
    Facts,
    check_facts,
    facts_of,
    refusal,
    source_of,
)

FILES = ("cfg.json", "sae_weights.safetensors")

_COMMON_ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
"""Known without SAELens, whose import takes seconds."""

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

    registered_model(entry)
    try:
        with quiet():
            sae: Any = SAE.from_pretrained(str(entry.release), str(entry.sae_id), device="cpu")
    except Exception as error:
        raise DictionaryUnavailableError(
            f"sae layer {entry.layer} ({source_of(entry)}) cannot be fetched: {whole_message(error, with_type=True)}",
            hint="check the network, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, or give {layer, path} of a copy",
        ) from error
    facts = facts_of(sae.cfg.to_dict())
    check_facts(facts, entry, d_model, n_layers)
    sae.save_model(folder)
    return facts


def registered_model(entry: Sae) -> str | None:
    """The model of a dictionary of the registry, as the installed SAELens has it, without network.

    Returns:
        None of a release with a slash that the registry does not know: a hub repository, which is left to SAELens.

    Raises:
        DictionaryError: if the registry does not have it, naming the nearest names.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = str(entry.release), str(entry.sae_id)
    directory: dict[str, Any] = get_pretrained_saes_directory()
    if release not in directory:
        if "/" in release:
            return None
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
    return str(directory[release].model)


def saved_content(entry: Sae, endpoint_url: str | None) -> dict[str, str]:
    """Content hashes of the two files of a saved SAE; asked again, they cost a stat each.

    Raises:
        DictionaryError: if a file is missing or cannot be read.
    """
    path = str(entry.path).rstrip("/")
    hashes: dict[str, str] = {}
    for name in FILES:
        try:
            with _refusing(entry, "cannot be read", but=(FileNotFoundError, NotADirectoryError)):
                hashes[name] = content_hash(f"{path}/{name}", endpoint_url)
        except (FileNotFoundError, NotADirectoryError) as error:
            place = without_credentials(path)
            raise refusal(entry, f"cannot be read: there is no {name} in {place}", _HOW_TO_SAVE) from error
    return hashes


def saved_facts(entry: Sae, endpoint_url: str | None) -> Facts:
    """What a saved SAE says of itself, and whether its files are whole, from a few kilobytes of them.

    Raises:
        DictionaryError: if a file is missing, damaged, or not what the other one says.
    """
    path = str(entry.path).rstrip("/")
    with _refusing(entry, "cannot be read"):
        filesystem, folder = fsspec.core.url_to_fs(path, **storage_options(path, endpoint_url))
        _require_files(entry, filesystem, folder)
        configuration = filesystem.cat_file(f"{folder}/{FILES[0]}")
        shapes = _shapes(filesystem, f"{folder}/{FILES[1]}")
    values = _configuration(entry, configuration)
    _check_architecture(entry, values.get("architecture", "standard"))
    with _refusing(entry, f"has a {FILES[0]} that does not say d_in and d_sae"):
        facts = facts_of(values)
    if shapes is None:
        raise refusal(entry, f"does not load; {FILES[1]} is damaged or half copied", _HOW_TO_SAVE)
    expected = [facts.d_in, facts.d_sae]
    if (found := shapes.get("W_enc", expected)) != expected:
        raise refusal(
            entry,
            f"does not load; the W_enc of {FILES[1]} has the shape {found}, where {FILES[0]} says {expected}",
            _HOW_TO_SAVE,
        )
    return facts


def _require_files(entry: Sae, filesystem: Any, folder: str) -> None:
    missing = [name for name in FILES if not filesystem.exists(f"{folder}/{name}")]
    if not missing:
        return
    place = without_credentials(str(entry.path))
    try:
        found = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(folder, detail=False))
    except OSError:
        raise refusal(entry, f"cannot be read: there is no folder {place}", _HOW_TO_SAVE) from None
    shown = f"; it has {', '.join(found[:5])}{' …' * (len(found) > 5)}" if found else ""
    raise refusal(
        entry, f"cannot be read: there is no {' and no '.join(missing)} in {place}{shown}", _HOW_TO_SAVE
    )


def _shapes(filesystem: Any, file: str) -> dict[str, list[int]] | None:
    """Shapes by name of a safetensors file, from its header; None where it is not whole."""
    size = int(filesystem.size(file))
    (length,) = struct.unpack("<Q", filesystem.cat_file(file, 0, 8).ljust(8, b"\xff"))
    if length > size - 8:
        return None
    try:
        header = json.loads(filesystem.cat_file(file, 8, 8 + length))
    except ValueError:
        return None
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    if 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0) != size:
        return None
    return {name: tensor["shape"] for name, tensor in tensors.items()}


def copy_saved(entry: Sae, endpoint_url: str | None, folder: Path, d_model: int, n_layers: int) -> Facts:
    """Copy a saved SAE byte for byte into `folder`, and load and check the copy.

    Raises:
        DictionaryError: if a file is missing or damaged, or the dictionary does not fit.
    """
    from sae_lens import SAE

    path = str(entry.path).rstrip("/")
    for name in FILES:
        address = f"{path}/{name}"
        with _refusing(entry, "cannot be copied"):
            filesystem, inside = fsspec.core.url_to_fs(address, **storage_options(address, endpoint_url))
            filesystem.get_file(inside, str(folder / name))
    _check_architecture(
        entry, _configuration(entry, (folder / FILES[0]).read_bytes()).get("architecture", "standard")
    )
    with quiet(), _refusing(entry, f"does not load; {FILES[1]} is damaged, or not what {FILES[0]} says"):
        sae: Any = SAE.load_from_disk(folder, device="cpu")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values()):
        raise refusal(
            entry, "has weights that are not finite numbers", "save it again from a sound checkpoint"
        )
    facts = facts_of(sae.cfg.to_dict())
    check_facts(facts, entry, d_model, n_layers)
    return facts


def _configuration(entry: Sae, content: bytes) -> dict[str, Any]:
    with _refusing(entry, f"has a {FILES[0]} that is no JSON object"):
        values = json.loads(content)
    if not isinstance(values, dict):
        raise refusal(entry, f"has a {FILES[0]} that is no JSON object", _HOW_TO_SAVE)
    return values


def _check_architecture(entry: Sae, architecture: Any) -> None:
    if architecture in _COMMON_ARCHITECTURES:
        return
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

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


@contextmanager
def _refusing(entry: Sae, reason: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Refuse the dictionary where the block fails, with what the library said; `but` and refusals come through."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (DictionaryError, *but)):
            raise
        raise refusal(entry, f"{reason}: {whole_message(error, with_type=True)}", _HOW_TO_SAVE) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without SAELens' warnings: what they are about is refused by `facts`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
