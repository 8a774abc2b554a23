"""A finished run of reactivation and steering made of plain values: folders of cases, traits and experiments.

Rates say how often a prompt's own features are active again, effects what steering does; both are put in, so that
tables and report can be held against them. Tests of what reads such a run change a list of rows (`run.features`)
before `run.write(storage)`.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from builders import Cut, GivenRun, commit_found, make_config, random_documents, run_of, write_corpus

from infra.catalog import Catalog
from infra.manifest import Manifest
from infra.storage import Storage
from schemas.config import Config
from schemas.steering.work import CaseFeatures, LayerFolder, Steered, SteeredPrompt, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.tables import candidate, publish
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING
from tasks.steering.tables import STEERING_GROUP

Row = dict[str, Any]

LAYERS, POOL, RESAMPLES = (1, 4), 60, 100
FUNCTION, CONTENT, UNKNOWN = 0, 22, 99
"""Token ids: the corpus' most frequent one, a rare one, and one that the corpus lacks."""

HOSTILE = "</code><script>document.title='pwned'</script>\n\n  of\u202e"
TEXTS = {FUNCTION: "\n", CONTENT: " rare", UNKNOWN: " <b>unseen</b>"}
LATER = (CONTENT, FUNCTION, UNKNOWN, FUNCTION, FUNCTION)
"""Tokens after the place, the same in all prompts."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What is put in.

    Attributes:
        cases: Cases of each relation.
        relations: Names of the relations.
        prompts: Prompts of a case.
        function: Share of own features active again at function tokens.
        content: The same at content tokens.
        counterfactual: Share of a case's other prompts' own features active at later tokens.
        unrelated: Share of all other features active at later tokens.
        experiments: Experiments; 0: no traits either.
        gain: Strength to the change of the target's log-probability at the last function token, by mode.
        content_gain: The same at the content token.
        random_gain: The same of random features.
        cost: Change of log perplexity.
        noise: Standard deviation of an experiment's own effect.
        draws: Random draws.
        given: Whether the traits' features are given.
        layers: Most informative layer of each trait, in turn.
        seed: Of everything.
    """

    cases: int = 8
    relations: Sequence[str] = ("capitals", "opposites")
    prompts: int = 2
    function: float = 0.7
    content: float = 0.3
    counterfactual: float = 0.1
    unrelated: float = 0.05
    experiments: int = 8
    gain: Mapping[str, Mapping[float, float]] = field(
        default_factory=lambda: {
            mode: {0.0: 0.0, 1.0: 0.5, 2.0: 1.5, 4.0: 3.0, 8.0: 1.0} for mode in ("add", "clamp")
        }
    )
    content_gain: float = 0.2
    random_gain: float = 0.1
    cost: float = 0.4
    noise: float = 0.1
    draws: int = 2
    given: bool = False
    layers: Sequence[int] = (4,)
    seed: int = 0


@dataclass
class SteeringRun:
    """What the stages hand on, and the corpus under it."""

    config: Config
    shards: CorpusShards
    tokens: dict[str, list[Row]] = field(default_factory=dict)
    features: dict[str, list[Row]] = field(default_factory=dict)
    trait_layers: dict[str, list[Row]] = field(default_factory=dict)
    trait_features: dict[str, list[Row]] = field(default_factory=dict)
    steering: dict[tuple[str, str, str], list[Row]] = field(default_factory=dict)

    def write(self, storage: Storage, seed: int = 0) -> GivenRun:
        """Write and commit every folder; a run that has them. Rows and results come in an order chosen by `seed`."""
        rng = random.Random(seed)
        cases, traits, experiments = [], [], []
        for place, name in enumerate(sorted(self.tokens)):
            folder = _write(storage, f"reactivation/case-{place}", {"prompt_tokens": self.tokens[name]}, rng)
            layers = _write_layers(storage, folder, {"prompt_features": self.features[name]}, rng)
            cases.append(
                CaseFeatures(case=name, folder=folder, layers=layers, n_tokens=len(self.tokens[name]))
            )
        for place, name in enumerate(sorted(self.trait_layers)):
            files = {"trait_layers": self.trait_layers[name], "trait_features": self.trait_features[name]}
            layers = _write_layers(storage, f"steering/trait-{place}", files, rng)
            traits.append(TraitFeatures(trait=name, layers=layers))
        for place, key in enumerate(sorted(self.steering)):
            folder = _write(storage, f"steering/{place}", {"steering": self.steering[key]}, rng)
            experiments.append(SteeredPrompt(case=key[0], prompt=key[1], folder=folder))
        for found in (cases, traits, experiments):
            rng.shuffle(found)  # type: ignore[arg-type]
        steered = Steered(traits=tuple(traits), experiments=tuple(experiments))
        return run_of(self.config, storage, {TOKENIZE: self.shards, REACTIVATION: cases, STEERING: steered})


