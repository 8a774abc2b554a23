"""Losses and texts of causal models against the plainest code: all logits, `cross_entropy`, one token at a time."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ModelError
from tasks.models import language_model as language_models
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.model import load_model

PROMPTS = [[0, 40, 41, 42], [0, 77], [0, *range(100, 120)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    # At Gemma's own cap of 30, the logits of a random model are the same without it.
    config = json.loads((folder / "gemma2" / "config.json").read_text())
    (folder / "gemma2" / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 0.7}))
    return folder


def load(folder: Path, architecture: str = "llama") -> LanguageModel:
    return load_language_model(Model(name=str(folder / architecture)), Storage(str(folder / "storage")))


def windows(n: int = 5, longest: int = 23) -> torch.Tensor:
    """(n, longest) ids, right-padded with 2."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (n, longest), generator=generator)
    for row in range(n):
        ids[row, longest - 3 * row :] = 2
    return ids


def plain_losses(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """(windows, length - 1) losses, one window at a time."""
    with torch.no_grad():
        rows = [
            cross_entropy(module(row[None]).logits[0, :-1].double(), row[1:], reduction="none") for row in ids
        ]
    return torch.stack(rows)


def granite() -> Any:
    from transformers import AutoModelForCausalLM, GraniteConfig

    return AutoModelForCausalLM.from_config(GraniteConfig(**_SHAPE, logits_scaling=0.05))


def cohere() -> Any:
    from transformers import AutoModelForCausalLM, CohereConfig

    return AutoModelForCausalLM.from_config(CohereConfig(**_SHAPE, logit_scale=25.0))


def gptj_with_a_bias() -> Any:
    from transformers import AutoModelForCausalLM, GPTJConfig

    module = AutoModelForCausalLM.from_config(
        GPTJConfig(vocab_size=400, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)
    )
    with torch.no_grad():
        module.lm_head.bias.normal_(0, 2)
    return module


_SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_losses_are_those_of_the_whole_logits(
    folder: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven tokens a chunk: chunks end within windows.
    monkeypatch.setattr(language_models, "CHUNK_BYTES", 4 * 400 * 7)
    model = load(folder, architecture)
    assert model.is_chunked
    sizes: list[int] = []
    model.module.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: sizes.append(inputs[0].shape[:-1].numel())
    )
    found = model.token_losses(windows())
    assert set(sizes) == {7, 5 * 22 % 7}
    expected = plain_losses(model.module, windows())
    assert found.dtype == torch.float32
    assert found.shape == (5, 22)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=0)
    assert found.std() > 0.1


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_rough_dtype_still_has_its_losses_in_float32(folder: Path, architecture: str) -> None:
    storage = Storage(str(folder / "storage"))
    model = load_language_model(Model(name=str(folder / architecture), dtype="bfloat16"), storage)
    assert model.dtype == torch.bfloat16
    assert model.is_chunked
    found = model.token_losses(windows())
    assert found.dtype == torch.float32
    assert torch.allclose(found, load(folder, architecture).token_losses(windows()), atol=0.2)
    # Were the softmax in bfloat16, most losses would be among its few values.
    assert (found.bfloat16().float() != found).float().mean() > 0.8


@pytest.mark.parametrize("build", [granite, cohere, gptj_with_a_bias])
def test_what_architectures_do_after_the_head_is_known(build: Any) -> None:
    torch.manual_seed(0)
    model = LanguageModel(build().eval(), "tiny", None)
    assert model.is_chunked
    assert torch.allclose(
        model.token_losses(windows()).double(), plain_losses(model.module, windows()), atol=1e-4, rtol=1e-5
    )


