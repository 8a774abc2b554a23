"""Prompts as the model sees them, and the places in them that PAPER 1.3 looks at.

Positions count all tokens that the model sees, from 0: BOS, a chat template's, and the prompt's own. A chat template
is taken to hold all that a prompt needs, BOS among it; without one, BOS begins the prompt where windows begin with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from infra.errors import ConfigError, ModelError
from schemas.config import Config, steering_of
from schemas.steering import short
from tasks.tokenizers import LoadedTokenizer

_STANDS_FOR_TEXT = "functok"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model sees it; all tuples have one entry a token, whose index is its position.

    Attributes:
        text: The prompt's own text, without a chat template.
        ids: Token ids, BOS and the chat template's included.
        tokens: Their texts, each decoded alone, as the table `tokens` has them.
        is_special: Whether a token is in no table (`tokenizer.all_special_ids`).
        in_text: Whether a token is of the prompt's own text.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    is_special: tuple[bool, ...]
    in_text: tuple[bool, ...]


def tokenized(text: str, config: Config, tokenizer: LoadedTokenizer) -> Prompt:
    """A prompt as the model sees it.

    With a chat template it is the user's only message, up to where the answer begins.

    Raises:
        ConfigError: if it has no token, or the chat template fails or does not show it.
        ModelError: if BOS is wanted and the tokenizer has none.
    """
    head: list[int] = []
    if steering_of(config).chat_template and tokenizer.tokenizer.chat_template:
        whole, start, end = _in_template(text, tokenizer)
    else:
        whole, start, end = text, 0, len(text)
        if config.windows.prepend_bos:
            if tokenizer.bos_id is None:
                raise ModelError(
                    f"the tokenizer of {config.model.name} has no BOS token",
                    hint="set windows.prepend_bos = false",
                )
            head = [tokenizer.bos_id]
    encoded = tokenizer.backend.encode(whole, add_special_tokens=False)
    ids = [*head, *encoded.ids]
    # A token is of the text where their spans of characters overlap.
    in_text = [False for _ in head] + [max(a, start) < min(b, end) for a, b in encoded.offsets]
    if not any(in_text):
        raise ConfigError(f"the prompt {short(text)} has no token", hint="give it text")
    special = set(tokenizer.special_ids)
    return Prompt(
        text=text,
        ids=tuple(ids),
        tokens=tuple(tokenizer.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids),
        is_special=tuple(i in special for i in ids),
        in_text=tuple(in_text),
    )


def last_function_position(prompt: Prompt, function_ids: Collection[int]) -> int:
    """The position of the last token that is a function token and not special.

    Raises:
        ConfigError: if there is none.
    """
    function = {int(i) for i in function_ids}
    for position in reversed(range(len(prompt.ids))):
        if prompt.ids[position] in function and not prompt.is_special[position]:
            return position
    raise ConfigError(
        f"the prompt {short(prompt.text)} has no function token of this corpus; its tokens are {listed(prompt.tokens)}",
        hint="end it with one, such as a question mark, or raise function_tokens.share",
    )


def content_position(prompt: Prompt, function_ids: Collection[int]) -> int | None:
    """The position of the prompt's own last content token before its last function token; None if there is none.

    Raises:
        ConfigError: if the prompt has no function token.
    """
    function, end = {int(i) for i in function_ids}, last_function_position(prompt, function_ids)
    for position in reversed(range(end)):
        is_own = prompt.in_text[position] and not prompt.is_special[position]
        if is_own and prompt.ids[position] not in function:
            return position
    return None


def target_ids(target: str, tokenizer: LoadedTokenizer) -> list[int]:
    """The ids of a continuation, with no special token before or after it.

    Raises:
        ConfigError: if it has no token.
    """
    ids: list[int] = tokenizer.backend.encode(target, add_special_tokens=False).ids
    if not ids:
        raise ConfigError(f"the target {target!r} has no token", hint="give the text of an answer")
    return ids


def listed(tokens: Iterable[str]) -> str:
    """Tokens as they are, for messages."""
    return " ".join(repr(token) for token in tokens)


def _in_template(text: str, tokenizer: LoadedTokenizer) -> tuple[str, int, int]:
    """The rendered template, and where in it the prompt's text is: [start, end) in characters.

    Templates may strip a message: then it is where the stripped text is.
    """
    whole, other = _rendered(text, tokenizer), _rendered(_STANDS_FOR_TEXT, tokenizer)
    before, found, _ = other.rpartition(_STANDS_FOR_TEXT)
    starts = [len(before)] if found and whole.startswith(before) else []
    for shown in filter(None, (text, text.strip())):
        # Where the template's own words depend on the message, a text that is there once is it.
        once = [whole.index(shown)] if whole.count(shown) == 1 else []
        for start in starts + once:
            if whole.startswith(shown, start):
                return whole, start, start + len(shown)
    raise ConfigError(
        f"the model's chat template does not show the prompt {short(text)} as it is",
        hint="change the prompt, or set steering.chat_template = false",
    )


def _rendered(text: str, tokenizer: LoadedTokenizer) -> str:
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the model's chat template fails on the prompt {short(text)}: {error}",
            hint="set steering.chat_template = false",
        ) from error
    return str(rendered)
