"""What forgetting does to a reading: a sequence read under several setups in lockstep with the full run (PAPER 2).

Everything is teacher-forced and paired with the full run, chunk by chunk, so that logits, residual streams and
attention of a chunk are compared and gone before the next. Of one sequence:

**Predictions.** That of token t + 1 counts where tokens t and t + 1 are ordinary ones of one document, and, under
`prefill`, t comes after the prompt. NLL in nats; KL(full ‖ policy) = Σ p_full (log p_full − log p_policy) over the
whole vocabulary; agreement: both have the same most likely token. Buckets are the kinds of tokens t → t + 1, positions
those of t + 1, in octaves (0–63, 64–127, 128–255, …).

**What layers are asked of.** Tokens that were read after something had first to leave (or after the prompt): before, a
reading *is* the full run, and would only dilute medians. Where nothing leaves: all but the first token, which is BOS.
Layers are looked into in every n-th chunk.

- *error* e(l, t) = ‖h_policy − h_full‖ / ‖h_full‖ of the block's output, median over tokens. *local error*: the same
  where the block is fed the full run's inputs and keys, with the policy's evictions alone (neither quantized nor
  merged); sliding blocks have none. *carried* is error / local error, made where tables are made.
- *retained mass*: what of the full run's attention falls on tokens whose own slot the policy still has when the token
  is read, mean over query heads and tokens.
- *attention entropy*: −Σ a log a in nats of the reading's own attention, mean over query heads and tokens, and beside
  it that of the full run at the same tokens.
- *key similarity*: the mean cosine of two different keys of a head as they are cached (rotated; of warm keys, what
  their codes stand for), after a chunk's eviction, mean over heads and chunks; beside it that of the full run.
- *kept*: ordinary tokens with a slot after a chunk's eviction, summed over heads and chunks, and the function tokens
  of them.

**Bytes** are of all tensors of the governed layers, after chunks after which the budget holds and something had to
leave (under `prefill`: after the prompt; where nothing leaves: at the end). `full_bytes` is the full run's cache of the
whole sequence, or prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.errors import ModelError
from schemas.tables import SHARD_FILES
from tasks.models.language_model import LanguageModel
from tasks.models.loading import residual_of
from tasks.retention.cache import NEVER, RetentionCache, RetentionLayer
from tasks.retention.policies import Attention, Full
from tasks.retention.running import Prefill, Reader, Settings, Step, Stream
from tasks.retention.sequences import SequenceTokens
from tasks.retention.survival import life_table

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]

UNIT = 2.0**32
"""Units in a nat."""

BUCKETS = ("function→function", "function→content", "content→function", "content→content")
FIRST_OCTAVE = 64
"""Positions of the first range; the next is as long, each after that twice its predecessor."""

FILES = ("reading_sums", "reading_losses", "reading_layers", "reading_survival")


def measure(
    model: LanguageModel,
    tokens: SequenceTokens,
    function_tokens: torch.Tensor,
    asked: Sequence[Settings],
    *,
    document: int,
    layers_every: int = 1,
) -> list[dict[str, pa.Table]]:
    """Read a sequence under every setting that is asked for, in lockstep with one full run.

    Args:
        model: Which.
        tokens: The sequence.
        function_tokens: (vocabulary,) bool.
        asked: Settings, all with the same chunks (`running.chunks_of`).
        document: What random keys know the sequence by.
        layers_every: Layers are looked into in every n-th chunk.

    Returns:
        Of each setting its files (`FILES`).

    Raises:
        ConfigError: as `running.read`.
        ModelError: as `running.read`, or if a loss is not finite.
    """
    full = _FullRun(model, tokens, asked[0], document)
    readings = [
        _Reading(model, tokens, function_tokens, settings, document, full.n_layers) for settings in asked
    ]
    with full.compared(readings):
        for number, _ in enumerate(_starts(tokens, asked[0])):
            looking = (number + 1) % layers_every == 0
            for reading in readings:
                reading.begin(looking=looking)
            full.next(looking=looking)
            for reading in readings:
                reading.next(full)
    return [reading.files(full) for reading in readings]


def _starts(tokens: SequenceTokens, settings: Settings) -> range:
    return range(0, len(tokens.ids), settings.protocol.chunk)


class _FullRun:
    """The full run, and what every reading is held against in its current chunk.

    Attributes:
        step: The current chunk.
        looking: Whether layers are looked into in it.
        residuals: Of each block (n, d_model) float32, where looked into.
    """

    def __init__(
        self, model: LanguageModel, tokens: SequenceTokens, settings: Settings, document: int
    ) -> None:
        self.model, self.n_layers = model, len(model.blocks)
        length = len(tokens.ids)
        self._ids = torch.from_numpy(tokens.ids)[None]
        whole = Settings(
            policy=Full(),
            budget=None,
            protocol=Stream(chunk=settings.protocol.chunk),
            protection=settings.protection,
            seed=settings.seed,
        )
        documents = torch.tensor([document])
        self._reader = Reader(model, self._ids, whole, documents=documents, watch=self._watch)
        self.step: Step
        self.looking = self._inside = self._again = False
        self.residuals: dict[int, torch.Tensor] = {}
        self.entropy = np.full((self.n_layers, length), np.nan, np.float32)
        self.similarity: list[dict[int, float]] = []
        self.bytes_at: dict[int, int] = {}
        self._readings: Sequence[_Reading] = ()
        self._cache: RetentionCache | None = None

    def next(self, *, looking: bool) -> None:
        """Read the next chunk."""
        self.looking, self.residuals = looking, {}
        self._inside = True
        try:
            self._reader.begin()
            self.step = self._reader.read()
        finally:
            self._inside = False
        self._cache = self.step.cache
        self.bytes_at[self.step.stop] = self._cache.n_bytes
        self.similarity.append(_similarities(self._cache) if looking else {})

    @contextmanager
    def compared(self, readings: Sequence[_Reading]) -> Iterator[None]:
        """Within the block, the full run's blocks are run again with the evictions of each reading."""
        self._readings = readings
        at = {id(block): layer for layer, block in enumerate(self.model.blocks)}

        def compare(block: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not self._inside or self._again or not self.looking:
                return
            layer = at[id(block)]
            self.residuals[layer] = exact = residual_of(output)[0].float()
            if self._cache is None or not isinstance(held := self._cache.layers[layer], RetentionLayer):
                return
            assert held.chunk is not None
            for reading in readings:
                hidden = reading.hidden(layer, held.chunk.start, held.chunk.stop)
                if hidden is None:
                    reading.local[layer, held.chunk.start : held.chunk.stop] = 0
                    continue
                held.hidden, self._again = hidden, True
                try:
                    found = residual_of(block(*args, **kwargs))[0].float()
                finally:
                    held.hidden, self._again = None, False
                reading.local[layer, held.chunk.start : held.chunk.stop] = _relative(found, exact)

        handles = [block.register_forward_hook(compare, with_kwargs=True) for block in self.model.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, layer: int, positions: torch.Tensor, attention: Attention) -> None:
        if self._again:
            return
        start, stop = int(attention.positions[0]), int(attention.positions[-1]) + 1
        for reading in self._readings:
            if reading.follows:
                held = self._reader.cache.layers[layer]
                chunk = slice(start, stop)
                reading.reader.take(layer, held.keys[:, :, chunk], held.values[:, :, chunk], attention)
        if not self.looking:
            return
        self.entropy[layer, start:stop] = _entropy(attention)
        by_head = attention.by_head
        for reading in self._readings:
            hidden = reading.hidden(layer, start, stop)
            mass = by_head if hidden is None else by_head.masked_fill(hidden, 0)
            reading.mass[layer, start:stop] = mass.sum(-1).mean(1)[0].cpu().numpy()


class _Reading:
    """One setting's reading, and what was found of it so far; arrays are NaN where nothing was."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: SequenceTokens,
        function_tokens: torch.Tensor,
        settings: Settings,
        document: int,
        n_layers: int,
    ) -> None:
        length = len(tokens.ids)
        self.settings, self._tokens, self._length = settings, tokens, length
        self._ids = torch.from_numpy(tokens.ids)
        self._is_function: Bools = function_tokens.cpu().numpy()[tokens.ids]
        self._kinds = torch.from_numpy(np.where(tokens.is_special, 2, self._is_function)).to(model.device)
        self.reader = Reader(
            model,
            self._ids[None],
            settings,
            documents=torch.tensor([document]),
            function_tokens=function_tokens,
            with_residuals=True,
            watch=self._watch,
        )
        self.cache: RetentionCache | None = None
        self._looking = self.follows = False
        by_layer = (n_layers, length)
        self.error, self.local, self.mass, self.entropy = (
            np.full(by_layer, np.nan, np.float32) for _ in range(4)
        )
        self._loss, self._full_loss, self._kl = (np.zeros(length - 1, np.float64) for _ in range(3))
        self._agreed = np.zeros(length - 1, bool)
        self._similarity: list[dict[int, float]] = []
        self._kept: list[dict[int, tuple[int, int]]] = []
        self._stops: list[int] = []
        self._bytes: list[tuple[int, int, int]] = []
        self._slots: list[int] = []

    @property
    def prompt(self) -> int:
        """Tokens of the prompt; 0 under `stream`."""
        return self.settings.protocol.prompt if isinstance(self.settings.protocol, Prefill) else 0

    def hidden(self, layer: int, start: int, stop: int) -> torch.Tensor | None:
        """(1, heads, q, n) bool: which of the first `stop` tokens the chunk's queries do not find in this reading.

        The future is among them. None: they find whatever the full run finds.
        """
        if self.cache is None or not self.settings.policy.evicts:
            return None
        governed = self.cache.layers[layer]
        rules = governed.rules
        gone = governed.fates.gone_at[..., :stop] <= start
        positions = torch.arange(stop, device=gone.device)
        own = positions[start:]
        visible = None
        if isinstance(self.settings.protocol, Stream) and stop - start > 1:
            visible = self.settings.policy.visible(
                own, positions.expand(1, 1, stop), rules.slots, rules.protection
            )
        if visible is None and not bool(gone.any()):
            return None
        hidden: torch.Tensor = (positions > own[:, None]) | gone[:, :, None]
        return hidden if visible is None else hidden | ~visible

    def begin(self, *, looking: bool) -> None:
        """Go to the next chunk: while it is the full run's, that is read in its place."""
        self._looking = looking
        self.reader.begin()
        self.follows = self.reader.is_full

    def next(self, full: _FullRun) -> None:
        """Read the chunk that was begun, or take the full run's, and compare it."""
        step = self.reader.follow(full.step) if self.follows else self.reader.read()
        if (step.start, step.stop) != (full.step.start, full.step.stop):
            raise AssertionError("readings in lockstep have the same chunks")
        self.cache = step.cache
        self._compare_predictions(step, full)
        if full.looking and self.follows:
            self.error[:, step.start : step.stop] = 0
        elif full.looking:
            for layer, residual in enumerate(step.residuals):
                self.error[layer, step.start : step.stop] = _relative(
                    residual[0].float(), full.residuals[layer]
                )
        self._similarity.append(_similarities(self.cache) if full.looking else {})
        self._kept.append(self._count_kept() if full.looking else {})
        self._weigh(step)

    def _compare_predictions(self, step: Step, full: _FullRun) -> None:
        stop = min(step.stop, self._length - 1)
        n = stop - step.start
        if n <= 0:
            return
        exact, found = full.step.log_probs[0, :n], step.log_probs[0, :n]
        target = self._ids[step.start + 1 : stop + 1].to(found.device)[:, None]
        span = slice(step.start, stop)
        self._loss[span] = -found.gather(-1, target)[:, 0].double().cpu().numpy()
        self._full_loss[span] = -exact.gather(-1, target)[:, 0].double().cpu().numpy()
        if self.follows:
            self._agreed[span] = True
            return
        self._kl[span] = torch.linalg.vecdot(full.step.probs[0, :n], exact - found).double().cpu().numpy()
        self._agreed[span] = (full.step.first[0, :n] == step.first[0, :n]).cpu().numpy()

    def _watch(self, layer: int, positions: torch.Tensor, attention: Attention) -> None:
        if self._looking:
            start, stop = int(attention.positions[0]), int(attention.positions[-1]) + 1
            self.entropy[layer, start:stop] = _entropy(attention)

    def _count_kept(self) -> dict[int, tuple[int, int]]:
        assert self.cache is not None
        found = {}
        for layer in self.cache.governed:
            positions = layer.slots().positions
            kinds = self._kinds[positions.long().clamp(min=0)]
            alive = positions >= 0
            found[layer.layer] = (int((alive & (kinds < 2)).sum()), int((alive & (kinds == 1)).sum()))
        return found

    def _weigh(self, step: Step) -> None:
        governed = step.cache.governed
        hot = sum(layer.keys.nbytes + layer.values.nbytes for layer in governed)
        warm = sum(layer.warm.n_bytes for layer in governed if layer.warm is not None)
        self._bytes.append((hot, warm, step.cache.n_bytes - hot - warm))
        self._slots.append(max(int(layer.slots().alive.sum(-1).max()) for layer in governed))
        self._stops.append(step.stop)

    @property
    def _first_loss(self) -> int | None:
        """Tokens seen when something first had to leave its place; None: nothing had."""
        assert self.cache is not None
        times = [
            int(torch.minimum(fates.gone_at, fates.warm_at).min()) for fates in self.cache.fates.values()
        ]
        return min(times) if min(times) < NEVER else None

    def files(self, full: _FullRun) -> dict[str, pa.Table]:
        """What was found, as files.

        Raises:
            ModelError: if a loss is not finite.
        """
        wrong = np.flatnonzero(
            ~(np.isfinite(self._loss) & np.isfinite(self._full_loss) & np.isfinite(self._kl))
        )
        if len(wrong):
            raise ModelError(
                f"{len(wrong):,} of {len(self._loss):,} losses under the policy {self.settings.policy.name} are not "
                f"finite, the first at position {wrong[0] + 1}",
                hint="try model.dtype = 'float32'",
            )
        found = {
            "reading_sums": self._sums(full),
            "reading_losses": self._losses(),
            "reading_layers": self._layers(full),
            "reading_survival": self._survival(),
        }
        return {
            name: pa.Table.from_pylist(rows, schema=SHARD_FILES[name]) if isinstance(rows, list) else rows
            for name, rows in found.items()
        }

    @property
    def _counting(self) -> Bools:
        """(length − 1,) which predictions count."""
        counting = self._tokens.predictions
        counting[: self.prompt] = False
        return counting

    def _sums(self, full: _FullRun) -> list[dict[str, Any]]:
        cache, counting = self.cache, self._counting
        assert cache is not None
        first, policy = self._first_loss, self.settings.policy
        if self.prompt:
            chosen = [place for place, stop in enumerate(self._stops) if stop == self.prompt]
        elif first is None:
            chosen = [len(self._stops) - 1]
        else:
            chosen = [place for place, stop in enumerate(self._stops) if stop >= first]
        weighed = np.array([self._bytes[place] for place in chosen], np.int64)
        rules, shape = cache.rules, cache.shape
        heads = shape.heads * len(shape.layers)
        allowed_slots = rules.slots if policy.evicts and rules.tiers is None else None
        allowed_bytes = None
        if rules.tiers is not None:
            allowed_bytes = heads * rules.tiers.budget
        elif allowed_slots is not None:
            slot = shape.token_bytes + policy.state_bytes
            allowed_bytes = heads * (allowed_slots * slot + policy.memory_bytes(shape))
        return [
            {
                "n": int(counting.sum()),
                "loss_units": int(_units(self._loss)[counting].sum()),
                "full_loss_units": int(_units(self._full_loss)[counting].sum()),
                "kl_units": int(_units(self._kl)[counting].sum()),
                "agreed": int(self._agreed[counting].sum()),
                "chunks": len(chosen),
                "hot_bytes": int(weighed[:, 0].sum()),
                "warm_bytes": int(weighed[:, 1].sum()),
                "state_bytes": int(weighed[:, 2].sum()),
                "most_bytes": int(weighed.sum(1).max()),
                "peak_bytes": cache.peak_bytes,
                "full_bytes": full.bytes_at[self.prompt or self._length],
                "allowed_bytes": allowed_bytes,
                "most_slots": max(self._slots[place] for place in chosen),
                "allowed_slots": allowed_slots,
            }
        ]

    def _losses(self) -> list[dict[str, Any]]:
        counting = self._counting
        current, following = self._is_function[:-1], self._is_function[1:]
        bucket = 2 * ~current + ~following
        edges = octaves(self._length)
        place = np.searchsorted(edges, np.arange(1, self._length), side="right") - 1
        units, exact = _units(self._loss), _units(self._full_loss)
        rows = []
        for number, name in enumerate(BUCKETS):
            for octave in range(len(edges) - 1):
                here = counting & (bucket == number) & (place == octave)
                if here.any():
                    rows.append(
                        {
                            "bucket": name,
                            "position_from": edges[octave],
                            "position_to": edges[octave + 1],
                            "n": int(here.sum()),
                            "loss_units": int(units[here].sum()),
                            "full_loss_units": int(exact[here].sum()),
                        }
                    )
        return rows

    def _layers(self, full: _FullRun) -> list[dict[str, Any]]:
        since = max(1, self.prompt, self._first_loss or 0)
        places = [place for place, stop in enumerate(self._stops) if stop >= since and self._kept[place]]
        rows = []
        for layer in range(full.n_layers):
            own = {name: getattr(self, name)[layer, since:] for name in ("error", "local", "mass", "entropy")}
            kept = [self._kept[place][layer] for place in places if layer in self._kept[place]]
            rows.append(
                {
                    "layer": layer,
                    "n": int(np.isfinite(own["error"]).sum()),
                    "error": _median(own["error"]),
                    "local_error": _median(own["local"]),
                    "retained_mass": _mean(own["mass"]),
                    "attention_entropy": _mean(own["entropy"]),
                    "full_attention_entropy": _mean(full.entropy[layer, since:]),
                    "key_similarity": _mean_of(self._similarity, places, layer),
                    "full_key_similarity": _mean_of(full.similarity, places, layer),
                    "kept": sum(n for n, _ in kept) if kept else None,
                    "kept_function": sum(n for _, n in kept) if kept else None,
                }
            )
        return rows

    def _survival(self) -> pa.Table | list[dict[str, Any]]:
        if not isinstance(self.settings.protocol, Stream):
            return []
        assert self.cache is not None
        counted = ~self._tokens.is_special
        counted[: self.settings.protection.sinks] = False
        return life_table(
            self.cache.fates,
            self._is_function,
            counted,
            self.settings.protocol.chunk,
            has_tiers=self.cache.rules.tiers is not None,
        )


def octaves(length: int) -> list[int]:
    """Ends of the ranges of positions of a sequence: 0, 64, 128, 256, …, the last its length."""
    edges, end = [0], FIRST_OCTAVE
    while end < length:
        edges.append(end)
        end *= 2
    return [*edges, length]


def _units(nats: npt.NDArray[np.float64]) -> Longs:
    return np.rint(nats * UNIT).astype(np.int64)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> Floats:
    error: Floats = ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).cpu().numpy()
    return error


