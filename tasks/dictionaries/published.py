"""The dictionaries of published tables: which one a layer's activations were encoded with."""

from __future__ import annotations

from infra.duck import Catalog
from infra.manifest import manifests_of
from infra.storage import Storage


def published_dictionaries(storage: Storage, catalog: Catalog) -> dict[int, str]:
    """Layer to the key of its dictionary, whose folder is `dictionaries/<key>`: as a feature shard of it says.

    The folder may be gone, as nothing reads it once features are there.
    """
    shards = {
        file.layer: file.name.rpartition("/")[0]
        for file in reversed(catalog.sharded.get("activations", []))
        if file.layer is not None
    }
    manifests = manifests_of(storage, shards.values())
    return {
        layer: str(manifests[folder].inputs["dictionary"])
        for layer, folder in sorted(shards.items())
        if folder in manifests and "dictionary" in manifests[folder].inputs
    }
