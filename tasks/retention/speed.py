"""The stage `retention_speed`: tokens decoded a second, against the full cache in alternation (PAPER 2).

Only shapes decide how long a token takes, so caches are filled with random keys and values rather than by reading
thousands of tokens; what a policy remembers of attention is random, too. Then both caches decode in turns, full and
policy, each turn as many tokens, one at a time and greedily; the first turn of each warms up and does not count.
A turn of the one is compared with the turn of the other beside it. A model that is alone on its machine is taken for
granted and not checked: `load` says how busy the machine was, and the rows what was measured where.

These numbers are of the moment: whoever measures again gets others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest
from infra.storage import Storage, StoredFile
from schemas.config import Config
from schemas.errors import FunctokError, about
from schemas.retention.section import Retention, retention_of
from schemas.retention.work import DecodeSpeed, Setup
from schemas.tables import SHARD_FILES
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.models.devices import device_client, settle
from tasks.models.language_model import LanguageModel
from tasks.models.model import model_key
from tasks.retention.attention import forgetting
from tasks.retention.cache import Chunk, RetentionCache
from tasks.retention.gates import GATES, read_gate
from tasks.retention.loaded import forget_loaded, loaded_model
from tasks.retention.policies import Attention, Full
from tasks.retention.running import Prefill, Settings, new_cache
from tasks.retention.setups import decoded_tokens, has_gate, policy_key, settings_of, speed_setups

VERSION = 1

_QUERIES = 64
"""Last queries whose attention the policies are shown when a cache is filled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SpeedUnit(Unit):
    """One policy at one budget and length.

    Attributes:
        setup: Policy, budget, and how many tokens there are when decoding ends.
        model_key: Key of the model that the work was planned for.
        gate: Folder of the learned gate, where the policy has one.
    """

    setup: Setup
    model_key: str
    gate: str | None


class Speeds(Stage[SpeedUnit, list[DecodeSpeed]]):
    """How fast tokens are decoded."""

    name = "retention_speed"
    measure = "policies, speed"
    things = "speeds"
    libraries = ("torch", "transformers")
    tops = ("retention_speed",)
    needs = (TOKENIZE, GATES)

    def applies(self, config: Config) -> bool:
        """Where it is asked for."""
        section = config.section(Retention)
        return section is not None and section.speed is not None

    def refuse(self, config: Config) -> FunctokError:
        """Nobody asks for it."""
        return FunctokError(
            "this configuration does not ask for speed",
            stage=self.name,
            hint="add [retention.speed]; configs/retention.toml shows one",
        )

    def units(self, run: Run) -> Sequence[SpeedUnit]:
        """A unit a policy, budget and length; none where none is asked for."""
        if not self.applies(run.config):
            return []
        section, key, gate = (
            retention_of(run.config),
            model_key(run.config.model, run.storage),
            run.result(GATES),
        )
        assert section.speed is not None
        units = []
        for setup in speed_setups(section):
            own_gate = gate if has_gate(section, setup.policy) else None
            units.append(
                SpeedUnit(
                    top="retention_speed",
                    inputs={
                        "version": VERSION,
                        "model": key,
                        **policy_key(section, setup.policy, own_gate),
                        "budget": setup.budget,
                        "budget_of": section.budget_of,
                        "length": setup.length,
                        "sinks": section.sinks,
                        "recent": section.recent,
                        "tokens": section.speed.tokens,
                        "turns": section.speed.turns,
                    },
                    about=f"{setup.policy} at {setup.budget:g} of {setup.length:,} tokens",
                    # Side by side they would measure each other.
                    together="one after another",
                    setup=setup,
                    model_key=key,
                    gate=own_gate,
                )
            )
        return units

    def prepare(self, run: Run, missing: Sequence[SpeedUnit]) -> Sequence[SpeedUnit]:
        """Decide the number format."""
        settle(run.config.model, run.storage)
        return missing

    def client(self, run: Run, groups: Sequence[Sequence[SpeedUnit]]) -> AbstractContextManager[Any]:
        """Here, or on one worker of a cluster."""
        return device_client(run.config, len(groups))

    def make(self, run: Run, group: Sequence[SpeedUnit]) -> Iterator[Made]:
        """Measure one after another.

        Raises:
            ConfigError: if a budget has no room for what is protected.
            ModelError: if the model does not fit.
        """
        section = retention_of(run.config)
        assert section.speed is not None
        for unit in group:
            model = loaded_model(run.config.model, run.storage, unit.model_key)
            gate = None if unit.gate is None else read_gate(run.storage, unit.gate)
            settings = settings_of(section, unit.setup, gate)
            with about(stage=self.name):
                turns, kv_bytes = alternate(
                    model, settings, unit.setup.length, section.speed.tokens, section.speed.turns
                )
            stats = {
                "kv_bytes": kv_bytes[0],
                "full_kv_bytes": kv_bytes[1],
                "device": _device_name(model.device),
                "threads": torch.get_num_threads(),
                "load": os.getloadavg()[0],
            }
            yield Made.of(unit, partial(_write, run.storage, unit, turns), stats)

    def close(self) -> None:
        """Free the model."""
        forget_loaded()

    def result(self, run: Run, units: Sequence[SpeedUnit], done: Mapping[str, Manifest]) -> list[DecodeSpeed]:
        """All speeds, in the order of the units."""
        return [
            DecodeSpeed(
                policy=unit.setup.policy,
                budget=unit.setup.budget,
                length=unit.setup.length,
                folder=unit.folder,
                **{
                    name: done[unit.folder].stats[name]
                    for name in ("kv_bytes", "full_kv_bytes", "device", "threads", "load")
                },
            )
            for unit in units
        ]

    def question(self, run: Run, result: list[DecodeSpeed]) -> Question:
        """All turns."""
        return Question(
            of={"folders": [speed.folder for speed in result]},
            views=lambda: {
                "decode_turns": pa.concat_tables(
                    [
                        SHARD_FILES["decode_turns"].empty_table(),
                        *(
                            verified.read_table(run.storage, f"{speed.folder}/decode_turns.parquet")
                            for speed in result
                        ),
                    ]
                )
            },
        )

    def shown(self, run: Run, result: list[DecodeSpeed]) -> Iterator[Shown]:
        """What was measured where."""
        yield Shown(
            name="retention-speed",
            description="Caches whose decoding was timed",
            rows=[
                {
                    "policy": speed.policy,
                    "budget": speed.budget,
                    "length": speed.length,
                    "kv_bytes": speed.kv_bytes,
                    "full_kv_bytes": speed.full_kv_bytes,
                    "device": speed.device,
                }
                for speed in result
            ],
        )