def _entropy(attention: Attention) -> Floats:
    entropy: Floats = torch.special.entr(attention.weights).sum(-1).mean((1, 2))[0].cpu().numpy()
    return entropy


def _similarities(cache: RetentionCache) -> dict[int, float]:
    """Of each governed layer the mean cosine of two different keys of a head; none where no head has two."""
    found = {}
    for layer in cache.governed:
        keys = layer.keys if layer.warm is None else torch.cat((layer.warm.keys(), layer.keys), dim=-2)
        alive = layer.slots().alive
        unit = torch.nn.functional.normalize(keys.float(), dim=-1) * alive[..., None]
        n = alive.sum(-1).double()
        among = (unit.double().sum(-2).square().sum(-1) - n) / (n * (n - 1))
        if bool((n > 1).any()):
            found[layer.layer] = float(among[n > 1].mean())
    return found


def _median(numbers: Floats) -> float | None:
    known = numbers[np.isfinite(numbers)]
    return float(np.median(known)) if len(known) else None


def _mean(numbers: Floats) -> float | None:
    known = numbers[np.isfinite(numbers)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _mean_of(found: Sequence[dict[int, float]], places: Sequence[int], layer: int) -> float | None:
    known = [found[place][layer] for place in places if layer in found[place]]
    return sum(known) / len(known) if known else None
