"""Prompts as the model sees them, and the places in them that PAPER 1.3 looks at.

Positions count all tokens that the model sees, from 0: BOS, a chat template's, and the prompt's own. A chat template
is taken to hold all that a prompt needs, BOS among it; without one, BOS begins the prompt where windows begin with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from schemas.config import Config
from schemas.errors import ConfigError, ModelError
from schemas.steering.section import short, steering_of
from tasks.models.tokenizers import LoadedTokenizer

_STANDS_FOR_TEXT = "functok"

_ENDS = ("\n", ".", "a")
"""Ends of a token: before any text, one of them hardly merges with it."""

_TODAY = datetime(2024, 7, 26)
"""What templates that show the date are told, or a prompt would be another one every day: the date that Llama 3's
template has where none is given."""

_CLOCK = (
    "{% macro strftime_now(format) %}{% set shown = namespace(text=format) %}{% for code, text in functok_today %}"
    "{% set shown.text = shown.text | replace(code, text) %}{% endfor %}{{ shown.text }}{% endmacro %}{{ '' }}"
)
"""Goes before a template instead of transformers' function of that name: what is given to templates is plain data."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model sees it; all tuples have one entry a token, whose index is its position.

    Attributes:
        text: The prompt's own text, without a chat template.
        ids: Token ids, BOS and the chat template's included.
        tokens: Their texts as they stand between others, as the table `tokens` has them.
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
    whole, start, end = _whole(text, config, tokenizer)
    if not _has_template(config, tokenizer) and config.windows.prepend_bos:
        if tokenizer.bos_id is None:
            raise ModelError(
                f"the tokenizer of {config.model.name} has no BOS token",
                hint="set windows.prepend_bos = false",
            )
        head = [tokenizer.bos_id]
    encoded = tokenizer.backend.encode(whole, add_special_tokens=False)
    ids = [*head, *encoded.ids]
    # A token is of the text where their spans of characters overlap.
    in_text = [False for _ in head] + [max(a, start) < min(b, end) for a, b in _spans(encoded.offsets)]
    if not any(in_text):
        raise ConfigError(f"the prompt {short(text)} has no token", hint="give it text")
    special = set(tokenizer.special_ids)
    return Prompt(
        text=text,
        ids=tuple(ids),
        tokens=tuple(tokenizer.texts[i] for i in ids),
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
    """The position of the prompt's own last content token before its last function token; None if there is none."""
    function, end = {int(i) for i in function_ids}, last_function_position(prompt, function_ids)
    for position in reversed(range(end)):
        is_own = prompt.in_text[position] and not prompt.is_special[position]
        if is_own and prompt.ids[position] not in function:
            return position
    return None


def target_ids(target: str, text: str, config: Config, tokenizer: LoadedTokenizer) -> list[int]:
    """The ids by which a target continues a prompt (up to where the answer begins), with no special token around it.

    They are what it adds to the prompt's tokens in one text with it. Where the two texts would merge in a token, as
    ` riv` and `er` may, the prompt's tokens stay and the target's own follow: what the tokenizer makes of it within
    a text, not at the start of one, where many tokenizers put a space before it.

    Raises:
        ConfigError: if it adds no token, none of its tokens read as it does after the prompt's, or the chat template
            fails or does not show the prompt.
    """
    prompt, _, _ = _whole(text, config, tokenizer)
    before, whole = _ids(prompt, tokenizer), _ids(prompt + target, tokenizer)
    if whole == before:
        raise ConfigError(f"the target {target!r} has no token", hint="give the text of an answer")
    if added := _after(before, whole):
        return added
    for start in ("", *_ENDS):
        own = _after(_ids(start, tokenizer), _ids(start + target, tokenizer))
        if own and _decoded([*before, *own], tokenizer) == _decoded(whole, tokenizer):
            return own
    raise ConfigError(
        f"the target {target!r} merges with the end of the prompt {short(text)}: no tokens continue it so",
        hint="end the prompt where a token ends, and let the target begin with a space",
    )


def listed(tokens: Iterable[str]) -> str:
    """Tokens as they are, for messages."""
    return " ".join(repr(token) for token in tokens)


def _ids(text: str, tokenizer: LoadedTokenizer) -> list[int]:
    return list(tokenizer.backend.encode(text, add_special_tokens=False).ids)


def _after(before: list[int], whole: list[int]) -> list[int]:
    """What follows `before` in `whole`; nothing where that does not begin with it."""
    return whole[len(before) :] if whole[: len(before)] == before else []


def _decoded(ids: Sequence[int], tokenizer: LoadedTokenizer) -> str:
    return str(tokenizer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _spans(offsets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """[start, end) of each token in characters, blank ones too, of which some tokenizers trim all but a border."""
    spans, last = [], 0
    for start, end in offsets:
        # Trimmed to its end, or at the start of a text to its start.
        spans.append((last, max(end, 1)) if start == end else (start, end))
        last = end
    return spans


def _has_template(config: Config, tokenizer: LoadedTokenizer) -> bool:
    return steering_of(config).chat_template and bool(tokenizer.tokenizer.chat_template)


def _whole(text: str, config: Config, tokenizer: LoadedTokenizer) -> tuple[str, int, int]:
    """What is tokenized of a prompt, and where in it the prompt's own text is: [start, end) in characters."""
    return _in_template(text, tokenizer) if _has_template(config, tokenizer) else (text, 0, len(text))


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
    # `%-d` is `%d` without a leading zero.
    codes = [f"%{padding}{code}" for padding in ("", "-") for code in "aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ"]
    try:
        template = tokenizer.tokenizer.get_chat_template()
        rendered = tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=f"{_CLOCK}{template}" if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=True,
            functok_today=[[code, _TODAY.strftime(code)] for code in codes],
        )
    # A template is a program: it may fail in any way.
    except Exception as error:
        raise ConfigError(
            f"the model's chat template fails on the prompt {short(text)}: {type(error).__name__}: {error}",
            hint="set steering.chat_template = false",
        ) from error
    return str(rendered)
