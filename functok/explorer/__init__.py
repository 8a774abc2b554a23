"""The explorer: pages over a run's tables, served on this machine (`functok explore`).

What pages say is in `tasks.explore` and in the rooms of experiments; here they are served and drawn: `tables` (who
reads what, and for how long), `grids` (sorting, filtering, paging, downloads), `drawing` (HTML), `console` (SQL),
`guard` (who may ask), `app` (addresses) and `server` (ports, threads, the browser).
"""
