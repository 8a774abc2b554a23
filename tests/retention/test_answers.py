"""Retrieval prompts, and asking what a cache still knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forgetful import FUNCTION, VOCABULARY, model, policy, settings
from tiny import save_tokenizer

from schemas.errors import ConfigError, ModelError
from tasks.retention.answers import answers
from tasks.retention.policies import POLICIES
from tasks.retention.prompts import TASKS, Prompt, prompts
from tasks.retention.running import Prefill, Stream

DEPTHS = (0.0, 0.3, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer")).backend_tokenizer


def made(
    tokenizer: Any, task: str, length: int = 900, n: int = 3, seed: int = 5, depths: Any = DEPTHS
) -> list[Prompt]:
    return prompts(tokenizer, task, length, depths, n, seed=seed, bos_id=0)


@pytest.mark.parametrize("task", TASKS)
def test_contexts_hold_the_answer_at_its_depth_and_are_of_one_length(tokenizer: Any, task: str) -> None:
    found = made(tokenizer, task)
    assert [(prompt.depth, prompt.number) for prompt in found] == [(d, i) for d in DEPTHS for i in range(3)]
    for prompt in found:
        assert len(prompt.context) == 900
        assert prompt.context[0] == 0
        text, answer = tokenizer.decode(list(prompt.context)), tokenizer.decode(list(prompt.answer))
        before = len(tokenizer.encode(text[: text.index(answer)]).ids)
        # A sentence of filler is 45 tokens long at most, and other sentences may lie before this one.
        assert abs(before / 900 - prompt.depth) < (0.1 if task == "passkey" else 0.25)
        assert tokenizer.decode(list(prompt.question)).startswith("\n\nWhat is the ")
        assert answer[0] == " "
        assert len(answer.strip()) == 5


def test_the_asked_for_key_or_variable_is_the_right_one_of_several(tokenizer: Any) -> None:
    for prompt in made(tokenizer, "multi_key"):
        text, question = tokenizer.decode(list(prompt.context)), tokenizer.decode(list(prompt.question))
        word, answer = question.rsplit(" for ", 1)[1].split()[0], tokenizer.decode(list(prompt.answer))
        assert f" The special number for {word} is{answer}." in text
        assert text.count("The special number for") == 4
    for prompt in made(tokenizer, "variable_tracking"):
        text, question = tokenizer.decode(list(prompt.context)), tokenizer.decode(list(prompt.question))
        name = question.rsplit(" of ", 1)[1].split()[0]
        for _ in range(2):
            name = text.split(f"The value of {name} is the value of ", 1)[1][0]
        assert f"The value of {name} is{tokenizer.decode(list(prompt.answer))}." in text


def test_a_prompt_depends_on_its_seed_and_itself_alone(tokenizer: Any) -> None:
    whole = made(tokenizer, "passkey")
    assert made(tokenizer, "passkey", depths=(0.5,)) == [p for p in whole if p.depth == 0.5]
    assert [p.context for p in made(tokenizer, "passkey", seed=6)] != [p.context for p in whole]
    assert len({prompt.answer for prompt in whole}) == len(whole)


def test_what_cannot_be_made_is_said(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no retrieval task 'sorting'"):
        made(tokenizer, "sorting")
    with pytest.raises(ConfigError, match="a context of 30 tokens has no room for the task multi_key"):
        made(tokenizer, "multi_key", length=30)


def random_prompts(
    n: int, length: int = 80, question: int = 6, answer: int = 4, seed: int = 0
) -> list[Prompt]:
    ids = torch.randint(
        3, VOCABULARY, (n, length + question + answer), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return [
        Prompt(
            task="passkey",
            depth=0.5,
            number=number,
            context=tuple(row[:length]),
            question=tuple(row[length : length + question]),
            answer=tuple(row[length + question :]),
        )
        for number, row in enumerate(ids)
    ]


def plain(prompt: Prompt) -> tuple[list[int], float]:
    """What transformers' own generate continues with, and the answer's log-probability by a forward without a cache."""
    module, ids = model().module, torch.tensor([[*prompt.context, *prompt.question]])
    with torch.no_grad():
        new = module.generate(ids, max_new_tokens=len(prompt.answer), do_sample=False, pad_token_id=0)
        whole = torch.tensor([[*prompt.context, *prompt.question, *prompt.answer]])
        logprobs = module(whole).logits[0].log_softmax(-1)
    n = len(prompt.answer)
    return new[0, ids.shape[1] :].tolist(), sum(
        float(logprobs[-n - 1 + i, token]) for i, token in enumerate(prompt.answer)
    )


@pytest.mark.parametrize("protocol", [Stream(chunk=16), Prefill(prompt=80, chunk=16)])
def test_the_full_cache_answers_as_greedy_decoding_does(protocol: Any) -> None:
    asked = random_prompts(5)
    greedy = [plain(prompt)[0] for prompt in asked]
    # Every second prompt is asked for what the model would say.
    asked = [
        prompt if number % 2 else Prompt(**{**vars(prompt), "answer": tuple(greedy[number])})
        for number, prompt in enumerate(asked)
    ]
    found = answers(model(), asked, settings(policy("full"), budget=None, protocol=protocol))
    assert [answer.exact_match for answer in found] == [True, False, True, False, True]
    assert [answer.logprob for answer in found] == pytest.approx([plain(p)[1] for p in asked], abs=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_asked_and_batches_change_nothing(name: str) -> None:
    asked = random_prompts(3) + random_prompts(2, question=9, answer=2, seed=1)
    share = 0.5 if name == "cmp" else 0.25
    how = settings(policy(name), share, protocol=Stream(chunk=16))
    found = answers(model(), asked, how, function_tokens=FUNCTION)
    assert len(found) == 5
    full = answers(model(), asked, settings(policy("full"), budget=None, protocol=Stream(chunk=16)))
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(found, full, strict=True))
    assert (difference > 1e-3) == (name != "full")
    if name not in {"random", "str", "cmp", "function", "content"}:
        # Their random keys know a prompt by its place.
        alone = [answers(model(), [prompt], how)[0].logprob for prompt in asked]
        assert [answer.logprob for answer in found] == pytest.approx(alone, abs=1e-3)


def test_a_prompt_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="has 130 tokens with its question and answer") as caught:
        answers(model(), random_prompts(1, length=120), settings(policy("full"), budget=None))
    assert "to 118 or less" in caught.value.hint
