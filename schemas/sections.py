"""The sections of the configuration that the spine reads, corpus to tables (PAPER 1.1, 1.2)."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

if TYPE_CHECKING:
    from schemas.config import SpineConfig


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def explain(item: Any, root: type[Section]) -> str:
    """What is wrong with one value, from one of a `ValidationError`'s `errors()`.

    Args:
        item: The error: its type, its message and its place.
        root: The model that was validated, where the known keys of an unknown one's place are found.
    """
    if item["type"] != "extra_forbidden":
        return str(item["msg"]).removeprefix("Value error, ")
    section = root
    for part in item["loc"][:-1]:
        if part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    near = difflib.get_close_matches(str(item["loc"][-1]), list(section.model_fields), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"no such key; {meant}known: {', '.join(section.model_fields)}"


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, itself, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


class ExperimentSection(Section):
    """Base of an experiment's sections: what the spine asks of them, so that it need not know them."""

    def check_against(self, config: SpineConfig) -> None:
        """Whether the rest of the configuration fits.

        Raises:
            ValueError: if it does not.
        """

    @property
    def subject(self) -> str:
        """What a run is about that has no model of its own."""
        return ""

    @property
    def trained_vocabulary(self) -> int | None:
        """Tokens of the tokenizer that it has trained on the corpus; None: it trains none."""
        return None

    @property
    def held_out(self) -> float | None:
        """Share of the documents, by a hash of their tokens, that no training may see; None: it holds out none."""
        return None

    @property
    def needs_head(self) -> bool:
        """Whether it asks for the model's own predictions, not for its residual stream alone."""
        return False


class Csv(Section):
    """How .csv and .tsv files are written. Their line ends and byte order marks are told from the files."""

    delimiter: str = Field(
        "", max_length=1, description="Sign between two fields. Empty: a comma, in .tsv files a tab."
    )
    quote: str = Field(
        '"', max_length=1, description="Sign around fields; doubled inside them. Empty: quotes are text."
    )
    escape: str = Field(
        "", max_length=1, description="Sign that takes its meaning from the next one, such as a backslash."
    )

    @field_validator("delimiter", mode="before")
    @classmethod
    def _tab(cls, value: object) -> object:
        # A form has no other way to say it.
        return "\t" if value == "\\t" else value

    @model_validator(mode="after")
    def _are_told_apart(self) -> Csv:
        signs = [sign for sign in (self.delimiter, self.quote, self.escape) if sign]
        if len(set(signs)) < len(signs) or {"\n", "\r", "\0"} & {*signs}:
            raise ValueError("delimiter, quote and escape are three signs, none of them a line end")
        return self


class Corpus(Section):
    """Which documents are read, and how they are tokenized."""

    urls: list[str] = Field(
        min_length=1,
        description="fsspec URLs or globs (file, s3, hf, zip://member::archive) of .jsonl, .json (an array, or a "
        "record a line), .parquet, .csv, .tsv or .txt files; .gz, .zst, .bz2 and .xz allowed on text formats. File "
        "order is list order, globs sorted.",
    )
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "txt", "parquet"] = Field(
        "auto", description="What every file holds, whatever its name. auto: what its name says."
    )
    compression: Literal["auto", "none", "gzip", "zstd", "bz2", "xz"] = Field(
        "auto", description="How every file is compressed. auto: what its first bytes say."
    )
    csv: Csv = Field(default_factory=Csv, description="How .csv and .tsv files are written.")
    text_field: str = Field("text", description="Column or key that holds the text (not used by .txt).")
    max_documents: PositiveInt | None = Field(
        None, description="Stop after this many documents, in file order."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Stop before the first document that would bring the total above this many tokens."
    )
    max_reject_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Fail the run if more than this share of the records read, or of their bytes, is unusable. 1: "
        "never.",
    )
    max_unreadable_files: int = Field(
        0,
        ge=0,
        description="Fail the run if more files than this give no document, or cannot be read to their end.",
    )
    txt_records: Literal["line", "file"] = Field(
        "line",
        description="What one document is in a .txt file: a line (a blank one is a reject), or the whole file.",
    )
    shard_tokens: PositiveInt = Field(
        262_144, description="A shard is closed at the first document that brings it to this many tokens."
    )
    keep_occurrences: bool = Field(
        True, description="Keep every token's position. False counts only, for corpora of any size."
    )

    @property
    def reads(self) -> dict[str, object]:
        """What decides which texts come out of a file of a known format."""
        return self.model_dump(include={"text_field", "txt_records", "compression", "csv"})


class Model(Section):
    """The language model whose residual stream is read."""

    name: str = Field(
        "",
        description="A local directory, a Hugging Face id, or a .gguf file. Not needed where all models and their "
        "tokenizer are trained here.",
    )
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit.")
    tokenizer: str | None = Field(None, description="Another directory or id to take the tokenizer from.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: the checkpoint's own dtype on CUDA, float32 on CPU; decided once a storage.root, by the "
        "machine that runs the model first.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads of a forward; 0: all cores. Another number may flip activations at the threshold.",
    )


class Gate(Section):
    """What a dictionary trained here must reach on held-out tokens before it is used."""

    min_explained_variance: float = Field(0.75, le=1, description="1 - squared error / variance.")
    max_l0_deviation: float = Field(0.10, ge=0, description="Allowed |L0 / k - 1|.")
    min_alive_share: float = Field(0.90, ge=0, le=1, description="Share of latents that fire at least once.")


