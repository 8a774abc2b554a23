"""One side of `bench.peers`, in a process of its own: asked by a word a line, answering by JSON.

Arguments: the side, and a file that says where the model, the windows and the dictionaries are. As `delphi` it imports
nothing of functok. `support` tells the active (row, latent) entries of the smallest batch at the first layer, `prepare`
loads what a run needs, `run` reads all batches, `end` tells the peak memory, the bytes on disk and the number of
non-zeros of the last run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Windows:
    """The batches: (windows, length) ids, and which positions are real."""

    def __init__(self, path: str) -> None:
        found = np.load(path)
        n = len(found.files) // 2
        self.ids = [torch.from_numpy(found[f"ids_{place}"]) for place in range(n)]
        self.real = [torch.from_numpy(found[f"real_{place}"]) for place in range(n)]
        self.smallest = min(range(n), key=lambda place: self.ids[place].numel())


def entries(dense: torch.Tensor) -> list[list[int]]:
    """The (row, latent) entries above 0 of a (rows, latents) tensor."""
    found: list[list[int]] = torch.nonzero(dense > 0).tolist()
    return found


class Functok:
    """The stage `features`, its reading of shards and its writing included."""

    def __init__(self, given: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from infra.storage import Storage
        from schemas.config import Config
        from tasks.dictionaries.dictionaries import DICTIONARIES
        from tasks.engine.run import Run, make
        from tasks.graph.features import FEATURES

        self._storage = Storage(given["root"])
        self._config = Config.model_validate(given["config"])
        self._run, self._stage, self._make = Run(self._config, self._storage), FEATURES, make
        self._dictionaries = make(self._run, DICTIONARIES)
        self._windows, self._made = Windows(given["windows"]), []
        self._model: Any = None
        self._load()

    def _load(self) -> None:
        # What a run loads for its first part, and keeps for all others.
        from dataclasses import replace

        from tasks.graph import extraction
        from tasks.models.devices import choose_device
        from tasks.models.model import model_key

        device = choose_device(self._config.model.device)
        # One model at a time: the last run's is freed first.
        self._model = None
        extraction.keep_for(model_key(self._config.model, self._storage))
        self._model = extraction.loaded_model(self._config.model, self._storage)
        extraction.loaded_tokenizer(self._config.model, self._storage)
        self._encoders = {
            one.layer: extraction._encoder(replace(one, quality=None), self._storage, device)
            for one in self._dictionaries
        }

    def support(self) -> list[list[int]]:
        """The active (row, latent) entries of the smallest batch at the first layer."""
        place, layer = self._windows.smallest, min(self._encoders)
        found: list[list[int]] = []

        def receive(_: int, hidden: torch.Tensor) -> None:
            sparse = self._encoders[layer](hidden[self._windows.real[place]])
            found.extend(torch.stack([sparse.row, sparse.feature], dim=1).tolist())

        self._model.forward(self._windows.ids[place], [layer], receive)
        return found

    def prepare(self) -> None:
        """Forget what the last run made, and load again what its end has freed."""
        self._storage.delete("features")
        self._run.forget(self._stage)
        self._load()

    def run(self) -> None:
        """Read all batches."""
        self._made = self._make(self._run, self._stage)

    def written(self) -> tuple[int, int]:
        """Bytes on disk, and non-zeros, of the last run."""
        sizes = [sum(self._storage.sizes(shard.folder).values()) for shard in self._made]
        return sum(sizes), sum(shard.n_activations for shard in self._made)


class Others:
    """What SAELens and delphi share: a Hugging Face model, hooks at its blocks, dictionaries, dense latents."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._windows = Windows(given["windows"])
        self._layers = sorted(int(layer) for layer in given["saes"])

    def prepare(self) -> None:
        """Nothing is kept between runs but what is loaded."""

    def written(self) -> tuple[int, int]:
        """Bytes on disk, and non-zeros, of the last run."""
        return 0, 0


