"""Prompts, and their continuations by transformers' own `generate`, free of what a checkpoint would like them to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from schemas.errors import ModelError
from tasks.models.tokenizers import LoadedTokenizer


def continuations(
    module: Any,
    name: str,
    batches: Sequence[torch.Tensor],
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
) -> list[list[int]]:
    """Continue batches, one after another; each batch's sampling starts from `seed`.

    Keys and values of earlier tokens are cached: after the prompt, a forward sees one token of each row. A row that
    has ended is filled up until all rows of its batch have. The rest is as in `LanguageModel.generate`.

    Args:
        module: The transformers model with its head; errors call it `name`.
        batches: (rows, n) ids each, on the model's device, rows of equal length: nothing is padded.

    Returns:
        The new ids of each row of each batch, in order.

    Raises:
        ModelError: if logits are not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    def refuse_not_finite(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is a token that the model rules out.
        if bool((scores.isnan() | (scores == torch.inf)).any()):
            raise ModelError(f"the logits of {name} are not finite", hint="try model.dtype = 'float32'")
        return scores

    stops = sorted({*stop_ids, *_own_stops(module)})
    sampling: dict[str, Any] = (
        {} if temperature is None else {"temperature": temperature, "top_p": top_p, "top_k": 0}
    )
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
        **sampling,
    )
    texts = []
    seeded = range(torch.cuda.device_count() if module.device.type == "cuda" else 0)
    with torch.random.fork_rng(devices=seeded), _bare(module):
        for ids in batches:
            torch.manual_seed(seed)
            made = module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([refuse_not_finite]),
            )
            texts += [_cut(row, stops) for row in made[:, ids.shape[1] :].tolist()]
    return texts


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


def _cut(new: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(new) if token in stops), len(new))
    return new[:end]


def _own_stops(module: Any) -> list[int]:
    own = getattr(module.generation_config, "eos_token_id", None)
    return [own] if isinstance(own, int) else list(own or ())


@contextmanager
def _bare(module: Any) -> Iterator[None]:
    # What a checkpoint's own generation_config says (penalties, another top_k) fills every gap in ours.
    from transformers import GenerationConfig

    own, module.generation_config = module.generation_config, GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = own