def steering_run(storage: Storage, made: Made | None = None) -> SteeringRun:
    """A run, its corpus committed and its folders not yet; equal arguments give equal runs."""
    made = made or Made()
    config = make_config(storage, LAYERS, steering={"cases": "cases.toml", "resamples": RESAMPLES})
    documents = random_documents(3, 12, layers=LAYERS)
    shards = write_corpus(storage, [Cut(source="a.jsonl", documents=documents, in_graph=12)])
    run, rng = SteeringRun(config, shards), random.Random(made.seed)
    for number in range(made.cases * len(made.relations)):
        relation = made.relations[number % len(made.relations)]
        _add_case(run, f"{relation} {number}", relation, made, rng)
    for number in range(2 if made.experiments else 0):
        _add_trait(run, f"trait {number}", made.layers[number % len(made.layers)], made, rng)
    for number in range(made.experiments):
        _add_experiment(run, number, made, rng)
    return run


def built(storage: Storage, made: Made | None = None) -> tuple[SteeringRun, Catalog]:
    """A run and its tables, published."""
    run = steering_run(storage, made)
    return run, published(run.write(storage))


def published(run: GivenRun) -> Catalog:
    """The tables of a run's corpus, cases, traits and experiments, beside what is published already."""
    catalog = candidate(run.storage, [CorpusTables().build(run), STEERING_GROUP.build(run)])
    publish(run.storage, catalog)
    return catalog


def _add_case(run: SteeringRun, name: str, relation: str, made: Made, rng: random.Random) -> None:
    prompts = [f"{name} asks {HOSTILE if p == 0 else p}" for p in range(made.prompts)]
    run.tokens[name], run.features[name] = [], []
    ids = [[CONTENT, 5, 10 + p, 14 + p, *LATER] for p in range(made.prompts)]
    for prompt, tokens in zip(prompts, ids, strict=True):
        for position, token in enumerate(tokens):
            run.tokens[name].append(
                {
                    "case": name,
                    "relation": relation,
                    "prompt": prompt,
                    "position": position + 1,
                    "token_id": token,
                    "token": TEXTS.get(token, f" t{token}"),
                    "in_text": position < 7,
                    "in_place": position in (2, 3),
                    "looked_at": position > 3,
                }
            )
    for layer in LAYERS:
        pool = rng.sample(range(POOL), POOL)
        own = [[pool.pop() for _ in range(rng.randrange(1, 6))] for _ in prompts]
        shared = [pool.pop() for _ in range(3)]
        for p, prompt in enumerate(prompts):
            for position, token in enumerate(ids[p]):
                if position in (2, 3):
                    active = {*shared, *(f for f in own[p] if position == 2 or rng.random() < 0.5)}
                else:
                    rates = dict.fromkeys(range(POOL), made.unrelated)
                    rates |= {f: made.counterfactual for mine in own for f in mine} if position > 3 else {}
                    rate = made.function if token == FUNCTION else made.content
                    rates |= dict.fromkeys(own[p], rate) if position > 3 else {}
                    active = {f for f, chance in rates.items() if rng.random() < chance}
                run.features[name] += [
                    {
                        "prompt": prompt,
                        "position": position + 1,
                        "layer": layer,
                        "feature_id": feature,
                        "activation": _float32(rng.expovariate(0.5) + 0.01),
                    }
                    for feature in sorted(active)
                ]


