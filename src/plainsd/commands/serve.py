"""`plainsd serve`: starts a server with the options given as flags."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote

from tyro.conf import OmitArgPrefixes, UseAppendAction

from plainsd.arguments import Switch
from plainsd.commands.cluster import ClusterFlags
from plainsd.commands.flags import flag
from plainsd.errors import UserError
from plainsd.text.styles import read_styles

if TYPE_CHECKING:
    from plainsd.server.limits import Limits
    from plainsd.server.pool import PoolOptions
    from plainsd.server.service import Service

UNCHECKED = ("port", "memory", "drain_seconds", "plain")  # by the rule that numbers are 1 or more


@dataclass
class Serve:
    """Serves a web page and three HTTP APIs for one or more models. Jobs and pictures survive restarts."""

    model: Annotated[UseAppendAction[tuple[str, ...]], flag("MODEL")] = ()
    """folder, file or Hub id; repeatable, the first is the default. The embedded model if not given"""
    prediction: Annotated[str | None, flag("NAME")] = None
    """override what the (only) model predicts: epsilon, v_prediction or sample (x0)"""
    zero_snr: Annotated[str | None, flag("on|off")] = None
    """override whether it has zero terminal SNR"""
    host: Annotated[str, flag("ADDRESS")] = "127.0.0.1"
    """address to listen on; any but a loopback address requires a token"""
    port: Annotated[int, flag("N")] = 7860
    data: Annotated[Path, flag("FOLDER")] = Path("plainsd-data")
    """where to store jobs and pictures"""
    token: Annotated[str | None, flag("T")] = None
    """access token for clients; default $PLAINSD_TOKEN, or a generated one if one is required"""
    tokens: Annotated[Path | None, flag("FILE")] = None
    """file of names and their tokens, `name token` on each line: everyone has a gallery and a share of the queue of
    their own; read again when it changes"""
    allow_host: Annotated[UseAppendAction[tuple[str, ...]], flag("NAME")] = ()
    """additional host name to accept, such as that of a reverse proxy; repeatable"""
    loras: Annotated[Path | None, flag("FOLDER")] = None
    """LoRAs, selected by name"""
    embeddings: Annotated[Path | None, flag("FOLDER")] = None
    """textual-inversion embeddings, used by writing their words in prompts"""
    controls: Annotated[Path | None, flag("FOLDER")] = None
    """ControlNets, T2I-Adapters, and IP-Adapters with their image encoders, files or folders, selected by name"""
    upscalers: Annotated[Path | None, flag("FOLDER")] = None
    """ESRGAN-type upscalers (.pth, .safetensors), selected by name"""
    wildcards: Annotated[Path | None, flag("FOLDER")] = None
    """text files with one choice per line, for prompts with __colours__; {red|blue} needs none"""
    styles: Annotated[Path | None, flag("FILE")] = None
    """CSV file of styles, in A1111's format: name,prompt,negative_prompt"""
    vae: Annotated[Path | None, flag("PATH")] = None
    """autoencoder for all models in place of their own: a folder, a file, or a whole checkpoint"""
    preview_vae: Annotated[Path | None, flag("PATH")] = None
    """TAESD, for sharper previews: the file taesd_decoder, or a folder"""
    batch: Annotated[int, flag("N")] = 4
    """batch size"""
    memory: Annotated[float | None, flag("GB")] = None
    """memory for models, beyond which the least recently used is unloaded (default: half of the RAM, 3/4 of a GPU)"""
    queue: Annotated[int, flag("N")] = 256
    """maximum length of the queue, in jobs"""
    max_pixels: Annotated[int, flag("N")] = 2048 * 2048
    """maximum pixels per picture"""
    max_steps: Annotated[int, flag("N")] = 150
    """maximum steps per picture"""
    max_count: Annotated[int, flag("N")] = 64
    """maximum pictures per job"""
    max_seconds: Annotated[float, flag("S")] = 3600
    """time limit per job, in seconds"""
    drain_seconds: Annotated[float, flag("S")] = 20
    """time for the pictures under way at SIGTERM, in seconds; what is not finished is drawn after the next start"""
    log_format: Literal["text", "json"] = "text"
    """how log lines are written to stderr; json: one object a line, with jobs, clients and models as fields"""
    log_level: Annotated[Literal["debug", "info", "warning", "error"] | None, flag()] = None
    """from which level on; info has a line for each request and each change of a job (default: info for json, else
    warning)"""
    plain: Switch = False
    """do not pack the weights for the processor, as `plainsd generate --plain`"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    ray: OmitArgPrefixes[ClusterFlags] = ClusterFlags()

    def run(self) -> None:
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import python_multipart  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise UserError(f"serve needs {error.name}, which is not installed; pip install 'plainsd[serve]'") from None
        from plainsd.files.predicted import on_or_off
        from plainsd.server.api.app import create_app
        from plainsd.server.api.security import Hosts
        from plainsd.server.limits import Limits
        from plainsd.server.logs import configure
        from plainsd.server.pool import PoolOptions

        self.check()
        token = self.checked_token()
        limits = Limits(
            queue=self.queue,
            pixels=self.max_pixels,
            steps=self.max_steps,
            count=self.max_count,
            seconds=self.max_seconds,
        )
        options = PoolOptions(
            device=self.device,
            dtype=self.dtype,
            memory=None if self.memory is None else self.memory * 1e9,
            plain=self.plain,
            loras=self.loras,
            embeddings=self.embeddings,
            controls=self.controls,
            upscalers=self.upscalers,
            wildcards=self.wildcards,
            styles=self.styles,
            vae=self.vae,
            preview_vae=self.preview_vae,
            prediction=self.prediction,
            zero_snr=on_or_off(self.zero_snr),
        )
        sock = listening_socket(self.host, self.port)
        configure(self.log_format, self.log_level)
        self.say("inspecting the models ...")
        service = self.opened(limits, options)
        app = create_app(
            service,
            Hosts(self.host, self.allow_host),
            token,
            lambda: self.greet(service, sock.getsockname()[1], token),
            self.tokens,
        )
        server_of(app, drain=self.drain_seconds).run(sockets=[sock])
        if service.queue.failure:
            self.say(f"plainsd: {service.queue.failure}")
            raise SystemExit(1)

    def opened(self, limits: Limits, options: PoolOptions) -> Service:
        from plainsd.server.service import Service

        if self.ray.address is None:
            return Service.open(self.model, self.data, limits, options, batch=self.batch)
        from plainsd.server.cluster import Cluster

        cluster = Cluster(self.ray.join(), self.ray.workers or 1)
        self.say(f"starting {cluster.workers} workers of {cluster.share} each ...")
        return Service.open(self.model, self.data, limits, options, batch=self.batch, drawers=cluster.drawers)

    def check(self) -> None:
        self.ray.check()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and field.name not in UNCHECKED and not value >= 1:
                raise UserError(
                    f"{field.name.replace('_', ' ')} {value} is out of range; give 1 or more", field=field.name
                )
        if self.memory is not None and not self.memory >= 0:
            raise UserError(
                f"memory {self.memory} is out of range; give gigabytes, 0 for one model at a time", field="memory"
            )
        if not 0 <= self.drain_seconds < math.inf:
            raise UserError(
                f"drain_seconds {self.drain_seconds} is out of range; give seconds, 0 to stop at the next step",
                field="drain_seconds",
            )
        if not 0 <= self.port < 65536:
            raise UserError(
                f"port {self.port} is out of range; choose 1 to 65535, or 0 for any free port", field="port"
            )
        for name in ("loras", "embeddings", "controls", "upscalers", "wildcards"):
            if (folder := getattr(self, name)) is not None and not folder.is_dir():
                raise UserError(f"--{name} '{folder}': no such folder; create it, or leave --{name} out", field=name)
        if self.styles is not None:
            read_styles(self.styles)
        if self.tokens is not None:
            from plainsd.server.users import read_tokens

            read_tokens(self.tokens)

    def checked_token(self) -> str | None:
        """The admin's token, of --token or $PLAINSD_TOKEN; or a generated one if others need one, or the address is
        not a loopback one."""
        from plainsd.server.api.security import is_loopback
        from plainsd.server.users import TOKEN_RULE, is_token

        token = self.token or os.environ.get("PLAINSD_TOKEN") or None
        if token is not None and not is_token(token):
            raise UserError(f"the token {TOKEN_RULE}, or give none to have one generated", field="token")
        open_to_all = is_loopback(self.host) and self.tokens is None
        return token if token is not None or open_to_all else secrets.token_urlsafe(18)

    def greet(self, service, port: int, token: str | None) -> None:
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listening on all addresses: one for the URL
        host = loopback.get(self.host, self.host)
        models = service.models
        self.say(f"models: {', '.join(models.known)} ({self.drawn_by(service)})")
        self.say(f"pictures are stored in {service.store.folder / 'pictures'}")
        if waiting := sum(service.queue.counts().values()):
            self.say(f"resuming {waiting} unfinished jobs")
        if self.host in loopback:
            self.say(f"from other machines: {url(own_address(), port, self.shown(token))}")
        if self.log_format == "json":
            self.say(f"listening on {url(host, port, self.shown(token))}")
        else:
            print(url(host, port, token), flush=True)

    def say(self, message: str) -> None:
        """On stderr, in the form of the log, whatever its level."""
        if self.log_format == "json":
            log = logging.getLogger("plainsd")
            log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, message, (), None))
        else:
            print(message, file=sys.stderr)

    def shown(self, token: str | None) -> str | None:
        """The token in an address that is printed; in a log, which others may read, only one that was generated."""
        given = self.token or os.environ.get("PLAINSD_TOKEN")
        return None if self.log_format == "json" and given else token

    def drawn_by(self, service: Service) -> str:
        if self.ray.address is None:
            return f"{service.models.device}, {str(service.models.dtype).removeprefix('torch.')}"
        return f"{sum(worker.drawer.ready for worker in service.workers)} of {len(service.workers)} workers are ready"


def url(host: str, port: int, token: str | None) -> str:
    """The page's address, with the token if there is one."""
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/{'?token=' + quote(token, safe='') if token else ''}"


