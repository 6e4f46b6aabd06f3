"""The routes of our own API and of the page."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from plainsd import __version__
from plainsd.diffusion.samplers import SAMPLERS, shared_spacings
from plainsd.models.variants import edits
from plainsd.pictures.defaults import size_multiple
from plainsd.pictures.preprocess import INPAINT
from plainsd.pictures.settings import (
    CONTROL_MODES,
    LIKE,
    MASKED_CONTENTS,
    NEEDS,
    NOISE_OF,
    PREPROCESSORS,
    RANGES,
    UPSCALERS,
)
from plainsd.pictures.texts.labels import sampler_label, spacing_label
from plainsd.server.api import a1111, metrics, openai
from plainsd.server.api.a1111_controlnet import controlnet_routes
from plainsd.server.api.errors import add_errors
from plainsd.server.api.events import interleaved
from plainsd.server.api.pictures import add_pictures
from plainsd.server.api.security import Hosts, SecurityMiddleware, log_in
from plainsd.server.errors import ERRORS, APIError
from plainsd.server.jobs.job import CANCELLED, DONE, FAILED, Job
from plainsd.server.logs import AccessLog
from plainsd.server.pool import ServedModel
from plainsd.server.readiness import Readiness
from plainsd.server.requests import CELLS
from plainsd.server.schema import JobRequest, Text
from plainsd.server.service import CurrentUser, Service, client_of, user_of
from plainsd.server.users import Access

PAGE = Path(str(files("plainsd.server") / "page"))
MOST_JOBS = 500  # in one answer, or in one stream of events
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".png": "image/png",
}


class Login(BaseModel):
    token: Text


def create_app(
    service: Service, hosts: Hosts, token: str | None = None, on_start=lambda: None, tokens: Path | None = None
) -> FastAPI:
    """The server as an ASGI application, which starts and stops its worker. `tokens` is the file of named ones."""
    access = Access(token, tokens, service.queue.set_names)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        on_start()
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="plainsd",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
        description="Jobs, pictures and models of this server, and the APIs of OpenAI and A1111.",
    )
    app.state.service = service
    add_errors(app)
    add_jobs(app, service)
    add_pictures(app, service)
    add_page(app, service)

    @app.post("/api/login", tags=["page"], status_code=204)
    def login(body: Login, request: Request) -> Response:
        """Exchange the token for a session cookie."""
        answer = Response(status_code=204)
        if access.required:
            log_in(answer, access, body.token, request.headers, request.url.scheme)
        return answer

    app.include_router(openai.routes(service))
    app.include_router(a1111.routes(service))
    app.include_router(controlnet_routes(service))
    app.add_middleware(SecurityMiddleware, hosts=hosts, access=access, limits=service.limits)
    app.add_middleware(AccessLog)
    return app


# --- jobs ------------------------------------------------------------------------------------------------------------


def add_jobs(app: FastAPI, service: Service) -> None:
    @app.post("/api/jobs", status_code=202, tags=["jobs"])
    async def new_job(
        body: JobRequest,
        request: Request,
        response: Response,
        x_client: Annotated[Text | None, Header(max_length=64)] = None,
    ) -> dict:
        """Queue pictures. Clients take turns; X-Client distinguishes clients behind one address."""
        job = await service.submit(body, client_of(request, x_client), "jobs", owner=user_of(request).owner)
        response.headers["Location"] = f"/api/jobs/{job.id}"
        return await run_in_threadpool(service.as_json, job)

    @app.get("/api/jobs", tags=["jobs"])
    def all_jobs(user: CurrentUser, limit: Annotated[int, Query(ge=0, le=MOST_JOBS)] = 50) -> dict:
        """Waiting and running jobs, oldest first, and the last ones that ended."""
        with service.queue.changed:
            active = [service.as_json(job) for job in service.queue.jobs.values() if user.sees(job.owner)]
        ended = service.store.jobs((DONE, FAILED, CANCELLED), limit, user.scope)
        return {"active": active, "ended": [service.as_json(job) for job in ended]}

    def found(id: Text, user: CurrentUser) -> Job:
        return service.job(id, user)

    FoundJob = Annotated[Job, Depends(found)]

    @app.get("/api/jobs/{id}", tags=["jobs"])
    def one_job(job: FoundJob) -> dict:
        return service.as_json(job)

    @app.get("/api/jobs/{id}/events", tags=["jobs"], response_class=EventSourceResponse)
    async def events(job: FoundJob) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `progress` with previews, then `end`."""
        async for name, data in service.events(job):
            if name != "beat":  # FastAPI has its own
                yield ServerSentEvent(event=name, data=data)

    def all_found(id: Annotated[list[Text], Query(min_length=1, max_length=MOST_JOBS)], user: CurrentUser) -> list[Job]:
        return [service.job(one, user) for one in dict.fromkeys(id)]

    @app.get("/api/events", tags=["jobs"], response_class=EventSourceResponse)
    async def events_of_several(jobs: Annotated[list[Job], Depends(all_found)]) -> AsyncIterator[ServerSentEvent]:
        """The events of several jobs (`?id=A&id=B`) on one connection, until the last of them has ended."""
        async for name, data in interleaved([service.events(job) for job in jobs]):
            if name != "beat":
                yield ServerSentEvent(event=name, data=data)

    @app.post("/api/jobs/{id}/cancel", tags=["jobs"])
    def cancel(job: FoundJob) -> dict:
        """Cancel a waiting or running job. Finished pictures are kept."""
        return service.as_json(service.queue.cancel(job.id) or job)


