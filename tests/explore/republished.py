"""A root under which one run after another is published, each in folders of its own, as runs do it."""

from __future__ import annotations

from dataclasses import replace

from small_run import small_run

from infra.catalog import write_catalog
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
        catalog = small_run(self._published).write(place)
        moved = replace(
            catalog,
            tables={table: f"{folder}/{name}" for table, name in catalog.tables.items()},
            sharded={
                table: [replace(file, name=f"{folder}/{file.name}") for file in files]
                for table, files in catalog.sharded.items()
            },
        )
        write_catalog(self.storage, moved)
