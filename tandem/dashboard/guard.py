"""Who may read the page and act through it: whoever has the token that is written at the start, from this page."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import web
from yarl import URL

from tandem.rpc.address import Address

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Nothing but the page's own files, and no script can make markup of text.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_CSRF_HEADER = "X-CSRF-Token"


class RefusedError(Exception):
    """The request is not answered, whatever it asks for."""


class Guard:
    """Looks at each request before anything is done for it."""

    def __init__(self, address: Address) -> None:
        """Make the secrets.

        Args:
            address: where the page is served.
        """
        self.token = secrets.token_urlsafe(32)
        self.csrf = secrets.token_urlsafe(32)
        # Browsers keep one set of cookies for all ports of a host.
        self._cookie = f"tandem-dashboard-{address.port}"
        self._names = {"localhost", address.host.lower()}
        self._open = not address.is_loopback

    def check(self, request: web.Request) -> bool:
        """Look at a request.

        Returns:
            Whether it brings the token in its address, so that the answer is to set the cookie.

        Raises:
            RefusedError: it has no right.
        """
        if not self._is_host(request):
            raise RefusedError(
                "this name is not the dashboard's: open the address that it wrote when it started"
            )
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none") and request.path != "/":
            raise RefusedError("another site's page asked for this")
        brings = request.path == "/" and _same(request.query.get("token", ""), self.token)
        if not brings and not _same(request.cookies.get(self._cookie, ""), self.token):
            raise RefusedError("open the address that the dashboard wrote when it started: it has the token")
        if request.method not in ("GET", "HEAD"):
            if request.headers.get("Origin", "") != f"http://{request.host}":
                raise RefusedError("another site's page asked for this")
            if not _same(request.headers.get(_CSRF_HEADER, ""), self.csrf):
                raise RefusedError(f"{_CSRF_HEADER} is missing or of another start: load the page again")
        return brings

    def set_cookie(self, response: web.StreamResponse) -> None:
        """Give the browser the token."""
        response.set_cookie(self._cookie, self.token, httponly=True, samesite="Strict", path="/")

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """What every answer has."""
        response.headers.update(_HEADERS)

    def _is_host(self, request: web.Request) -> bool:
        """Whether the request was sent to this server by its own name: another site's name may resolve to it."""
        try:
            host = (URL(f"http://{request.host}").host or "").lower()
        except ValueError:
            return False
        if host in self._names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return self._open or address.is_loopback  # numbers belong to no site


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())
