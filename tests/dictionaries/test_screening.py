"""Screened and settled features against all latents settled, at the edges of what can be missed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dictionaries import encoding, screening
from tasks.dictionaries.encoding import Encoder, Sparse, Way, settled
from tasks.dictionaries.screening import BFloat16Screen, Float32Screen

CPU = torch.device("cpu")
WAYS: tuple[Way, ...] = ("bfloat16", "float32")
SHAPES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("topk", {"k": 5}),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ("topk", {"k": 150}),
]
D_SAE = 160


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, chunks and groups each, the last ones short."""
    monkeypatch.setattr(screening, "DENSE_ENTRIES", D_SAE * 47)
    monkeypatch.setattr(screening, "_SCORES", D_SAE * 20)
    monkeypatch.setattr(screening, "_CPU_BLOCK", (48, 50))
    monkeypatch.setattr(screening, "_PACKED_AT_ONCE", 50)
    monkeypatch.setattr(screening, "_GROUPS", 30)


def residuals(n: int = 121, seed: int = 1) -> torch.Tensor:
    """Ordinary rows, massive and minute ones, and one of zeros."""
    x = torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(seed)) * 3
    x[5] = 0
    x[17] *= 123
    x[18, 3] = 5000
    x[40] *= 1e-12
    x[41] *= 1e12
    x[42] *= 1e-30
    return x


def uneven(sae: Any) -> Any:
    """Latents without weights, with minute and enormous ones, alike ones, negative thresholds, and far biases."""
    with torch.no_grad():
        sae.W_enc[:, 7] = 0
        sae.W_enc[:, 20] *= 1e-22
        sae.W_enc[:, 21] *= 1e15
        sae.W_enc[:, 22] *= 1e-35
        sae.W_enc[:, 31] = sae.W_enc[:, 90]
        sae.b_enc[31] = sae.b_enc[90]
        sae.b_enc[60], sae.b_enc[61], sae.b_enc[62] = 1e6, -1e6, 3e-30
        if hasattr(sae, "threshold"):
            sae.threshold[70:90] = -1
            sae.threshold[31] = sae.threshold[90]
    return sae


def all_settled(encoder: Encoder, x: torch.Tensor) -> Sparse:
    """The obvious way: each pre-activation of each row, then the rule of the architecture."""
    inner: Any = encoder._encode
    x = encoder.sae.run_time_activation_norm_fn_in(x).contiguous()
    n = encoder.d_sae
    row = torch.arange(len(x)).repeat_interleave(n)
    values = settled(x, inner._weight, inner._bias, row, torch.arange(n).repeat(len(x))).view(len(x), n)
    if inner._threshold is not None:
        kept = values > inner._threshold
    else:
        values = values if inner._scale is None else values * inner._scale
        kept = torch.zeros_like(values, dtype=torch.bool)
        for one, scores in enumerate(values.tolist()):
            first = sorted(range(n), key=lambda latent: (-scores[latent], latent))[: inner._k]
            kept[one, first] = True
        kept &= values > 0
    found, latent = torch.nonzero(kept, as_tuple=True)
    return Sparse(row=found, feature=latent, value=values[found, latent])


