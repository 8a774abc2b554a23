"""What is kept, what is left of it, and that nothing else changes: every policy, every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import forgetful
import pytest
import torch
from forgetful import EVICTING, LENGTH, PROTECTION, policy, reading, share_of

from schemas.errors import ConfigError, ModelError
from tasks.models.language_model import LanguageModel
from tasks.retention.attention import forgetting
from tasks.retention.budgets import Budget, CacheShape, Protection
from tasks.retention.cache import NEVER, Chunk, RetentionCache, Rules
from tasks.retention.policies import POLICIES, Policy
from tasks.retention.running import Prefill, Stream, local_errors, next_losses, read, run


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", forgetful.ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 7, LENGTH])
def test_full_is_what_the_model_itself_says(architecture: str, chunk: int) -> None:
    module = forgetful.model(architecture).module
    with torch.no_grad():
        expected = module(input_ids=forgetful.ids(2), use_cache=False).logits
    found = forgetful.logits(policy("full"), architecture, rows=2, protocol=Stream(chunk=chunk))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("architecture", forgetful.ARCHITECTURES)
@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_of_the_whole_sequence_changes_no_bit(architecture: str, name: str) -> None:
    full = forgetful.logits(policy("full"), architecture)
    # The tiers' budget is in bytes, and their hot slots carry scores.
    share = 2.0 if name == "cmp" else 1.0
    assert torch.equal(forgetful.logits(policy(name), architecture, share=share), full)


@pytest.mark.parametrize("architecture", forgetful.ARCHITECTURES)
@pytest.mark.parametrize("name", EVICTING)
def test_cutting_out_is_the_same_as_hiding(architecture: str, name: str) -> None:
    rows = 1 if name == "cmp" else 2
    given: dict[str, Any] = {"architecture": architecture, "rows": rows, "share": share_of(name)}
    physical = forgetful.logits(policy(name), **given)
    masked = forgetful.logits(policy(name), **given, masked=True)
    full = forgetful.logits(policy("full"), **given)
    scale = full.abs().max()
    assert (physical - masked).abs().max() <= 1e-5 * max(1, scale)
    assert (physical - full).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("architecture", forgetful.ARCHITECTURES)
@pytest.mark.parametrize("name", ["window", "streaming"])
@pytest.mark.parametrize("chunk", [5, 32, LENGTH])
def test_chunks_give_what_steps_give_where_positions_decide(architecture: str, name: str, chunk: int) -> None:
    stepwise = forgetful.logits(policy(name), architecture, protocol=Stream(chunk=1))
    chunked = forgetful.logits(policy(name), architecture, protocol=Stream(chunk=chunk))
    assert (chunked - stepwise).abs().max() <= 2e-5 * stepwise.abs().max()


@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_holds_after_every_chunk_and_counts_every_tensor(name: str) -> None:
    share = share_of(name, 0.5)
    how = forgetful.settings(policy(name), budget=Budget(byte_share=share), protection=PROTECTION)
    model = forgetful.model()
    shape_bytes = 0
    for step in read(model, forgetful.ids(), how, function_tokens=forgetful.FUNCTION):
        shape_bytes = step.cache.shape.full_bytes(LENGTH)
        for layer in step.cache.governed:
            assert layer.n_bytes == sum(tensor.nbytes for tensor in _tensors_of(layer))
        assert step.cache.n_bytes <= share * shape_bytes
    found = run(model, forgetful.ids(), how, function_tokens=forgetful.FUNCTION)
    assert found.full_bytes == shape_bytes == LENGTH * 2 * 8 * 4 * 2 * 3
    # Nothing is wasted either: a slot or two, or a group of the tiers.
    assert max(found.bytes_after) >= 0.8 * share * shape_bytes
    assert max(found.bytes_after) < found.peak_bytes < max(found.bytes_after) + shape_bytes // 4


def _tensors_of(layer: Any) -> list[torch.Tensor]:
    """All tensors that a layer holds on to, its record and what it was told excepted."""
    found: dict[int, torch.Tensor] = {}

    def walk(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif hasattr(thing, "__dict__"):
            for name, value in vars(thing).items():
                if name not in ("rules", "fates", "chunk"):
                    walk(value)

    walk(layer)
    return list(found.values())


@pytest.mark.parametrize("name", [name for name in EVICTING if name != "cmp"])
def test_what_is_kept_fills_the_slots_and_holds_what_is_protected(name: str) -> None:
    how = forgetful.settings(policy(name))
    slots = LENGTH // 4
    sinks = PROTECTION.sinks if name != "window" else 0
    for step in read(forgetful.model(), forgetful.ids(2), how, function_tokens=forgetful.FUNCTION):
        for layer in step.cache.governed:
            assert layer.hot.count == min(slots, step.stop)
            kept = layer.fates.kept(step.stop)
            positions = layer.hot.positions.long()
            assert torch.equal(kept, torch.zeros_like(kept).scatter(-1, positions, True))
            assert bool((positions.diff(dim=-1) > 0).all())
            assert bool(kept[..., :sinks].all())
            assert bool(kept[..., max(0, step.stop - PROTECTION.recent) : step.stop].all())


def test_kinds_are_kept_first() -> None:
    kinds = forgetful.FUNCTION[forgetful.ids(2)]
    shares = {}
    for name in ("function", "content", "random"):
        found = reading(policy(name), rows=2)
        kept = found.fates[0].kept(LENGTH)[..., PROTECTION.sinks : LENGTH - PROTECTION.recent]
        middle = kinds[:, None, PROTECTION.sinks : LENGTH - PROTECTION.recent].expand(kept.shape)
        shares[name] = float((kept & middle).sum() / kept.sum())
    assert shares["function"] == 1
    assert shares["content"] == 0
    assert 0.1 < shares["random"] < 0.6


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "streaming"])
def test_a_compressed_prompt_keeps_what_plain_code_keeps(architecture: str, name: str) -> None:
    weights = forgetful.attentions(architecture)
    prompt, window = 80, 8
    found = reading(policy(name), architecture, protocol=Prefill(prompt=prompt, chunk=16))
    heads = found.fates[0].gone_at.shape[1]
    for layer, fates in found.fates.items():
        by_head = weights[layer][:, :, :prompt, :prompt].unflatten(1, (heads, -1)).mean(2)
        scores = {
            "h2o": by_head.sum(-2),
            "tova": by_head[..., -1, :].mean(1, keepdim=True).expand(1, heads, prompt),
            "snapkv": _snapkv(by_head, window),
            "streaming": torch.arange(prompt).float().expand(1, heads, prompt),
        }[name].clone()
        scores[..., : PROTECTION.sinks] = scores[..., -PROTECTION.recent :] = torch.inf
        best = scores.topk(prompt // 4).indices.sort(dim=-1).values
        kept = fates.kept(prompt)[..., :prompt]
        assert torch.equal(kept.nonzero()[:, -1].view(best.shape), best)


def _snapkv(by_head: torch.Tensor, window: int) -> torch.Tensor:
    """As kvpress writes it: the prompt before the window is pooled, and the window gets the maximum."""
    before = by_head[..., -window:, :-window].mean(-2)
    pooled = torch.nn.functional.avg_pool1d(before, 5, stride=1, padding=2)
    return torch.nn.functional.pad(pooled, (0, window), value=float(pooled.max()) + 1)


@pytest.mark.parametrize("name", EVICTING)
def test_a_prompt_is_read_exactly_and_compressed_once(name: str) -> None:
    prompt = 64
    how: dict[str, Any] = {"protocol": Prefill(prompt=prompt, chunk=16), "share": share_of(name)}
    found, full = reading(policy(name), **how), reading(policy("full"), **how)
    assert torch.equal(found.losses[:, : prompt - 1], full.losses[:, : prompt - 1])
    assert not torch.equal(found.losses[:, prompt:], full.losses[:, prompt:])
    for fates in found.fates.values():
        assert set(fates.gone_at.unique().tolist()) == {prompt, NEVER}
        assert bool((fates.gone_at[..., prompt:] == NEVER).all())


@pytest.mark.parametrize("name", EVICTING)
def test_rows_are_read_as_if_alone(name: str) -> None:
    if name == "cmp":
        pytest.skip("reads one document at a time")
    together = reading(policy(name), rows=3, documents=torch.tensor([5, 6, 7]))
    how = forgetful.settings(policy(name))
    given: dict[str, Any] = {"documents": torch.tensor([7]), "function_tokens": forgetful.FUNCTION}
    alone = run(forgetful.model(), forgetful.ids(3)[2:], how, **given)
    assert (together.losses[2:] - alone.losses).abs().max() < 1e-4
    for layer, fates in alone.fates.items():
        assert torch.equal(together.fates[layer].gone_at[2:], fates.gone_at)


def test_policies_read_in_lockstep_as_they_do_alone() -> None:
    model, names = forgetful.model(), ("random", "str", "full")
    readings = [
        read(model, forgetful.ids(), forgetful.settings(policy(name)), with_residuals=name == "full")
        for name in names
    ]
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for steps in zip(*readings, strict=True):
        for name, step in zip(names, steps, strict=True):
            losses[name].append(next_losses(step, forgetful.ids()))
        assert [len(step.residuals) for step in steps] == [0, 0, 3]
        assert steps[2].residuals[1].shape == (1, 8, 32)
    for name in names:
        assert torch.equal(torch.cat(losses[name], dim=1), reading(policy(name)).losses)
    assert model.module.config._attn_implementation == "sdpa"


def test_losses_are_the_models_own() -> None:
    found = reading(policy("full"), rows=2)
    expected = forgetful.model().token_losses(forgetful.ids(2))
    assert (found.losses - expected).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", forgetful.ARCHITECTURES)
@pytest.mark.parametrize("name", ["full", "streaming", "random", "content"])
def test_a_fused_kernel_says_the_same(architecture: str, name: str) -> None:
    explicit = forgetful.logits(policy(name), architecture, rows=2)
    fused = forgetful.logits(policy(name), architecture, rows=2, fused=True)
    assert (fused - explicit).abs().max() <= 2e-5 * explicit.abs().max()


def test_watching_shows_attention_before_it_costs_anything() -> None:
    seen: list[tuple[int, int]] = []

    def watch(layer: int, positions: torch.Tensor, attention: Any) -> None:
        assert torch.allclose(attention.weights.sum(-1), torch.ones(1))
        assert positions.shape == attention.weights[:, :, 0, 0].shape
        seen.append((layer, positions.shape[-1]))

    how = forgetful.settings(policy("random"))
    watched = run(forgetful.model(), forgetful.ids(), how, watch=watch)
    assert seen[:3] == [(0, 8), (1, 8), (2, 8)]
    assert seen[-1] == (2, LENGTH // 4 + 8)
    assert torch.equal(watched.losses, reading(policy("random")).losses)


@pytest.mark.parametrize("name", ["streaming", "random", "h2o"])
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.slow
def test_the_local_error_of_the_first_layer_is_its_whole_error(name: str, chunk: int) -> None:
    model, how = forgetful.model(), forgetful.settings(policy(name), protocol=Stream(chunk=chunk))
    whole = forgetful.settings(policy("full"), protocol=Stream(chunk=chunk))
    actual = []
    for step, exact in zip(
        *(read(model, forgetful.ids(2), each, with_residuals=True) for each in (how, whole)), strict=True
    ):
        found = [
            (one - other).norm(dim=-1) / other.norm(dim=-1)
            for one, other in zip(step.residuals, exact.residuals, strict=True)
        ]
        actual.append(torch.stack(found))
    errors = torch.cat(actual, dim=-1)
    fates = run(model, forgetful.ids(2), how).fates
    local = local_errors(model, forgetful.ids(2), how, fates)
    assert local.shape == errors.shape
    assert torch.allclose(local[0], errors[0], atol=1e-5)
    assert errors[0].max() > 0.1
    assert errors[2].median() > local[2].median() > 0


def test_sliding_layers_have_no_local_error_and_are_left_alone() -> None:
    model, how = forgetful.model("gemma2"), forgetful.settings(policy("random"))
    found = run(model, forgetful.ids(), how)
    assert sorted(found.fates) == [0, 2]
    assert found.sliding_bytes == 15 * 2 * 8 * 4 * 2
    local = local_errors(model, forgetful.ids(), how, found.fates)
    assert bool((local[1] == 0).all())
    assert local[2].max() > 0.01


def _survival(policy: Policy, steps: int, slots: int, documents: int) -> torch.Tensor:
    """(steps,) how often the token of each position is left after `steps` tokens, one at a time, nothing protected."""
    shape = CacheShape(layers=(0,), heads=1, groups=1, head_dim=2, dtype=torch.float32)
    rules = Rules(
        policy=policy,
        protection=Protection(sinks=0, recent=0),
        slots=slots,
        tiers=None,
        documents=torch.arange(documents),
        seed=3,
        length=steps,
    )
    cache = RetentionCache(rules, shape, [None])
    for step in range(steps):
        surprisal = torch.zeros(documents, 1)
        cache.begin(
            Chunk(start=step, stop=step + 1, is_function=None, surprisal=surprisal, stepwise=True, evict=True)
        )
        cache.update(torch.zeros(documents, 1, 1, 2), torch.zeros(documents, 1, 1, 2), 0)
        cache.attended(cache.governed[0], None)
    return cache.fates[0].kept(steps).double().mean((0, 1))


def test_a_key_drawn_once_is_a_reservoir_and_one_drawn_each_time_kills() -> None:
    steps, slots, documents = 40, 8, 4_000

    def require(found: torch.Tensor, expected: torch.Tensor) -> None:
        spread = (expected * (1 - expected) / documents).sqrt()
        assert bool(((found - expected).abs() <= 5 * spread).all())

    reservoir = _survival(policy("random"), steps, slots, documents)
    require(reservoir, torch.full((steps,), slots / steps, dtype=torch.float64))
    # The first eviction comes with token number slots + 1; a token that came later escaped those before it.
    evictions = torch.minimum(torch.tensor(steps - slots), steps - torch.arange(steps)).double()
    redrawn = _survival(policy("random", redraw=True), steps, slots, documents)
    require(redrawn, (slots / (slots + 1)) ** evictions)
    assert redrawn[0] < 0.2 * reservoir[0]


@pytest.mark.slow
def test_str_is_the_sum_of_three_signals_and_forgets_by_query_not_by_chunk() -> None:
    weights = forgetful.attentions()
    decay = 0.9
    losses = forgetful.model().token_losses(forgetful.ids())
    surprisal = torch.cat((torch.tensor([[torch.nan]]), losses), dim=1)
    chunks = {}
    for chunk in (1, 5, LENGTH):
        how = forgetful.settings(policy("str", decay=decay), share=1.0, protocol=Stream(chunk=chunk))
        *_, last = read(forgetful.model(), forgetful.ids(), how)
        chunks[chunk] = last.cache
    for layer in range(3):
        by_head = weights[layer].unflatten(1, (2, 2)).mean(2)
        ema = torch.zeros(1, 2, LENGTH)
        for query in range(LENGTH):
            ema = decay * ema + (1 - decay) * by_head[..., query, :]
        for cache in chunks.values():
            state = cache.governed[layer].hot.state
            assert torch.allclose(state["received"], ema, atol=1e-5)
            values = cache.governed[layer].values
            assert torch.allclose(state["log_norm"], values.norm(dim=-1).log(), atol=1e-5)
            expected = surprisal[:, None].expand(1, 2, LENGTH)
            assert torch.allclose(state["surprisal"], expected, atol=1e-3, equal_nan=True)
        held = chunks[5].governed[layer]._held(None)
        middle = slice(PROTECTION.sinks, LENGTH - PROTECTION.recent)
        age = LENGTH - torch.arange(LENGTH)
        total = torch.zeros(1, 2, LENGTH)[..., middle]
        for signal in (ema / (1 - decay**age), state["log_norm"], expected):
            among = signal[..., middle]
            total += (among - among.mean(-1, keepdim=True)) / among.std(-1, keepdim=True, unbiased=False)
        found = policy("str", decay=decay).significance(held)[..., middle]  # type: ignore[attr-defined]
        assert torch.allclose(found, total, atol=1e-3)


def test_without_chance_str_keeps_the_most_significant() -> None:
    """At T = 0 nothing depends on the seed; at T = 1 most does."""
    cold = [reading(policy("str", temperature=0.0), seed=seed).losses for seed in (0, 1)]
    warm = [reading(policy("str", temperature=1.0), seed=seed).losses for seed in (0, 1)]
    assert torch.equal(*cold)
    assert not torch.equal(*warm)


@pytest.mark.slow
def test_a_threshold_keeps_less_than_the_budget_the_higher_it_is() -> None:
    kept = []
    for spread in (-50.0, 4.5, 6.0):
        given = policy("str", temperature=0.0, spread=spread)
        found, masked = reading(given), reading(given, masked=True)
        assert (found.losses - masked.losses).abs().max() < 1e-4
        once = reading(given, protocol=Prefill(prompt=LENGTH)).fates[0].kept(LENGTH)
        assert bool(once[..., : PROTECTION.sinks].all())
        kept.append(int(once.sum()))
    assert kept[0] == 2 * LENGTH // 4
    assert kept[0] > kept[1] > kept[2]
    assert torch.equal(
        reading(policy("str", temperature=0.0, spread=-50.0)).losses,
        reading(policy("str", temperature=0.0)).losses,
    )


def test_errors_come_before_work() -> None:
    model = forgetful.model()

    def refused(match: str, kind: type[Exception], **changes: Any) -> None:
        tokens = changes.pop("ids", forgetful.ids())
        how = forgetful.settings(changes.pop("policy", policy("h2o")), **changes)
        with pytest.raises(kind, match=match):
            read(model, tokens, how)

    refused("longer than llama was built for", ModelError, ids=forgetful.ids(length=129))
    refused("h2o with token_share = 0.05 leaves 4 tokens", ConfigError, share=0.05)
    refused("h2o with n_bytes = 9 leaves 0 tokens", ConfigError, budget=Budget(n_bytes=9))
    refused("h2o needs a budget", ConfigError, budget=None)
    refused("function must be told which", ConfigError, policy=policy("function"))
    refused("cmp reads one document at a time", ConfigError, policy=policy("cmp"), ids=forgetful.ids(2))
    refused(r"cmp with hot_share = 0.5 has \d hot slots", ConfigError, policy=policy("cmp"), share=0.1)
    refused("a prompt of 97 tokens", ConfigError, protocol=Prefill(prompt=97))
    refused("a chunk of 0 tokens", ConfigError, protocol=Stream(chunk=0))
    refused("outside the vocabulary of llama", ModelError, ids=forgetful.ids() + 200)


def test_other_architectures_are_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

    shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    module = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    gpt2 = LanguageModel(module.eval(), "gpt2-tiny", 100)
    how = forgetful.settings(policy("random"))
    with pytest.raises(ModelError, match=r"model gpt2-tiny: the attention of GPT2LMHeadModel \(gpt2\)"):
        read(gpt2, torch.zeros(1, 50, dtype=torch.int64), how)
    config = Gemma2Config(
        **shape,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention"],
    )
    slides = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), "slides", 100)
    with pytest.raises(ModelError, match="all its layers slide"):
        read(slides, torch.zeros(1, 50, dtype=torch.int64), how)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "tova", "str", "cmp"])
def test_scores_that_are_not_finite_name_policy_and_layer(name: str) -> None:
    model = forgetful.model()
    weight = model.module.model.layers[1].self_attn.k_proj.weight
    before = weight.clone()
    weight[0, 0] = torch.nan
    try:
        with pytest.raises(ModelError, match=f"the scores of the policy {name} in layer 1 are not finite"):
            reading(policy(name), share=share_of(name))
    finally:
        weight.copy_(before)


def test_a_model_that_forgot_is_itself_again_afterwards() -> None:
    module = forgetful.model("gemma3").module
    before = module.config._attn_implementation
    with forgetting(module):
        assert module.config._attn_implementation == "retention"
    assert module.config._attn_implementation == before


def test_every_policy_is_tested_here() -> None:
    assert set(POLICIES) == {"full", *EVICTING}