# --- the page, and what it needs to know -----------------------------------------------------------------------------


def add_page(app: FastAPI, service: Service) -> None:
    def page(name: str) -> FileResponse:
        path = PAGE / name
        if path.parent != PAGE or path.suffix not in TYPES or not path.is_file():
            raise APIError(404, f"there is no page {name!r}; the page is at /")
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return page("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    def asset(name: Text) -> FileResponse:
        return page(name)

    @app.get("/api/models", tags=["models"])
    def models() -> dict:
        return {
            "models": [described_model(model, service) for model in service.models.known.values()],
            "default": service.models.default,
        }

    @app.get("/api/info", tags=["models"])
    def info(user: CurrentUser) -> dict:
        """Everything that a form needs: models, LoRAs, samplers, spacings, limits; and whose token it is."""
        return models() | {
            "version": __version__, "user": user.name, "samplers": {name: sampler_label(name) for name in SAMPLERS},
            "spacings": {name: spacing_label(name) for name in shared_spacings()},
            "upscalers": (*UPSCALERS, *sorted(service.models.upscalers.known())),
            "grid": CELLS, "ranges": RANGES, "limits": vars(service.limits), "needs": NEEDS | {"handover": "refiner"},
            "loras": sorted(service.models.loras.known()), "styles": [*service.models.templates.known_styles()],
            "masked_contents": MASKED_CONTENTS, "like": LIKE, "noises": sorted({*NOISE_OF.values()}),
            "controls": sorted(service.models.controls.known()),
            "control_nets": service.models.controls.described(), "preprocessors": [*PREPROCESSORS, INPAINT],
            "control_modes": CONTROL_MODES, "image_prompts": sorted(service.models.image_adapters.known()),
            "image_encoders": sorted(service.models.image_adapters.towers()),
            "unusable": {"loras": service.models.loras.unusable, "embeddings": service.models.embeddings.unusable,
                         "controls": service.models.controls.unusable,
                         "upscalers": service.models.upscalers.unusable,
                         "styles": service.models.templates.unusable()},
        }  # fmt: skip

    @app.get("/healthz", tags=["service"])
    async def healthz() -> JSONResponse:  # on the event loop: it answers while all threads are busy, and takes no lock
        alive = all(worker.is_alive() for worker in service.workers)
        return JSONResponse(
            {"status": "ok" if alive else "the worker has ended; restart the server"}, 200 if alive else 503
        )

    readiness = Readiness(service)

    @app.get("/readyz", tags=["service"])
    def readyz() -> JSONResponse:
        """Whether jobs may be sent here: the worker lives, the data folder can be written, and no stop is ahead."""
        why = readiness.problem()
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    registry = metrics.registry_of(service)

    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    def prometheus() -> PlainTextResponse:
        """Metrics in Prometheus' text format."""
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def described_model(model: ServedModel, service: Service) -> dict:
    models, variant = service.models, model.bare.variant
    return {
        "name": model.name, "kind": variant.name, "resident": service.resident(model.name), "bytes": model.bytes,
        "ideas": model.example_prompts, "refiners": models.refiners(model),
        "quick": model.quick,
        "embeddings": [embedding.text for embedding in models.embeddings.fitting(model.bare)],
        "controls": models.controls.fitting(model.bare),
        "inpainting_only": variant.unet.in_channels == 2 * variant.vae.latent_channels + 1,
        "edits": edits(variant.unet, variant.vae), "size_multiple": size_multiple(variant.vae),
        "defaults": {"size": [variant.size, variant.size], "steps": variant.steps, "guidance": variant.guidance,
                     "sampler": variant.sampler, "spacing": variant.spacing},
    }  # fmt: skip
