"""Somebody else's web application, observed by the router's monitoring: no router, no gateway, no model.

    pip install llm-runner-router
    python examples/bookshop.py          # PORT, LOG_DIR and the switches of the guide are heeded
    curl -X POST http://127.0.0.1:8000/books/poetry/sell
    curl http://127.0.0.1:8000/metrics

With FastAPI it is the same: `FastAPI(lifespan=...)`, `app.add_middleware(monitoring.middleware)`,
`app.router.routes.extend(monitoring.routes())`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llm_router import MonitoringSystem, StructuredLogger


def bookshop(monitoring: MonitoringSystem, logger: StructuredLogger) -> Starlette:
    """The application. What it sells is counted, its shelves are checked, and empty ones are an alert."""
    shelves = {"poetry": 3, "travel": 5}
    sold = monitoring.metrics.counter("bookshop_books_sold", "Books sold", labels=("shelf",))
    stock = monitoring.metrics.gauge("bookshop_stock_books", "Books on the shelves", labels=("shelf",))
    for shelf, books in shelves.items():
        stock.set(books, shelf=shelf)

    def check_shelves() -> dict[str, object]:
        empty = [shelf for shelf, books in shelves.items() if not books]
        return {"healthy": not empty, "message": f"{len(empty)} shelves are empty", "details": {"empty": empty}}

    monitoring.health.add_check("shelves", check_shelves, interval=5)
    monitoring.alerting.add_rule(
        "FewBooks",
        lambda metrics: metrics.bookshop_stock_books < 6,
        severity="warning",
        message="Order more books",
    )

    async def sell(request: Request) -> Response:
        shelf = request.path_params["shelf"]
        if not shelves.get(shelf):
            logger.warn("Nothing to sell", {"shelf": shelf})
            return JSONResponse({"error": "sold out"}, 409)
        shelves[shelf] -= 1
        sold.inc(shelf=shelf)
        stock.set(shelves[shelf], shelf=shelf)
        logger.audit("book_sold", {"shelf": shelf, "left": shelves[shelf]})
        return JSONResponse({"left": shelves[shelf]})

    async def show_alerts(request: Request) -> Response:
        return JSONResponse({rule.name: rule.state for rule in monitoring.alerting.rules()})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with monitoring:
            logger.info("The bookshop is open")
            yield
        logger.close()

    return Starlette(
        routes=[
            Route("/books/{shelf}/sell", sell, methods=["POST"]),
            Route("/alerts", show_alerts),
            *monitoring.routes(),
        ],
        middleware=[Middleware(logger.middleware), Middleware(monitoring.middleware)],
        lifespan=lifespan,
    )


if __name__ == "__main__":
    application = bookshop(MonitoringSystem(interval=1), StructuredLogger(service_name="bookshop", version="1.0"))
    uvicorn.run(application, port=int(os.environ.get("PORT", "8000")), log_level="warning")