def _add_trait(run: SteeringRun, name: str, best: int, made: Made, rng: random.Random) -> None:
    layers = LAYERS if not made.given else (best,)
    run.trait_layers[name] = [
        {
            "trait": name,
            "layer": layer,
            "separation": None if made.given else 1.0 + (layer == best) + 0.1 * rng.random(),
            "accuracy": None if made.given else 0.75,
            "explained_variance": None if made.given else 0.8,
            "n_pairs": 0 if made.given else 6,
            "is_most_informative": layer == best,
        }
        for layer in layers
    ]
    run.trait_features[name] = [
        {
            "trait": name,
            "layer": layer,
            "place": place,
            "feature_id": 7 * place + layer,
            "coefficient": 5.0 / place,
            "contribution": 5.0 / place,
            "clamp_value": 6.0 / place,
            "mean_positive": None if made.given else 5.5 / place,
            "mean_negative": None if made.given else 0.5 / place,
        }
        for layer in layers
        for place in range(1, 13)
    ]


def _add_experiment(run: SteeringRun, number: int, made: Made, rng: random.Random) -> None:
    case, prompt, target = f"trait {number % 2}", f"Where is <i>{number}</i>?", f" target {number}"
    own = {
        place: rng.gauss(0, made.noise) for place in ("last function token", "all positions", "content token")
    }
    rows = run.steering[case, prompt, target] = []
    common = {
        "case": case,
        "prompt": prompt,
        "target": target,
        "traits": case,
        "layer": made.layers[0],
        "feature_ids": [7 + made.layers[0], 14 + made.layers[0]],
        "baseline_text": f"It is here, {number}.",
        "target_logprob": -9.0,
        "baseline_perplexity": None if number == 1 else 4.0,
    }
    settings = [("last function token", "trait", 0), ("all positions", "trait", 0)]
    settings += [("content token", "trait", 0)] * (number != 2)
    settings += [
        (place, "random", draw)
        for place in ("last function token", "all positions")
        for draw in range(1, made.draws + 1)
    ]
    for mode, by_strength in made.gain.items():
        for strength, gain in by_strength.items():
            for place, control, draw in settings:
                change = {"content token": made.content_gain}.get(place, gain)
                change = made.random_gain + rng.gauss(0, made.noise) if control == "random" else change
                change = (change + own[place]) if strength else 0.0
                changed = strength > 1 and control == "trait" and place != "content token"
                rows.append(
                    {
                        **common,
                        "mode": mode,
                        "place": place,
                        "position": {"all positions": None, "content token": 6}.get(place, 11),
                        "control": control,
                        "draw": draw,
                        "strength": strength,
                        "steered_text": f"{HOSTILE} {mode} {strength:g}" if changed else common["baseline_text"],
                        "kl": abs(change) / 3,
                        "target_logprob_delta": change,
                        "perplexity": _perplexity(number, strength, changed, made),
                        "relative_norm": 0.1 * strength,
                    }
                )  # fmt: skip


def _perplexity(number: int, strength: float, changed: bool, made: Made) -> float | None:
    """4 for the unsteered text; null where nothing was generated: by one experiment unsteered, by one steered."""
    if (number == 1 and not changed) or (number == 3 and changed):
        return None
    return 4.0 * math.exp(made.cost * strength / 4)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _write(storage: Storage, folder: str, files: dict[str, list[Row]], rng: random.Random) -> str:
    for name, rows in files.items():
        mixed = list(rows)
        rng.shuffle(mixed)
        storage.write_parquet(
            f"{folder}/{name}.parquet", pa.Table.from_pylist(mixed, schema=SHARD_FILES[name])
        )
    commit_found(storage, folder, Manifest(stage="steering", inputs={}))
    return folder


def _write_layers(
    storage: Storage, folder: str, files: dict[str, list[Row]], rng: random.Random
) -> tuple[LayerFolder, ...]:
    """A folder for each layer that the files have rows of."""
    return tuple(
        LayerFolder(
            layer=layer,
            folder=_write(
                storage,
                f"{folder}-{layer}",
                {name: [row for row in rows if row["layer"] == layer] for name, rows in files.items()},
                rng,
            ),
        )
        for layer in sorted({row["layer"] for rows in files.values() for row in rows})
    )
