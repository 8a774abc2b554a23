"""Prompts whose answer must be remembered: passkey, several keys, and variables, generated from a seed.

A prompt is a context of an exact number of tokens, filler with a few sentences that matter in it, and a question that
comes after it: who reads the context does not know what will be asked. The tasks are those of the literature: passkey
(Mohtashami & Jaggi 2023, arXiv 2305.16300), several keys of which one is asked for, and variable tracking (both RULER,
arXiv 2404.06654), in which the answer stands at the end of a chain of assignments.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from schemas.errors import ConfigError

VERSION = 1
"""Raise when the same seed gives other prompts."""

KEYS, LINKS = 4, 3
"""Keys of which one is asked for; assignments of a chain."""

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The river runs slowly to the sea.",
    "A dog sleeps in front of the house.",
    "Nobody knows what the weather will bring.",
    "The train was late this morning.",
    "Some of the books are old.",
    "She walked along the street and came home.",
    "In the evening the lights go on.",
    "They talked about this and that.",
    "The bread was still warm.",
    "It rained for most of the week.",
    "A boy threw a stone into the lake.",
)
WORDS = (
    *(
        "apple",
        "bridge",
        "candle",
        "desert",
        "engine",
        "forest",
        "garden",
        "hammer",
        "island",
        "jacket",
        "kitchen",
    ),
    *(
        "ladder",
        "market",
        "needle",
        "ocean",
        "pencil",
        "river",
        "saddle",
        "temple",
        "valley",
        "window",
        "yellow",
    ),
)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A context and what is asked after it, as token ids.

    Attributes:
        task: Which of `TASKS`.
        depth: Where in the context the first sentence lies that the answer needs, as a share of the filler before it.
        number: Which of the prompts at this depth.
        context: Ids of an exact number, BOS included where there is one.
        question: Ids that follow it.
        answer: Ids that are right after the question.
    """

    task: str
    depth: float
    number: int
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """What a task puts into the filler: sentences by their depths, then the question and its answer."""

    sentences: Sequence[tuple[float, str]]
    question: str
    answer: str


def prompts(
    tokenizer: Any, task: str, length: int, depths: Sequence[float], n: int, *, seed: int, bos_id: int | None
) -> list[Prompt]:
    """The prompts of a task, depth by depth.

    A prompt depends on nothing but the seed, its own task, length, depth and number, and the tokenizer.

    Args:
        tokenizer: A backend of `tasks.models.tokenizers`.
        task: One of `TASKS`.
        length: Tokens of every context.
        depths: Shares from 0 to 1.
        n: Prompts at each depth.
        seed: Of texts.
        bos_id: What a context begins with; None: nothing of its own.

    Raises:
        ConfigError: if there is no such task, or a context is too short for what it must hold.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no retrieval task {task!r}", hint=f"choose one of {', '.join(TASKS)}")

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    first = [] if bos_id is None else [bos_id]
    filler = [ids(f" {sentence}") for sentence in FILLER]
    found = []
    for depth in depths:
        for number in range(n):
            rng = random.Random(f"{seed}/{task}/{length}/{depth}/{number}")  # noqa: S311
            text = TASKS[task](depth, rng)
            placed = sorted((at, ids(f" {sentence}")) for at, sentence in text.sentences)
            room = length - len(first) - sum(len(sentence) for _, sentence in placed)
            if room < 1:
                raise ConfigError(
                    f"a context of {length} tokens has no room for the task {task}, whose sentences take "
                    f"{length - room}",
                    hint="raise retention.retrieval.lengths",
                )
            found.append(
                Prompt(
                    task=task,
                    depth=depth,
                    number=number,
                    context=(*first, *_filled(placed, filler, room, rng)),
                    question=tuple(ids(text.question)),
                    answer=tuple(ids(text.answer)),
                )
            )
    return found


def _filled(
    placed: Sequence[tuple[float, list[int]]], filler: Sequence[list[int]], room: int, rng: random.Random
) -> list[int]:
    """The placed sentences among whole sentences of filler; the last one of these is cut where the context ends."""
    sentences = list[list[int]]()
    while sum(map(len, sentences)) < room:
        sentences.append(rng.choice(filler))
    starts = [0, *accumulate(map(len, sentences))]
    sentences[-1] = sentences[-1][: room - starts[-2]]
    starts[-1] = room
    before: dict[int, list[int]] = {}
    for depth, ids in placed:
        nearest = min(range(len(starts)), key=lambda place: abs(starts[place] - depth * room))
        before.setdefault(nearest, []).extend(ids)
    whole = list[int]()
    for place in range(len(starts)):
        whole += before.get(place, [])
        whole += sentences[place] if place < len(sentences) else []
    return whole


def _passkey(depth: float, rng: random.Random) -> _Text:
    key = _numbers(rng, 1)[0]
    return _Text(
        sentences=[(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")],
        question="\n\nWhat is the pass key? The pass key is",
        answer=f" {key}",
    )


def _several_keys(depth: float, rng: random.Random) -> _Text:
    words, numbers = rng.sample(WORDS, KEYS), _numbers(rng, KEYS)
    depths = [depth, *(rng.random() for _ in range(KEYS - 1))]
    return _Text(
        sentences=[
            (at, f"The special number for {word} is {number}.")
            for at, word, number in zip(depths, words, numbers, strict=True)
        ],
        question=f"\n\nWhat is the special number for {words[0]}? The special number for {words[0]} is",
        answer=f" {numbers[0]}",
    )


def _variable_tracking(depth: float, rng: random.Random) -> _Text:
    names, numbers = rng.sample(LETTERS, LINKS + 1), _numbers(rng, 2)
    sentences = [(depth, f"The value of {names[0]} is {numbers[0]}.")]
    for link in range(1, LINKS):
        at = depth + (1 - depth) * link / LINKS
        sentences.append((at, f"The value of {names[link]} is the value of {names[link - 1]}."))
    # Without a second number there would be nothing to tell apart.
    sentences.append((rng.random(), f"The value of {names[-1]} is {numbers[1]}."))
    asked = names[LINKS - 1]
    return _Text(
        sentences=sentences,
        question=f"\n\nWhat is the value of {asked}? The value of {asked} is",
        answer=f" {numbers[0]}",
    )


def _numbers(rng: random.Random, n: int) -> list[int]:
    return rng.sample(range(10_000, 100_000), n)


TASKS: Mapping[str, Callable[[float, random.Random], _Text]] = {
    "passkey": _passkey,
    "multi_key": _several_keys,
    "variable_tracking": _variable_tracking,
}
"""What each task puts into a context, and asks: one key; one of several keys; a variable at the end of a chain."""
