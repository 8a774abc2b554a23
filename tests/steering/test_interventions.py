"""Features set in the residual stream: against SAELens' own encoder and decoder, hand-written hooks without a cache,
and unsteered passes of the same shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import DictionaryError, ModelError
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.steering.directions import Directions, directions_of
from tasks.steering.interventions import Intervention, change_norms, steered

CPU = torch.device("cpu")
MODELS = (*tiny.ARCHITECTURES, "gptj")
PROMPT = [0, 40, 41, 42, 77, 120, 9]
FEATURES = (5, 17, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    return folder


def load(folder: Path, architecture: str = "llama", dtype: str = "float32") -> LanguageModel:
    """A tiny model that ends no text by itself; the blocks of `gptj` give tuples, the others' tensors."""
    if architecture == "gptj":
        model = LanguageModel(gptj().to(getattr(torch, dtype)), "gptj", 64)
    else:
        name = str(folder / architecture)
        model = load_language_model(
            Model(name=name, dtype=dtype, threads=1), Storage(str(folder / "storage"))
        )
    model.module.generation_config.eos_token_id = None
    return model


def gptj() -> Any:
    from transformers import AutoModelForCausalLM, GPTJConfig

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(
        GPTJConfig(
            vocab_size=400,
            n_embd=tiny.D_MODEL,
            n_layer=tiny.N_LAYERS,
            n_head=4,
            rotary_dim=8,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return module


def correlated(architecture: str = "jumprelu", **config: Any) -> Any:
    """A dictionary in which three features overlap, and the encoder is nearly the decoder transposed."""
    sae = tiny.build_sae(architecture, **config)
    with torch.no_grad():
        sae.W_dec[17] += 2 * sae.W_dec[5]
        sae.W_dec[40] -= sae.W_dec[5]
        sae.W_enc.mul_(0.3).add_(sae.W_dec.T)
    return sae


def residuals(*shape: int, size: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, tiny.D_MODEL, generator=generator) * size


def intervene(
    sae: Any, values: tuple[float, ...], mode: Any, position: int | None, layer: int = 1
) -> Intervention:
    features = FEATURES[: len(values)]
    return Intervention(
        directions=directions_of(sae, layer, features, CPU), values=values, mode=mode, position=position
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@contextmanager
def recorded(model: LanguageModel, layer: int) -> Iterator[list[torch.Tensor]]:
    """The outputs of a block, as what comes after it has them."""
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = model.blocks[layer].register_forward_hook(keep)
    yield outputs
    handle.remove()


def n_hooks(model: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules()
    )


@pytest.mark.parametrize("architecture", ["jumprelu", "standard"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("values", [(3.5,), (0.0,), (2.0, 7.0, 1.5), (4.0, 0.0, 3.0), (0.0, 0.0, 0.0)])
def test_the_encoder_reads_what_was_clamped(
    architecture: str, apply_b_dec_to_input: bool, values: tuple[float, ...]
) -> None:
    sae = correlated(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    hidden = residuals(2, 50)
    features = list(FEATURES[: len(values)])
    before = sae.encode(hidden)[..., features]
    assert (before > 0).any(0).any(0).all()
    assert (before == 0).any(0).any(0).all()
    clamp = intervene(sae, values, "clamp", None)
    change = clamp.change(hidden)
    assert change.dtype == torch.float32
    after = sae.encode(hidden + change)[..., features]
    wanted = torch.tensor(values).expand_as(after)
    assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-5)
    if architecture == "jumprelu":
        assert torch.equal(after == 0, wanted == 0)
    # It moves along the decoder's directions alone, and what is off and is to be off stays as silent as it was.
    decoder = sae.W_dec[features].detach()
    along = torch.linalg.lstsq(decoder.T, change.reshape(-1, tiny.D_MODEL).T).solution
    assert torch.allclose(decoder.T @ along, change.reshape(-1, tiny.D_MODEL).T, atol=1e-4)
    own = clamp.directions
    silent = (before == 0) & (wanted == 0)
    first, second = (x @ own.encoder + own.bias for x in (hidden, hidden + change))
    assert torch.allclose(second[silent], first[silent], atol=1e-4)


def test_clamping_several_is_not_clamping_one_after_another() -> None:
    sae, hidden = correlated(), residuals(1, 20)
    features = list(FEATURES[:2])
    for feature, value in zip(features, (3.0, 5.0), strict=True):
        directions = directions_of(sae, 1, [feature], CPU)
        hidden += Intervention(directions=directions, values=(value,), mode="clamp", position=None).change(
            hidden
        )
    assert not torch.allclose(sae.encode(hidden)[..., features], torch.tensor([3.0, 5.0]), rtol=0.1)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("position", [None, 4])
@pytest.mark.parametrize("kind", ["jumprelu", "standard"])
def test_within_a_model_the_encoder_reads_the_values(
    folder: Path, architecture: str, position: int | None, kind: str
) -> None:
    model, sae = load(folder, architecture), correlated(kind)
    ids = torch.tensor([PROMPT, PROMPT])
    with recorded(model, 1) as plain:
        model.next_log_probs(ids)
    clamp = intervene(sae, (6.0, 0.0, 4.0), "clamp", position)
    with steered(model, [[], [clamp]]), recorded(model, 1) as changed:
        model.next_log_probs(ids)
    (hidden,), (after,) = plain, changed
    here = slice(None) if position is None else slice(position, position + 1)
    read = sae.encode(after[1, here])[:, list(FEATURES)]
    assert torch.allclose(read, torch.tensor([6.0, 0.0, 4.0]).expand_as(read), rtol=1e-4, atol=1e-5)
    assert torch.equal(after[0], hidden[0])
    others = [place for place in range(len(PROMPT)) if position not in (None, place)]
    assert torch.equal(after[1, others], hidden[1, others])


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("position", [None, 0, 6])
def test_adding_is_the_residual_plus_values_times_directions(
    folder: Path, architecture: str, position: int | None
) -> None:
    model, sae = load(folder, architecture), tiny.build_sae()
    ids = torch.tensor([PROMPT])
    with recorded(model, 2) as plain:
        model.next_log_probs(ids)
    add = intervene(sae, (3.0, -2.0, 0.5), "add", position, layer=2)
    with steered(model, [[add]]), recorded(model, 2) as changed:
        model.next_log_probs(ids)
    expected = plain[0].clone()
    for place in range(len(PROMPT)) if position is None else [position]:
        expected[0, place] += 3.0 * sae.W_dec[5] - 2.0 * sae.W_dec[17] + 0.5 * sae.W_dec[40]
    assert torch.allclose(changed[0], expected, atol=1e-5)
    assert not torch.allclose(plain[0], expected, atol=0.1)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("jumprelu", {}),
        ("gated", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("abstopk", {"k": 8, "rescale_acts_by_decoder_norm": True}),
        ("matching_pursuit", {}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_adding_is_what_the_dictionarys_decoder_does_with_the_value(
    architecture: str, config: dict[str, Any]
) -> None:
    sae, hidden = tiny.build_sae(architecture, **config), residuals(6)
    more = torch.zeros(6, 96)
    more[:, 5], more[:, 17] = 3.0, 1.5
    decoded = []
    for extra in (torch.zeros_like(more), more):
        found = sae.encode(hidden)  # which keeps the scale that `decode` undoes, once
        decoded.append(sae.decode((found.to_dense() if found.is_sparse else found) + extra))
    change = intervene(sae, (3.0, 1.5), "add", None).change(hidden)
    assert torch.allclose(change, decoded[1] - decoded[0], atol=1e-4)


def steerings(sae: Any) -> list[list[Intervention]]:
    """One of each kind, strong enough to change a tiny model's texts, and nothing."""
    return [
        [intervene(sae, (9.0, 6.0), "add", 6)],
        [intervene(sae, (9.0, -6.0), "add", None)],
        [intervene(sae, (20.0, 25.0, 0.0), "clamp", 0)],
        [intervene(sae, (20.0, 0.0, 15.0), "clamp", None)],
        [],
    ]


@pytest.mark.parametrize("architecture", MODELS)
def test_cached_texts_are_those_of_everything_computed_anew(folder: Path, architecture: str) -> None:
    model, sae = load(folder, architecture), correlated()
    rows = steerings(sae)
    logits: list[torch.Tensor] = []
    head = model.module.get_output_embeddings()
    watch = head.register_forward_hook(lambda _module, _inputs, output: logits.append(output[:, -1]))
    with steered(model, rows):
        found = model.generate_rows(torch.tensor([PROMPT] * len(rows)), 8)
    watch.remove()
    expected = [text_without_cache(model, PROMPT, 8, by_hand(sae, row)) for row in rows]
    assert found == [ids for ids, _ in expected]
    cached = torch.stack(logits, dim=1)
    anew = torch.stack([scores for _, scores in expected])
    assert cached.shape == anew.shape == (5, 8, 400)
    assert torch.allclose(after_head(model, cached), anew, atol=1e-3, rtol=1e-4)
    # Each does something of its own, at the first new token and at the last.
    for one, another in itertools.combinations(anew, 2):
        assert ((one - another).abs().amax(-1)[[0, -1]] > 0.03).all()


def after_head(model: LanguageModel, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.module.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def by_hand(sae: Any, row: list[Intervention]) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit of (n, d_model) residuals, with SAELens' own encoder and the plainest algebra."""

    def edit(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        for one in row:
            features = list(one.directions.feature_ids)
            decoder, encoder = sae.W_dec[features].double(), sae.W_enc[:, features].double()
            for place in range(len(hidden)) if one.position is None else [one.position]:
                x = hidden[place].double()
                coefficients = torch.tensor(one.values, dtype=torch.float64)
                if one.mode == "clamp":
                    before = (x - sae.b_dec.double()) @ encoder + sae.b_enc[features].double()
                    is_on = sae.encode(hidden[place])[features] > 0
                    keeps = (coefficients == 0) & ~is_on
                    wanted = torch.where(keeps, before, coefficients)
                    coefficients = torch.linalg.solve((decoder @ encoder).T, wanted - before)
                hidden[place] = (x + coefficients @ decoder).float()
        return hidden

    return edit


def text_without_cache(
    model: LanguageModel, prompt: list[int], n: int, edit: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[int], torch.Tensor]:
    """Token after token, everything computed anew for each; and (n, vocabulary) logits."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0][0])[None], *output[1:])
        return edit(output[0])[None]

    ids, logits = list(prompt), []
    handle = model.blocks[1].register_forward_hook(hook)
    with torch.no_grad():
        for _ in range(n):
            logits.append(model.module(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    handle.remove()
    return ids[len(prompt) :], torch.stack(logits)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [*((one, "float32") for one in MODELS), ("llama", "bfloat16")]
)
def test_an_untouched_row_is_the_same_to_the_bit(folder: Path, architecture: str, dtype: str) -> None:
    model, sae = load(folder, architecture, dtype), correlated()
    kinds = steerings(sae)[:4]
    for n in (1, 2, 5) if dtype == "float32" else (2,):
        ids = torch.tensor([PROMPT] * n)
        with recorded(model, 1) as plain:
            log_probs = model.next_log_probs(ids)
        texts = model.generate_rows(ids, 3)
        for untouched in {0, n // 2, n - 1}:
            rows = [[] if row == untouched else kinds[row % 4] for row in range(n)]
            with steered(model, rows), recorded(model, 1) as changed:
                steered_probs = model.next_log_probs(ids)
            with steered(model, rows):
                steered_texts = model.generate_rows(ids, 3)
            assert torch.equal(bits(changed[0][untouched]), bits(plain[0][untouched]))
            assert torch.equal(bits(steered_probs[untouched]), bits(log_probs[untouched]))
            assert steered_texts[untouched] == texts[untouched]
            for row in set(range(n)) - {untouched}:
                assert not torch.equal(changed[0][row], plain[0][row])
                assert not torch.equal(steered_probs[row], log_probs[row])


def test_the_blocks_own_output_is_left_as_it_is(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT])
    own_output: list[torch.Tensor] = []
    # It reads before steering does, and keeps the tensor itself.
    handle = model.blocks[1].register_forward_hook(lambda _module, _inputs, output: own_output.append(output))
    model.next_log_probs(ids)
    with steered(model, [[intervene(sae, (9.0,), "add", None)]]), recorded(model, 1) as changed:
        model.next_log_probs(ids)
    handle.remove()
    assert torch.equal(own_output[1], own_output[0])
    assert not torch.equal(changed[0], own_output[0])


def test_nothing_added_is_nothing_changed(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT] * 3)
    log_probs = model.next_log_probs(ids)
    zero = [intervene(sae, (0.0, 0.0), "add", position) for position in (None, 6)]
    with steered(model, [[], zero[:1], zero[1:]]):
        assert torch.equal(bits(model.next_log_probs(ids)), bits(log_probs))


def test_a_rough_dtype_is_changed_in_float32(folder: Path) -> None:
    model, sae = load(folder, dtype="bfloat16"), correlated()
    ids = torch.tensor([PROMPT])
    with recorded(model, 1) as plain:
        model.next_log_probs(ids)
    add = intervene(sae, (3.0, 1.0), "add", None)
    with steered(model, [[add]]), recorded(model, 1) as changed:
        model.next_log_probs(ids)
    assert changed[0].dtype == torch.bfloat16
    exact = plain[0].float() + 3.0 * sae.W_dec[5] + 1.0 * sae.W_dec[17]
    assert torch.equal(changed[0], exact.bfloat16())


def test_a_row_takes_several_interventions_in_order_and_at_several_layers(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT])
    push = intervene(sae, (5.0,), "add", 2)
    clamp = intervene(sae, (4.0,), "clamp", 2)
    early = intervene(sae, (2.0,), "add", 1, layer=0)
    read = {}
    for name, row in {"clamped last": [early, push, clamp], "pushed last": [clamp, early, push]}.items():
        with steered(model, [row]), recorded(model, 1) as changed:
            model.next_log_probs(ids)
        read[name] = sae.encode(changed[0][0, 2])[5].item()
    assert read["clamped last"] == pytest.approx(4.0, rel=1e-4)
    gain = (sae.W_dec[5] @ sae.W_enc[:, 5]).item()
    assert read["pushed last"] == pytest.approx(4.0 + 5.0 * gain, rel=1e-4)
    with recorded(model, 0) as plain:
        model.next_log_probs(ids)
    with steered(model, [[early, clamp]]), recorded(model, 0) as changed:
        model.next_log_probs(ids)
    assert torch.allclose(changed[0][0, 1], plain[0][0, 1] + 2.0 * sae.W_dec[5], atol=1e-5)


def test_a_sized_control_moves_as_much_in_its_own_direction() -> None:
    sae, hidden = correlated(), residuals(2, 30)
    other = directions_of(sae, 1, (60, 61), CPU)
    for trait in (
        intervene(sae, (2.0, 7.0), "clamp", 4),
        intervene(sae, (2.0, 7.0), "add", None),
    ):
        control = Intervention(directions=other, values=(2.0, 7.0), mode="add", position=4, sized_as=trait)
        wanted, size = change_norms(trait, hidden)
        found, same = change_norms(control, hidden)
        assert torch.allclose(found, wanted, rtol=1e-5)
        assert torch.equal(size, same)
        assert torch.allclose(size, hidden.square().sum(-1).sqrt())
        own = 2.0 * sae.W_dec[60] + 7.0 * sae.W_dec[61]
        cosine = torch.cosine_similarity(control.change(hidden), own.expand_as(hidden), dim=-1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)
    # Where the trait is at its value already, the control does nothing; and nothing cannot be scaled.
    silent = intervene(sae, (0.0, 0.0), "clamp", None)
    moves = change_norms(silent, hidden)[0]
    off = (sae.encode(hidden)[..., list(FEATURES[:2])] == 0).all(-1)
    assert off.any()
    assert not off.all()
    control = Intervention(directions=other, values=(1.0, 1.0), mode="add", position=None, sized_as=silent)
    assert torch.allclose(change_norms(control, hidden)[0], moves, rtol=1e-5)
    assert not control.change(hidden)[off].any()
    nothing = Intervention(
        directions=other,
        values=(0.0, 0.0),
        mode="add",
        position=None,
        sized_as=intervene(sae, (2.0,), "add", None),
    )
    assert not nothing.change(hidden).any()


def test_the_model_is_restored_whatever_happens(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT])
    hooks, log_probs = n_hooks(model), model.next_log_probs(ids)
    rows = [[intervene(sae, (5.0,), "add", None, layer=layer) for layer in (0, 2)]]

    def restored() -> bool:
        return n_hooks(model) == hooks and torch.equal(bits(model.next_log_probs(ids)), bits(log_probs))

    with steered(model, rows):
        assert n_hooks(model) == hooks + 4  # one in each block, and before the decoder for each
        assert not torch.equal(model.next_log_probs(ids), log_probs)
    assert restored()
    with pytest.raises(ZeroDivisionError), steered(model, rows):
        raise ZeroDivisionError
    assert restored()
    outside = [[*rows[0], intervene(sae, (5.0,), "add", 7)]]
    with pytest.raises(ModelError), steered(model, outside):
        model.generate_rows(ids, 3)
    assert restored()
    nowhere = [[*rows[0], intervene(sae, (5.0,), "add", None, layer=3)]]
    with pytest.raises(ModelError), steered(model, nowhere):
        pytest.fail("there is no block 3")
    assert restored()


@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_feature_steers_as_computed_by_hand(folder: Path, layer: int) -> None:
    model, token = load(folder), 123
    with torch.no_grad():
        for block in model.blocks[layer + 1 :]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.module.model.norm.weight.copy_(torch.linspace(0.5, 1.5, tiny.D_MODEL))
    sae, unembedding = tiny.build_sae(), model.module.lm_head.weight
    norm = model.module.model.norm
    with torch.no_grad():
        sae.W_dec[5] = unembedding[token]
    ids = torch.tensor([PROMPT])
    with recorded(model, layer) as plain:
        before = model.next_log_probs(ids)
    last, direction = plain[0][0, -1].double(), unembedding[token].double()
    assert before.argmax() != token
    logits = []
    for strength in (0.0, 1.0, 4.0, 30.0):
        x = last + strength * direction
        # RMS norm, then the unembedding.
        x = x / (x.square().mean() + norm.variance_epsilon).sqrt() * norm.weight.double()
        expected = unembedding.double() @ x
        logits.append(float(expected[token]))
        with steered(model, [[intervene(sae, (strength,), "add", 6, layer=layer)]]):
            found = model.next_log_probs(ids)
        assert torch.allclose(found[0].double(), expected.log_softmax(0), atol=1e-4)
    assert logits == sorted(set(logits))
    with steered(model, [[intervene(sae, (30.0,), "add", None, layer=layer)]]):
        assert model.generate_rows(ids, 6) == [[token] * 6]
    with steered(model, [[intervene(sae, (30.0,), "add", 6, layer=layer)]]):
        (text,) = model.generate_rows(ids, 6)
    # No later block reads what the last one gives, so all else is as if the token had been written.
    assert text[0] == token
    assert text[1:] == model.generate([[*PROMPT, token]], 5)[0]
    assert text[1:] != [token] * 5


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((3, 96), r"layer 1: there is no feature 96: the dictionary has 96 .*0 to 95"),
        ((-1,), "there is no feature -1"),
        ((4, 9, 4), r"a feature is named twice in \[4, 9, 4\]"),
    ],
)
def test_features_that_are_not_there_are_named(features: tuple[int, ...], message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        directions_of(tiny.build_sae(), 1, features, CPU)


def test_a_dictionary_of_attention_heads_has_no_directions() -> None:
    sae = tiny.build_sae()
    sae.cfg.reshape_activations = "hook_z"
    with pytest.raises(DictionaryError, match="reads attention heads"):
        directions_of(sae, 1, [5], CPU)


@pytest.mark.parametrize(
    ("values", "mode", "message"),
    [
        ((1.0,), "add", "features 5, 17 cannot be given 1 values"),
        ((1.0, float("nan")), "add", r"cannot be given the values \[1.0, nan\]"),
        ((9.0, -1.0), "clamp", "feature 17 cannot be clamped to -1"),
        (
            (9.0, 0.25),
            "clamp",
            r"feature 17 cannot be clamped to 0.25: .* threshold of 0.75 .*another strength",
        ),
        ((0.75, 9.0), "clamp", "feature 5 cannot be clamped to 0.75"),
    ],
)
def test_values_that_cannot_be_are_refused(values: tuple[float, ...], mode: Any, message: str) -> None:
    sae = correlated()
    with torch.no_grad():
        sae.threshold.fill_(0.75)
    directions = directions_of(sae, 1, FEATURES[:2], CPU)
    with pytest.raises(DictionaryError, match=message):
        Intervention(directions=directions, values=values, mode=mode, position=None)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("topk", {}, "topk dictionary"),
        ("gated", {}, "gated dictionary"),
        ("jumprelu", {"normalize_activations": "layer_norm"}, r"jumprelu dictionary normalizes .*layer_norm"),
    ],
)
def test_dictionaries_that_cannot_be_clamped_say_so(
    architecture: str, config: dict[str, Any], message: str
) -> None:
    sae = tiny.build_sae(architecture, **config)
    with pytest.raises(DictionaryError, match=rf'feature 5 cannot be clamped: .*{message}.*mode = "add"'):
        intervene(sae, (9.0,), "clamp", None)


@pytest.mark.parametrize("case", ["same reading", "same writing", "nothing read", "across"])
def test_features_that_the_encoder_cannot_set_are_refused(case: str) -> None:
    sae = tiny.build_sae()
    with torch.no_grad():
        if case == "same reading":
            sae.W_enc[:, 17] = 2 * sae.W_enc[:, 5]
        elif case == "same writing":
            sae.W_dec[17] = 0.1 * sae.W_dec[5]
        elif case == "nothing read":
            sae.W_enc[:, 17] = 0
        else:
            sae.W_enc[:, 17] -= (
                (sae.W_enc[:, 17] @ sae.W_dec[17]) / sae.W_dec[17].square().sum() * sae.W_dec[17]
            )
    intervene(sae, (9.0, 9.0), "add", None)
    values, features = ((9.0,), (17,)) if case in ("nothing read", "across") else ((9.0, 9.0), (5, 17))
    directions = directions_of(sae, 1, features, CPU)
    with pytest.raises(DictionaryError, match=r'cannot be clamped: the encoder does not read .*mode = "add"'):
        Intervention(directions=directions, values=values, mode="clamp", position=None)


def test_sizes_are_those_of_the_same_layer() -> None:
    sae = correlated()
    elsewhere = intervene(sae, (1.0,), "add", None, layer=2)
    with pytest.raises(DictionaryError, match="layer 1: a change cannot be sized as one at layer 2"):
        replace(intervene(sae, (1.0,), "add", None, layer=1), sized_as=elsewhere)


def test_steering_what_is_not_there_is_an_error(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT, PROMPT])
    own = intervene(sae, (5.0,), "add", None)
    with (
        pytest.raises(ModelError, match=r"no block 3: it has 3 .*0 to 2"),
        steered(model, [[intervene(sae, (5.0,), "add", None, layer=3)]]),
    ):
        pass
    with (
        pytest.raises(ModelError, match=r"layer 1 of .*a batch of 2 rows .*interventions of 3"),
        steered(model, [[own], [], []]),
    ):
        model.next_log_probs(ids)
    for position in (7, -1):
        with (
            pytest.raises(ModelError, match=rf"position {position} cannot be steered: .* 7 tokens .*0 to 6"),
            steered(model, [[], [intervene(sae, (5.0,), "add", position)]]),
        ):
            model.next_log_probs(ids)


def test_a_second_pass_is_refused(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT])
    with steered(model, [[intervene(sae, (5.0,), "add", 6)]]):
        model.next_log_probs(ids)
        with pytest.raises(ModelError, match=r"a second pass begins after 7 tokens .*open another"):
            model.next_log_probs(ids)


def test_several_tokens_at_once_after_the_prompt_are_refused(folder: Path) -> None:
    model, sae = load(folder), correlated()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode(), steered(model, [[intervene(sae, (5.0,), "add", 3)]]):
        cache = model.module(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ModelError, match=r"3 tokens came after 4, .*open another"):
            model.module(ids[:, 4:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_second_pass_of_one_token_is_no_step_of_a_generation(
    folder: Path, architecture: str, first: int, is_chunked: bool
) -> None:
    model, sae = load(folder, architecture), correlated()
    model.is_chunked = is_chunked
    rows = [[intervene(sae, (5.0,), "add", 0)]]
    prompt, one = torch.tensor([PROMPT[:first]]), torch.tensor([[40]])
    passes: dict[str, Callable[[torch.Tensor], Any]] = {
        "distribution": model.next_log_probs,
        "text": lambda ids: model.generate_rows(ids, 4),
    }
    for before, after in itertools.product(passes.values(), passes.values()):
        with steered(model, rows):
            before(prompt)
            with pytest.raises(ModelError, match=r"a second pass begins after \d+ tokens .*open another"):
                after(one)


def test_directions_are_float32_whatever_the_dictionary_is() -> None:
    directions = directions_of(tiny.build_sae().to(torch.bfloat16), 1, [7, 3], "cpu")
    assert isinstance(directions, Directions)
    assert directions.feature_ids == (7, 3)
    weights = (directions.decoder, directions.encoder, directions.bias, directions.threshold)
    assert [tuple(tensor.shape) for tensor in weights] == [(2, 32), (32, 2), (2,), (2,)]
    assert {tensor.dtype for tensor in weights} == {torch.float32}
