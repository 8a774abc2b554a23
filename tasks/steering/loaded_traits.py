"""A trait as steering uses it: what `tasks.steering.traits` found, read back, and where to steer (PAPER 1.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra import verified
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.steering.section import Cases, Trait, steering_of
from schemas.steering.work import TraitFeatures


@dataclass(frozen=True, kw_only=True)
class TraitFeature:
    """One feature of a trait at a layer; its attributes are columns of `trait_features`."""

    feature_id: int
    coefficient: float
    clamp_value: float


@dataclass(frozen=True, kw_only=True)
class TraitLayer:
    """One layer of a trait; its attributes are columns of the table `trait_layers`.

    None: the trait's features are given.
    """

    layer: int
    separation: float | None
    accuracy: float | None
    explained_variance: float | None
    n_pairs: int
    is_most_informative: bool


@dataclass(frozen=True, kw_only=True)
class LoadedTrait:
    """A trait as steering needs it.

    Attributes:
        trait: Its name.
        layers: Every layer it was looked for at, ascending; that of a given trait alone.
        features: By layer, strongest first, or in the order in which they are given; a layer may have none.
    """

    trait: str
    layers: tuple[TraitLayer, ...]
    features: dict[int, tuple[TraitFeature, ...]]

    @property
    def is_given(self) -> bool:
        """Whether the cases' file names its features, and nothing was looked for."""
        return all(layer.separation is None for layer in self.layers)

    def strongest(self, layer: int, n: int) -> tuple[TraitFeature, ...]:
        """What is steered together at a layer: its `n` strongest features, or all of those that are given.

        Raises:
            ConfigError: if it has none there.
        """
        found = self.features.get(layer, ())
        if not found:
            known = ", ".join(str(at) for at, features in self.features.items() if features) or "none"
            given = "its features are given at another layer" if self.is_given else "it has no feature there"
            raise ConfigError(
                f"[[trait]] {self.trait!r} cannot be steered at layer {layer}: {given} (layers with features: {known})",
                hint="choose another steering.layer, give prompts that differ more, or name the trait's features",
                stage="steering",
            )
        return found if self.is_given else found[:n]


def load_layers(storage: Storage, found: TraitFeatures) -> tuple[TraitLayer, ...]:
    """What `find_trait` has kept of a trait's layers, ascending.

    Which is the most informative one is told here, of all of them together: it is the one of the largest separation,
    the lowest of equal ones.
    """
    names = [f"{entry.folder}/trait_layers.parquet" for entry in found.layers]
    rows = [row for name in names for row in verified.read_table(storage, name).to_pylist()]
    best = _largest({row["layer"]: row["separation"] or 0.0 for row in rows})
    columns = [name for name in TraitLayer.__annotations__ if name != "is_most_informative"]
    return tuple(
        TraitLayer(**{name: row[name] for name in columns}, is_most_informative=row["layer"] == best)
        for row in rows
    )


def load_trait(storage: Storage, found: TraitFeatures) -> LoadedTrait:
    """Read what `find_trait` has kept of a trait."""
    features = {}
    for entry in found.layers:
        rows = verified.read_table(storage, f"{entry.folder}/trait_features.parquet").to_pylist()
        features[entry.layer] = tuple(
            TraitFeature(**{name: row[name] for name in TraitFeature.__annotations__}) for row in rows
        )
    return LoadedTrait(trait=found.trait, layers=load_layers(storage, found), features=features)


def given_trait(trait: Trait) -> LoadedTrait | None:
    """A trait whose features the cases' file gives, as `load_trait` reads it; None if prompts are to find them."""
    if trait.layer is None or trait.features is None or trait.values is None:
        return None
    layer = TraitLayer(
        layer=trait.layer,
        separation=None,
        accuracy=None,
        explained_variance=None,
        n_pairs=0,
        is_most_informative=True,
    )
    features = tuple(
        TraitFeature(feature_id=feature, coefficient=value, clamp_value=value)
        for feature, value in zip(trait.features, trait.values, strict=True)
    )
    return LoadedTrait(trait=trait.name, layers=(layer,), features={trait.layer: features})


def known_traits(storage: Storage, cases: Cases, found: Sequence[TraitFeatures]) -> dict[str, LoadedTrait]:
    """Traits by name: those that are found, and those whose features the cases' file gives."""
    given = {trait.name: known for trait in cases.trait if (known := given_trait(trait)) is not None}
    return given | {trait.trait: load_trait(storage, trait) for trait in found if trait.trait not in given}


def choose_layer(config: Config, traits: Sequence[LoadedTrait]) -> int:
    """The layer at which some traits are steered together.

    It is `steering.layer`; else that of the traits whose features are given; else, of the layers where every trait has
    features, the one with the largest sum of their separations (the lowest of equal ones). For one trait that is its
    most informative layer, unless its dictionary has no feature of the trait there.

    Raises:
        ConfigError: if a trait has no features there.
    """
    layer = steering_of(config).layer
    if layer is None:
        given = [trait.layers[0].layer for trait in traits if trait.is_given]
        layer = given[0] if given else _most_informative(traits)
    for trait in traits:
        trait.strongest(layer, 1)
    return layer


def _most_informative(traits: Sequence[LoadedTrait]) -> int:
    sums: dict[int, float] = {}
    for trait in traits:
        for at in trait.layers:
            sums[at.layer] = sums.get(at.layer, 0.0) + (at.separation or 0.0)
    possible = [layer for layer in sums if all(trait.features.get(layer) for trait in traits)]
    return _largest({layer: sums[layer] for layer in possible or sums})


def _largest(separations: Mapping[int, float]) -> int:
    """The layer of the largest separation, the lowest of equal ones."""
    return min(separations, key=lambda layer: (-separations[layer], layer))
