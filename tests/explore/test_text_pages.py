"""Documents and their windows, token by token, against plain Python; and pasted text against what a run gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from explored import activations, again, asked, occurrences, publish, publish_losses
from plain import run_plain
from small_run import D_SAE, SmallRun, small_run
from test_feature_pages import HOSTILE, every, grid
from tiny import save_model, save_sae, texts, write_jsonl

from infra.catalog import read_catalog, write_catalog
from infra.config_file import load_config
from infra.storage import Storage
from schemas.errors import ConfigError
from tasks.explore import text as text_pages
from tasks.explore.encoding import MOST_TOKENS, Encode
from tasks.explore.pasted import pasted
from tasks.explore.text import text
from tasks.explore.text import texts as documents
from tasks.explore.vocabulary import Asked, Contexts, Controls, Grid, Missing, NotThere, Refused


@pytest.fixture(scope="module")
def run() -> SmallRun:
    run = small_run()
    run.tables["tokens"].loc[lambda rows: rows.token_id == 1, "token"] = HOSTILE
    return run


@pytest.fixture(scope="module")
def page(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    publish(storage, run)
    return asked(storage)


def test_documents_are_listed_with_their_beginnings(page: Asked, run: SmallRun) -> None:
    rows = page.rows(grid(documents(page), "documents").query)
    told = run.tables["tokens"].set_index("token_id").token
    of = {
        doc: own.sort_values("position").token_id.map(told) for doc, own in occurrences(run).groupby("doc_id")
    }
    lengths = [length for frame in run.documents for length in frame.n_tokens]
    assert [row["n_tokens"] for row in rows] == lengths
    for row in rows:
        expected = "".join(of[row["doc_id"]][: text_pages.BEGINS]) if row["doc_id"] in of else None
        assert row["begins"] == expected


@pytest.mark.parametrize("layer", ["0", "1", "all"])
@pytest.mark.parametrize("by", ["strongest", "active"])
@pytest.mark.parametrize("doc_id", [0, 2, 3])
def test_a_window_is_shaded_as_its_activations(
    page: Asked, run: SmallRun, layer: str, by: str, doc_id: int
) -> None:
    (shown,) = every(text(again(page, {"doc_id": doc_id}, layer=layer, by=by)), Contexts)
    layers = [0, 1] if layer == "all" else [int(layer)]
    assert [context.about for context in shown.contexts] == [f"layer {n}" for n in layers]
    tokens = occurrences(run)[lambda rows: rows.doc_id == doc_id].sort_values("position")
    for n, context in zip(layers, shown.contexts, strict=True):
        own = activations(run)[lambda rows, n=n: (rows.layer == n) & (rows.doc_id == doc_id)]
        of = own.groupby("position").activation
        values = of.max() if by == "strongest" else of.size()
        assert len(context.tokens) == len(tokens)
        for shade, row in zip(context.tokens, tokens.itertuples(), strict=True):
            assert shade.strength == pytest.approx(values.get(row.position, 0) / values.max())
            here = own[own.position == row.position].sort_values(
                ["activation", "feature_id"], ascending=[False, True]
            )
            strongest = [f"{one.feature_id}: {one.activation:.3g}" for one in here.head(5).itertuples()]
            expected = f"{len(here)} active; {', '.join(strongest)}" if len(here) else ""
            assert shade.value.partition(" · ")[2] == expected
            assert shade.to == f"/text/{doc_id}?layer={layer}&by={by}&at={row.position}"


def test_one_feature_shades_a_window(page: Asked, run: SmallRun) -> None:
    (shown,) = every(text(again(page, {"doc_id": 3}, layer="1", feature="3")), Contexts)
    own = activations(run)[lambda rows: (rows.layer == 1) & (rows.doc_id == 3) & (rows.feature_id == 3)]
    values = own.set_index("position").activation
    strengths = [shade.strength for shade in shown.contexts[0].tokens]
    assert strengths == pytest.approx([values.get(n, 0) / values.max() for n in range(len(strengths))])


@pytest.mark.parametrize("layer", ["1", "all"])
def test_a_token_lists_its_features(page: Asked, run: SmallRun, layer: str) -> None:
    shown = text(again(page, {"doc_id": 3}, layer=layer, at="4"))
    assert [shade.mark for shade in every(shown, Contexts)[0].contexts[0].tokens].index(True) == 4
    own = activations(run)[lambda rows: (rows.doc_id == 3) & (rows.position == 4)]
    own = own if layer == "all" else own[own.layer == 1]
    expected = set(zip(own.layer, own.feature_id, own.activation, strict=True))
    rows = page.rows(grid(shown, "at").query)
    assert {(row["layer"], row["feature_id"], row["activation"]) for row in rows} == expected


def test_windows_and_documents_lead_to_one_another(page: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_pages, "WINDOW", 4)
    seen: list[str] = []
    start = "0"
    while True:
        shown = text(again(page, {"doc_id": 3}, layer="1", **{"from": start}))
        seen += [shade.text for shade in every(shown, Contexts)[0].contexts[0].tokens]
        after = dict(shown.beside).get("tokens after")
        if after is None:
            break
        start = after.partition("from=")[2].partition("&")[0]
    monkeypatch.undo()
    whole = every(text(again(page, {"doc_id": 3}, layer="1")), Contexts)[0].contexts[0].tokens
    assert seen == [shade.text for shade in whole]
    assert dict(shown.beside)["tokens before"] == "/text/3?from=4&layer=1"
    assert dict(shown.beside)["document before"] == "/text/2?layer=1"
    assert "next document" in dict(text(again(page, {"doc_id": 3})).beside)
    assert "next document" not in dict(text(again(page, {"doc_id": 4})).beside)


@pytest.mark.slow
def test_losses_are_shown_where_they_were_measured(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    catalog = publish(storage, run, loss_buckets=pd.DataFrame({"model": ["m", "m"], "step": [1, 20]}))
    places = occurrences(run)[lambda rows: rows.position > 0]
    losses = np.random.default_rng(0).random(len(places))
    catalog = publish_losses(storage, catalog, run, losses)
    page = asked(storage)
    own = dict(zip(zip(places.doc_id, places.position, strict=True), losses, strict=True))
    (shown,) = every(text(again(page, {"doc_id": 3}, by="loss")), Contexts)
    here = {position: loss for (doc, position), loss in own.items() if doc == 3}
    (context,) = shown.contexts
    assert context.about == "loss of m at step 20"
    assert {shade.kind for shade in context.tokens} == {"loss"}
    for position, shade in enumerate(context.tokens):
        assert shade.strength == pytest.approx(here.get(position, 0) / max(here.values()))
    (stacked,) = every(text(again(page, {"doc_id": 3}, layer="all")), Contexts)
    assert [one.about for one in stacked.contexts] == ["layer 0", "layer 1", "loss of m at step 20"]
    (earlier,) = every(text(again(page, {"doc_id": 3}, by="loss", of="m at step 1")), Contexts)
    assert earlier.contexts[0].about == "loss of m at step 1"
    choices = [
        choice
        for form in every(text(again(page, {"doc_id": 3}, by="loss")), Controls)
        for choice in form.controls
    ]
    assert next(one for one in choices if one.key == "of").value == "m at step 20"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer": "1", "feature": "99999"}, "layer 1 has no feature 99999"),
        ({"layer": "1", "feature": "x"}, "feature cannot be x"),
        ({"at": "400"}, "at cannot be 400"),
        ({"from": "-1"}, "from cannot be -1"),
        ({"by": "loudness"}, "no by loudness"),
        ({"layer": "some"}, "no layer some"),
    ],
)
def test_what_a_text_cannot_be_asked_is_said(page: Asked, values: dict[str, str], said: str) -> None:
    with pytest.raises((NotThere, Refused), match=said) as told:
        text(again(page, {"doc_id": 3}, **values))
    assert told.value.hint


def test_a_feature_that_is_not_in_a_text_leads_to_its_own_page(page: Asked, run: SmallRun) -> None:
    own = activations(run)[lambda rows: rows.layer == 1]
    for feature_id in range(D_SAE[1]):
        shown = text(again(page, {"doc_id": 3}, layer="1", feature=str(feature_id)))
        is_here = ((own.doc_id == 3) & (own.feature_id == feature_id)).any()
        told = [one for one in every(shown, Missing) if f"/feature/1/{feature_id}" in one.way]
        assert bool(told) is not is_here


@pytest.mark.slow
def test_what_is_not_there_is_said(page: Asked, run: SmallRun, tmp_path: Path) -> None:
    for doc_id in (5, -1, 10**12):
        with pytest.raises(NotThere, match="no document"):
            text(again(page, {"doc_id": doc_id}))
    with pytest.raises(NotThere, match="larger than any"):
        text(again(page, {"doc_id": 10**20}))
    assert not every(text(again(page, {"doc_id": 1})), Missing)
    (told,) = every(pasted(page), Missing)
    assert "--model" in told.way
    storage = Storage(str(tmp_path))
    kept = publish(storage, run)
    without = {name: files for name, files in kept.sharded.items() if name != "occurrences"}
    write_catalog(storage, replace(kept, sharded=without))
    assert "keep_occurrences" in every(text(asked(storage, {"doc_id": 0})), Missing)[0].way
    assert every(documents(asked(storage)), Grid)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    folder = tmp_path_factory.mktemp("real")
    save_model(folder / "model")
    for layer in (0, 2):
        save_sae(folder / f"sae-{layer}", seed=layer)
    write_jsonl(folder / "corpus.jsonl", texts(6))
    config = load_config(
        {
            "corpus": {"urls": [str(folder / "corpus.jsonl")]},
            "model": {"name": str(folder / "model")},
            "windows": {"context_size": 32},
            "sae": [{"layer": layer, "path": str(folder / f"sae-{layer}")} for layer in (0, 2)],
            "storage": {"root": str(folder / "root")},
        }
    )
    return run_plain(config, checked=False)


@pytest.mark.slow
def test_pasted_text_is_as_the_run_encodes_it(real: Storage) -> None:
    encode, catalog = Encode(real), read_catalog(real)
    page = asked(real, encode=encode)
    for doc_id, document in enumerate(texts(6)):
        found = encode(catalog, document, [0, 2])
        rows = page.connection.execute(
            "SELECT layer, position, feature_id, activation FROM activations WHERE doc_id = ?", [doc_id]
        ).fetchall()
        stored = {(layer, position, feature): value for layer, position, feature, value in rows}
        live = {
            (layer, place, feature): value
            for layer, of in found.active.items()
            for place, feature, value in of
        }
        # Another batch may flip what sits at the threshold.
        assert len(stored.keys() ^ live.keys()) <= 1e-3 * len(stored)
        both = stored.keys() & live.keys()
        assert [live[key] for key in both] == pytest.approx([stored[key] for key in both], rel=1e-3)
        ids = page.connection.execute(
            "SELECT token_id FROM occurrences WHERE doc_id = ? ORDER BY position", [doc_id]
        ).fetchall()
        assert [token for token, _ in found.tokens] == [token for (token,) in ids]


@pytest.mark.slow
def test_pasted_text_is_shown_and_listed(real: Storage) -> None:
    encode, catalog = Encode(real), read_catalog(real)
    page = asked(
        real, values={"text": "the river <script> of Tokyo", "layer": "all", "at": "1"}, encode=encode
    )
    shown = pasted(page)
    (contexts,) = every(shown, Contexts)
    assert [context.about for context in contexts.contexts] == ["layer 0", "layer 2"]
    assert (
        "".join(shade.text for shade in contexts.contexts[0].tokens).replace("␣", " ") == page.values["text"]
    )
    found = encode(catalog, "the river <script> of Tokyo", [0, 2])
    expected = {
        (layer, feature): value
        for layer, of in found.active.items()
        for place, feature, value in of
        if place == 1
    }
    rows = page.rows(grid(shown, "active").query)
    assert {(row["layer"], row["feature_id"]): row["activation"] for row in rows} == pytest.approx(expected)
    assert {row["token"] for row in rows} == {contexts.contexts[0].tokens[1].text}
    special = encode(catalog, "the <eos> river", [0])
    assert "<eos>" not in [token for _, token in special.tokens]
    assert {place for place, _, _ in special.active[0]} <= set(range(len(special.tokens)))
    assert encode(catalog, "", [0]).active == {0: []}
    assert encode(catalog, "the " * (MOST_TOKENS + 9), []).is_cut


@pytest.mark.slow
def test_a_model_that_is_gone_or_another_is_said(real: Storage, tmp_path: Path) -> None:
    catalog = read_catalog(real)
    with pytest.raises(ConfigError, match="does not load"):
        Encode(real, name=str(tmp_path / "gone"))(catalog, "text", [0])
    other = save_model(tmp_path / "other", seed=5)
    with pytest.raises(Exception, match="is not here what it was"):
        Encode(real, name=str(other))(catalog, "text", [0])
