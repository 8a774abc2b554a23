"""Tokens in the explorer: ranking, search, degree beside others, features, contexts; against the frames they are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from explored import publish
from page_reading import built, cells, grid, of, rows
from small_run import D_SAE, M, SmallRun, small_run

from infra.catalog import read_catalog
from infra.duck import connect
from infra.storage import Storage
from tasks.explore import search, tokens
from tasks.explore.contexts import WIDTH, Place
from tasks.explore.examples import in_text
from tasks.explore.labels import add_feature_labels, connect_labelled, write_label
from tasks.explore.search import meant
from tasks.explore.vocabulary import Contexts, Controls, Facts, Figure, Missing, NotThere, Page

TEXTS = [
    " the",
    "the",
    "\n",
    "<script>alert(1)</script>",
    "<0xE2>",
    " The",
    "\\n",
    " other",
    "\u202eevil",
    "13",
    "",
    " ",
]
TOKEN = "/token/{token_id}"
LABELLED = 3


@pytest.fixture(scope="module")
def run() -> SmallRun:
    run = small_run(3)
    for table in ("tokens", "token_degree", "coverage"):
        run.tables[table]["token"] = [TEXTS[token] for token in run.tables[table].token_id]
    run.tables["run_info"] = pd.DataFrame([{"key": "graph_documents", "value": "5"}])
    return run


@pytest.fixture(scope="module")
def storage(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("tokens")))
    publish(storage, run)
    return storage


@pytest.fixture(scope="module")
def connection(storage: Storage) -> Iterator[Any]:
    for layer in D_SAE:
        write_label(storage, f"d{layer}", LABELLED, f"of layer {layer}", "")
    with closing(connect_labelled(storage)) as connection:
        yield connection


def page(connection: Any, token_id: int, **values: str) -> Page:
    return built(tokens.PAGES, TOKEN, connection, {"token_id": str(token_id)}, **values)


def occurrences(run: SmallRun) -> pd.DataFrame:
    """All occurrences, with their document's number in the corpus."""
    offsets = [shard.doc_offset for shard in run.shards.shards]
    moved = [
        frame.assign(doc_id=frame.doc + offset)
        for frame, offset in zip(run.occurrences, offsets, strict=True)
    ]
    return pd.concat(moved).sort_values(["doc_id", "position"])


def active(run: SmallRun, layer: int, place: Place) -> dict[int, float]:
    """Feature to activation of one place."""
    found = {}
    for (of_layer, part), frame in run.activations.items():
        if of_layer == layer:
            offset = run.shards.shards[part].doc_offset
            here = frame[(frame.doc + offset == place.doc_id) & (frame.position == place.position)]
            found |= dict(zip(here.feature_id, here.activation, strict=True))
    return found


def test_the_ranking_has_every_token_with_its_degrees_at_each_layer(run: SmallRun, connection: Any) -> None:
    found = rows(grid(built(tokens.PAGES, "/tokens", connection), "tokens").query, connection)
    assert len(found) == len(run.tables["tokens"])
    degrees = run.tables["token_degree"].set_index(["layer", "token_id"])
    for row in found:
        for layer in D_SAE:
            twin = degrees.loc[layer, row["token_id"]]
            assert row[f"degree_{layer}"] == twin.degree
            rarefied = row[f"rarefied_degree_{layer}"]
            assert (rarefied is None) == (row["count"] < M)
            assert rarefied is None or rarefied == twin.rarefied_degree
    by_rank = {row["rank"]: row for row in found}
    ranked = run.tables["tokens"].sort_values("rank")
    assert [by_rank[rank]["kind"] == "function" for rank in ranked["rank"]] == ranked.is_function.tolist()


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("␣the", " the"),
        (r"\n", "\n"),
        (r"a\u{200b}b", "a\u200bb"),
        (r"\u{d800}", r"\u{d800}"),
        (r"\u{ffffff}", r"\u{ffffff}"),
        ("◌\u0301", "\u0301"),
        ("<0xE2>", "<0xE2>"),
    ],
)
def test_what_is_typed_as_it_is_shown_is_read_so(typed: str, text: str) -> None:
    assert meant(typed) == text


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (" the", [(" the", 1), ("the", 2), (" The", 3), (" other", 6)]),
        ("␣the", [(" the", 1), ("the", 2), (" The", 3), (" other", 6)]),
        ("THE", [(" the", 3), ("the", 3), (" The", 3), (" other", 7)]),
        ("th", [(" the", 4), ("the", 4), (" The", 5), (" other", 6)]),
        (r"\n", [("\n", 1), ("\\n", 1)]),
        ("<0xe2>", [("<0xE2>", 3)]),
        ("<script", [("<script>alert(1)</script>", 4)]),
        (r"\u{202e}evil", [("\u202eevil", 1)]),
        # An id, and a text.
        ("9", [("13", 1)]),
        ("13", [("13", 1)]),
        ("' OR 1=1 --", []),
        ("%", []),
    ],
)
def test_a_token_is_found_by_its_text(
    run: SmallRun, connection: Any, typed: str, found: list[tuple[str, int]]
) -> None:
    there = set(run.tables["tokens"].token)
    shown = rows(grid(built(search.PAGES, "/search", connection, q=typed), "tokens").query, connection)
    assert sorted((row["token"], row["place"]) for row in shown) == sorted(
        pair for pair in found if pair[0] in there
    )
    assert [row["place"] for row in shown] == sorted(row["place"] for row in shown)


