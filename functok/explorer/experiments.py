"""The page of all experiments: what each answers, what it found in this run, and how to ask for the others."""

from __future__ import annotations

from collections.abc import Iterator

from schemas.experiments import experiment_rooms
from schemas.room import Room
from tasks.explore.not_run import answers, not_run
from tasks.explore.overview import findings_of
from tasks.explore.vocabulary import Asked, Facts, Findings, Missing, Page, PageAt, Panel
from tasks.report.text import plural
from tasks.stages import experiment


def experiments(asked: Asked) -> Page:
    """Those that have tables first."""
    rooms = experiment_rooms()
    run = [room for room in rooms if asked.tables & room.tables.keys()]
    others = [room for room in rooms if room not in run]
    panels = [panel for room in run for panel in _of(asked, room)]
    for room in others:
        missing = not_run(room.name)
        panels.append(Missing(what=f"{room.name.capitalize()}: {missing.what}", way=missing.way))
    told = f"{plural(len(run), 'experiment')} of {len(rooms)} have tables in this run."
    return Page(title="Experiments", lead=told, panels=panels)


def _of(asked: Asked, room: Room) -> Iterator[Panel]:
    one = experiment(room.name)
    title = one.pages[0].title if one.pages else room.name.capitalize()
    yield Facts(
        title=f"{title}: {answers(room)}",
        facts=[
            *((name, value, "") for name, value in one.report.facts(asked.connection)),
            *(("page", page.title, page.path) for page in one.pages if "{" not in page.path),
        ],
    )
    if found := findings_of(asked, one.report):
        yield Findings(findings=found)


INDEX = PageAt(path="/experiments", title="Experiments", build=experiments, menu=True)