class Train(Section):
    """A BatchTopK dictionary trained by SAELens on this corpus' own residuals."""

    d_sae: PositiveInt = Field(description="Number of latents.")
    k: PositiveInt = Field(32, description="Mean number of active latents per token.")
    samples: PositiveInt = Field(300_000, description="Residual vectors shown, repeats included.")
    batch_size: PositiveInt = Field(512, description="Residual vectors per optimizer step.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak Adam rate, cosine to a tenth of it.")
    max_tokens: PositiveInt = Field(
        1_000_000, description="Residuals are sampled from the first graph documents up to this many tokens."
    )
    heldout_share: float = Field(0.1, gt=0, lt=1, description="Share of those documents kept for the gate.")
    outlier_multiple: float = Field(
        10.0, gt=1, description="Leave out of training what exceeds this multiple of the median norm."
    )
    seed: int = Field(0, ge=0, description="Seed of initialization and order.")
    start_from: str | None = Field(
        None,
        description="Folder (any fsspec URL) of a saved SAE whose weights training starts from; none: fresh.",
    )
    gate: Gate = Field(default_factory=Gate, description="What it must reach on held-out tokens.")

    @model_validator(mode="after")
    def _possible(self) -> Train:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} active latents of d_sae = {self.d_sae}: k can be d_sae at most")
        if self.samples < self.batch_size:
            raise ValueError(f"samples = {self.samples} are fewer than one batch of {self.batch_size}")
        return self


class Sae(Section):
    """The dictionary of one layer: from the SAELens registry, from disk, or trained here."""

    layer: int = Field(ge=0, description="Decoder block whose output is read, counted from 0.")
    release: str | None = Field(None, description="SAELens registry release, with sae_id.")
    sae_id: str | None = Field(None, description="SAELens registry id inside the release.")
    path: str | None = Field(None, description="Directory (any fsspec URL) saved by SAELens.")
    train: Train | None = Field(None, description="Train one here.")
    allow_other_model: bool = Field(
        False,
        description="Read it in this model though it says that it was trained on another one, such as the base model.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Sae:
        if (self.release is None) != (self.sae_id is None):
            raise ValueError(f"layer {self.layer}: release and sae_id go together")
        sources = [self.release is not None, self.path is not None, self.train is not None]
        if sum(sources) != 1:
            raise ValueError(
                f"layer {self.layer}: give exactly one of {{release, sae_id}}, {{path}} and {{train = {{…}}}}"
            )
        return self


class Windows(Section):
    """How a document becomes model inputs."""

    context_size: int = Field(1024, ge=2, description="Tokens per window at most, BOS included.")
    prepend_bos: bool = Field(True, description="Begin every window with BOS (fed, never in a table).")


class FunctionTokens(Section):
    """Which tokens are function tokens (PAPER 1.1)."""

    share: float = Field(
        0.40, gt=0, le=1, description="Share of all occurrences their ranking prefix reaches."
    )


class Activations(Section):
    """Extraction and encoding."""

    max_documents: PositiveInt | None = Field(None, description="Documents in the graph, in file order.")
    max_tokens: PositiveInt | None = Field(
        None, description="Tokens in the graph: documents in file order while they fit."
    )
    batch_tokens: PositiveInt = Field(
        4096, description="Padded tokens per forward at most (one window at least)."
    )
    keep_dense: bool = Field(False, description="Also write the residuals themselves.")
    mantissa_bits: int = Field(
        15, ge=7, le=23, description="Mantissa bits kept of a stored activation; 23 keeps float32 whole."
    )


class Graph(Section):
    """The token-feature graph's statistics."""

    rarefaction_m: PositiveInt = Field(
        100, description="Occurrences at which the expected (rarefied) degree is computed."
    )


class Features(Section):
    """The tables that show one feature at a time."""

    top_examples: PositiveInt = Field(20, description="Strongest activations kept of each feature.")
    decile_examples: PositiveInt = Field(
        5, description="Activations drawn from each tenth of a feature's, weakest to strongest."
    )
    histogram_bins: PositiveInt = Field(40, description="Bins from 0 to the feature's largest activation.")
    logits: bool = Field(
        False, description="Read the model's head: which tokens each feature's decoder direction promotes."
    )
    logit_tokens: PositiveInt = Field(
        10, description="Tokens promoted, and as many suppressed, of each feature."
    )


class DuckDb(Section):
    """Resources of the table stage."""

    memory_limit: str = Field(
        "3GB",
        pattern=r"^\d+(\.\d+)?\s?[KMGT]i?B$",
        description="DuckDB spills above it; the process needs about 200 MB more.",
    )
    threads: int = Field(0, ge=0, description="0: all cores, as far as the memory goes.")
    temp_directory: str | None = Field(None, description="Where DuckDB spills; default: a temporary folder.")


class Dask(Section):
    """Where tokenization (and, on a cluster, extraction) runs."""

    scheduler: str = Field("", description="Address of a running scheduler; empty: a local cluster.")
    workers: int = Field(
        0, ge=0, description="Local worker processes; 0: one per core, at most one per 2 MiB of the corpus."
    )


class StorageSection(Section):
    """Where everything is written."""

    root: str = Field("runs/functok", min_length=1, description="A local path or s3://bucket/prefix.")
    endpoint_url: str | None = Field(
        None, description="S3 endpoint, if not AWS. Credentials come from the environment, never from here."
    )
