"""The explorer's server: a page, the index as JSON and bytes, and the model that answers.

    GET  /                        the page: static/ as it is
    GET  /api/meta.json           what is shown; all that an export says otherwise
    GET  /api/{tokens,layers,clusters}.json
    GET  /api/{map,labels,norms,keys}/NAME.bin
    GET  /api/token/ID            /api/key/LAYER/KEY           records of the index
    GET  /api/row/ID              /api/similar/LAYER/KEY       from the model
    GET  /api/state               edits that are applied, and what can be compared
    POST /api/prompt              and the other verbs of live.py, editing.py and comparing.py

Errors are {"error": sentence} with status 4xx. What every request passes first is in guard.py.
"""

from __future__ import annotations

import functools
import gc
import logging
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from flexmemory.interpret.patch import Patch
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.comparing import Comparison, all_comparable
from flexmemory.serve.editing import MAX_PATCH_BYTES, Bench
from flexmemory.serve.fields import Fields
from flexmemory.serve.guard import LOOPBACK, MAX_BODY_BYTES, Guard, refused
from flexmemory.serve.listening import address, listen
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records, to_json

logger = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"


def create_app(
    records: Records,
    live: LiveModel,
    *,
    checkpoint: Checkpoint,
    name: str,
    compare: Sequence[Path] = (),
    hosts: tuple[str, ...] = LOOPBACK,
) -> Guard:
    """The application.

    Args:
        records: An index.
        live: The model of that index.
        checkpoint: What both were made from.
        name: Of the model, for reading.
        compare: Checkpoints, stores and patches for the page Diff; patches can be tried on the bench too.
        hosts: Names and addresses under which it is served.

    Raises:
        FileNotFoundError: there is nothing at one of `compare`.
        ValueError: one of `compare` is of another model.
    """
    others = all_comparable(compare, checkpoint)
    patches = {called: other for called, other in others.items() if isinstance(other, Patch)}
    bench = Bench(live, records, checkpoint, patches=patches)
    comparison = Comparison(bench, others)
    verbs = {**live.verbs(), **bench.verbs(), **comparison.verbs()}
    documents = {
        "meta": lambda: records.meta() | live.meta() | {"name": name, "live": True},
        "tokens": records.tokens,
        "layers": records.layers,
        "clusters": records.clusters,
    }
    reads: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "token/{id:int}": lambda path: records.token(path["id"]),
        "key/{layer:int}/{key:int}": lambda path: records.key(path["layer"], path["key"]),
        "row/{id:int}": lambda path: live.row_record(path["id"]),
        "state": lambda path: bench.state() | {"comparable": comparison.names()},
        "similar/{layer:int}/{key:int}": lambda path: live.similar_keys(path["layer"], path["key"]),
    }
    app = Starlette(
        routes=[
            *(Route(f"/api/{each}.json", _document(make)) for each, make in documents.items()),
            Route("/api/{kind}/{name}.bin", _binary(records)),
            *(Route(f"/api/{path}", _read(handler)) for path, handler in reads.items()),
            *(Route(f"/api/{verb}", _posted(handler), methods=["POST"]) for verb, handler in verbs.items()),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        exception_handlers={HTTPException: _failed, ValueError: _failed, Exception: _broken},
    )
    body = MAX_BODY_BYTES + 4 * MAX_PATCH_BYTES // 3  # in base64
    return Guard(
        app, hosts=hosts, max_body_bytes=body
    )  # outside of Starlette's own handlers, so that their answers pass it too


def _json(value: Any) -> Response:
    return Response(to_json(value), media_type="application/json")


def _document(make: Callable[[], Any]) -> Callable[[Request], Response]:
    """Serve what never changes, made once."""
    content = functools.cache(lambda: to_json(make()))
    return lambda request: Response(content(), media_type="application/json")


def _binary(records: Records) -> Callable[[Request], Response]:
    def serve_array(request: Request) -> Response:
        content = records.binary(request.path_params["kind"], request.path_params["name"])
        return Response(content, media_type="application/octet-stream")

    return serve_array


def _read(handler: Callable[[Mapping[str, Any]], Any]) -> Callable[[Request], Response]:
    return lambda request: _json(handler(request.path_params))


def _posted(handler: Callable[[Fields], Any]) -> Callable[[Request], Any]:
    """Serve a verb; bytes are a file, everything else is JSON."""

    async def serve_verb(request: Request) -> Response:
        answer = await run_in_threadpool(handler, Fields.parse(await request.body()))
        if isinstance(answer, bytes):
            return Response(answer, media_type="application/octet-stream")
        return _json(answer)

    return serve_verb


def _failed(request: Request, error: Exception) -> Response:
    """What does not exist, or cannot be done."""
    if isinstance(error, HTTPException):
        return refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return refused(400 if request.method == "POST" else 404, str(error))


def _broken(request: Request, error: Exception) -> Response:
    """A mistake of ours; the terminal shows it."""
    return refused(500, f"this failed ({type(error).__name__}); the terminal says where")


def hosts_of(address: str) -> tuple[str, ...]:
    """The names under which a server at `address` is reached.

    Raises:
        ValueError: it stands for many addresses, so that there is no telling.
    """
    if address in ("", "0.0.0.0", "::"):
        raise ValueError(
            f"--host {address or repr('')} is no single address: name the one under which it is reached, since "
            "requests for other hosts are refused"
        )
    return LOOPBACK if address in LOOPBACK else (*LOOPBACK, address)


def settle() -> None:
    """Leave what is loaded now out of garbage collections, which took 0.1 s of a request now and then."""
    gc.collect()
    gc.freeze()


def serve(app: ASGIApp, *, host: str, port: int, open_browser: bool) -> None:
    """Serve until interrupted.

    Args:
        app: From `create_app`.
        host: Address to listen at.
        port: 0 takes a free one.
        open_browser: Whether to open the page.

    Raises:
        OSError: the port is taken.
    """
    with listen(host, port) as listening:
        page = f"{address(listening)}/"
        logger.info("explorer at %s (Ctrl+C ends it)", page)
        settle()
        if open_browser:
            threading.Timer(0.5, webbrowser.open, [page]).start()
        uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listening])
