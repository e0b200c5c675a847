"""Answer the requests of the page that are about files: pictures, the curve, the report, models.

A run, a picture and a sample are found by their names among those that are there. Nothing that a
user has sent is served as it came: pictures are decoded and encoded again. Samples and drawn
pictures are of our own making.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Final
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dreambooth.data import images
from dreambooth.errors import DreamBoothError, ResourceError, UserError
from dreambooth.limits import LIMITS, Limits
from dreambooth.report import charts, report_data
from dreambooth.report.charts import Series
from dreambooth.report.page import METER_CURVES, meter_curves
from dreambooth.runs import run_folder
from dreambooth.runs.run_folder import Run
from dreambooth.runs.run_list import RunList
from dreambooth.studio import downloads, uploads
from dreambooth.studio.drawings import Drawings
from dreambooth.studio.model_server import PICTURE, ModelServer

METERS: Final = {f"meter-{number}": curve for number, curve in enumerate(METER_CURVES)}
"""The report's charts of the meter by the names of their files."""

STATIC: Final = Path(__file__).parent / "static"

# Such a file shows its own texts and pictures, and reaches nothing.
_ALONE: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_SIDES: Final = range(16, 2_049)
_CHART_STYLE: Final = (
    "svg{color:#23232a;font-family:system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{color:#ececea;--grid:#36363c;--series-1:#7aa7ff;"
    "--series-2:#f0a066;--series-3:#7fd1a1;--series-4:#cfa3ee}}"
)

_Answer = Callable[[Request], Awaitable[Response]]


def run_address(name: str, *parts: str) -> str:
    """Return the address of a run's page, or of a file of the run."""
    return "/".join(["/runs", *(quote(part, safe="") for part in (name, *parts))])


def drawing_address(name: str, picture: str) -> str:
    """Return the address of a picture that was drawn."""
    return f"/drawings/{name}/{quote(picture, safe='')}"


def routes(runs: RunList, *, limits: Limits = LIMITS) -> Sequence[Route | Mount]:
    """Return the routes; each asks the disk anew."""

    def run_of(request: Request) -> Run:
        return runs.run(request.path_params["run"])

    def drawn(request: Request) -> Sequence[Path]:
        return Drawings(runs, None).drawing(request.path_params["drawing"]).pictures()

    def of_the_meter(request: Request) -> Sequence[Path]:
        folder = run_of(request).folder / run_folder.METER
        return [picture.path for picture in report_data.meter_pictures(folder)]

    async def add_picture(request: Request) -> Response:
        run = run_of(request)
        stream = request.stream()
        path = await uploads.add(run, request.query_params.get("name", ""), stream, limits=limits)
        return JSONResponse({"name": path.name})

    async def show_picture(request: Request) -> Response:
        run = run_of(request)
        side = request.query_params.get("side", "")
        if not (side.isascii() and side.isdecimal()) or len(side) > 4 or int(side) not in _SIDES:
            raise UserError(f"side must lie between {_SIDES[0]} and {_SIDES[-1]}.")
        path = uploads.picture(run, request.path_params["name"])
        return Response(
            await asyncio.to_thread(_as_trained, path, int(side)),
            media_type="image/png",
            headers={"Cache-Control": "private, max-age=3600"},
        )

    async def show_curve(request: Request) -> Response:
        run = run_of(request)
        curve = await asyncio.to_thread(_curve, run, request.path_params["curve"])
        return Response(
            curve,
            media_type="image/svg+xml",
            headers={"Content-Security-Policy": _ALONE, "Cache-Control": "no-store"},
        )

    async def show_report(request: Request) -> Response:
        path = run_of(request).folder / run_folder.REPORT
        if not path.is_file():
            raise UserError("There is no report yet.")
        return FileResponse(
            path, media_type="text/html", headers={"Content-Security-Policy": _ALONE}
        )

    async def send_archive(request: Request) -> Response:
        return await downloads.archive(run_of(request))

    async def send_single_file(request: Request) -> Response:
        run = run_of(request)
        precision = request.query_params.get("precision", "fp32")
        return await downloads.single_file(run, precision)

    return (
        Route("/runs/{run}/pictures", _answered(add_picture), methods=["POST"]),
        Route("/runs/{run}/pictures/{name}", _answered(show_picture), methods=["GET"]),
        Route("/runs/{run}/samples/{name}", _pngs(lambda asked: run_of(asked).samples())),
        Route("/runs/{run}/meter/{name}", _pngs(of_the_meter)),
        Route("/drawings/{drawing}/{name}", _pngs(drawn)),
        Route("/runs/{run}/{curve}.svg", _answered(show_curve), methods=["GET"]),
        Route("/runs/{run}/report.html", _answered(show_report), methods=["GET"]),
        Route("/runs/{run}/model.tar.gz", _answered(send_archive), methods=["GET"]),
        Route("/runs/{run}/model.safetensors", _answered(send_single_file), methods=["GET"]),
        Route("/server/{name}", _pngs(lambda _: [ModelServer(runs).folder / PICTURE])),
        Mount("/static", StaticFiles(directory=STATIC)),
    )


def _answered(answer: _Answer) -> _Answer:
    """Return the route with its errors as one JSON object with a sentence."""

    async def answered(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:  # nobody reads the reply
            return Response(status_code=400)
        except ResourceError as error:
            return JSONResponse({"error": str(error)}, 507)
        except DreamBoothError as error:
            is_missing = request.method == "GET"
            return JSONResponse({"error": str(error)}, 404 if is_missing else 422)

    return answered


def _pngs(pictures_of: Callable[[Request], Sequence[Path]]) -> _Answer:
    """Return the route of the one of these pictures that the address names."""

    async def answer(request: Request) -> Response:
        for path in pictures_of(request):
            if path.name == request.path_params["name"] and path.is_file():
                return FileResponse(path, media_type="image/png")
        raise UserError("There is no such picture.")

    return _answered(answer)


def _as_trained(path: Path, side: int) -> bytes:
    """Return a PNG of the central square of a picture, resized as for training."""
    image = images.resize(images.open_image(path), side)
    left, top = images.crop_offsets(image.size, side, center=True, random=Random(0))
    buffer = io.BytesIO()
    image.crop((left, top, left + side, top + side)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _curve(run: Run, name: str) -> str:
    """Return the curve of the loss, or the chart meter-N of the report, as an SVG file."""
    rows = report_data.read_metrics(run.folder / run_folder.METRICS)
    title, names = METERS.get(name, ("loss over the steps", {}))
    if name == "loss":
        curves, smoothed = [("loss", [row.loss for row in rows])], True
    elif names:
        rows = [row for row in rows if row.meter]
        curves, smoothed = meter_curves(rows, names), False
    else:
        raise UserError("There is no such curve.")
    steps = [row.step for row in rows]
    series = [Series(label=label, x=steps, y=y, smoothed=smoothed) for label, y in curves]
    chart = charts.line_chart(series, label=title)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {charts.WIDTH} {charts.HEIGHT}"><style>{_CHART_STYLE}</style>{chart}</svg>'
    )
