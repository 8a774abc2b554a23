"""The pages of features: every number against plain Python, hostile text, and empty states that teach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pandas as pd
import pytest
import torch
from explored import activations, again, asked, feature_tables, occurrences, publish
from safetensors.torch import save_file
from small_run import D_SAE, SmallRun, small_run

from infra.catalog import write_catalog
from infra.storage import Storage
from tasks.dictionaries.published import neuronpedia_address
from tasks.explore.examples import AFTER, BEFORE
from tasks.explore.feature import SAMPLED, feature
from tasks.explore.features import features
from tasks.explore.labels import write_label
from tasks.explore.vocabulary import (
    Asked,
    Columns,
    Contexts,
    Controls,
    Facts,
    Figure,
    Grid,
    Link,
    Missing,
    Note,
    NotThere,
    Page,
    Panel,
)

HOSTILE = "<script>alert(1)</script>\u202e"
P = TypeVar("P", bound=Any)


@pytest.fixture(scope="module")
def run() -> SmallRun:
    run = small_run()
    run.tables["tokens"].loc[lambda rows: rows.token_id == 1, "token"] = HOSTILE
    run.tables["token_degree"].loc[lambda rows: rows.token_id == 1, "token"] = HOSTILE
    return run


@pytest.fixture(scope="module")
def page(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    storage = Storage(str(tmp_path_factory.mktemp("root")))
    publish(storage, run)
    return asked(storage)


def every(page: Page, kind: type[P]) -> list[P]:
    """The panels of a kind, those side by side too."""

    def within(panels: Any) -> list[Panel]:
        return [
            one
            for panel in panels
            for one in (within(panel.panels) if isinstance(panel, Columns) else [panel])
        ]

    return [panel for panel in within(page.panels) if isinstance(panel, kind)]


def grid(page: Page, key: str) -> Grid:
    (found,) = [grid for grid in every(page, Grid) if grid.key == key]
    return found


def links(asked: Asked, grid: Grid) -> set[str]:
    columns = [column for column in grid.columns if isinstance(column, Link)]
    return {to for row in asked.rows(grid.query) for column in columns if (to := column.to(row))}


def of_feature(run: SmallRun, layer: int, feature_id: int) -> pd.DataFrame:
    rows = activations(run)
    return rows[(rows.layer == layer) & (rows.feature_id == feature_id)]


@pytest.mark.parametrize("layer", D_SAE)
def test_features_are_as_in_the_activations(page: Asked, run: SmallRun, layer: int) -> None:
    shown = grid(features(again(page, {}, layer=str(layer))), "features")
    rows = {row["feature_id"]: row for row in page.rows(shown.query)}
    own = activations(run)
    own = own[own.layer == layer]
    assert set(rows) == set(own.feature_id)
    for feature_id, of in own.groupby("feature_id"):
        row, counts = rows[feature_id], of.token_id.value_counts()
        first = min(counts[counts == counts.max()].index)
        share = counts / len(of)
        assert (row["n"], row["degree"], row["token_id"]) == (len(of), len(counts), first)
        assert row["density"] == pytest.approx(len(of) / run.shards.n_tokens)
        assert row["top_share"] == pytest.approx(counts.max() / len(of))
        assert row["token_entropy"] == pytest.approx(-(share * np.log2(share)).sum())
        assert row["max_activation"] == of.activation.max()
        assert row["is_between"] is None
    assert f"{D_SAE[layer] - len(rows)} more are active nowhere" in shown.caption
    assert f"/feature/{layer}/{own.feature_id.iloc[0]}" in links(page, shown)


def test_features_are_drawn_by_what_opens_them(page: Asked) -> None:
    shown = features(again(page, {}, layer="0"))
    (figure,) = every(shown, Figure)
    kinds = {row["feature_id"]: row["kind"] for row in page.rows(figure.query)}
    for row in page.rows(grid(shown, "features").query):
        assert kinds[row["feature_id"]] == (
            "mostly one token" if row["top_share"] >= 0.5 else "several tokens"
        )
    assert figure.chart.spec.to_dict()["layer"]
    listed = page.rows(grid(shown, "features").query)
    (facts,) = every(shown, Facts)
    for _, said, to in facts.facts:
        column, least = parse_qsl(urlsplit(to).query)[1]
        n = sum(row[column.removeprefix("features.")] >= float(least.removeprefix(">= ")) for row in listed)
        assert said == f"{n}, {100 * n / len(listed):.0f} %"


@pytest.mark.slow
def test_learned_features_are_told_where_the_run_has_bounds(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    bounds = pd.DataFrame({"model": ["m"], "step": [1], "min_density": [0.3], "max_density": [0.35]})
    publish(storage, run, learned_features=bounds)
    page = asked(storage)
    shown = grid(features(page), "features")
    rows = page.rows(shown.query)
    assert {row["is_between"] for row in rows} == {True, False}
    assert all(row["is_between"] == (0.3 <= row["density"] <= 0.35) for row in rows)
    one = rows[0]
    facts = dict(
        (name, value)
        for panel in every(feature(again(page, {"layer": 0, "feature_id": one["feature_id"]})), Facts)
        for name, value, _ in panel.facts
    )
    assert facts["learned"].startswith("yes" if one["is_between"] else "no")


@pytest.mark.parametrize("feature_id", range(D_SAE[1]))
def test_a_feature_is_as_in_the_activations(page: Asked, run: SmallRun, feature_id: int) -> None:
    own = of_feature(run, 1, feature_id)
    shown = feature(again(page, {"layer": 1, "feature_id": feature_id}))
    facts = {name: value for panel in every(shown, Facts) for name, value, _ in panel.facts}
    assert facts["largest"] == f"{own.activation.max():.4g}"
    assert facts["mean where active"] == f"{own.activation.mean():.4g}"
    assert facts["activations"].startswith(f"{len(own)}, at ")
    opened = {row["token_id"]: row for row in page.rows(grid(shown, "tokens").query)}
    counts = run.tables["tokens"].set_index("token_id")["count"]
    assert set(opened) == set(own.token_id)
    for token, of in own.groupby("token_id"):
        row = opened[token]
        assert row["n"] == len(of)
        assert row["of_feature"] == pytest.approx(len(of) / len(own))
        assert row["share"] == pytest.approx(len(of) / counts[token])
        assert row["lift"] == pytest.approx(len(of) / len(own) / (counts[token] / run.shards.n_tokens))
        assert (row["max_activation"], row["mean_activation"]) == (of.activation.max(), of.activation.mean())
    share = {token: len(of) / counts[token] for token, of in own.groupby("token_id") if len(of) > 1}
    if share:
        surest = facts["opened most surely by"]
        assert surest.endswith(f"(at {100 * max(share.values()):.1f} % of its occurrences)")
    (histogram,) = every(shown, Figure)
    assert sum(row["n"] for row in page.rows(histogram.query)) == len(own)


@pytest.mark.slow
def test_contexts_are_the_text_around_shaded_by_the_feature(page: Asked, run: SmallRun) -> None:
    feature_id = 3
    own = of_feature(run, 1, feature_id).set_index(["doc_id", "position"]).activation
    texts = {doc: of.sort_values("position") for doc, of in occurrences(run).groupby("doc_id")}
    tokens = run.tables["tokens"].set_index("token_id").token
    top, sample = every(feature(again(page, {"layer": 1, "feature_id": feature_id})), Contexts)
    strongest = own.reset_index().sort_values(
        ["activation", "doc_id", "position"], ascending=[False, True, True]
    )
    for context, place in zip(top.contexts, strongest.itertuples(), strict=False):
        text = texts[place.doc_id]
        near = text[text.position.between(place.position - BEFORE, place.position + AFTER)]
        assert len(context.tokens) == len(near)
        assert [shade.mark for shade in context.tokens] == (near.position == place.position).tolist()
        for shade, row in zip(context.tokens, near.itertuples(), strict=True):
            value = own.get((place.doc_id, row.position), 0.0)
            assert shade.strength == pytest.approx(value / own.max())
            assert shade.text == (
                r"<script>alert(1)</script>\u{202e}" if row.token_id == 1 else tokens[row.token_id]
            )
            assert shade.to == f"/token/{row.token_id}?layer=1"
    assert len(top.contexts) == min(6, len(own))
    of_deciles = feature_tables(run)["feature_examples"]
    of_deciles = of_deciles[(of_deciles.layer == 1) & (of_deciles.feature_id == feature_id)]
    assert len(sample.contexts) == (of_deciles.kind != "top").sum()
    order = [context.about.split(":")[0] for context in sample.contexts]
    assert order == sorted(order, key=lambda kind: -int(kind.split()[1]))
    assert all(sum(shade.strength > 0 for shade in context.tokens) == 1 for context in sample.contexts)


def test_features_active_with_it_are_counted_at_its_examples(page: Asked, run: SmallRun) -> None:
    shown = grid(feature(again(page, {"layer": 1, "feature_id": 3})), "coactive")
    examples = feature_tables(run)["feature_examples"]
    examples = examples[(examples.layer == 1) & (examples.feature_id == 3) & (examples.kind != "top")]
    places = set(zip(examples.doc_id, examples.position, strict=True))
    assert len(places) <= SAMPLED
    rows = activations(run)
    there = np.array([place in places for place in zip(rows.doc_id, rows.position, strict=True)])
    beside = rows[there & (rows.layer == 1) & (rows.feature_id != 3)].groupby("feature_id").activation
    found = {row["feature_id"]: row for row in page.rows(shown.query)}
    assert {key: row["n"] for key, row in found.items()} == beside.size().to_dict()
    assert {key: row["max_activation"] for key, row in found.items()} == beside.max().to_dict()
    for row in found.values():
        assert row["share"] == pytest.approx(row["n"] / len(places))
        assert row["lift"] == pytest.approx(row["share"] / row["density"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_neighbours_are_the_nearest_directions(run: SmallRun, tmp_path: Path, dtype: torch.dtype) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, run)
    decoder = torch.randn(D_SAE[1], 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    decoder[2] = 0
    (tmp_path / "dictionaries/d1").mkdir()
    save_file(
        {"W_dec": decoder, "b_dec": torch.zeros(5)}, tmp_path / "dictionaries/d1/sae_weights.safetensors"
    )
    page = asked(storage)
    shown = grid(feature(again(page, {"layer": 1, "feature_id": 3})), "neighbours")
    cosine = torch.cosine_similarity(decoder.double(), decoder[3].double(), dim=1).tolist()
    expected = sorted(set(range(D_SAE[1])) - {3}, key=lambda n: -cosine[n])
    rows = page.rows(shown.query)
    assert [row["feature_id"] for row in rows] == expected
    assert [row["cosine"] for row in rows] == pytest.approx([cosine[n] for n in expected], abs=1e-5)


@pytest.mark.slow
def test_promoted_tokens_are_shown_where_the_head_was_read(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    of = {"layer": 1, "feature_id": 3}
    rows = [
        {
            **of,
            "sign": sign,
            "place": place,
            "token_id": place,
            "token": sign,
            "logit": factor * (4.0 - place),
        }
        for sign, factor in (("promoted", 1), ("suppressed", -1))
        for place in (1, 2)
    ]
    publish(storage, run, feature_logits=pd.DataFrame(rows))
    page = asked(storage)
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    assert [row["logit"] for row in page.rows(grid(shown, "promoted").query)] == [3.0, 2.0]
    assert [row["logit"] for row in page.rows(grid(shown, "suppressed").query)] == [-3.0, -2.0]


@pytest.mark.slow
def test_labels_are_shown_wherever_the_feature_is(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, run)
    write_label(storage, "d1", 3, HOSTILE, "first")
    write_label(storage, "d1", 3, "articles", "second\nline")
    page = asked(storage)
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    assert shown.title == "Feature 3 of layer 1: articles"
    (note,) = every(shown, Note)
    assert [control.value for control in note.controls] == ["articles", "second\nline"]
    assert note.to == "/label/1/3"
    assert HOSTILE.replace("\u202e", r"\u{202e}") in note.said
    rows = page.rows(grid(features(again(page, {}, layer="1")), "features").query)
    listed = {row["feature_id"]: row["label"] for row in rows}
    assert listed == {n: "articles" if n == 3 else None for n in listed}


def test_neuronpedia_is_named_of_what_it_has() -> None:
    known = "gemma-scope-9b-pt-res-canonical / layer_20/width_16k/canonical"
    assert neuronpedia_address(known, 7) == "https://www.neuronpedia.org/gemma-2-9b/20-gemmascope-res-16k/7"
    assert neuronpedia_address("gemma-scope-9b-pt-res-canonical / no such", 7) is None
    assert neuronpedia_address("no such release / 1", 7) is None
    assert neuronpedia_address("trained here", 7) is None


def test_arrows_lead_to_the_features_beside(page: Asked) -> None:
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    places = {name.split(":")[0]: int(to.split("/")[-1]) for name, to in shown.beside if "/feature/1/" in to}
    assert set(places) == {"before", "next"}
    assert places["before"] < 3 < places["next"]


def test_what_is_not_there_is_said(page: Asked) -> None:
    with pytest.raises(NotThere, match="no features of layer 5"):
        feature(again(page, {"layer": 5, "feature_id": 0}))
    with pytest.raises(NotThere, match="no feature 8"):
        feature(again(page, {"layer": 1, "feature_id": 8}))
    with pytest.raises(NotThere, match="no whole number"):
        feature(again(page, {"layer": 1, "feature_id": "x"}))
    shown = feature(again(page, {"layer": 1, "feature_id": 3}))
    assert any("dictionary" in panel.what for panel in every(shown, Missing))


@pytest.mark.slow
def test_empty_states_teach(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    catalog = publish(storage, run)
    layers = [features, lambda asked: feature(again(asked, {"layer": 1, "feature_id": 3}))]

    def republish(*left_out: str) -> Asked:
        kept = replace(
            catalog,
            tables={name: file for name, file in catalog.tables.items() if name not in left_out},
            sharded={name: files for name, files in catalog.sharded.items() if name not in left_out},
        )
        write_catalog(storage, kept)
        return asked(storage)

    counted = republish("feature_degree", "graph_summary", "activations", *feature_tables(run))
    assert all("[[sae]]" in every(build(counted), Missing)[0].way for build in layers)
    old = republish(*feature_tables(run))
    assert all("functok run" in every(build(old), Missing)[0].way for build in layers)
    without = republish("occurrences")
    told = every(layers[1](without), Missing)
    assert any("keep_occurrences" in panel.way for panel in told)
    assert every(features(without), Controls)


@pytest.mark.slow
def test_a_feature_without_activations_says_so(run: SmallRun, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    dead = small_run()
    dead.tables["feature_degree"] = dead.tables["feature_degree"][
        lambda rows: ~((rows.layer == 1) & (rows.feature_id == 3))
    ]
    publish(storage, dead)
    shown = feature(again(asked(storage), {"layer": 1, "feature_id": 3}))
    assert "No token activates" in every(shown, Missing)[0].what
    assert every(shown, Note)
