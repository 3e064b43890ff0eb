"""The page and its questions: routes of a small Starlette application."""

from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from raydet.browsing.codes import ERROR_KINDS, OUTCOMES, SCORE_BINS, SIDES, SIZES
from raydet.browsing.filters import MAX_PAGE, ImageFilter, PageRequest, SelectRequest
from raydet.browsing.guard import Guard
from raydet.browsing.pictures import PictureError, Pictures
from raydet.browsing.queries import MOST_IN_ORDER, SORTS, Queries
from raydet.browsing.selection import save_selection
from raydet.browsing.sources import Sources
from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.common.version import __version__

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SCRIPTS = ("app.js", "boxes.js", "filters.js", "grid.js", "state.js", "viewer.js")
_ASSETS = ("index.html", "icon.svg", "style.css", *_SCRIPTS)
_LONGEST_NAME = 200
_Request = TypeVar("_Request")


class _Pages:
    """Handlers of the requests about some sources."""

    def __init__(self, sources: Sources, queries: Queries, selection: str) -> None:
        self._sources, self._queries, self._selection = sources, queries, selection
        self._pictures = Pictures(sources)
        self.routes = [
            Route("/", _asset("index.html")),
            *(Route(f"/{name}", _asset(name)) for name in _ASSETS[1:]),
            Route("/api/about", _answering(self._about)),
            Route("/api/classes", _answering(self._classes)),
            Route("/api/facets", _asking(self._facets, ImageFilter), methods=["POST"]),
            Route("/api/page", _asking(self._page, PageRequest), methods=["POST"]),
            Route("/api/image", _asking(self._image, PageRequest), methods=["POST"]),
            Route("/api/select", _asking(self._select, SelectRequest), methods=["POST"]),
            Route("/api/save", _asking(self._save, ImageFilter), methods=["POST"]),
            Route("/thumbnail/{image:int}", self._picture_of(self._pictures.thumbnail)),
            Route("/picture/{image:int}", self._picture_of(self._pictures.picture)),
        ]

    def _about(self, _: Request) -> dict[str, Any]:
        index, sources = self._queries.index, self._sources
        return {
            "title": sources.title,
            "uri": sources.uri,
            "version": __version__,
            "numImages": index.num_images,
            "numBoxes": index.num_boxes,
            "numClasses": len(index.names),
            "sides": [{"index": side, "key": SIDES[side], "name": self._name_of(side)} for side in index.sides],
            "thresholds": [run.threshold for run in sources.runs],
            "sizes": SIZES,
            "outcomes": OUTCOMES,
            "errors": ERROR_KINDS,
            "scoreBins": SCORE_BINS,
            "groups": [{"name": group.name, "values": group.values} for group in index.groups],
            "answers": [
                {"title": own.title, "areNumbers": own.are_numbers, "numValues": len(own.values)}
                for own in index.answers
            ],
            "sorts": [{"key": name, "name": SORTS[name][0]} for name in self._queries.sorts],
            "hasErrors": any(run.scored.errors for run in sources.runs),
            "mostInOrder": MOST_IN_ORDER,
            "pageSize": MAX_PAGE // 2,
            "notes": sources.notes,
            "selection": self._selection,
        }

    def _name_of(self, side: int) -> str:
        runs = self._sources.runs
        names = ["Labels", *(run.name for run in runs), *([""] * (2 - len(runs))), "Suspect labels"]
        return names[side]

    def _names(self, indices: set[int]) -> dict[int, str]:
        names = self._queries.index.names
        return {index: names[index][:_LONGEST_NAME] for index in sorted(indices) if 0 <= index < len(names)}

    def _classes(self, request: Request) -> dict[str, Any]:
        text = request.query_params.get("text", "")[:_LONGEST_NAME]
        found = self._queries.classes_like(text)
        return {"classes": found, "names": self._names(set(found))}

    def _facets(self, chosen: ImageFilter) -> dict[str, Any]:
        counts = self._queries.facets(chosen)
        shown = {index for index, _ in counts["classes"]} | set(chosen.classes)
        return {**counts, "names": self._names(shown)}

    def _page(self, asked: PageRequest, *, is_single: bool = False) -> dict[str, Any]:
        order = self._queries.order(asked.filter, asked.sort)
        images = order[asked.start : min(asked.start + asked.count, MOST_IN_ORDER)].tolist()
        cards = self._queries.cards(images, asked.filter, is_single=is_single)
        used = {box[place] for card in cards for box in card["boxes"] for place in (1, 7)}
        return {"total": len(order), "images": cards, "names": self._names(used)}

    def _image(self, asked: PageRequest) -> dict[str, Any]:
        return self._page(msgspec.structs.replace(asked, count=1), is_single=True)

    def _select(self, asked: SelectRequest) -> dict[str, Any]:
        return {"selected": self._queries.select(asked.images, asked.filter, is_selected=asked.is_selected)}

    def _save(self, _: ImageFilter) -> dict[str, Any]:
        rows = self._queries.selected()
        return {"files": save_selection(self._selection, self._sources, rows), "selected": rows.num_rows}

    @staticmethod
    def _picture_of(make: Callable[[int], bytes]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            try:
                data = await run_in_threadpool(make, request.path_params["image"])
            except PictureError as error:
                raise HTTPException(404, str(error)) from None
            return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"})

        return handle


def application(sources: Sources, queries: Queries, *, selection: str) -> Guard:
    """Return the application, behind its guard.

    Args:
        sources: What the page shows.
        queries: Answers about them.
        selection: Where the page saves a selection, without an ending.
    """
    pages = _Pages(sources, queries, selection)
    return Guard(Starlette(routes=pages.routes, exception_handlers={HTTPException: _refused, Exception: _failed}))


def _asset(name: str) -> Callable[[Request], Any]:
    data = resources.files("raydet.browsing").joinpath("assets", name).read_bytes()

    async def handle(_: Request) -> Response:
        return Response(data, media_type=_MEDIA_TYPES[name.rpartition(".")[2]])

    return handle


def _answering(answer: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        return _json(await run_in_threadpool(answer, request))

    return handle


def _asking(answer: Callable[[_Request], dict[str, Any]], kind: type[_Request]) -> Callable[[Request], Any]:
    """Return the handler of requests whose body is JSON of a kind; others, and values out of range, are refused."""

    async def handle(request: Request) -> Response:
        try:
            asked = msgspec.json.decode(await request.body(), type=kind)
        except (msgspec.MsgspecError, UnicodeError, UserError) as error:
            raise HTTPException(400, str(error)) from None
        try:
            return _json(await run_in_threadpool(answer, asked))
        except UserError as error:
            raise HTTPException(400, str(error)) from None

    return handle


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"error": error.detail})
    response.status_code = error.status_code
    return response


def _failed(_: Request, error: Exception) -> Response:
    response = _json({"error": one_line(without_secrets(str(error)), limit=500)})
    response.status_code = 500
    return response