def own_address() -> str:
    """This machine's IPv4 address in its network, or its host name if it has none."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # UDP: selects the route and sends nothing (address of RFC 5737)
            return sock.getsockname()[0]
        except OSError:
            return socket.gethostname()


def server_of(app, grace: int = 5, drain: float = 0):
    """The uvicorn server. The first SIGTERM lets the batches under way end, for at most `drain` seconds, in which it
    answers as before, but takes no jobs; a second one, or SIGINT, stops after the current step. On shutdown, event
    streams end; other connections are closed after `grace` seconds."""
    import uvicorn

    from plainsd.server.api.connections import Connection, raise_file_limit

    raise_file_limit()

    class Server(uvicorn.Server):
        asked_to_drain = draining = False

        def handle_exit(self, sig, frame) -> None:
            if sig == signal.SIGTERM and drain and not self.asked_to_drain:
                self.asked_to_drain = True
                self._captured_signals.append(sig)
            else:
                super().handle_exit(sig, frame)

        def drain_queue(self) -> None:
            """In a thread of its own: the queue's lock may be held while the disk is written."""
            queue = app.state.service.queue
            queue.drain(drain)
            while not queue.drained():
                time.sleep(0.1)
            self.should_exit = True

        async def on_tick(self, counter: int) -> bool:
            if self.asked_to_drain and not self.draining:
                self.draining = True
                threading.Thread(target=self.drain_queue, name="drain", daemon=True).start()
            if app.state.service.queue.failure:
                self.should_exit = True
            return await super().on_tick(counter)

        async def shutdown(self, sockets=None) -> None:
            await asyncio.to_thread(app.state.service.stop)
            await super().shutdown(sockets)

    return Server(uvicorn.Config(
        app, http=Connection, ws="none", log_level="warning", server_header=False, timeout_graceful_shutdown=grace,
        timeout_keep_alive=75,        # longer than most clients', so that we do not close a connection in use
    ))  # fmt: skip


def listening_socket(host: str, port: int):
    """UserError if the address is not available."""
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(512)
        return sock
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose others with --host and --port"
        ) from None
