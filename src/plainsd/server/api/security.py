"""Access control and body limits, applied before routing.

A server on a person's own machine is open to every web page that person visits: the page's scripts can send requests to
127.0.0.1, and, with a DNS name that changes its address ("rebinding"), read the answers. So the Host must be one of
ours, a foreign Origin is refused, and so is whatever the browser itself calls cross-site (Fetch Metadata).
"""

import asyncio
import ipaddress
import logging
import socket
from base64 import b64decode
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plainsd.errors import UserError
from plainsd.json_reader import BadJSON, ValueCounter
from plainsd.server.errors import APIError
from plainsd.server.limits import Limits
from plainsd.server.users import Access, User, session_of

log = logging.getLogger("plainsd.server")
COOKIE = "plainsd_session"
PROBES = ("/healthz", "/readyz")  # answered under any host name
PUBLIC_PATHS = ("/", *PROBES, "/api/login")  # answered without the token; so is everything below /page/
FORM_PATHS = ("/v1/images/edits",)  # multipart forms; everything else is JSON
MOST_IN_BODY = 100_000  # values in the JSON of a request
BODY_SECONDS = 120  # timeout for a body
PUBLIC_BODY = 2**16  # bytes of a body on public paths
BODY_PIECE = 2**14  # bytes of a body that are looked through at once, before other requests have their turn
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


