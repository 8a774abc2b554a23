"""Tiny real parts for tests: corpora, tokenizers, random models of several architectures, and dictionaries."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were her all she there would their we him been has when who will more no if out so said what Tokyo Russia Moscow
London river mountain quick brown fox jumps lazy dog naïve café Zürich 日本 東京 emoji 🙂
""".split()

ARCHITECTURES = ("llama", "gemma2", "gpt_neox")
D_MODEL = 32
N_LAYERS = 3


def texts(n: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Random documents with a skewed vocabulary, short and long ones."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    documents = []
    for _ in range(n):
        words = rng.choices(WORDS, weights, k=rng.randint(1, longest))
        documents.append(" ".join(words) + rng.choice([".", ".\n", "", "!\n\n"]))
    return documents


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """One document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path


def save_tokenizer(folder: Path, documents: Iterable[str] | None = None, size: int = 400) -> Any:
    """A byte-level BPE tokenizer of `size` tokens with BOS, EOS and padding, trained on documents; default: `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(200) if documents is None else documents, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, architecture: str = "llama", seed: int = 0, tokenizer: Any | None = None
) -> Path:
    """A random three-block model of an architecture, with its tokenizer, or for one that is in the folder."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        GPTNeoXConfig,
        LlamaConfig,
    )

    tokenizer = tokenizer or save_tokenizer(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    config = {
        "llama": lambda: LlamaConfig(**shape, **grouped),
        "gemma2": lambda: Gemma2Config(**shape, **grouped, query_pre_attn_scalar=8, sliding_window=16),
        "gpt_neox": lambda: GPTNeoXConfig(**shape),
    }[architecture]()
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    module.save_pretrained(folder)
    return folder


def build_sae(
    architecture: str = "jumprelu", d_sae: int = 96, seed: int = 0, d_in: int = D_MODEL, **config: Any
) -> Any:
    """A random dictionary of a SAELens architecture."""
    from sae_lens import SAE

    values = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        **config,
    }
    if architecture == "topk":
        values.setdefault("k", 8)
    values.setdefault("metadata", {})
    sae: Any = SAE.from_dict(values)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if name == "threshold":
                parameter.abs_().add_(0.5)
    return sae


def save_sae(folder: Path, architecture: str = "jumprelu", **arguments: Any) -> Path:
    """A random dictionary on disk, as SAELens saves it."""
    build_sae(architecture, **arguments).save_model(str(folder))
    return folder
