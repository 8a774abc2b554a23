"""The encoder against `sae.encode`, and windows against the obvious way to cut them."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.windows import ShardTokens, batches
from tasks.dictionaries import encoding
from tasks.dictionaries.encoding import Encoder
from tasks.graph.features import round_mantissa

CPU = torch.device("cpu")
SETTLED = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"k": 5}),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
]


def dense(sparse: encoding.Sparse, shape: torch.Size) -> torch.Tensor:
    result = torch.zeros(shape)
    result[sparse.row, sparse.feature] = sparse.value
    return result


@pytest.mark.parametrize(("architecture", "config"), [*SETTLED, ("gated", {})])
def test_encoder_gives_what_sae_encode_gives(
    architecture: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = tiny.build_sae(architecture, d_sae=160, **config)
    x = torch.randn(301, tiny.D_MODEL, generator=torch.Generator().manual_seed(1)) * 3
    expected = sae.encode(x)
    expected = expected.to_dense() if expected.is_sparse else expected
    # Several chunks of rows, the last one short.
    monkeypatch.setattr(encoding, "DENSE_ENTRIES", 160 * 97)
    encoder = Encoder(sae, CPU)
    assert (encoder.way == "sae.encode") == (architecture == "gated")
    sparse = encoder(x)
    assert torch.equal(dense(sparse, expected.shape) > 0, expected > 0)
    torch.testing.assert_close(dense(sparse, expected.shape), expected, rtol=1e-4, atol=1e-5)
    assert (sparse.value > 0).all()
    key = sparse.row * 160 + sparse.feature
    assert (key[1:] > key[:-1]).all()


def test_encoder_of_nothing_is_empty() -> None:
    sparse = Encoder(tiny.build_sae(), CPU)(torch.empty(0, tiny.D_MODEL))
    assert len(sparse.row) == len(sparse.feature) == len(sparse.value) == 0


def test_bfloat16_residuals_are_encoded_in_float32() -> None:
    sae = tiny.build_sae()
    x = torch.randn(64, tiny.D_MODEL, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    sparse = Encoder(sae, CPU)(x)
    assert sparse.value.dtype == torch.float32
    torch.testing.assert_close(
        dense(sparse, torch.Size((64, 96))), sae.encode(x.float()), rtol=1e-4, atol=1e-5
    )


documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    lengths=documents, context=st.integers(2, 9), bos=st.sampled_from([None, 1]), budget=st.integers(1, 64)
)
def test_every_token_is_in_one_window_once(
    lengths: list[int], context: int, bos: int | None, budget: int
) -> None:
    doc = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    token_id = (10 + np.arange(len(doc))).astype(np.int32)
    is_special = token_id % 7 == 0
    tokens = ShardTokens(doc=doc, position=position, token_id=token_id, is_special=is_special)
    step = context - (bos is not None)
    expected = [
        token_id[(doc == d)][start : start + step].tolist()
        for d, n in enumerate(lengths)
        for start in range(0, n, step)
    ]
    windows, kept = [], []
    for batch in batches(tokens, context_size=context, bos_id=bos, pad_id=3, batch_tokens=budget):
        assert batch.input_ids.shape == batch.token.shape
        assert batch.input_ids.shape[1] <= context
        assert batch.input_ids.size <= budget or len(batch.input_ids) == 1
        for ids, index in zip(batch.input_ids, batch.token, strict=True):
            real = [int(i) for i in ids if i >= 10]
            assert ids.tolist() == [
                *([bos] if bos else []),
                *real,
                *[3] * (len(ids) - len(real) - (bos is not None)),
            ]
            windows.append(real)
            assert token_id[index[index >= 0]].tolist() == [i for i in real if i % 7]
            kept += index[index >= 0].tolist()
    assert sorted(windows) == sorted(expected)
    assert sorted(kept) == np.flatnonzero(~is_special).tolist()


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1), st.integers(7, 23))
def test_rounding_keeps_the_asked_bits(values: list[float], bits: int) -> None:
    exact = np.array(values, dtype=np.float32)
    rounded = round_mantissa(exact, bits)
    assert (rounded > 0).all()
    assert (np.abs(rounded.astype(np.float64) - exact) <= exact.astype(np.float64) * 2.0 ** -(bits + 1)).all()
    assert (rounded.view(np.uint32) % (1 << (23 - bits)) == 0).all()
    if bits == 23:
        assert (rounded == exact).all()
