"""The HTTP side: OpenAI's routes over the engine. Needs the extra ``serve``."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from luthier.errors import MissingPackageError, UserError
from luthier.inference.generation import Generator
from luthier.serving.engine import Engine
from luthier.serving.metrics import TYPE, Metrics
from luthier.serving.models import Served
from luthier.serving.protocol import ChatRequest, CompletionRequest, RequestError, error_body, parse, status_of
from luthier.serving.replies import ChatShape, CompletionShape, Entries, Shape, entries, usage
from luthier.serving.session import Session

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    _INSTALLED = True
except ModuleNotFoundError:  # create() says what to install
    _INSTALLED = False

MAX_BODY_BYTES = 16 << 20
_HUNG_UP = 499  # nginx's, as nobody is there to read it
_LOG = logging.getLogger("luthier.serving")


def require() -> None:
    """Raise MissingPackageError without the extra."""
    if not _INSTALLED:
        raise MissingPackageError("serving needs FastAPI and uvicorn", "pip install 'luthier[serve]'")


def create(models: Sequence[Served], engine: Engine, api_key: str) -> FastAPI:
    """The application. models: as they are listed. The engine must be started, or be stepped elsewhere."""
    require()
    app = FastAPI(title="luthier", docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(models, engine)

    def authorised(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.strip().encode(), api_key.encode()):
            raise RequestError("the API key is missing or wrong", "send Authorization: Bearer KEY", status=401)

    guarded: dict[str, Any] = {"dependencies": [Depends(authorised)]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", **guarded)
    async def metrics() -> Response:
        return Response(service.metrics.text(engine), media_type=TYPE)

    @app.get("/v1/models", **guarded)
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe(m) for m in models]}

    @app.get("/v1/models/{name:path}", **guarded)
    async def one(name: str) -> dict[str, Any]:
        return service.describe(service.find(name))

    @app.post("/v1/chat/completions", **guarded)
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions", **guarded)
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return service.refusal(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        told = RequestError(f"{request.method} {request.url.path}: {error.detail}", "see /v1/models", error.status_code)
        return service.refusal(told)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return service.refusal(error)

    return app


class Service:
    """Requests to replies; no routes."""

    def __init__(self, models: Sequence[Served], engine: Engine) -> None:
        self.models = {m.name: m for m in models}
        self.engine = engine
        self.metrics = Metrics()

    def describe(self, served: Served) -> dict[str, Any]:
        base = next(reversed(self.models))
        parent = base if served.adapter else None
        limit = self.engine.limit
        return {"id": served.name, "object": "model", "created": 0, "owned_by": "luthier", "parent": parent,
                "max_model_len": limit}  # fmt: skip

    def find(self, name: str) -> Served:
        found = self.models.get(name)
        if found is None:
            raise RequestError(
                f"the model {name!r} is not served here",
                f"use {', '.join(self.models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return found

    def refusal(self, error: Exception, model: str = "") -> Response:
        status = status_of(error)
        if status == 500:
            _LOG.error("a request failed", exc_info=error)
        self.metrics.request(model, status)
        return JSONResponse(error_body(error), status, headers={"Retry-After": "1"} if status == 429 else None)

    async def answer(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        asked = parse(kind, await _body(request))
        served = self.find(asked.model)
        try:
            # templates and tokenizers take their time with long prompts; others' tokens are not to wait for them
            ids = await asyncio.to_thread(_prompt, asked, served)
            stops, raw = asked.stops, isinstance(asked, CompletionRequest)
            session = Session(
                served, ids, asked.sampling(served.sampling, asked.longest), stops, asked.logprob_count, raw
            )
            session.submit(self.engine)
        except Exception as e:
            return self.refusal(e, served.name)
        if isinstance(asked, CompletionRequest):
            shape: Shape = CompletionShape(served.name, len(asked.text or ""))
        else:
            shape = ChatShape(served.name)
        reply = _Reply(served, session, shape)
        if asked.stream:
            lines = self._lines(reply, asked.usage_wanted)
            first = await anext(lines)  # begun, so that it is closed even if nobody ever reads on
            return StreamingResponse(_chained(first, lines), media_type="text/event-stream")
        return await self._whole(request, reply)

    async def _whole(self, request: Request, reply: _Reply) -> Response:
        session = reply.session
        ended, gone = asyncio.ensure_future(session.whole()), asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not ended.done():
                session.cancel()
                ended.cancel()
        name = reply.served.name
        if not ended.done() or ended.cancelled():
            self.metrics.request(name, _HUNG_UP)
            return Response(status_code=_HUNG_UP)
        if error := ended.exception():
            assert isinstance(error, Exception)
            return self.refusal(error, name)
        text, tokens = ended.result()
        self.metrics.request(name, 200, session.first_token_s)
        found = reply.entries(tokens)
        return JSONResponse({**reply.shape.whole(text, found, session.finish), "usage": reply.usage()})

    async def _lines(self, reply: _Reply, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. Left early (the client hung up), the request's work stops."""
        session, shape, status = reply.session, reply.shape, _HUNG_UP
        try:
            yield _event(shape.opening())
            async for text, tokens in session.pieces():
                yield _event(shape.piece(text, reply.entries(tokens)))
            yield _event(shape.piece("", None, session.finish))
            if with_usage:
                yield _event(shape.usage_piece(reply.usage()))
            yield "data: [DONE]\n\n"
            status = 200
        except Exception as e:  # the status line is sent already; the client reads the error from the stream
            status = status_of(e)
            if status == 500:
                _LOG.error("a request failed", exc_info=e)
            yield _event(error_body(e))
        finally:
            session.cancel()
            self.metrics.request(reply.served.name, status, session.first_token_s)