def test_a_number_may_be_a_feature(run: SmallRun, connection: Any) -> None:
    (facts,) = of(built(search.PAGES, "/search", connection, q="feature 3"), Facts)
    degrees = run.tables["feature_degree"].set_index(["layer", "feature_id"]).degree
    assert [(fact[1], fact[2]) for fact in facts.facts] == [
        (f"{degrees[layer, 3]} tokens open it", f"/feature/{layer}/3") for layer in D_SAE
    ]
    layer = max(D_SAE)
    for typed in (
        f"{layer}/3", f"L{layer} 3", f"{layer}:3", f"layer {layer}, feature 3",
        f"Feature 3 of layer {layer}", f"/feature/{layer}/3",
    ):  # fmt: skip
        (facts,) = of(built(search.PAGES, "/search", connection, q=typed), Facts)
        assert [fact[2] for fact in facts.facts] == [f"/feature/{layer}/3"]
    assert not of(built(search.PAGES, "/search", connection, q="feature 999"), Facts)
    assert not of(built(search.PAGES, "/search", connection, q="99/3"), Facts)
    assert not of(built(search.PAGES, "/search", connection), Facts)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_token_stands_among_those_of_its_frequency(run: SmallRun, connection: Any, rank: int) -> None:
    (token_id,) = run.tables["tokens"].query("rank == @rank").token_id
    found = rows(grid(page(connection, token_id), "layers").query, connection)
    assert [row["layer"] for row in found] == list(D_SAE)
    for row in found:
        of_layer = run.tables["token_degree"].query("layer == @row['layer']").set_index("token_id")
        own, others = of_layer.loc[token_id], of_layer.drop(token_id)
        alike = others[(others["count"] >= own["count"] / 1.5) & (others["count"] <= own["count"] * 1.5)]
        assert (row["degree"], row["alike"]) == (own.degree, len(alike))
        if len(alike):
            assert row["alike_median"] == np.median(alike.degree)
            below = (np.sign(own.degree - alike.degree) + 1) / 2
            assert row["percentile"] == pytest.approx(below.mean())
        else:
            assert row["percentile"] is None
        rarefied = others.rarefied_degree.dropna()
        expected = ((np.sign(own.rarefied_degree - rarefied) + 1) / 2).mean()
        assert row["rarefied_percentile"] == (
            None if np.isnan(own.rarefied_degree) else pytest.approx(expected)
        )


@pytest.mark.slow
def test_the_features_that_a_token_opens(run: SmallRun, connection: Any) -> None:
    for layer in D_SAE:
        found = rows(grid(page(connection, 1, layer=str(layer)), "features").query, connection)
        edges = run.tables["edges"].query("layer == @layer")
        own = edges[edges.token_id == 1].set_index("feature_id")
        assert {row["feature_id"] for row in found} == set(own.index)
        count = (occurrences(run).token_id == 1).sum()
        assert LABELLED in own.index
        for row in found:
            assert row["label"] == (f"of layer {layer}" if row["feature_id"] == LABELLED else None)
            edge, feature = own.loc[row["feature_id"]], edges[edges.feature_id == row["feature_id"]]
            assert (row["n"], row["degree"]) == (edge.n, len(feature))
            assert row["share"] == edge.n / count
            assert row["lift"] == pytest.approx(edge.n / count / (feature.n.sum() / run.shards.n_tokens))
            assert row["max_activation"] == edge.max_activation
            assert row["mean_activation"] == pytest.approx(edge.sum_activation / edge.n)


def test_the_chart_has_the_token_itself(run: SmallRun, connection: Any) -> None:
    (figure,) = of(page(connection, 1), Figure)
    spec = figure.chart.spec.to_dict()
    (points,) = spec["datasets"].values()
    (own,) = [point for point in points if point["kind"] == "this token"]
    assert (own["token_id"], own["count"]) == (1, (occurrences(run).token_id == 1).sum())
    for point in points:
        assert own["count"] / 10 <= point["count"] <= own["count"] * 10


@pytest.mark.slow
def test_contexts_are_the_text_around_occurrences(run: SmallRun, connection: Any) -> None:
    every = occurrences(run)
    texts = every.groupby("doc_id").token_id.apply(list).to_dict()
    for token_id in (0, 1):
        shown = of(page(connection, token_id), Contexts)[0].contexts
        own = every[every.token_id == token_id]
        assert len(shown) == min(12, len(own))
        for context in shown:
            document, position = map(int, context.about.split(":"))
            begins = max(0, position - WIDTH)
            expected = texts[document][begins : position + WIDTH + 1]
            assert [shade.to for shade in context.tokens] == [f"/token/{token}?layer=0" for token in expected]
            assert [shade.text for shade in context.tokens] == [in_text(TEXTS[token]) for token in expected]
            assert [place for place, shade in enumerate(context.tokens) if shade.mark] == [position - begins]
            assert context.to == f"/text/{document}?from={begins}&layer=0&at={position}"


