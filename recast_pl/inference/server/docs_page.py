"""A page that describes all requests and can send them; it loads nothing from other servers."""

import importlib.util
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse

_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def add_docs(app: FastAPI) -> None:
    """Adds `/docs`, from Swagger UI's files in the package `fastapi-offline`; nothing if it is not installed."""
    package = importlib.util.find_spec("fastapi_offline")
    if package is None or package.origin is None:
        return
    folder = Path(package.origin).parent / "static"

    async def docs(request: Request) -> Response:
        """The page."""
        root = request.scope.get("root_path", "").rstrip("/")
        page = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=f"{app.title}: requests",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_favicon_url="data:,",
        )
        page.headers.update(_HEADERS)
        return page

    async def file(name: str) -> Response:
        """A file of the page."""
        if name not in _FILES:
            return Response(status_code=404)
        return FileResponse(folder / name, media_type=_FILES[name])

    methods = ["GET", "HEAD"]
    app.add_api_route("/docs", docs, methods=methods, include_in_schema=False)
    app.add_api_route("/docs/{name}", file, methods=methods, include_in_schema=False)
