"""Causal language models with their heads: losses of every next token, and texts (PAPER 1.4).

Logits are the largest thing that a language model makes: a row of the vocabulary for every token. The decoder runs
once over a batch, and the head over its output in chunks of tokens, so that a chunk's logits exist at a time. What
lies between head and logits in some architectures (scaling, soft capping) is read from their configuration, and a
few tokens tell at loading whether that is all: where it is not, the whole model runs on a few windows at a time,
which is exact for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ModelError
from tasks.models.loading import find_blocks, load_module, residual_of, with_residual
from tasks.models.model import context_length, require_causal, require_known, text_config
from tasks.models.text_generation import continuations

CHUNK_BYTES = 64 << 20
"""Bytes of float32 logits at a time, at most (one token's at least)."""

_PROBE_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class LanguageModel:
    """A causal model on its device.

    Args:
        module: The transformers model with its head, in evaluation mode, on its device.
        name: What errors call it.
        positions: Positions that it was built for; None where it says nothing.

    Attributes:
        blocks: Its decoder blocks.
        device: Where it is.
        vocabulary: Rows of its embedding: token ids are below it.
        is_chunked: Whether the head runs over chunks of tokens; else the whole model runs on a few windows.

    Raises:
        ModelError: if it has no recognizable decoder blocks.
    """

    def __init__(self, module: Any, name: str, positions: int | None) -> None:
        self.module, self.name, self.context_length = module, name, positions
        self._config = text_config(module.config)
        shape = (int(self._config.num_hidden_layers), int(self._config.hidden_size))
        self.blocks = find_blocks(module, *shape, name)
        embedding = module.get_input_embeddings().weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.vocabulary = int(embedding.shape[0])
        self._decoder, self._head = module.get_decoder(), module.get_output_embeddings()
        self._replacements = 0
        self.is_chunked = self._head_explains_logits()

    def token_losses(self, input_ids: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """The cross-entropy of every next token, from float32 logits.

        Windows are right-padded and no mask is given: in a causal model no real position sees what is to its right.

        Args:
            input_ids: (windows, padded length) ids.
            wanted: (windows, padded length - 1) bool, which predictions count, on the CPU; the head runs for
                those alone. None: all.

        Returns:
            (windows, padded length - 1) float32 on the CPU, in nats: the loss of predicting `input_ids[:, 1:]`;
            NaN where not wanted.

        Raises:
            ModelError: if an id is outside the vocabulary.
        """
        self._check_ids(input_ids)
        losses = torch.full((input_ids.shape[0], input_ids.shape[1] - 1), torch.nan)
        if wanted is None:
            wanted = torch.ones_like(losses, dtype=torch.bool)
        if wanted.any():
            measure = self._by_chunks if self.is_chunked else self._by_windows
            with torch.inference_mode():
                found = measure(input_ids.to(self.device), wanted.to(self.device)).cpu()
            losses[wanted] = found
        return losses

    def _by_chunks(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(n,) losses of the wanted predictions in order."""
        hidden = self._hidden(ids)[:, :-1][wanted]
        targets = ids[:, 1:][wanted]
        size = self._tokens_at_a_time
        return torch.cat(
            [
                torch.nn.functional.cross_entropy(self._logits(rows), aims, reduction="none")
                for rows, aims in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
            ]
        )

    @property
    def _tokens_at_a_time(self) -> int:
        return max(1, CHUNK_BYTES // (4 * self.vocabulary))

    def _by_windows(self, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(n,) losses of the wanted predictions in order."""
        # A replacement sees the whole batch at once, as it does where the head runs over chunks.
        size = max(1, CHUNK_BYTES // (4 * self.vocabulary * ids.shape[1]))
        size = len(ids) if self._replacements else size
        found = []
        for some, chosen in zip(torch.split(ids, size), torch.split(wanted, size), strict=True):
            logits = self.module(input_ids=some, use_cache=False).logits[:, :-1][chosen].float()
            found.append(torch.nn.functional.cross_entropy(logits, some[:, 1:][chosen], reduction="none"))
        return torch.cat(found)

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._decoder(input_ids=ids, use_cache=False)[0]
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden).float()
        if divisor := getattr(self._config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if factor := getattr(self._config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if cap := getattr(self._config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.inference_mode()
    def _head_explains_logits(self) -> bool:
        ids = torch.arange(min(_PROBE_TOKENS, self.vocabulary), device=self.device)[None]
        expected = self.module(input_ids=ids, use_cache=False).logits.float()
        try:
            found = self._logits(self._hidden(ids))
        except (AttributeError, RuntimeError, TypeError):
            return False
        if found.shape != expected.shape:
            return False
        if not bool(torch.isfinite(expected).all()):
            return True  # Nothing can be compared; whoever reads the losses says that they are not finite.
        error = (found - expected).abs().max()
        return bool(error <= _TOLERANCE.get(self.dtype, 4e-2) * expected.abs().max())

    def _check_ids(self, ids: torch.Tensor) -> None:
        require_known(ids, self.vocabulary, f"the vocabulary of {self.name}")

    @contextmanager
    def replaced(self, layer: int, replace: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within the block, decoder block `layer` gives `replace(its output)` to what comes after it.

        Args:
            layer: Decoder block, counted from 0.
            replace: From (windows, padded length, d_model) to the same shape; called with the whole batch,
                once for each `token_losses` or `next_log_probs`, and once for each token of `generate_rows`.

        Raises:
            ModelError: if there is no such block.
        """
        if not 0 <= layer < len(self.blocks):
            known = f"choose one of 0 to {len(self.blocks) - 1}"
            raise ModelError(f"{self.name} has no block {layer}: it has {len(self.blocks)}", hint=known)

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            return with_residual(output, replace(residual_of(output)))

        handle = self.blocks[layer].register_forward_hook(hook)
        self._replacements += 1
        try:
            yield
        finally:
            self._replacements -= 1
            handle.remove()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] = (),
    ) -> list[list[int]]:
        """Continue prompts with transformers' own `generate`.

        Prompts run one at a time: in a batch, padding and another shape of the products would round
        differently, and a text would depend on its neighbours. For the same reason each prompt's sampling
        starts from `seed`; the random state of the process is left as it was.

        Args:
            prompts: Token ids of each, BOS included where the model needs it.
            max_new_tokens: New tokens at most.
            temperature: Of sampling; None: greedy.
            top_p: Nucleus of sampling.
            seed: Of sampling.
            stop_ids: Ids that end a text; not in the result. The model's own end-of-text ids count as well.

        Returns:
            The new ids of each prompt.

        Raises:
            ModelError: if a prompt is empty, leaves no room in the model's context, or has ids outside the
                vocabulary, or logits are not finite.
        """
        for prompt in prompts:
            self._check_prompt(prompt, max_new_tokens)
        batches = [torch.tensor([list(prompt)], device=self.device) for prompt in prompts]
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return continuations(self.module, self.name, batches, max_new_tokens, stop_ids=stop_ids, **sampling)

    def generate_rows(
        self, input_ids: torch.Tensor, max_new_tokens: int, stop_ids: Iterable[int] = ()
    ) -> list[list[int]]:
        """Continue the rows of one batch together, greedily: for rows that are one prompt in many settings.

        Rows have one length, so nothing is padded; a batch of another shape may round differently.

        Args:
            input_ids: (rows, n) ids, any device.
            max_new_tokens: New tokens at most.
            stop_ids: As in `generate`.

        Returns:
            The new ids of each row.

        Raises:
            ModelError: as `generate` does.
        """
        self._check_rows(input_ids, max_new_tokens)
        batch = input_ids.to(self.device)
        return continuations(self.module, self.name, [batch], max_new_tokens, stop_ids=stop_ids)

    def next_log_probs(self, input_ids: torch.Tensor) -> torch.Tensor:
        """How likely each token is to come after the last one.

        Args:
            input_ids: (rows, n) ids, rows of equal length, any device.

        Returns:
            (rows, vocabulary) float32 natural log-probabilities on the CPU.

        Raises:
            ModelError: if rows are empty or longer than the model's context, or ids are outside the vocabulary.
        """
        self._check_rows(input_ids, 0)
        ids = input_ids.to(self.device)
        with torch.inference_mode():
            if not self.is_chunked:
                logits = self.module(input_ids=ids, use_cache=False).logits[:, -1].float()
                return torch.log_softmax(logits, dim=-1).cpu()
            hidden = torch.split(self._hidden(ids)[:, -1], self._tokens_at_a_time)
            return torch.cat([torch.log_softmax(self._logits(rows), dim=-1).cpu() for rows in hidden])

    def _check_rows(self, input_ids: torch.Tensor, max_new_tokens: int) -> None:
        self._check_ids(input_ids)
        self._check_prompt(input_ids[0].tolist(), max_new_tokens)

    def _check_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        if not prompt:
            raise ModelError("a prompt has no token", hint="give it text, or a tokenizer with a BOS token")
        self._check_ids(torch.tensor(prompt))
        if self.context_length is not None and len(prompt) + max_new_tokens > self.context_length:
            raise ModelError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than {self.name} was "
                f"built for ({self.context_length})",
                hint="shorten the prompt, or lower max_new_tokens",
            )


def load_language_model(model: Model, storage: Storage) -> LanguageModel:
    """Load a causal model with its head, as `tasks.models.model.load_model` loads one without.

    Raises:
        ModelError: if it cannot be loaded as its files hold it, reads both ways, or has no blocks that hand on one
            residual stream.
    """
    module = load_module(model, storage, with_head=True)
    require_causal(module, model.name)
    return LanguageModel(module, model.name, context_length(model, storage))
