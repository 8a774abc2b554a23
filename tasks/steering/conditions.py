"""What an experiment tries: its conditions, the features that it moves, and the random ones beside them (PAPER 1.3).

Every condition is one row of the table `steering`. A trait's features are moved at the last function token, or at
every position, in each mode and with each strength. Controls are the same features at a content token, as many random
features whose change has the same norm, and strength 0, which leaves a row untouched.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from infra.manifest import content_key
from schemas.errors import ConfigError
from schemas.steering.section import Mode, Place, Steering
from tasks.steering.directions import Directions
from tasks.steering.interventions import Intervention
from tasks.steering.loaded_traits import TraitFeature

Control = Literal["trait", "random"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to steer a prompt; its attributes are columns of the table `steering`.

    Attributes:
        mode: How features are set.
        place: Where, in words.
        position: Where, in tokens that the model sees, from 0; None: at every position, generated ones too.
        control: Whether the trait's features are moved, or random ones.
        draw: Of random features, from 1; 0 for the trait's.
        strength: Multiple of the trait's values; 0 is the unsteered model.
    """

    mode: Mode
    place: Place
    position: int | None
    control: Control
    draw: int
    strength: float

    def __str__(self) -> str:
        """How errors name it."""
        control = f", random draw {self.draw}" if self.control == "random" else ""
        return f"strength {self.strength:g} ({self.mode}, {self.place}{control})"


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The features that an experiment moves together.

    Attributes:
        feature_ids: The features, the first trait's first.
        values: By mode, each feature's value at strength 1.
    """

    feature_ids: tuple[int, ...]
    values: Mapping[Mode, tuple[float, ...]]


def conditions_of(section: Steering, last: int, content: int | None) -> tuple[Condition, ...]:
    """All conditions of one experiment, in the order of its table.

    Places are the prompt's last function token and the content token that is the control; a prompt without one (None)
    has no such rows.
    """
    positions: dict[Place, int | None] = {
        "last function token": last,
        "all positions": None,
        "content token": content,
    }
    draws = range(1, section.random_controls + 1)
    variants: list[tuple[Place, Control, int]] = [(place, "trait", 0) for place in section.places]
    variants += [("content token", "trait", 0)] if content is not None else []
    variants += [(place, "random", draw) for place in section.places for draw in draws]
    return tuple(
        Condition(
            mode=mode, place=place, position=positions[place], control=control, draw=draw, strength=strength
        )
        for mode in section.modes
        for place, control, draw in variants
        for strength in section.strengths
    )


def moved_features(traits: Sequence[Sequence[TraitFeature]]) -> Moved:
    """The features of one or several traits together.

    A feature that several traits have is moved once: what they would add is added up, and it is clamped to the
    largest of their values.
    """
    added: dict[int, float] = {}
    clamped: dict[int, float] = {}
    for trait in traits:
        for feature in trait:
            key = feature.feature_id
            added[key] = added.get(key, 0.0) + feature.coefficient
            clamped[key] = max(clamped.get(key, feature.clamp_value), feature.clamp_value)
    return Moved(
        feature_ids=tuple(added),
        values={"add": tuple(added.values()), "clamp": tuple(clamped.values())},
    )


def random_features(seed: int, prompt: str, draw: int, taken: Collection[int], d_sae: int) -> tuple[int, ...]:
    """As many random latents as the trait has, none of them twice and none of the trait's.

    A function of its arguments alone: one draw (from 1) has the same latents at every strength, in every mode and
    place.

    Raises:
        ConfigError: if the dictionary has too few other latents.
    """
    if 2 * len(taken) > d_sae:
        raise ConfigError(
            f"{len(taken)} random features beside the {len(taken)} that are steered are more than the dictionary's "
            f"{d_sae} latents",
            hint="lower steering.features, or set steering.random_controls = 0",
        )
    generator = random.Random(content_key(seed=seed, prompt=prompt, draw=draw))  # noqa: S311
    drawn = generator.sample(range(d_sae), 2 * len(taken))
    return tuple(feature for feature in drawn if feature not in taken)[: len(taken)]


def intervention_of(
    condition: Condition, values: Sequence[float], directions: Mapping[int, Directions]
) -> list[Intervention]:
    """What a condition does to its row of a batch: nothing at strength 0.

    Random features are always added, with the trait's values: their change is then scaled, position by position, to
    the norm of what the trait's does in this mode. Values are those of the trait's features at strength 1; directions
    are by draw, the trait's being 0.
    """
    if condition.strength == 0:
        return []
    scaled = tuple(condition.strength * value for value in values)
    trait = Intervention(
        directions=directions[0], values=scaled, mode=condition.mode, position=condition.position
    )
    if condition.control == "trait":
        return [trait]
    drawn = directions[condition.draw]
    # Features that are switched off (clamped to 0) have no values to share: any that are not 0 give a direction.
    shared = scaled if any(scaled) else (1.0,) * len(scaled)
    return [
        Intervention(directions=drawn, values=shared, mode="add", position=condition.position, sized_as=trait)
    ]