class SaeLens(Others):
    """`run_with_cache` of SAELens' proxy of the model, and `sae.encode`; nothing is written."""

    def __init__(self, given: dict[str, Any], *, stopped: bool) -> None:
        import logging

        from sae_lens import SAE
        from sae_lens.load_model import load_model
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__(given)
        logging.getLogger("sae_lens").setLevel(logging.ERROR)
        kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(given["folder"]))]
        self._hooks = {layer: f"{kind.base_model_prefix}.{given['inner']}.{layer}" for layer in self._layers}
        self._saes: dict[int, Any] = {
            layer: SAE.load_from_disk(given["saes"][str(layer)]) for layer in self._layers
        }
        self._stop = {"stop_at_layer": max(self._layers) + 1} if stopped else {}
        self._model: Any = load_model(
            "AutoModelForCausalLM",
            given["folder"],
            device="cpu",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            hook_names=list(self._hooks.values()),
        )
        self._model.eval()

    @torch.inference_mode()
    def _encode(self, place: int, layers: list[int]) -> dict[int, torch.Tensor]:
        _, cache = self._model.run_with_cache(
            self._windows.ids[place], names_filter=list(self._hooks.values()), **self._stop
        )
        return {layer: self._saes[layer].encode(cache[self._hooks[layer]]) for layer in layers}

    def support(self) -> list[list[int]]:
        """The active (row, latent) entries of the smallest batch at the first layer."""
        place, layer = self._windows.smallest, self._layers[0]
        return entries(self._encode(place, [layer])[layer][self._windows.real[place]])

    def run(self) -> None:
        """Read all batches."""
        for place in range(len(self._windows.ids)):
            self._encode(place, self._layers)


class Delphi(Others):
    """`LatentCache` with the encoder of delphi's own JumpReLU (`sparse_coders.custom.gemmascope`); `save_splits`."""

    SPLITS = 5

    def __init__(self, given: dict[str, Any]) -> None:
        import logging

        from delphi.latents.cache import LatentCache
        from safetensors.torch import load_file
        from transformers import AutoModel

        super().__init__(given)
        logging.getLogger("delphi").setLevel(logging.ERROR)
        self._cache_of = LatentCache
        self._model: Any = AutoModel.from_pretrained(given["folder"], dtype=torch.float32).eval()
        self._scratch, self._nonzeros = Path(given["scratch"]), 0
        self._encoders: dict[str, Any] = {}
        for layer in self._layers:
            weights = load_file(Path(given["saes"][str(layer)], "sae_weights.safetensors"))
            weight = weights["W_enc"]
            bias, threshold = weights["b_enc"] - weights["b_dec"] @ weight, weights["threshold"]

            def encode(
                x: torch.Tensor,
                weight: torch.Tensor = weight,
                bias: torch.Tensor = bias,
                threshold: torch.Tensor = threshold,
            ) -> torch.Tensor:
                before = x @ weight + bias
                return (before > threshold) * torch.relu(before)

            self._encoders[f"{given['inner']}.{layer}"] = encode

    def support(self) -> list[list[int]]:
        """The active (row, latent) entries of the smallest batch at the first layer."""
        place, hook = self._windows.smallest, next(iter(self._encoders))
        ids, real = self._windows.ids[place], self._windows.real[place]
        cache = self._cache_of(self._model, {hook: self._encoders[hook]}, batch_size=len(ids))
        cache.run(ids.numel(), ids)
        at = torch.full(real.shape, -1, dtype=torch.long)
        at[real] = torch.arange(int(real.sum()))
        window, position, latent = cache.cache.latent_locations[hook].T
        row = at[window, position]
        return torch.stack([row, latent], dim=1)[row >= 0].tolist()  # type: ignore[no-any-return]

    def run(self) -> None:
        """Read all batches."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._nonzeros = 0
        for place, ids in enumerate(self._windows.ids):
            cache = self._cache_of(self._model, self._encoders, batch_size=len(ids))
            cache.run(ids.numel(), ids)
            folder = self._scratch / str(place)
            folder.mkdir(parents=True)
            cache.save_splits(self.SPLITS, folder)
            self._nonzeros += sum(len(found) for found in cache.cache.latent_locations.values())

    def written(self) -> tuple[int, int]:
        """Bytes on disk, and non-zeros, of the last run."""
        return sum(file.stat().st_size for file in self._scratch.rglob("*.safetensors")), self._nonzeros


def peak_mib() -> int:
    """Peak resident memory of this process; `getrusage` would pass on what the parent had before it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    """Load, say so, and answer until the other side closes."""
    side, given = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(given["threads"])
    made: Any
    if side == "functok":
        made = Functok(given)
    elif side == "delphi":
        made = Delphi(given)
    else:
        made = SaeLens(given, stopped=side == "saelens_stopped")
    print(json.dumps("loaded"), file=answers, flush=True)
    for line in sys.stdin:
        asked = line.strip()
        if asked == "prepare":
            made.prepare()
            # What lay idle while the others ran may have been paged out.
            made.support()
            answer: Any = "prepared"
        elif asked == "end":
            size, nonzeros = made.written()
            answer = {"bytes": size, "nonzeros": nonzeros, "peak_mib": peak_mib()}
        else:
            answer = getattr(made, asked)()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
