"""The spine's pages of the explorer, in the order in which they stand in the menu."""

from __future__ import annotations

from tasks.explore.vocabulary import PageAt

PAGES: tuple[PageAt, ...] = ()
