"""Measures in lockstep against slow, obvious twins: every logit, residual and attention weight at once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import forgetful
import numpy as np
import pyarrow as pa
import pytest
import torch
from forgetful import FUNCTION, LENGTH, PROTECTION, settings

from tasks.retention.cache import NEVER, Fates
from tasks.retention.measures import BUCKETS, measure, octaves
from tasks.retention.policies import Full
from tasks.retention.running import Prefill, Reader, Settings, Step, local_errors, read
from tasks.retention.sequences import SequenceTokens
from tasks.retention.survival import ends, life_table

CHUNK, PROMPT, DOCUMENT = 8, 64, 77
IDS = forgetful.ids()[0].numpy()
TOKENS = SequenceTokens(
    ids=IDS,
    is_special=np.isin(np.arange(LENGTH), [0, 40]),
    document=np.repeat([0, 1], [41, LENGTH - 41]),
)
KIND = FUNCTION.int().numpy()[IDS]


def setting(name: str, prefill: bool = False, **options: Any) -> Settings:
    protocol = Prefill(prompt=PROMPT, chunk=CHUNK) if prefill else None
    return settings(
        Full() if name == "full" else forgetful.policy(name), forgetful.share_of(name), protocol, **options
    )


@cache
def measured(architecture: str, name: str, prefill: bool = False) -> dict[str, pa.Table]:
    model = forgetful.model(architecture)
    how = setting(name, prefill)
    # Beside others, as a stage measures them.
    beside = [setting("streaming", prefill), how, setting("full", prefill)]
    return measure(model, TOKENS, FUNCTION, beside, document=DOCUMENT)[1]


def steps(architecture: str, how: Settings, watch: Any = None) -> list[Step]:
    return list(
        read(
            forgetful.model(architecture),
            torch.from_numpy(IDS)[None],
            how,
            documents=torch.tensor([DOCUMENT]),
            function_tokens=FUNCTION,
            with_residuals=True,
            watch=watch,
        )
    )


def whole(prefill: bool = False) -> Settings:
    return setting("full", prefill, budget=None)


def log_probs(found: list[Step]) -> torch.Tensor:
    return torch.log_softmax(torch.cat([step.logits for step in found], dim=1)[0].double(), dim=-1)


def fates(found: list[Step]) -> dict[int, Fates]:
    return found[-1].cache.fates


def first_loss(found: list[Step]) -> int:
    times = [int(torch.minimum(of.gone_at, of.warm_at).min()) for of in fates(found).values()]
    return min(times) if min(times) < NEVER else 1


@pytest.mark.parametrize("name", ["window", "random", "str", "cmp", "full"])
@pytest.mark.parametrize("prefill", [False, True])
def test_predictions(name: str, prefill: bool) -> None:
    found = measured("llama", name, prefill)
    own, exact = log_probs(steps("llama", setting(name, prefill))), log_probs(steps("llama", whole(prefill)))
    loss: dict[tuple[str, int], list[tuple[float, float]]] = {}
    kl, agreed = 0.0, 0
    edges = octaves(LENGTH)
    for t in range(LENGTH - 1):
        ends_document = t == 40 or t + 1 == 40
        if t == 0 or ends_document or (prefill and t < PROMPT):
            continue
        target = int(IDS[t + 1])
        kind = ["content", "function"]
        bucket = f"{kind[KIND[t]]}→{kind[KIND[t + 1]]}"
        start = max(edge for edge in edges[:-1] if edge <= t + 1)
        loss.setdefault((bucket, start), []).append((-float(own[t, target]), -float(exact[t, target])))
        kl += float((exact[t].exp() * (exact[t] - own[t])).sum())
        agreed += int(own[t].argmax() == exact[t].argmax())
    (sums,) = found["reading_sums"].to_pylist()
    every = [pair for pairs in loss.values() for pair in pairs]
    assert sums["n"] == len(every)
    assert sums["loss_units"] / 2**32 == pytest.approx(sum(own for own, _ in every), rel=1e-5)
    assert sums["full_loss_units"] / 2**32 == pytest.approx(sum(full for _, full in every), rel=1e-5)
    assert sums["kl_units"] / 2**32 == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert sums["agreed"] == agreed
    rows = {(row["bucket"], row["position_from"]): row for row in found["reading_losses"].to_pylist()}
    assert {key[0] for key in rows} <= set(BUCKETS)
    assert {key: row["n"] for key, row in rows.items()} == {key: len(pairs) for key, pairs in loss.items()}
    for key, pairs in loss.items():
        assert rows[key]["loss_units"] / 2**32 == pytest.approx(sum(own for own, _ in pairs), rel=1e-5)


@pytest.mark.parametrize(("architecture", "name"), [("llama", "str"), ("gemma2", "h2o"), ("llama", "window")])
def test_errors_are_medians_over_tokens_that_lost_something(architecture: str, name: str) -> None:
    how = setting(name)
    mine, full = steps(architecture, how), steps(architecture, whole())
    since = first_loss(mine)
    local = local_errors(
        forgetful.model(architecture), torch.from_numpy(IDS)[None], how, fates(mine)
    ).numpy()[:, 0]
    governed = fates(mine)
    for row in measured(architecture, name)["reading_layers"].to_pylist():
        layer = row["layer"]
        own = torch.cat([step.residuals[layer][0] for step in mine])
        exact = torch.cat([step.residuals[layer][0] for step in full])
        error = ((own - exact).norm(dim=-1) / exact.norm(dim=-1)).numpy()
        assert row["n"] == LENGTH - since
        assert row["error"] == pytest.approx(float(np.median(error[since:])), rel=1e-4, abs=1e-6)
        if layer in governed:
            assert row["local_error"] == pytest.approx(float(np.median(local[layer, since:])), abs=1e-5)
        else:
            assert row["local_error"] is None


@pytest.mark.parametrize("name", ["random", "cmp", "streaming"])
def test_attention_on_survivors_and_its_entropy(name: str) -> None:
    mine = steps("llama", setting(name))
    since, gone = first_loss(mine), fates(mine)
    attentions = forgetful.attentions()  # (1, query heads, t, n), by transformers' own eager function
    slots = int(0.25 * LENGTH)
    for row in measured("llama", name)["reading_layers"].to_pylist():
        weights = attentions[row["layer"]][0].double()
        mass, entropy = [], []
        for t in range(since, LENGTH):
            begun = t // CHUNK * CHUNK
            for head in range(weights.shape[0]):
                kept = gone[row["layer"]].gone_at[0, head // 2, : t + 1] > begun
                if name == "streaming":
                    positions = torch.arange(t + 1)
                    kept = (positions < PROTECTION.sinks) | (positions >= t - (slots - PROTECTION.sinks))
                mass.append(float(weights[head, t, : t + 1][kept].sum()))
                entropy.append(float(torch.special.entr(weights[head, t, : t + 1]).sum()))
        assert row["retained_mass"] == pytest.approx(np.mean(mass), abs=1e-4)
        assert row["full_attention_entropy"] == pytest.approx(np.mean(entropy), abs=1e-3)
        assert 0 < row["attention_entropy"] <= math.log(LENGTH)


@pytest.mark.slow
def test_keys_that_are_kept_and_their_kinds() -> None:
    since = first_loss(steps("llama", setting("random")))
    similarity: dict[int, list[float]] = {0: [], 1: [], 2: []}
    kept: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in read(
        forgetful.model(),
        torch.from_numpy(IDS)[None],
        setting("random"),
        documents=torch.tensor([DOCUMENT]),
        function_tokens=FUNCTION,
    ):
        if step.stop < since:
            continue
        for layer in step.cache.governed:
            of_heads = []
            for keys in layer.keys[0]:
                cosines = [
                    float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0))
                    for i in range(len(keys))
                    for j in range(len(keys))
                    if i != j
                ]
                of_heads.append(np.mean(cosines))
            similarity[layer.layer].append(float(np.mean(of_heads)))
            positions = layer.slots().positions[0].flatten().numpy()
            kept[layer.layer] += [int(p) for p in positions if p not in {0, 40}]
    for row in measured("llama", "random")["reading_layers"].to_pylist():
        assert row["key_similarity"] == pytest.approx(np.mean(similarity[row["layer"]]), abs=1e-5)
        assert row["kept"] == len(kept[row["layer"]])
        assert row["kept_function"] == sum(KIND[p] for p in kept[row["layer"]])


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ["window", "streaming", "h2o", "snapkv", "function", "str", "cmp", "full"])
@pytest.mark.slow
def test_following_the_full_run_is_reading_alone(
    architecture: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = []

    def read_alone(reader: Reader) -> bool:
        followed.append(is_full(reader))
        return False

    is_full = Reader.is_full.fget
    assert is_full is not None
    alike = measured(architecture, name)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "is_full", property(read_alone))
        alone = measured.__wrapped__(architecture, name)
    assert any(followed)
    assert not all(followed)
    assert alike == alone


def test_full_read_twice_is_the_same_to_the_bit() -> None:
    (sums,) = measured("llama", "full")["reading_sums"].to_pylist()
    assert sums["loss_units"] == sums["full_loss_units"]
    assert (sums["kl_units"], sums["agreed"]) == (0, sums["n"])
    assert sums["hot_bytes"] + sums["state_bytes"] == sums["most_bytes"] == sums["full_bytes"]
    for row in measured("llama", "full")["reading_layers"].to_pylist():
        assert row["error"] == row["local_error"] == 0
        assert row["attention_entropy"] == row["full_attention_entropy"]
        assert row["key_similarity"] == row["full_key_similarity"]


@pytest.mark.parametrize("name", ["h2o", "cmp"])
def test_bytes_are_those_of_all_tensors_once_something_had_to_leave(name: str) -> None:
    found = steps("llama", setting(name))
    since = first_loss(found)
    cache_bytes = []
    for step in read(
        forgetful.model(),
        torch.from_numpy(IDS)[None],
        setting(name),
        documents=torch.tensor([DOCUMENT]),
        function_tokens=FUNCTION,
    ):
        cache_bytes.append((step.stop, step.cache.n_bytes))
    after = [n for stop, n in cache_bytes if stop >= since]
    (sums,) = measured("llama", name)["reading_sums"].to_pylist()
    assert sums["chunks"] == len(after)
    assert sums["hot_bytes"] + sums["warm_bytes"] + sums["state_bytes"] == sum(after)
    assert sums["most_bytes"] == max(after) <= sums["allowed_bytes"]
    assert (sums["warm_bytes"] > 0) == (name == "cmp")


def test_layers_may_be_looked_into_less_often() -> None:
    model, how = forgetful.model(), setting("random")
    (seldom,) = measure(model, TOKENS, FUNCTION, [how], document=DOCUMENT, layers_every=4)
    often = measured("llama", "random")
    assert seldom["reading_sums"].equals(often["reading_sums"])
    assert seldom["reading_survival"].equals(often["reading_survival"])
    n = {row["n"] for row in seldom["reading_layers"].to_pylist()}
    assert n == {sum(CHUNK for end in range(CHUNK, LENGTH + 1, CHUNK) if end % (4 * CHUNK) == 0 and end > 32)}


@pytest.mark.parametrize("name", ["random", "cmp"])
def test_life_tables_count_each_token_once_an_eviction(name: str) -> None:
    of = fates(steps("llama", setting(name)))
    counted = ~TOKENS.is_special
    counted[: PROTECTION.sinks] = False
    expected: dict[tuple[int, str, str, int], list[int]] = {}
    for layer, fate in of.items():
        left = ends(fate, has_tiers=name == "cmp")
        assert set(left) == ({"hot", "warm", "cold"} if name == "cmp" else {"hot"})
        for tier, times in left.items():
            for head in range(times.shape[0]):
                for token in np.flatnonzero(counted):
                    kind = "function" if KIND[token] else "content"
                    first = token // CHUNK
                    for number in range(first, LENGTH // CHUNK):
                        seen = (number + 1) * CHUNK
                        entry = expected.setdefault((layer, kind, tier, (number - first) * CHUNK), [0, 0])
                        entry[0] += 1
                        if times[head, token] == seen:
                            entry[1] += 1
                            break
    rows = measured("llama", name)["reading_survival"].to_pylist()
    found = {
        (row["layer"], row["kind"], row["tier"], row["age"]): [row["at_risk"], row["died"]] for row in rows
    }
    assert found == expected


def test_a_merged_value_lives_as_long_as_the_one_that_it_is_in() -> None:
    of = Fates.of(1, 1, 4, torch.device("cpu"))
    # 0 is merged into 1 at 8, 1 into 2 at 16, and 2 leaves at 24; 3 stays.
    of.gone_at[0, 0] = torch.tensor([8, 16, 24, NEVER])
    of.warm_at[0, 0] = torch.tensor([4, 4, NEVER, NEVER])
    of.cold_at[0, 0] = torch.tensor([8, 16, NEVER, NEVER])
    of.cold_into[0, 0] = torch.tensor([1, 2, -1, -1])
    found = {tier: times[0].tolist() for tier, times in ends(of, has_tiers=True).items()}
    assert found == {"hot": [4, 4, 24, NEVER], "warm": [8, 16, 24, NEVER], "cold": [24, 24, 24, NEVER]}


def test_a_short_last_chunk_is_an_eviction_too() -> None:
    of = Fates.of(1, 1, 10, torch.device("cpu"))
    of.gone_at[0, 0, 3] = 10
    table = life_table({0: of}, np.zeros(10, bool), np.ones(10, bool), 4, has_tiers=False).to_pylist()
    assert [(row["age"], row["at_risk"], row["died"]) for row in table] == [(0, 10, 0), (4, 8, 0), (8, 4, 1)]


def test_ranges_of_positions_are_octaves() -> None:
    assert octaves(48) == [0, 48]
    assert octaves(64) == [0, 64]
    assert octaves(600) == [0, 64, 128, 256, 512, 600]