class _Reply:
    """What becomes JSON: one request's session in one of the two shapes."""

    def __init__(self, served: Served, session: Session, shape: Shape) -> None:
        self.served, self.session, self.shape = served, session, shape
        self._before: int | None = None

    def entries(self, tokens: Sequence[Any]) -> Entries:
        if self.session.request.logprobs is None:
            return None
        found = entries(self.served.generator.tokenizer, tokens, self._before)
        if tokens:
            self._before = tokens[-1].id
        return found

    def usage(self) -> dict[str, Any]:
        request = self.session.request
        return usage(len(request.ids), request.reused, self.session.reply_tokens)


def _prompt(asked: ChatRequest | CompletionRequest, served: Served) -> list[int]:
    """The ids that the model reads. Raises UserError."""
    generator, chat_format = served.generator, served.generator.chat_format
    if isinstance(asked, ChatRequest):
        conversation = asked.conversation(served.system)
        for m in asked.messages:
            chat_format.check_text(m.text, f"the {m.role} message")
        ids = chat_format.prompt_ids(conversation)
    else:
        ids = _raw_prompt(asked, generator)
    try:
        generator.check_length(len(ids))
    except UserError as e:
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        raise RequestError(e.message, e.fix, param=param, code="context_length_exceeded") from None
    return ids


def _raw_prompt(asked: CompletionRequest, generator: Generator) -> list[int]:
    """Text as the tokenizer begins a document (with <s>, where the model has that), or ids as they are."""
    text = asked.text
    if text is None:
        ids = [int(i) for i in asked.prompt]
        size = generator.model.config.get_text_config().vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise RequestError(f"prompt: the model has no token {wrong[0]}", f"ids are below {size}", param="prompt")
        return ids
    generator.chat_format.check_text(text, "the prompt")
    ids = list(generator.tokenizer.hf.backend_tokenizer.encode(text).ids)
    if not ids:
        raise RequestError("prompt: is empty", "give some text to go on from", param="prompt")
    return ids


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request is longer than {MAX_BODY_BYTES} bytes", "send less", status=413)
    return bytes(body)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for line in rest:
            yield line
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
