"""A root under which one run after another is published, each in folders of its own, as runs do it."""

from __future__ import annotations

from small_run import small_run

from infra.duck import CATALOG
from infra.storage import Storage


class Roots:
    """A root with a small run published.

    Args:
        storage: The root.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._published = 0
        self.publish_next()

    def publish_next(self) -> None:
        """Publish another small run; the folders of those before stay."""
        folder = f"run{self._published}"
        self._published += 1
        place = Storage(self.storage.url(folder), self.storage.endpoint_url)
        catalog = small_run(self._published).write(place).to_json()
        catalog["tables"] = {table: f"{folder}/{name}" for table, name in catalog["tables"].items()}
        for columns in catalog["sharded"].values():
            columns["name"] = [f"{folder}/{name}" for name in columns["name"]]
        self.storage.write_json(CATALOG, catalog)
