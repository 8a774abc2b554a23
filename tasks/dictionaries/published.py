"""The dictionaries of published tables: which one encoded a layer, and what it says by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from infra import verified
from infra.catalog import Catalog, Shards
from infra.manifest import manifests_of
from infra.storage import Storage
from schemas.errors import DictionaryError, StorageError

WEIGHTS = "sae_weights.safetensors"


def published_dictionaries(storage: Storage, catalog: Catalog) -> dict[int, str]:
    """Layer to the key of its dictionary, whose folder is `dictionaries/<key>`: as a feature shard of it says.

    The folder may be gone, as nothing reads it once features are there.
    """
    shards = {
        layer: name.rpartition("/")[0]
        for layer, name in Shards.of(catalog.sharded.get("activations", [])).first_of_layers().items()
    }
    manifests = manifests_of(storage, shards.values())
    return {
        layer: str(manifests[folder].inputs["dictionary"])
        for layer, folder in sorted(shards.items())
        if folder in manifests and "dictionary" in manifests[folder].inputs
    }


def cosines(storage: Storage, dictionary: str, feature_id: int) -> npt.NDArray[np.float32]:
    """The cosine of a feature's decoder direction with every feature's, its own too.

    The decoder is read in blocks, straight from its file, and nothing is kept but the answer.

    Args:
        storage: The run's.
        dictionary: Key of the dictionary; a folder that lies elsewhere is fetched whole, once a machine.
        feature_id: The feature.

    Returns:
        (d_sae,); 0 where a direction has no length.

    Raises:
        StorageError: if the dictionary's files are not there.
        DamagedError: if they are not what was written.
        DictionaryError: if it keeps no decoder, or has no such feature.
    """
    return _cosines(storage, dictionary, feature_id)


@lru_cache(maxsize=64)
def _cosines(storage: Storage, dictionary: str, feature_id: int) -> npt.NDArray[np.float32]:
    path = verified.local_folder(storage, f"dictionaries/{dictionary}") / WEIGHTS
    if not path.is_file():
        raise StorageError(f"{path} is not there", hint="run again: it will be made anew")
    with _decoder(path) as (shape, rows):
        n_features, width = shape
        if not 0 <= feature_id < n_features:
            raise DictionaryError(f"the dictionary has {n_features} features, and no {feature_id}")
        own = rows(feature_id, feature_id + 1)[0]
        found = np.zeros(n_features, np.float32)
        step = max(1, _BLOCK // (4 * width))
        for first in range(0, n_features, step):
            last = min(n_features, first + step)
            block = rows(first, last)
            lengths = np.sqrt(np.einsum("ij,ij->i", block, block)) * np.linalg.norm(own)
            np.divide(block @ own, lengths, out=found[first:last], where=lengths > 0)
    return found


@contextmanager
def _decoder(path: Path) -> Iterator[tuple[tuple[int, int], Callable[[int, int], npt.NDArray[np.float32]]]]:
    """The shape of a decoder, (d_sae, d_model), and its rows from one to before another, in float32."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        kind = file.get_slice("W_dec").get_dtype() if "W_dec" in file.keys() else None  # noqa: SIM118
    if kind is None:
        raise DictionaryError("the dictionary keeps no decoder: there is no W_dec in its file")
    # NumPy has no bfloat16; torch, which takes seconds to import, has.
    with safe_open(path, framework="pt" if kind == "BF16" else "numpy") as file:
        decoder = file.get_slice("W_dec")

        def rows(first: int, last: int) -> npt.NDArray[np.float32]:
            block = decoder[first:last]
            return np.asarray(block.float() if kind == "BF16" else block, dtype=np.float32)

        yield tuple(decoder.get_shape()), rows


def neuronpedia_address(source: str, feature_id: int) -> str | None:
    """Where Neuronpedia shows a feature of a registered dictionary, as the installed SAELens has it.

    The registry is read as text, a release's entry alone: SAELens takes seconds to import, its whole registry most of
    one.

    Args:
        source: `<release> / <sae_id>`, as the table `dictionaries` has it.
        feature_id: The feature.

    Returns:
        None of a dictionary that is not registered, or not on Neuronpedia.
    """
    release, separator, sae_id = source.partition(" / ")
    found = _on_neuronpedia(release).get(sae_id) if separator else None
    return f"https://www.neuronpedia.org/{found}/{feature_id}" if found else None


@cache
def _on_neuronpedia(release: str) -> dict[str, str]:
    spec = find_spec("sae_lens")
    for place in (spec and spec.submodule_search_locations) or ():
        registry = Path(place) / "pretrained_saes.yaml"
        if not registry.is_file():
            continue
        entry = re.search(
            rf"^{re.escape(release)}:.*?(?=^\S|\Z)",
            registry.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
        if entry is not None:
            saes = yaml.safe_load(entry[0])[release]["saes"]
            return {str(sae["id"]): str(sae["neuronpedia"]) for sae in saes if sae.get("neuronpedia")}
    return {}


_BLOCK = 64 << 20
"""Bytes of a decoder at once."""
