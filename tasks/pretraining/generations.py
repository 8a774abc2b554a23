"""How each checkpoint continues fixed prompts: greedily, and sampled with a fixed seed (PAPER 1.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from infra.manifest import Manifest, commit, content_key, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import FunctokError, ModelError
from schemas.pretraining.section import Generations, consolidation_of
from schemas.pretraining.work import Checkpoint, GeneratedTexts
from schemas.tables import SHARD_FILES
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.pretraining.checkpoint_jobs import named, open_checkpoint, run_by_checkpoint

VERSION = 1
MODES = ("greedy", "sampled")


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """One checkpoint's texts: a folder to make or to find."""

    checkpoint: Checkpoint
    inputs: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"generations/{content_key(**self.inputs)}"


def find_generations(
    config: Config, storage: Storage, checkpoints: Sequence[Checkpoint]
) -> list[GeneratedTexts] | None:
    """The texts of all checkpoints, in the order given, or None if any is missing."""
    return _found(storage, _units(config, storage, checkpoints))


def missing_generations(
    config: Config, storage: Storage, checkpoints: Sequence[Checkpoint]
) -> tuple[int, list[str]]:
    """The number of checkpoints whose texts are done, and a line for each other."""
    units = _units(config, storage, checkpoints)
    done = load_all(storage, [unit.folder for unit in units])
    missing = [unit.checkpoint for unit in units if unit.folder not in done]
    return len(units) - len(missing), [f"{one.series}, step {one.step}" for one in missing]


def generate_texts(
    config: Config, storage: Storage, checkpoints: Sequence[Checkpoint], progress: Progress = silent
) -> list[GeneratedTexts]:
    """Make the texts that are missing.

    Raises:
        ModelError: if a checkpoint does not fit the tokenizer, a prompt leaves no room in its context, or
            logits are not finite.
    """
    units = _units(config, storage, checkpoints)
    done = load_all(storage, [unit.folder for unit in units])
    missing = [unit for folder, unit in {unit.folder: unit for unit in units}.items() if folder not in done]
    if missing:
        total, seen = len(missing) * len(MODES) * len(_section(config).prompts), 0
        progress(0, total, "texts, generations")
        for size in run_by_checkpoint(config, storage, missing, partial(_make, config, storage)):
            seen += size
            progress(seen, total, "texts, generations")
    found = _found(storage, units)
    if found is None:
        raise FunctokError("texts vanished while they were made", stage="generations", hint="run again")
    return found


def check_prompts(config: Config, storage: Storage, context_length: int) -> None:
    """Whether every prompt leaves room for its continuation.

    Args:
        config: The configuration, its tokenizer resolved.
        storage: Where the tokenizer may be.
        context_length: Positions of the models that are to be trained.

    Raises:
        ModelError: naming the first prompt that does not, or one that is empty without a BOS token.
    """
    tokenizer, section = load_tokenizer(config.model, storage), _section(config)
    for prompt in section.prompts:
        length = len(prompt_ids(prompt, tokenizer, prepend_bos=config.windows.prepend_bos))
        if length + section.max_new_tokens > context_length:
            raise ModelError(
                f"consolidation.generations: the prompt {prompt[:60]!r} has {length} tokens, and with max_new_tokens = "
                f"{section.max_new_tokens} that is more than the models have positions ({context_length})",
                hint="shorten the prompt, lower max_new_tokens, or raise consolidation.train.context_size",
                stage="generations",
            )


def _section(config: Config) -> Generations:
    section = consolidation_of(config).generations
    assert section is not None
    return section


def _units(config: Config, storage: Storage, checkpoints: Sequence[Checkpoint]) -> list[_Unit]:
    tokenizer = load_tokenizer(config.model, storage)
    return [
        _Unit(
            checkpoint=checkpoint,
            inputs={
                "version": VERSION,
                "model": checkpoint.key,
                "generations": _section(config).model_dump(),
                "prepend_bos": config.windows.prepend_bos,
                "tokenizer": tokenizer.key,
                # Where texts end; which special token does is no part of the tokenizer's key.
                "eos": tokenizer.tokenizer.eos_token_id,
            },
        )
        for checkpoint in checkpoints
    ]


def _found(storage: Storage, units: Sequence[_Unit]) -> list[GeneratedTexts] | None:
    done = load_all(storage, [unit.folder for unit in units])
    if any(unit.folder not in done for unit in units):
        return None
    return [GeneratedTexts(checkpoint=unit.checkpoint, folder=unit.folder) for unit in units]


def _make(config: Config, storage: Storage, unit: _Unit) -> Iterator[int]:
    """Make a checkpoint's texts, yielding 1 for each."""
    section = _section(config)
    rows = []
    with named(unit.checkpoint, "generations"):
        model, tokenizer = open_checkpoint(config, storage, unit.checkpoint)
        end = tokenizer.tokenizer.eos_token_id
        stops = [] if end is None else [end]
        for prompt in section.prompts:
            ids = prompt_ids(prompt, tokenizer, prepend_bos=config.windows.prepend_bos)
            for mode in MODES:
                (new,) = model.generate(
                    [ids],
                    section.max_new_tokens,
                    temperature=section.temperature if mode == "sampled" else None,
                    top_p=section.top_p,
                    seed=section.seed,
                    stop_ids=stops,
                )
                rows.append(
                    {
                        "prompt": prompt,
                        "continuation": continuation(ids, new, tokenizer),
                        "mode": mode,
                        "seed": section.seed if mode == "sampled" else None,
                    }
                )
                yield 1
    table = pa.Table.from_pylist(rows, schema=SHARD_FILES["generations"])
    written = storage.write_parquet(f"{unit.folder}/generations.parquet", table)
    commit(storage, unit.folder, Manifest(stage="generations", inputs=unit.inputs), [written])


def prompt_ids(prompt: str, tokenizer: LoadedTokenizer, *, prepend_bos: bool) -> list[int]:
    """A prompt's ids as the corpus has them, after BOS where windows begin with it.

    An empty prompt is BOS alone, wherever the tokenizer has one.

    Raises:
        ModelError: if the prompt is empty and there is no BOS token.
    """
    ids: list[int] = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
    if ids and not prepend_bos:
        return ids
    if tokenizer.bos_id is None:
        raise ModelError("an empty prompt needs a BOS token, and the tokenizer has none", hint="give it text")
    return [tokenizer.bos_id, *ids]


def continuation(prompt: Sequence[int], new: Sequence[int], tokenizer: LoadedTokenizer) -> str:
    """The text of the new tokens, without special tokens, as it goes on from the prompt's.

    Some decoders drop a space at the start of what they decode: the prompt stands before it and is cut off.
    """

    def decoded(ids: Sequence[int]) -> str:
        return str(
            tokenizer.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    start, whole = decoded(prompt), decoded([*prompt, *new])
    return whole.removeprefix(start) if whole.startswith(start) else decoded(new)