# --- hosts -----------------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def hostname(header: str) -> str:
    """That of `name:port`, in small letters; empty if it is malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class Hosts:
    """The host names that the server accepts.

    A rebinding attack needs a name that somebody else controls, so bare addresses are safe where the server listens on
    all of them.
    """

    def __init__(self, bound: str, more: Iterable[str] = ()):
        self.any_address = bound in ("0.0.0.0", "::")
        for name in more:
            if name.lower() != hostname(name) and not is_address(name):
                what = f"--allow-host {name!r} is no host's name"
                raise UserError(f"{what}; leave scheme, port and path out", field="allow_host", value=name)
        names = {"localhost", "127.0.0.1", "::1", bound, *more}
        self.names = {name.lower() for name in names | ({socket.gethostname()} if self.any_address else set())}

    def __contains__(self, header: str) -> bool:
        name = hostname(header).rstrip(".")
        return name in self.names or (self.any_address and is_address(name))


# --- the gate --------------------------------------------------------------------------------------------------------


class SecurityMiddleware:
    """ASGI middleware: checks host, origin, token, content type and size; adds security headers to every response.
    The scope's `user` is a `User` from here on."""

    def __init__(self, app: ASGIApp, hosts: Hosts, access: Access, limits: Limits):
        self.app, self.hosts, self.access, self.limits = app, hosts, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self.check_host(scope, headers)
            self.check_origin(scope, headers)
            if (login := self.login_link(scope)) is not None:
                return await login(scope, receive, send_with_headers)
            if not is_public(scope["path"]):
                scope["user"] = self.user(headers)
            body = await self.body(scope, headers, receive)
            await self.app(scope, replay(body, receive), send_with_headers)
        except Exception as error:
            if started:  # too late for an error response
                raise
            refused = error if isinstance(error, APIError) else internal_error(scope, error)
            answer = JSONResponse(refused.body(scope["path"]), refused.status, refused.headers)
            await answer(scope, receive, send_with_headers)

    def check_host(self, scope: Scope, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if scope["path"] in PROBES:
            return
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            said = ", ".join(hosts) or "none"
            raise APIError(
                403,
                f"host {said!r} is not a name of this server; start it with --allow-host NAME (no port) to add one",
            )

    def check_origin(self, scope: Scope, headers: Headers) -> None:
        for origin in headers.getlist("origin"):
            if netloc(origin) != headers.get("host", "").lower():
                raise APIError(403, f"origin {origin!r} is not allowed; use this server's own page")
        site = headers.get("sec-fetch-site", "none")
        opened = (scope["method"], scope["path"], headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
        if site not in ("none", "same-origin") and opened != ("GET", "/", "navigate", "document"):
            raise APIError(403, f"the browser calls this request {site!r}; only the server's own page may send it")

    def login_link(self, scope: Scope) -> RedirectResponse | None:
        """`/?token=T`, as printed at startup: sets the cookie, and removes the token from the address bar."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token")
        if not (self.access.required and given and scope["method"] == "GET" and scope["path"] == "/"):
            return None
        answer = RedirectResponse("/", 303)
        log_in(answer, self.access, given[0], Headers(scope=scope), scope["scheme"])
        return answer

    def user(self, headers: Headers) -> User:
        """By Bearer (OpenAI's clients), Basic with any user name (A1111's), or the page's cookie."""
        if not self.access.required:
            return User()
        self.access.refresh()
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return user_of_token(self.access, given.strip())
        if kind.lower() == "basic":
            try:
                return user_of_token(self.access, b64decode(given).decode().partition(":")[2])
            except ValueError:
                raise APIError(401, "the Authorization header cannot be read; send 'Bearer TOKEN'", "token") from None
            except APIError:  # a proxy's own password, which browsers send along
                if (found := self.access.user_of_session(cookie(headers))) is not None:
                    return found
                raise
        if (found := self.access.user_of_session(cookie(headers))) is not None:
            return found
        raise APIError(
            401,
            "a token is required; send it as 'Authorization: Bearer TOKEN'",
            "token",
            None,
            {"WWW-Authenticate": "Bearer"},
        )

    async def body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """Reads the whole body, up to the limit."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        most, less = (PUBLIC_BODY, "less") if is_public(scope["path"]) else (self.limits.upload, "smaller pictures")
        too_long = APIError(413, f"the request has more than {most} bytes; send {less}")
        said = headers.get("content-length", "0")
        if not said.isdecimal() or len(said) > 15 or int(said) > most:
            raise too_long
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        body, counter = bytearray(), ValueCounter(MOST_IN_BODY)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise APIError(400, "the request was incomplete; send it again")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_long
                    if kind == "application/json":
                        await count_values(counter, message.get("body", b""))
        except TimeoutError:
            raise APIError(408, f"the request took longer than {BODY_SECONDS} s to come; send it again") from None
        except BadJSON as error:
            raise APIError(413, f"the request is too large: {error}; send less at once") from None
        wanted = "multipart/form-data" if scope["path"] in FORM_PATHS else "application/json"
        if body and kind != wanted:
            raise APIError(415, f"content type {kind or 'none'!r} is not accepted; send {wanted}")
        return bytes(body)


async def count_values(counter: ValueCounter, body: bytes) -> None:
    for start in range(0, len(body), BODY_PIECE):
        counter.add(body[start : start + BODY_PIECE])
        await asyncio.sleep(0)


def is_public(path: str) -> bool:
    return path in PUBLIC_PATHS or path.startswith("/page/")


def user_of_token(access: Access, given: str) -> User:
    if (found := access.user_of_token(given)) is None:
        raise APIError(401, "the token is wrong; it was printed when the server started, or is yours alone", "token")
    return found


def log_in(answer: Response, access: Access, given: str, headers: Headers, scheme: str) -> None:
    """Sets the cookie of a token; APIError if it is wrong. One that came by https is not sent without."""
    access.refresh()
    user_of_token(access, given)
    answer.set_cookie(
        cookie_name(headers), session_of(given), max_age=30 * 86400, httponly=True, samesite="strict",
        secure=scheme == "https",
    )  # fmt: skip


def netloc(origin: str) -> str:
    """Host and port of an Origin; empty if it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def internal_error(scope: Scope, error: Exception) -> APIError:
    """An internal error: logged in full; the client sees only its type."""
    log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
    return APIError(500, f"the server failed on this request ({type(error).__name__}); see its log")


def cookie_name(headers: Headers) -> str:
    """With the port that the browser asks: it sends a host's cookies to all the servers there."""
    try:
        port = urlsplit(f"//{headers.get('host', '')}").port
    except ValueError:
        port = None
    return f"{COOKIE}_{port}" if port else COOKIE


def cookie(headers: Headers) -> str:
    """The session; also by its older name, without a port."""
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    found = cookies.get(cookie_name(headers)) or cookies.get(COOKIE)
    return found.value if found else ""


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body again, in pieces, then passes on later messages, such as a disconnect."""
    starts = iter(range(0, max(1, len(body)), BODY_PIECE))

    async def again() -> Message:
        if (start := next(starts, None)) is None:
            return await receive()
        await asyncio.sleep(0)
        return {
            "type": "http.request",
            "body": body[start : start + BODY_PIECE],
            "more_body": start + BODY_PIECE < len(body),
        }

    return again