def assert_same(found: Sparse, expected: Sparse) -> None:
    assert torch.equal(found.row, expected.row)
    assert torch.equal(found.feature, expected.feature)
    assert torch.equal(found.value.view(torch.int32), expected.value.view(torch.int32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_even", [True, False])
@pytest.mark.parametrize(("architecture", "config"), SHAPES)
def test_what_is_screened_is_what_all_latents_settled_give(
    architecture: str, config: dict[str, Any], is_even: bool, way: Way
) -> None:
    sae = tiny.build_sae(architecture, d_sae=D_SAE, **config)
    encoder = Encoder(sae if is_even else uneven(sae), CPU, way)
    x = residuals()
    found = encoder(x)
    assert len(found.row) > 400
    assert_same(found, all_settled(encoder, x))


@pytest.mark.parametrize(("architecture", "config"), SHAPES)
def test_a_tokens_features_depend_on_it_alone(architecture: str, config: dict[str, Any]) -> None:
    x = residuals()
    encoder = Encoder(tiny.build_sae(architecture, d_sae=D_SAE, **config), CPU, "bfloat16")
    whole = encoder(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            for rows in (*order.split(50), order[:1], torch.tensor([17, 3, 17])):
                some = encoder(x[rows])
                for place, row in enumerate(rows.tolist()):
                    one, all_ = some.row == place, whole.row == row
                    assert torch.equal(some.feature[one], whole.feature[all_])
                    assert torch.equal(some.value[one], whole.value[all_])
            again = Encoder(tiny.build_sae(architecture, d_sae=D_SAE, **config), CPU, "float32")
            assert_same(again(x), whole)
    finally:
        torch.set_num_threads(threads)


@st.composite
def numbers(draw: st.DrawFn, n: int) -> torch.Tensor:
    """Signed numbers, some of them half-way between two of bfloat16, of a common size."""
    mantissas = st.sampled_from(
        [1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-23, 1.5 + 2.0**-8, 1.0, 1 + 2.0**-7]
    ) | st.floats(1, 2, width=32)
    signs = st.sampled_from([-1.0, 1.0, 1.0, 1.0])
    size = 2.0 ** draw(st.integers(-20, 20))
    return torch.tensor([draw(mantissas) * draw(signs) * size for _ in range(n)])


@st.composite
def edges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights, and biases of the same sizes as their products."""
    d, latents, n = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    x = torch.stack([draw(numbers(d)) for _ in range(n)])
    weight = torch.stack([draw(numbers(d)) for _ in range(latents)])
    if draw(st.booleans()):
        # Along the row, where Cauchy and Schwarz give nothing away.
        weight = torch.cat([weight, x * 2.0 ** draw(st.integers(-9, 9))])
    size = float(x.norm(dim=1).max() * weight.norm(dim=1).max())
    bias = torch.tensor(
        draw(st.lists(st.floats(-2, 2, width=32), min_size=len(weight), max_size=len(weight)))
    )
    return x, weight, bias * size


@settings(deadline=None, max_examples=80)
@given(edges(), st.sampled_from([BFloat16Screen, Float32Screen]))
@pytest.mark.slow
def test_no_latent_is_missed_by_the_last_bit(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], screen: type[BFloat16Screen | Float32Screen]
) -> None:
    x, weight, bias = case
    every = torch.arange(len(weight))
    for row in x[:, None].unbind():
        value = settled(row, weight, bias, torch.zeros_like(every), every)
        below = torch.nextafter(value, torch.full_like(value, -torch.inf))
        assert screen(weight, bias, below, None).above(row).tolist() == every.tolist()
        for k in range(1, len(weight) + 1):
            scores = sorted(((-one, latent) for latent, one in enumerate(value.tolist()) if one > 0))[:k]
            named = set(screen(weight, bias, None, None).largest(row, k).tolist())
            assert {latent for _, latent in scores} <= named


def parallel() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A row and a latent along it: each number of the row loses nearly 2^-8 of itself, each weight some, too."""
    for d in range(16, 200):
        weight = torch.full((1, d), 1 + 2.0**-8)
        v = weight / (weight.norm() * (1 + 2.0**-9))
        if float((1 - v.to(torch.bfloat16).float() / v).max()) > 0.25 * 2.0**-8:
            yield torch.full((1, d), 1 + 2.0**-8), weight


def test_half_of_the_bound_misses_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(parallel())
    assert len(cases) > 10
    for x, weight in cases:
        exact = float(x.double()[0] @ weight.double()[0])
        rounded = float(x.to(torch.bfloat16).double()[0] @ weight.to(torch.bfloat16).double()[0])
        # What was thought to be the bound: both factors rounded, 2^-8 of their norms.
        assert exact - rounded > 2.0**-8 * float(x.norm() * weight.norm())
        none = torch.zeros(1)
        value = settled(x, weight, none, torch.tensor([0]), torch.tensor([0]))
        screen = BFloat16Screen(weight, none, value * (1 - 2.0**-23), None)
        assert len(screen.above(x)) == 1
        with monkeypatch.context() as patched:

            def half(x: torch.Tensor, farthest: float, whole: Any = screen._rounded) -> Any:
                rows, hidden = whole(x, farthest)
                rows[:, -2:] /= 2
                return rows, hidden

            patched.setattr(screen, "_rounded", half)
            assert len(screen.above(x)) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_rows_beyond_all_measure_are_settled_whole(architecture: str, way: Way) -> None:
    encoder = Encoder(tiny.build_sae(architecture, d_sae=D_SAE), CPU, way)
    x = residuals()
    x[2] *= 1e25
    x[30, 1] = torch.inf
    x[31] = torch.nan
    found = encoder(x)
    assert (found.row == 2).sum() > 5
    assert not (found.row == 31).any()
    if architecture == "jumprelu":
        assert_same(found, all_settled(encoder, x))
    ordinary = torch.tensor([row for row in range(len(x)) if row not in {2, 30, 31}])
    apart = encoder(x[ordinary])
    kept = torch.isin(found.row, ordinary)
    assert torch.equal(found.feature[kept], apart.feature)
    assert torch.equal(found.value[kept], apart.value)


def test_settled_values_are_dot_products() -> None:
    sae = tiny.build_sae("jumprelu", d_sae=D_SAE)
    inner: Any = Encoder(sae, CPU, "float32")._encode
    x = residuals()
    row, latent = torch.arange(len(x)).repeat_interleave(3), torch.arange(3 * len(x)) % D_SAE
    found = settled(x, inner._weight, inner._bias, row, latent)
    exact = (x.double()[row] * inner._weight.double()[latent]).sum(1) + inner._bias.double()[latent]
    size = x.double().norm(dim=1)[row] * inner._weight.norm(dim=1)[latent] + inner._bias.abs()[latent]
    assert ((found - exact).abs() <= 1.01 * (tiny.D_MODEL + 1) * 2.0**-24 * size).all()
    nothing = torch.empty(0, dtype=torch.int64)
    assert len(settled(x, inner._weight, inner._bias, nothing, nothing)) == 0


def test_dot_products_of_a_gpu_are_alike_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_PAIRS_AT_ONCE", 64)
    x = residuals()
    weight = torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    row, latent = torch.arange(len(x)).repeat_interleave(3), torch.arange(3 * len(x)) % D_SAE
    found = encoding._dots(x, weight, row, latent)
    exact = (x.double()[row] * weight.double()[latent]).sum(1)
    size = x.double().norm(dim=1)[row] * weight.double().norm(dim=1)[latent]
    assert ((found - exact).abs() <= 1.01 * tiny.D_MODEL * 2.0**-24 * size).all()
    for some in (slice(1, None), slice(100, 164), slice(0, 1)):
        assert torch.equal(encoding._dots(x, weight, row[some], latent[some]), found[some])


def test_few_latents_are_named_in_vain() -> None:
    generator = torch.Generator().manual_seed(0)
    d, n = 256, 4096
    weight = torch.randn(n, d, generator=generator)
    x = torch.randn(100, d, generator=generator)
    values = x @ (weight / weight.norm(dim=1, keepdim=True)).T
    threshold = values.flatten().kthvalue(int(values.numel() * (1 - 50 / n))).values * weight.norm(dim=1)
    screen = BFloat16Screen(weight, torch.zeros(n), threshold, None)
    assert 5000 <= len(screen.above(x)) < 6000
    # A massive row is uncertain in its own measure alone.
    massive = torch.cat([x, x[:1] * 1000])
    assert (screen.above(massive) < 100 * n).sum() == len(screen.above(x))
    assert len(BFloat16Screen(weight / 16, torch.zeros(n), None, None).largest(x, 50)) < 9000


def test_the_way_is_a_function_of_machine_and_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_units, way in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(encoding, "has_bfloat16_units", lambda _device, has_units=has_units: has_units)
        assert Encoder(tiny.build_sae(), CPU).way == way
    beyond = tiny.build_sae()
    with torch.no_grad():
        beyond.W_enc[0, 3] = 1e30
    assert Encoder(beyond, CPU).way == "sae.encode"
    monkeypatch.setattr(encoding, "has_bfloat16_units", lambda _device: True)
    monkeypatch.setattr(encoding, "WIDEST", tiny.D_MODEL - 1)
    assert Encoder(tiny.build_sae(), CPU).way == "float32"


def test_units_are_told_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert screening.has_bfloat16_units(CPU) == expected
    for capability, expected in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, it=capability: it)
        assert screening.has_bfloat16_units(torch.device("cuda")) == expected


def test_a_massive_residual_names_no_latents_of_others() -> None:
    """Rounding in the float32 product of one row is nothing that another's latents may hide in."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 512, generator=generator) for n in (200, 300))
    norms = weight.norm(dim=1)
    screen = Float32Screen(weight, torch.zeros(300), 2.5 * norms, None)
    usual = screen.above(x)
    assert 0.001 < len(usual) / (200 * 300) < 0.03
    x[[3, 150]] *= torch.tensor([[1e3], [1e9]])
    found = screen.above(x)
    assert torch.equal(found, found.unique())
    others = (found // 300 != 3) & (found // 300 != 150)
    ordinary = (usual // 300 != 3) & (usual // 300 != 150)
    assert int(others.sum()) <= 1.1 * int(ordinary.sum())
    assert set(usual[ordinary].tolist()) == set(found[others].tolist())