SPEEDS = Speeds()


def alternate(
    model: LanguageModel, settings: Settings, length: int, tokens: int, turns: int
) -> tuple[list[tuple[float, float]], tuple[int, int]]:
    """Decode with both caches in turns.

    Args:
        model: Which.
        settings: The policy's.
        length: Tokens that there are when decoding ends.
        tokens: Of a turn.
        turns: That count.

    Returns:
        Seconds of the policy's turn and of the full cache's, for each turn, and the bytes of both caches once they are
        filled.
    """
    before = length - decoded_tokens(tokens, turns)
    # The budget is of what came before; tokens come one by one from there.
    streamed = replace(settings, protocol=Prefill(prompt=before, chunk=1), fused=True)
    whole = replace(streamed, policy=Full(), budget=None)
    caches = [
        _Decoding(model, filled_cache(model, how, before, length), before, length)
        for how in (whole, streamed)
    ]
    kv_bytes = [decoding.cache.n_bytes for decoding in caches]
    found = []
    for turn in range(turns + 1):
        seconds = [decoding.timed(tokens) for decoding in caches]
        if turn:
            found.append((seconds[1], seconds[0]))
    return found, (kv_bytes[1], kv_bytes[0])


def filled_cache(model: LanguageModel, settings: Settings, filled: int, length: int) -> RetentionCache:
    """A cache as if `filled` tokens had been read and the budget enforced, of random keys and values."""
    cache = new_cache(model, settings, length, torch.zeros(1, dtype=torch.int64))
    cache.fused = settings.fused
    device, shape = model.device, cache.shape
    generator = torch.Generator(device=device).manual_seed(settings.seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(shape.dtype)

    kinds = torch.rand(1, filled, generator=generator, device=device) < 0.4
    surprisal = torch.rand(1, length, generator=generator, device=device)
    cache.begin(
        Chunk(
            start=0,
            stop=filled,
            is_function=kinds,
            surprisal=surprisal[:, :filled],
            stepwise=False,
            evict=True,
        )
    )
    queries = min(_QUERIES, filled)
    governed = {layer.layer for layer in cache.governed}
    with torch.inference_mode():
        for number, layer in enumerate(cache.layers):
            size = (1, shape.heads, filled, shape.head_dim)
            layer.update(noise(*size), noise(*size))
            if number in governed:
                weights = noise(1, shape.heads, shape.groups, queries, filled).float().softmax(-1)
                attention = Attention(
                    weights=weights,
                    queries=noise(1, shape.heads, shape.groups, queries, shape.head_dim),
                    positions=torch.arange(filled - queries, filled, device=device),
                    scaling=shape.head_dim**-0.5,
                    softcap=None,
                )
                cache.attended(layer, attention)
    return cache


class _Decoding:
    """A cache that tokens are decoded with."""

    def __init__(self, model: LanguageModel, cache: RetentionCache, seen: int, length: int) -> None:
        self.cache, self._model, self._seen = cache, model, seen
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._surprisal = torch.full((1, length + 1), torch.nan, device=model.device)

    def timed(self, tokens: int) -> float:
        """Seconds that so many tokens take."""
        self._synchronize()
        began = time.perf_counter()
        with torch.inference_mode(), forgetting(self._model.module):
            for _ in range(tokens):
                self._step()
        self._synchronize()
        return time.perf_counter() - began

    def _step(self) -> None:
        seen, model = self._seen, self._model
        self.cache.begin(
            Chunk(
                start=seen,
                stop=seen + 1,
                is_function=torch.zeros(1, 1, dtype=torch.bool, device=model.device),
                surprisal=self._surprisal[:, seen : seen + 1],
                stepwise=True,
                evict=True,
            )
        )
        logits = model.module(
            input_ids=self._token,
            position_ids=torch.tensor([[seen]], device=model.device),
            past_key_values=self.cache,
            use_cache=True,
            retention=self.cache,
        ).logits[:, -1]
        self._token = logits.argmax(-1, keepdim=True)
        self._surprisal[:, seen + 1] = (
            logits.float().logsumexp(-1) - logits.float().gather(-1, self._token)[:, 0]
        )
        self.cache.learn_surprisal(self._surprisal, seen + 1)
        self._seen += 1

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write(storage: Storage, unit: SpeedUnit, turns: Sequence[tuple[float, float]]) -> list[StoredFile]:
    section_tokens = (unit.inputs or {})["tokens"]
    rows = [
        {"turn": turn, "seconds": own, "full_seconds": full, "tokens": section_tokens}
        for turn, (own, full) in enumerate(turns)
    ]
    table = pa.Table.from_pylist(rows, schema=SHARD_FILES["decode_turns"])
    return [storage.write_parquet(f"{unit.folder}/decode_turns.parquet", table)]