def unusual(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model whose logits are not what its head and configuration say."""
    from transformers import GPTNeoXForCausalLM

    forward = GPTNeoXForCausalLM.forward

    def sharper(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output = forward(self, *arguments, **keywords)
        output.logits = output.logits * 1.7
        return output

    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", sharper)
    return load(folder, "gpt_neox")


def test_an_unusual_head_is_noticed_and_the_whole_model_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unusual(folder, monkeypatch)
    assert not model.is_chunked
    monkeypatch.setattr(language_models, "CHUNK_BYTES", 4 * 400 * 23 * 2)
    sizes: list[int] = []
    model.blocks[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    found = model.token_losses(windows())
    assert sizes == [2, 2, 1]
    assert torch.allclose(found.double(), plain_losses(model.module, windows()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_usual", [True, False])
def test_only_wanted_losses_are_made(folder: Path, is_usual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder, "gpt_neox") if is_usual else unusual(folder, monkeypatch)
    wanted = torch.rand(5, 22, generator=torch.Generator().manual_seed(0)) < 0.4
    found = model.token_losses(windows(), wanted)
    assert torch.equal(found.isnan(), ~wanted)
    assert torch.allclose(found[wanted], model.token_losses(windows())[wanted], atol=1e-5, rtol=0)
    assert model.token_losses(windows(), torch.zeros_like(wanted)).isnan().all()
    assert model.token_losses(torch.tensor([[5], [6]])).shape == (2, 0)


@pytest.mark.parametrize("is_usual", [True, False])
def test_a_blocks_output_is_replaced_and_restored(
    folder: Path, is_usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, "gpt_neox") if is_usual else unusual(folder, monkeypatch)
    monkeypatch.setattr(language_models, "CHUNK_BYTES", 1)
    before = model.token_losses(windows())
    seen: list[torch.Size] = []

    def halve(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape)
        return hidden / 2

    with model.replaced(1, halve):
        replaced = model.token_losses(windows())
    assert seen == [(5, 23, tiny.D_MODEL)]
    plain = copy.deepcopy(model.module)
    with torch.no_grad():
        # What the last block adds is of what it reads: halve both there by hand.
        block, last = plain.gpt_neox.layers[1], plain.gpt_neox.layers[2]
        last.register_forward_pre_hook(lambda _module, inputs: (inputs[0] / 2, *inputs[1:]))
    assert len(block._forward_hooks) == 0
    assert torch.allclose(replaced.double(), plain_losses(plain, windows()), atol=1e-5, rtol=0)
    assert not torch.allclose(replaced, before, atol=1e-3)
    assert torch.equal(model.token_losses(windows()), before)

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.replaced(1, broken):
        model.token_losses(windows())
    assert torch.equal(model.token_losses(windows()), before)
    with pytest.raises(ModelError, match="no block 3"), model.replaced(3, halve):
        pass


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_block_that_gives_several_things_is_replaced_too(folder: Path, kind: type) -> None:
    model = load(folder)

    class InATuple(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return kind([self.block(*arguments, **keywords), "cache"])

    wrapped = InATuple(model.blocks[0])
    model.blocks[0] = wrapped
    with model.replaced(0, torch.zeros_like):
        output = wrapped(torch.ones(1, 2, tiny.D_MODEL), position_embeddings=_rotary(model))
    assert isinstance(output, kind)
    assert output[1] == "cache"
    assert not output[0].any()


def _rotary(model: LanguageModel) -> Any:
    return model.module.model.rotary_emb(torch.ones(1, 2, tiny.D_MODEL), torch.arange(2)[None])


def test_an_id_outside_the_vocabulary_is_named(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(ModelError, match=r"token id 400 is outside the vocabulary of .*llama .400 tokens"):
        model.token_losses(torch.tensor([[3, 400]]))
    with pytest.raises(ModelError, match="token id 401"):
        model.generate([[3, 401]], 2)


def test_a_model_without_its_head_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(folder / "llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its files lack lm_head.weight"):
        load_language_model(Model(name=str(tmp_path)), Storage(str(tmp_path / "storage")))


def plain_text(
    module: Any, prompt: list[int], n: int, temperature: float | None = None, seed: int = 0
) -> list[int]:
    """Token after token, everything computed anew for each; no nucleus."""
    ids = list(prompt)
    torch.manual_seed(seed)
    with torch.no_grad():
        for _ in range(n):
            logits = module(torch.tensor([ids])).logits[0, -1].float()
            if temperature is None:
                ids.append(int(logits.argmax()))
            else:
                ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("temperature", [None, 0.8])
@pytest.mark.slow
def test_texts_are_those_of_one_token_after_another(
    folder: Path, architecture: str, temperature: float | None
) -> None:
    model = load(folder, architecture)
    module = copy.deepcopy(model.module)
    model.module.generation_config.eos_token_id = None
    # What a checkpoint would like its texts to be has no say.
    model.module.generation_config.repetition_penalty = 3.0
    model.module.generation_config.top_k = 1
    own = copy.deepcopy(model.module.generation_config)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    found = model.generate(PROMPTS, 12, temperature=temperature, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == [plain_text(module, prompt, 12, temperature, 5) for prompt in PROMPTS]
    assert found == [model.generate([prompt], 12, temperature=temperature, seed=5)[0] for prompt in PROMPTS]
    assert model.module.generation_config.to_dict() == own.to_dict()
    if temperature is not None:
        assert found != model.generate(PROMPTS, 12, temperature=temperature, seed=6)


def test_a_nucleus_leaves_out_the_unlikely(folder: Path) -> None:
    model = load(folder)
    texts = [model.generate(PROMPTS[:1], 1, temperature=1.0, top_p=0.3, seed=seed)[0] for seed in range(40)]
    with torch.no_grad():
        likely = model.module(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).sort(descending=True)
    n = int((likely.values.cumsum(0) < 0.3).sum()) + 1
    assert 1 < len({ids[0] for ids in texts}) <= n
    assert {ids[0] for ids in texts} <= set(likely.indices[:n].tolist())


def test_a_text_ends_before_its_stop(folder: Path) -> None:
    model = load(folder)
    model.module.generation_config.eos_token_id = None
    (whole,) = model.generate(PROMPTS[:1], 12)
    stop = whole[5]
    expected = whole[: whole.index(stop)]
    assert model.generate(PROMPTS[:1], 12, stop_ids=[stop]) == [expected]
    model.module.generation_config.eos_token_id = [stop, 399]
    assert model.generate(PROMPTS[:1], 12) == [expected]


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [([], 1, "a prompt has no token"), ([5] * 120, 9, r"120 tokens and 9 new ones .* built for .128")],
)
def test_a_prompt_that_does_not_fit_is_named(folder: Path, prompt: list[int], n: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(folder).generate([prompt], n)
    assert len(load(folder).generate([[5] * 120], 8)[0]) <= 8


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_logits_that_are_not_finite_make_no_text(folder: Path, temperature: float | None) -> None:
    model = load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        model.generate(PROMPTS[:1], 2, temperature=temperature)
    assert model.token_losses(windows()).isnan().all()


@pytest.mark.parametrize(
    ("architecture", "is_usual"), [("gpt_neox", True), ("gemma2", True), ("gpt_neox", False)]
)
def test_what_comes_next_is_the_softmax_of_the_last_logits(
    folder: Path, architecture: str, is_usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, architecture) if is_usual else unusual(folder, monkeypatch)
    # Two rows a chunk, the last one short.
    monkeypatch.setattr(language_models, "CHUNK_BYTES", 4 * 400 * 2)
    ids = windows()[:, :8]
    found = model.next_log_probs(ids)
    with torch.no_grad():
        expected = torch.stack([model.module(row[None]).logits[0, -1].double().log_softmax(0) for row in ids])
    assert found.dtype == torch.float32
    assert found.shape == (5, 400)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(found.double().exp().sum(1), torch.ones(5, dtype=torch.float64), atol=1e-5)


def test_what_comes_next_is_in_float32_whatever_the_weights_are(folder: Path) -> None:
    model = load_language_model(
        Model(name=str(folder / "llama"), dtype="bfloat16"), Storage(str(folder / "storage"))
    )
    found = model.next_log_probs(windows()[:, :8])
    assert found.dtype == torch.float32
    assert torch.allclose(found, load(folder).next_log_probs(windows()[:, :8]), atol=0.2)
    assert (found.bfloat16().float() != found).float().mean() > 0.8


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.slow
def test_rows_of_a_batch_are_continued_as_each_alone(folder: Path, architecture: str) -> None:
    model = load(folder, architecture)
    model.module.generation_config.eos_token_id = None
    model.module.generation_config.repetition_penalty = 3.0
    ids = windows()[:, :8]
    found = model.generate_rows(ids, 10)
    assert found == model.generate(ids.tolist(), 10)
    assert len({tuple(text) for text in found}) > 1
    # Rows that end early are filled up while the others go on.
    stops = [found[0][3], found[1][6]]
    expected = [row[: min((row.index(stop) for stop in stops if stop in row), default=10)] for row in found]
    assert model.generate_rows(ids, 10, stop_ids=stops) == expected
    assert model.generate(ids.tolist(), 10, stop_ids=stops) == expected
    assert len({len(text) for text in expected}) > 1


@pytest.mark.parametrize(
    ("ids", "n", "message"),
    [
        (torch.empty(2, 0, dtype=torch.int64), 1, "a prompt has no token"),
        (torch.tensor([[5] * 120] * 2), 9, r"120 tokens and 9 new ones .* built for .128"),
        (torch.tensor([[5, 6], [5, 400]]), 1, "token id 400 is outside the vocabulary"),
    ],
)
def test_rows_that_do_not_fit_are_named(folder: Path, ids: torch.Tensor, n: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(folder).generate_rows(ids, n)


def test_a_sequence_that_is_longer_than_the_context_has_no_next_token(folder: Path) -> None:
    model = load(folder)
    assert model.next_log_probs(torch.full((1, 128), 5)).shape == (1, 400)
    with pytest.raises(ModelError, match=r"a prompt of 129 tokens .* built for .128"):
        model.next_log_probs(torch.full((1, 129), 5))
    with pytest.raises(ModelError, match="a prompt has no token"):
        model.next_log_probs(torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(ModelError, match="token id 400"):
        model.next_log_probs(torch.tensor([[400]]))


def test_threads_construct_one_model_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel, PreTrainedModel

    under_way, most = [0], [0]
    construct, tie_weights = LlamaModel.__init__, PreTrainedModel.tie_weights

    def slowly(self: Any, *arguments: Any, **keywords: Any) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        construct(self, *arguments, **keywords)
        under_way[0] -= 1

    monkeypatch.setattr(LlamaModel, "__init__", slowly)
    with ThreadPoolExecutor(4) as pool:
        names = [str(folder / "llama")] * 4
        stores = [Storage(str(folder / "storage"))] * 4
        kinds = [load_language_model, load_model] * 2
        loaded = list(pool.map(lambda kind, name, store: kind(Model(name=name), store), kinds, names, stores))
    assert len(loaded) == 4
    assert most == [1]
    # Two at once leave a transformers without weight tying behind, now and then.
    assert PreTrainedModel.tie_weights is tie_weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path, dtype: Any, seed: int) -> None:
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = tiny.save_tokenizer(tmp_path)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    storage = Storage(str(tmp_path / "storage"))
    for load in (load_language_model, load_model):
        with pytest.raises(ModelError, match="is not causal"):
            load(Model(name=str(tmp_path), dtype=dtype), storage)
