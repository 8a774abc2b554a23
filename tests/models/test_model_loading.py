"""A model is the one that its files hold, or it is refused by name before any work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from infra.storage import Storage
from schemas.config import Model
from schemas.errors import ModelError
from tasks.models.language_model import load_language_model
from tasks.models.loading import find_blocks, load_module, model_outline
from tasks.models.model import load_model

Weights = dict[str, torch.Tensor]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model")


def storage_of(folder: Path) -> Storage:
    return Storage(str(folder.parent / "storage"))


def change(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def residuals(folder: Path) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    model = load_model(Model(name=str(folder)), storage_of(folder))
    model.forward(IDS, [0, 1, 2], lambda _, hidden: found.append(hidden))
    return found


def refused(folder: Path, message: str, *, with_head: bool = False) -> None:
    """By the outline, before any weight is read, and by loading."""
    model = Model(name=str(folder))
    for load in (model_outline, load_module):
        with pytest.raises(ModelError, match=message) as caught:
            load(model, storage_of(folder), with_head=with_head)
        assert caught.value.hint
        assert str(folder) in caught.value.message


# karpathy/nanoGPT issue 325: a compiled model was saved; rwightman asks in timm 2003 for both prefixes at once.
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda key: f"_fsdp_wrapped_module.{key.replace('.self_attn', '._fsdp_wrapped_module.self_attn')}",
    ],
)
def test_weights_that_a_wrapper_saved_are_read_without_its_prefix(
    folder: Path, rename: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = residuals(folder)
    change(folder, lambda weights: {rename(key): tensor for key, tensor in weights.items()})
    with caplog.at_level(logging.WARNING):
        found = residuals(folder)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert "named as a wrapper saved them" in caplog.text
    load_language_model(Model(name=str(folder)), storage_of(folder))


@pytest.mark.parametrize("with_head", [False, True])
def test_weights_that_the_files_lack_are_not_made_up(folder: Path, with_head: bool) -> None:
    change(
        folder, lambda weights: {key: value for key, value in weights.items() if "layers.1.mlp" not in key}
    )
    refused(folder, r"its files lack \S*layers.1.mlp.down_proj.weight, .* random", with_head=with_head)


@pytest.mark.parametrize("with_head", [False, True])
def test_weights_under_unknown_names_are_refused(folder: Path, with_head: bool) -> None:
    change(folder, lambda weights: {f"transformer.{key}": value for key, value in weights.items()})
    refused(folder, r"its files lack", with_head=with_head)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_configuration_with_fewer_layers_than_the_files_is_refused(folder: Path, with_head: bool) -> None:
    configure(folder, num_hidden_layers=2)
    refused(
        folder, r"its files hold model.layers.2.\S+, .* and 6 more, which .* leave out", with_head=with_head
    )


@pytest.mark.parametrize("with_head", [False, True])
def test_a_configuration_with_another_width_is_refused(folder: Path, with_head: bool) -> None:
    configure(folder, intermediate_size=48)
    refused(folder, r"layers.0.mlp.down_proj.weight, .* and 6 more have other shapes", with_head=with_head)


# ezelikman/quiet-star issue 9: weights of a method of its own, which the architecture leaves out.
@pytest.mark.parametrize("with_head", [False, True])
def test_weights_that_the_architecture_does_not_know_are_refused(folder: Path, with_head: bool) -> None:
    change(folder, lambda weights: weights | {"talk_head.0.0.weight": torch.ones(2, 2)})
    refused(folder, r"its files hold talk_head.0.0.weight, which .* leave out", with_head=with_head)


# Checkpoints saved with tied weights and tie_word_embeddings lost on the way: the head is random.
def test_a_head_that_is_tied_no_more_is_refused_for_losses_alone(folder: Path) -> None:
    change(folder, lambda weights: {key: value for key, value in weights.items() if "lm_head" not in key})
    refused(folder, r"its files lack lm_head.weight", with_head=True)
    assert load_module(Model(name=str(folder)), storage_of(folder), with_head=False)
    configure(folder, tie_word_embeddings=True)
    assert load_module(Model(name=str(folder)), storage_of(folder), with_head=True)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_buffers_of_older_versions_and_heads_of_other_uses_are_no_weights(
    tmp_path: Path, architecture: str
) -> None:
    folder = tiny.save_model(tmp_path / "model", architecture)
    stack = "gpt_neox.layers" if architecture == "gpt_neox" else "model.layers"
    old = {
        f"{stack}.0.attention.rotary_emb.inv_freq": torch.ones(4),
        f"{stack}.0.attention.bias": torch.ones(1, 1, 8, 8),
        f"{stack}.0.attention.masked_bias": torch.tensor(-1e9),
    }
    change(folder, lambda weights: weights | old)
    for with_head in (False, True):
        assert load_module(Model(name=str(folder)), storage_of(folder), with_head=with_head)


def test_a_classifier_has_the_residual_stream_of_its_decoder(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    other = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(other)
    assert all(torch.equal(*pair) for pair in zip(residuals(other), residuals(folder), strict=True))
    refused(other, "its files lack lm_head.weight", with_head=True)


# An index that names a shard which is not there: half a download.
def test_a_missing_shard_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = {key: value for key, value in weights.items() if "layers.2" not in key}
    save_file(half, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    files = {key: f"model-0000{1 if key in half else 2}-of-00002.safetensors" for key in weights}
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "cannot load the model .*model-00002-of-00002.safetensors")


def adapter(folder: Path) -> None:
    configuration = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


# 2U1/Qwen-VL-Series-Finetune issue 157: merging wrote the adapter alone, in silence.
def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    adapter(folder)
    refused(folder, r"holds an adapter \(LoRA, adapter_config.json\) on org/base, which is not read")


# huggingface/transformers issue 28688: what PEFT saved is given as a model, and lacks config.json.
def test_an_adapter_alone_says_how_it_is_merged(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    adapter(tmp_path / "lora")
    with pytest.raises(ModelError, match="holds an adapter") as caught:
        load_model(Model(name=str(tmp_path / "lora")), Storage(str(tmp_path / "storage")))
    assert "merge_and_unload().save_pretrained" in caught.value.hint
    assert "org/base" in caught.value.hint


def saved(module: Any, folder: Path) -> Path:
    tiny.save_tokenizer(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    module.save_pretrained(folder)
    return folder


TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.slow
def test_the_decoder_of_a_model_that_sees_is_its_text_decoder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, InternVLConfig

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [28, 28],
        "patch_size": [14, 14],
    }
    config = InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **TEXT})
    folder = saved(AutoModelForImageTextToText.from_config(config), tmp_path / "internvl")
    found = residuals(folder)
    assert [hidden.shape for hidden in found] == [(1, 5, 32)] * 3
    blocks = load_model(Model(name=str(folder)), storage_of(folder)).blocks
    assert type(blocks[0]).__name__ == "Qwen2DecoderLayer"
    outline = model_outline(Model(name=str(folder)), storage_of(folder), with_head=False)
    assert type(find_blocks(outline, 3, 32, "x")[0]).__name__ == "Qwen2DecoderLayer"


@pytest.mark.slow
def test_blocks_that_hand_on_several_streams_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        **TEXT,
        head_dim=8,
        vocab_size_per_layer_input=400,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 3,
        layer_types=["full_attention"] * 3,
    )
    folder = saved(AutoModelForCausalLM.from_config(config), tmp_path / "gemma3n")
    model, storage = Model(name=str(folder)), storage_of(folder)
    message = r"the blocks of Gemma3n\w+ give no single residual stream .*\(4, 1, 4, 32\)"
    with pytest.raises(ModelError, match=message):
        load_model(model, storage)
    with pytest.raises(ModelError, match=message):
        find_blocks(model_outline(model, storage, with_head=False), 3, 32, str(folder))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: [x]])
def test_a_block_may_give_a_tensor_a_tuple_or_a_list(folder: Path, wrap: Callable[[Any], Any]) -> None:
    model = load_model(Model(name=str(folder)), storage_of(folder))
    expected, found = residuals(folder), []
    deepest = model.blocks[2]
    original = deepest.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrap(original(*args, **kwargs))

    deepest.forward = forward
    assert find_blocks(_last_unwrapped(model.module), 3, 32, "x") is model.blocks
    model.forward(IDS, [2], lambda _, hidden: found.append(hidden))
    assert torch.equal(found[0], expected[2])


def _last_unwrapped(module: Any) -> Any:
    """A decoder that takes what its last block gives, be it wrapped, and gives nothing of its own."""

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module.layers

        def get_input_embeddings(self) -> Any:
            return module.get_input_embeddings()

        def forward(self, input_ids: torch.Tensor, **_: Any) -> None:
            from tasks.models.loading import residual_of

            hidden = module.get_input_embeddings()(input_ids)
            positions = torch.arange(hidden.shape[1])[None]
            rotary = module.rotary_emb(hidden, positions)
            for block in module.layers:
                hidden = residual_of(block(hidden, position_embeddings=rotary, position_ids=positions))

    return Decoder()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # huggingface/text-generation-inference issue 1006: an ImportError of optimum
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"cannot load the model .*(optimum|gptqmodel|GPTQ)",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "cannot load the model .*bitsandbytes",
        ),
        ({"model_type": "none-such"}, "cannot load the model .*none-such"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}},
            "cannot load the model .*brings code of its own, which is not run",
        ),
    ],
)
def test_whatever_fails_at_loading_names_the_model_the_cause_and_the_way_out(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    configure(folder, **values)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(Model(name=str(folder)), storage_of(folder))
    assert str(folder) in caught.value.message
    assert not caught.value.message.rstrip().endswith(":")
    assert caught.value.hint
