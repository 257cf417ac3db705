"""The HTTP application: OpenAI's routes on top of the engine. Needs the extra ``serve``."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence

from luthier._util.installation import install_command
from luthier.errors import MissingPackageError, UserError
from luthier.inference.generation import check_length
from luthier.models.chat_format import ChatFormat
from luthier.serving.metrics import TYPE, Metrics
from luthier.serving.models import Served
from luthier.serving.protocol import ChatRequest, CompletionRequest, RequestError, error_body, parse, status_of
from luthier.serving.replies import (
    ChatReplyBuilder,
    CompletionReplyBuilder,
    ReplyBuilder,
    TokenLogprobs,
    token_logprobs,
    usage,
)
from luthier.serving.requests import ReplyEngine, Token
from luthier.serving.session import ReplySession

try:
    from fastapi import Depends, FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    _INSTALLED = True
except ModuleNotFoundError:  # require() reports what to install
    _INSTALLED = False

MAX_BODY_BYTES = 16 << 20
_DISCONNECTED = 499  # nginx's status for a client that disconnected; only metrics show it
_LOG = logging.getLogger("luthier.serving")


def require() -> None:
    """Raise MissingPackageError if the extra ``serve`` is not installed."""
    if not _INSTALLED:
        raise MissingPackageError("serving needs FastAPI and uvicorn", install_command("serve"))


def create(models: Sequence[Served], engine: ReplyEngine, api_key: str) -> FastAPI:
    """Create the application. models: in the order of ``GET /v1/models``. The engine must be started separately."""
    require()
    app = FastAPI(title="luthier", docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(models, engine)

    def authorised(request: HttpRequest) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(token.strip().encode(), api_key.encode()):
            raise RequestError("the API key is missing or wrong", "send Authorization: Bearer KEY", status=401)

    guard = [Depends(authorised)]

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", dependencies=guard)
    async def metrics() -> Response:
        return Response(service.metrics.text(engine), media_type=TYPE)

    @app.get("/v1/models", dependencies=guard)
    async def listed() -> dict[str, object]:
        return {"object": "list", "data": [service.describe(m) for m in models]}

    @app.get("/v1/models/{name:path}", dependencies=guard)
    async def one(name: str) -> dict[str, object]:
        return service.describe(service.find(name))

    @app.post("/v1/chat/completions", dependencies=guard)
    async def chat(request: HttpRequest) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions", dependencies=guard)
    async def completions(request: HttpRequest) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.exception_handler(UserError)
    async def refused(_: HttpRequest, error: UserError) -> Response:
        return service.refusal(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return service.refusal(RequestError(message, "see /v1/models", error.status_code))

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> Response:
        return service.refusal(error)

    return app


class Service:
    """Answers requests with the engine, independently of the routes."""

    def __init__(self, models: Sequence[Served], engine: ReplyEngine) -> None:
        self.models = {m.name: m for m in models}
        self.engine = engine
        self.metrics = Metrics()

    def describe(self, served: Served) -> dict[str, object]:
        """Return the JSON that describes a model in ``GET /v1/models``."""
        base = next(reversed(self.models))
        parent = base if served.adapter else None
        limit = self.engine.limit
        return {"id": served.name, "object": "model", "created": 0, "owned_by": "luthier", "parent": parent,
                "max_model_len": limit}  # fmt: skip

    def find(self, name: str) -> Served:
        """Return the model with this name. Raises RequestError if it is not served."""
        served = self.models.get(name)
        if served is None:
            raise RequestError(
                f"the model {name!r} is not served here",
                f"use {', '.join(self.models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return served

    def refusal(self, error: Exception, model: str = "") -> Response:
        """Return the response for an error, and count the request. Logs internal errors."""
        status = status_of(error)
        if status == 500:
            _LOG.error("a request failed", exc_info=error)
        self.metrics.request(model, status)
        return JSONResponse(error_body(error), status, headers={"Retry-After": "1"} if status == 429 else None)

    async def answer(self, request: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """Parse a request, submit it to the engine, and return its reply, complete or as a stream."""
        asked = parse(kind, await _body(request))
        served = self.find(asked.model)
        try:
            # rendering and encoding a long prompt takes time that other requests should not wait for
            ids = await asyncio.to_thread(_prompt, asked, served)
            stops, raw = asked.stops, isinstance(asked, CompletionRequest)
            sampling = asked.sampling(served.sampling, asked.max_new_tokens)
            session = ReplySession(served, ids, sampling, stops, asked.logprob_count, raw)
            session.submit(self.engine)
        except Exception as e:
            return self.refusal(e, served.name)
        if isinstance(asked, CompletionRequest):
            builder: ReplyBuilder = CompletionReplyBuilder(served.name, len(asked.text or ""))
        else:
            builder = ChatReplyBuilder(served.name)
        reply = _Reply(served, session, builder)
        if asked.stream:
            lines = self._lines(reply, asked.usage_wanted)
            first = await anext(lines)  # start the generator, so that it is closed even if the client never reads
            return StreamingResponse(_chained(first, lines), media_type="text/event-stream")
        return await self._whole(request, reply)

    async def _whole(self, request: HttpRequest, reply: _Reply) -> Response:
        session = reply.session
        whole, disconnected = asyncio.ensure_future(session.whole()), asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({whole, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            disconnected.cancel()
            if not whole.done():
                session.cancel()
                whole.cancel()
        name = reply.served.name
        if not whole.done() or whole.cancelled():
            self.metrics.request(name, _DISCONNECTED)
            return Response(status_code=_DISCONNECTED)
        if error := whole.exception():
            assert isinstance(error, Exception)
            return self.refusal(error, name)
        text, tokens = whole.result()
        self.metrics.request(name, 200, session.first_token_s)
        content = reply.builder.whole(text, reply.logprobs(tokens), session.finish)
        return JSONResponse({**content, "usage": reply.usage()})

    async def _lines(self, reply: _Reply, with_usage: bool) -> AsyncGenerator[str, None]:
        """Yield server-sent events. If closed early because the client disconnected, generation stops."""
        session, builder, status = reply.session, reply.builder, _DISCONNECTED
        try:
            yield _event(builder.opening())
            async for text, tokens in session.pieces():
                yield _event(builder.piece(text, reply.logprobs(tokens)))
            yield _event(builder.piece("", None, session.finish))
            if with_usage:
                yield _event(builder.usage_piece(reply.usage()))
            yield "data: [DONE]\n\n"
            status = 200
        except Exception as e:  # the status line has been sent; the client reads the error from the stream
            status = status_of(e)
            if status == 500:
                _LOG.error("a request failed", exc_info=e)
            yield _event(error_body(e))
        finally:
            session.cancel()
            self.metrics.request(reply.served.name, status, session.first_token_s)


class _Reply:
    """The session of one request, and the builder of its JSON."""

    def __init__(self, served: Served, session: ReplySession, builder: ReplyBuilder) -> None:
        self.served, self.session, self.builder = served, session, builder
        self._before: int | None = None

    def logprobs(self, tokens: Sequence[Token]) -> TokenLogprobs:
        if self.session.request.logprobs is None:
            return None
        logprobs = token_logprobs(self.served.chat_format.tokenizer, tokens, self._before)
        if tokens:
            self._before = tokens[-1].id
        return logprobs

    def usage(self) -> dict[str, object]:
        request = self.session.request
        return usage(len(request.ids), request.reused, self.session.reply_tokens)


def _prompt(asked: ChatRequest | CompletionRequest, served: Served) -> list[int]:
    """Encode the prompt of a request. Raises UserError if it cannot be rendered or is too long."""
    chat_format = served.chat_format
    if isinstance(asked, ChatRequest):
        conversation = asked.conversation(served.system)
        for m in asked.messages:
            chat_format.check_text(m.text, f"the {m.role} message")
        ids = chat_format.prompt_ids(conversation)
    else:
        ids = _raw_prompt(asked, chat_format)
    try:
        check_length(chat_format.config, len(ids))
    except UserError as e:
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        raise RequestError(e.message, e.fix, param=param, code="context_length_exceeded") from None
    return ids


def _raw_prompt(asked: CompletionRequest, chat_format: ChatFormat) -> list[int]:
    """Encode text like the start of a document (with <s> if the model has one); token ids are used unchanged."""
    text = asked.text
    if text is None:
        ids = [int(i) for i in asked.prompt]
        size = chat_format.config.get_text_config().vocab_size
        if unknown := [i for i in ids if not 0 <= i < size]:
            raise RequestError(
                f"prompt: the model has no token {unknown[0]}", f"send token ids below {size}", param="prompt"
            )
        return ids
    chat_format.check_text(text, "the prompt")
    ids = list(chat_format.tokenizer.hf.backend_tokenizer.encode(text).ids)
    if not ids:
        raise RequestError("prompt: is empty", "send a text to continue", param="prompt")
    return ids


async def _body(request: HttpRequest) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request is longer than {MAX_BODY_BYTES} bytes", "send a shorter one", status=413)
    return bytes(body)


async def _disconnect(request: HttpRequest) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chained(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for line in rest:
            yield line
    finally:
        await rest.aclose()


def _event(value: Mapping[str, object]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
