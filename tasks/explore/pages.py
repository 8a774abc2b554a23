"""The spine's pages of the explorer, in the order in which they stand in the menu, and what its forms do."""

from __future__ import annotations

from tasks.explore import cover, feature, features, labels, overview, pasted, search, text, tokens
from tasks.explore.labels import LABEL
from tasks.explore.vocabulary import Action, PageAt

PAGES: tuple[PageAt, ...] = (
    *overview.PAGES,
    *tokens.PAGES,
    *search.PAGES,
    *cover.PAGES,
    *features.PAGES,
    *feature.PAGES,
    *labels.PAGES,
    *text.PAGES,
    *pasted.PAGES,
)

ACTIONS: tuple[Action, ...] = (LABEL,)
