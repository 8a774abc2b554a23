"""Texts of checkpoints: what their table holds, and what makes them be generated again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import run_of

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ModelError
from schemas.pretraining.work import Checkpoint, GeneratedTexts
from schemas.tables import SHARD_FILES
from tasks.engine.run import Run, make
from tasks.models.language_model import load_language_model
from tasks.models.model import model_key
from tasks.models.text_generation import continuation, prompt_ids
from tasks.models.tokenizers import LoadedTokenizer, load_tokenizer
from tasks.pretraining import loading
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.generations import GENERATIONS

PROMPTS = ["The river of", "", "Tokyo <eos> was"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for step in (0, 10):
        tiny.save_model(folder / f"step-{step}", seed=step)
    return folder


@dataclass(frozen=True)
class Prepared:
    config: Config
    storage: Storage
    checkpoints: list[Checkpoint]

    def run(self) -> Run:
        """A new look at the run."""
        return run_of(self.config, self.storage, {CHECKPOINTS: self.checkpoints})

    def make(self, progress: Progress = silent) -> list[GeneratedTexts]:
        return make(self.run(), GENERATIONS, progress)

    def found(self) -> list[GeneratedTexts] | None:
        run = self.run()
        return run.result(GENERATIONS) if run.is_finished(GENERATIONS) else None

    def with_tokenizer(self, folder: Path) -> Prepared:
        model = self.config.model.model_copy(update={"tokenizer": str(folder)})
        return replace(self, config=self.config.model_copy(update={"model": model}))


def prepare(parts: Path, root: Path, prepend_bos: bool = True, **generations: Any) -> Prepared:
    config = Config.model_validate(
        {
            "corpus": {"urls": ["corpus.jsonl"]},
            "model": {"name": "", "tokenizer": str(parts / "step-0")},
            "windows": {"context_size": 32, "prepend_bos": prepend_bos},
            "consolidation": {
                "series": [{"name": "tiny", "folder": str(parts)}],
                "generations": {"prompts": PROMPTS, "max_new_tokens": 9, "seed": 3} | generations,
            },
            "storage": {"root": str(root)},
        }
    )
    storage = Storage(str(root))
    models = {step: config.model.model_copy(update={"name": str(parts / f"step-{step}")}) for step in (0, 10)}
    checkpoints = [
        Checkpoint(series="tiny", step=step, model=model, key=model_key(model, storage))
        for step, model in models.items()
    ]
    return Prepared(config, storage, checkpoints)


def rows(made: list[GeneratedTexts], storage: Storage) -> list[list[dict[str, Any]]]:
    tables = [storage.read_parquet(f"{texts.folder}/generations.parquet") for texts in made]
    assert all(table.schema == SHARD_FILES["generations"] for table in tables)
    return [table.to_pylist() for table in tables]


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.slow
def test_each_prompt_is_continued_greedily_and_sampled(
    parts: Path, tmp_path: Path, prepend_bos: bool
) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(parts, tmp_path, prepend_bos)
    storage, checkpoints = prepared.storage, prepared.checkpoints
    reports: list[tuple[int, int, str]] = []
    made = prepared.make(lambda *report: reports.append(report))
    assert [texts.checkpoint for texts in made] == checkpoints
    assert list(dict.fromkeys(reports)) == [(done, 12, "texts, generations") for done in range(13)]
    tokenizer = AutoTokenizer.from_pretrained(parts / "step-0")
    found = rows(made, storage)
    for checkpoint, texts in zip(checkpoints, found, strict=True):
        model = load_language_model(checkpoint.model, storage)
        expected = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if prepend_bos or not prompt:
                ids = [tokenizer.bos_token_id, *ids]
            sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 3}
            for mode, seed, options in (("greedy", None, {}), ("sampled", 3, sampling)):
                (new,) = model.generate([ids], 9, stop_ids=[tokenizer.eos_token_id], **options)
                text = tokenizer.decode(new, skip_special_tokens=True)
                expected.append({"prompt": prompt, "continuation": text, "mode": mode, "seed": seed})
        assert texts == expected
    assert found[0] != found[1]
    assert any(one["continuation"] != two["continuation"] for one, two in zip(*found, strict=True))
    assert sum(len(row["continuation"]) > 5 for texts in found for row in texts) > 6


@pytest.mark.slow
def test_a_second_call_generates_nothing_and_a_lost_checkpoint_alone_is_made_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(parts, tmp_path)
    storage = prepared.storage
    assert prepared.found() is None
    made = prepared.make()
    before = [storage.read_bytes(f"{texts.folder}/generations.parquet") for texts in made]
    load, loaded = loading.load_language_model, []

    def counting(*arguments: Any) -> Any:
        loaded.append(arguments[0].name)
        return load(*arguments)

    monkeypatch.setattr(loading, "load_language_model", counting)
    assert prepared.make() == made == prepared.found()
    assert loaded == []
    storage.delete(made[1].folder)
    assert prepared.found() is None
    assert GENERATIONS.lines(prepared.run().find(GENERATIONS).missing) == ["tiny, step 10"]
    assert replace(prepared, checkpoints=prepared.checkpoints[:1]).found() == made[:1]
    assert prepared.make() == made
    assert loaded == [str(parts / "step-10")]
    assert [storage.read_bytes(f"{texts.folder}/generations.parquet") for texts in made] == before
    for changed in ({"seed": 4}, {"prompts": PROMPTS[:2]}, {"max_new_tokens": 8}, {"top_p": 0.5}):
        assert prepare(parts, tmp_path, **changed).found() is None
    assert prepare(parts, tmp_path, prepend_bos=False).found() is None


@pytest.mark.slow
def test_texts_that_end_elsewhere_are_others(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(parts, tmp_path / "run", max_new_tokens=2)
    own = load_tokenizer(prepared.config.model, prepared.storage)
    prepared.make()
    # A token that was special before, so that the tokenizer's key is the same.
    ending = AutoTokenizer.from_pretrained(parts / "step-0")
    ending.eos_token, ending.sep_token = "<pad>", "<eos>"
    ending.save_pretrained(tmp_path / "ending")
    other = prepared.with_tokenizer(tmp_path / "ending")
    assert load_tokenizer(other.config.model, other.storage).key == own.key
    assert prepared.found() is not None
    assert other.found() is None


@pytest.mark.slow
def test_another_seed_changes_what_is_sampled_alone(parts: Path, tmp_path: Path) -> None:
    one, other = prepare(parts, tmp_path), prepare(parts, tmp_path, seed=4)
    for left, right in zip(rows(one.make(), one.storage), rows(other.make(), one.storage), strict=True):
        same = [a["continuation"] == b["continuation"] for a, b in zip(left, right, strict=True)]
        assert same[::2] == [True] * len(PROMPTS)
        assert False in same[1::2]


@pytest.mark.slow
def test_a_text_ends_at_the_tokenizers_end(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prepared = prepare(parts, tmp_path / "long")
    storage, checkpoints = prepared.storage, prepared.checkpoints
    tokenizer = load_tokenizer(prepared.config.model, storage)
    model = load_language_model(checkpoints[0].model, storage)
    ids = prompt_ids(PROMPTS[0], tokenizer, prepend_bos=True)
    (new,) = model.generate([ids], 9)
    # The same tokenizer, but for its end, which is now a token that the model comes to.
    ending = AutoTokenizer.from_pretrained(parts / "step-0")
    ending.eos_token = ending.convert_ids_to_tokens(new[4])
    ending.save_pretrained(tmp_path / "ending")
    ended = replace(prepared.with_tokenizer(tmp_path / "ending"), checkpoints=checkpoints[:1])
    (texts,) = rows(ended.make(), storage)
    expected = new[: new.index(new[4])]
    assert texts[0]["continuation"] == tokenizer.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_prompt_that_does_not_fit_names_the_checkpoint(parts: Path, tmp_path: Path) -> None:
    prepared = prepare(parts, tmp_path, prompts=["Tokyo " * 130])
    with pytest.raises(
        ModelError, match=r"\[generations\] checkpoint tiny, step 0: a prompt of \d+ tokens and 9 new ones"
    ):
        prepared.make()


def test_an_empty_prompt_needs_a_bos(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(parts / "step-0", tmp_path / "nobos")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nobos")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "nobos")
    prepared = prepare(parts, tmp_path, prepend_bos=False).with_tokenizer(tmp_path / "nobos")
    with pytest.raises(ModelError, match="checkpoint tiny, step 0: an empty prompt needs a BOS token"):
        prepared.make()


def test_a_decoder_that_drops_the_first_space_does_not_join_words() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "▁the": 1, "▁river": 2, "bank": 3, "</s>": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer = LoadedTokenizer(
        tokenizer=wrapped, backend=backend, key="k", special_ids=(0, 4), bos_id=0, pad_id=4
    )
    assert wrapped.decode([2, 3]) == "riverbank"
    assert continuation([0, 1], [2, 3], tokenizer) == " riverbank"
    assert continuation([0, 1, 2], [3, 4], tokenizer) == "bank"
    assert continuation([0], [1, 2], tokenizer) == "the river"
    assert continuation([0, 1], [], tokenizer) == ""
