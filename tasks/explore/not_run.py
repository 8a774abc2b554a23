"""What pages say of an experiment that a run has not asked for: what it would answer, and how to ask for it.

It comes from the experiment's room alone, so that none has to be named here: the descriptions of its sections, and
these sections as one of the files in `configs/` has them.
"""

from __future__ import annotations

import re
from importlib.resources import files

from pydantic.fields import FieldInfo

from schemas.experiments import experiment_rooms
from schemas.room import Room
from schemas.sections import section_in
from tasks.explore.vocabulary import Missing

_BLOCKS = re.compile(r"^(?=\[\[?\w)", re.MULTILINE)
_KEY = re.compile(r"\[\[?(\w+)")


def answers(room: Room) -> str:
    """What an experiment answers, in the words of its configuration."""
    return " ".join(field.description for field in _asking(room).values() if field.description)


def not_run(name: str) -> Missing:
    """What is said where a run has not asked for an experiment."""
    (room,) = [one for one in experiment_rooms() if one.name == name]
    return Missing(what=f"{answers(room)} This run was not asked for it. To ask:", way=configuration(room))


def configuration(room: Room) -> str:
    """TOML that asks for an experiment: its sections in the first file of `configs/` that asks, or what they need."""
    for file in sorted(files("configs").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            blocks = _BLOCKS.split(file.read_text(encoding="utf-8"))
            own = [block for block in blocks if (key := _KEY.match(block)) and key[1] in room.sections]
            if any((key := _KEY.match(block)) and key[1] in _asking(room) for block in own):
                return "\n".join([f"# as in configs/{file.name}", *(block.strip() for block in own)])
    return "\n".join(_needed(room))


def _asking(room: Room) -> dict[str, FieldInfo]:
    """The sections by which a configuration asks for it: those that may be left out."""
    return {key: field for key, (_, field) in room.sections.items() if field.default is None}


def _needed(room: Room) -> list[str]:
    lines = []
    for key in _asking(room):
        section = section_in(room.sections[key][0])
        fields = section.model_fields if section else {}
        lines += [f"[{key}]", *(f"{n} = …  # {f.description}" for n, f in fields.items() if f.is_required())]
    return lines