@pytest.mark.slow
def test_samples_are_spread_and_reach_every_occurrence(
    run: SmallRun, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.explore.contexts.SHOWN", 5)
    own = occurrences(run).query("token_id == 0")
    everywhere = {(row.doc_id, row.position) for row in own.itertuples()}
    seen = set()
    for sample in range(12):
        shown = of(page(connection, 0, sample=str(sample)), Contexts)[0].contexts
        places = [tuple(map(int, one.about.split(":"))) for one in shown]
        assert len(set(places)) == 5
        seen |= set(places)
    assert seen == everywhere


@pytest.mark.slow
def test_two_contexts_differ_in_their_features(run: SmallRun, connection: Any) -> None:
    made = page(connection, 0, layer="1")
    choices = of(made, Controls)[-1].controls
    options = [value for value, _ in choices[0].options]  # type: ignore[union-attr]
    assert [choice.value for choice in choices] == options[:2]  # type: ignore[union-attr]
    for first, second in ((options[0], options[1]), (options[2], options[2]), (options[-1], options[0])):
        made = page(connection, 0, layer="1", first=first, second=second)
        a, b = (active(run, 1, Place(*map(int, name.split(":")))) for name in (first, second))
        found = {row["feature_id"]: row for row in rows(grid(made, "compared").query, connection)}
        assert set(found) == set(a) | set(b)
        for feature, row in found.items():
            assert row["label"] == ("of layer 1" if feature == LABELLED else None)
            assert (row["first"], row["second"]) == (a.get(feature), b.get(feature))
            assert row["difference"] == pytest.approx(a.get(feature, 0) - b.get(feature, 0))
            assert row["active_in"] == (
                "both" if feature in a and feature in b else "first alone" if feature in a else "second alone"
            )
        counted = {name: value for name, value, _ in of(made, Facts)[-1].facts}
        assert counted["features in both"] == str(len(set(a) & set(b)))
        assert counted["in the first alone"] == str(len(set(a) - set(b)))
        assert counted["in the second alone"] == str(len(set(b) - set(a)))


@pytest.mark.slow
def test_hostile_texts_are_shown_with_nothing_hidden(connection: Any) -> None:
    made = page(connection, 8)
    assert made.title == r"Token \u{202e}evil"
    for token_id in (2, 3):
        for context in of(page(connection, token_id), Contexts)[0].contexts:
            assert all(shade.text.isprintable() for shade in context.tokens)
    shown = [row[1] for row in cells(grid(built(tokens.PAGES, "/tokens", connection), "tokens"), connection)]
    assert "␣the" in shown
    assert all(text.isprintable() and " " not in text for text in shown)


def test_what_is_not_there_is_said(storage: Storage, connection: Any, tmp_path: Path) -> None:
    for wrong in ("999999", "x"):
        with pytest.raises(NotThere):
            built(tokens.PAGES, TOKEN, connection, {"token_id": wrong})
    # Tokens were counted, and nothing else.
    catalog = read_catalog(storage)
    kept = {"tokens": catalog.tables["tokens"], "run_info": catalog.tables["run_info"]}
    with closing(connect(storage)) as reader:
        for view in ("occurrences", "activations", *(set(catalog.tables) - set(kept))):
            reader.execute(f"DROP VIEW {view}")
        made = built(tokens.PAGES, TOKEN, reader, {"token_id": "1"})
        said = [panel.what + panel.way for panel in of(made, Missing)]
        assert any("[[sae]]" in text for text in said)
        assert any("keep_occurrences" in text for text in said)
        listed = grid(built(tokens.PAGES, "/tokens", reader), "tokens")
        assert "degree_0" not in rows(listed.query, reader)[0]


@pytest.mark.slow
def test_a_token_outside_the_graph_says_so(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    smaller = small_run(3)
    smaller.tables["token_degree"] = smaller.tables["token_degree"].query("token_id != 2")
    smaller.tables["token_degree"].loc[lambda rows: rows.token_id == 0, "count"] = 1
    smaller.tables["run_info"] = pd.DataFrame([{"key": "graph_documents", "value": "1"}])
    publish(storage, smaller)
    with closing(connect(storage)) as connection:
        add_feature_labels(connection, storage, read_catalog(storage))
        said = [panel.what for panel in of(page(connection, 2), Missing)]
        assert any("in none of the documents whose features were read" in text for text in said)
        # Only the first document is in the graph.
        first = of(page(connection, 0), Contexts)[0]
        assert {context.about.split(":")[0] for context in first.contexts} == {"0"}
        (count,) = smaller.tables["tokens"].query("token_id == 0")["count"]
        note = grid(page(connection, 0), "features").note
        assert note.startswith(
            f"In its 1 occurrence in the documents whose features were read ({count:,} in the whole"
        )
