"""The engine for a model that is served elsewhere: an OpenAI-compatible completions API.

    Requests  ->  POST /v1/completions, many at once  ->  Completions

Prompts go as token ids, so the server tokenizes nothing. vLLM tells the ids that it wrote; of a
server that does not, the text is taken as it comes.
"""

import asyncio
import json
import math
import os
import queue
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import anyio
from anyio.from_thread import start_blocking_portal

from mcore_sft.base import web
from mcore_sft.config import EvaluationConfig, ServerConfig
from mcore_sft.evaluation.engines.engine import Completion, Decode, Engine, Request, completion
from mcore_sft.evaluation.errors import EvaluationError

# Seconds between tries: a server that restarts, or a proxy that stumbles, has a good minute.
_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# In all, from the first byte that is sent to the last that comes, whatever comes between.
_GREETING_SECONDS = 30.0
# Of one answer with all tries: the server may have many others to give before it.
_ANSWER_SECONDS = 3600.0
# A try with less would tell of its own end alone, and hide what the server said before.
_SHORTEST_TRY_SECONDS = 1.0
# A million token ids of a prompt and their text take half of it.
_REPLY_BYTES = 16 * 2**20
_SHOWN_CHARACTERS = 500
# Beside all from 500 on: the request was slow to arrive, or came too early, or too many did.
_PASSING_STATUSES = (408, 425, 429)
_DEEPEST = 50
# What some servers make anew for each reply: it says nothing of the model.
_PASSING_FIELDS = ("created", "permission")


class ServerEngine(Engine):
    """A model behind an address; `folder` is what it is said to serve, and gives the tokens."""

    def __init__(
        self, folder: Path, config: EvaluationConfig, *, stop_ids: Collection[int], decode: Decode
    ) -> None:
        self._api = _Api(config.server)
        self._card = self._api.model_card(config.server.model)
        super().__init__(folder, config, stop_ids=stop_ids, decode=decode)

    def _limits(self) -> Mapping[str, int | None]:
        limit = self._card.get("max_model_len")
        known = type(limit) is int and limit > 0
        return {"the server's max_model_len": limit if known else None}

    @property
    def served(self) -> Mapping[str, Any]:
        """As `served` says it, when the engine was opened."""
        return self._card

    def describe(self) -> dict[str, str]:
        """The server and the model as it calls it; vLLM's version, where it is one."""
        return {
            "engine": "server",
            "url": self._api.url,
            "model": self._card["id"],
            "owned_by": str(self._card.get("owned_by", "")),
            "served": json.dumps(self._card, sort_keys=True),
            "version": self._api.version(),
        }

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Answer all `requests`, `server.concurrency` of them at a time."""
        self.check(requests)
        done: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
        # leaving it ends what is still being asked
        with start_blocking_portal() as portal:
            portal.start_task_soon(self._answer_all, requests, done.put)
            waiting = len(requests)
            while waiting:
                found = [done.get()]
                while not done.empty():
                    found.append(done.get())
                if answers := [one for one in found if isinstance(one, Completion)]:
                    yield answers
                for one in found:
                    if isinstance(one, Exception):
                        raise one
                waiting -= len(answers)

    async def _answer_all(
        self, requests: Sequence[Request], put: Callable[[Completion | Exception], None]
    ) -> None:
        asked = iter(requests)

        async def ask(client: web.Client) -> None:
            try:
                for request in asked:
                    choice = await self._api.complete(client, self._body(request))
                    put(self._completion(request, choice))
            except Exception as error:  # whatever it is, the thread that waits raises it
                put(error)

        try:
            async with self._api.client() as client, asyncio.TaskGroup() as group:
                for _ in range(min(self._config.server.concurrency, len(requests))):
                    group.create_task(ask(client))
        except Exception as error:
            put(error)

    def _body(self, request: Request) -> dict[str, Any]:
        """One request, in which nothing is left to the server's defaults."""
        return {
            "model": self._card["id"],
            "prompt": request.prompt_ids,
            "max_tokens": self._config.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            # beyond OpenAI's API, in vLLM's words
            "stop_token_ids": sorted(self._stop_ids),
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
        }

    def _completion(self, request: Request, choice: Mapping[str, Any]) -> Completion:
        """Raises `EvaluationError` for what is no answer to `request`."""
        url = self._api.url
        reason, text, tokens = (choice.get(x) for x in ("finish_reason", "text", "token_ids"))
        if text is None and tokens is None and "message" in choice:
            raise EvaluationError(
                f"{url}: it answered as in a chat, expected the text of a completion; "
                "set evaluation.server.url to a server of /v1/completions"
            )
        if reason not in ("stop", "length"):
            raise EvaluationError(
                f"{url}: it ended an answer with {repr(reason)[:_SHOWN_CHARACTERS]}, "
                "expected 'stop' or 'length'"
            )
        got = choice.get("prompt_token_ids")
        if got is not None and got != list(request.prompt_ids):
            size = len(got) if isinstance(got, list) else 0
            raise EvaluationError(
                f"{url}: it continued a prompt of {size} tokens where "
                f"{len(request.prompt_ids)} were sent; it must take token ids as they are"
            )
        if not tokens and isinstance(text, str):
            return Completion(index=request.index, tokens=(), text=text, finish_reason=reason)
        if not self._are_ids(tokens):
            raise EvaluationError(
                f"{url}: it answered with neither text nor token ids of this model; "
                "give the --model that it serves"
            )
        return completion(
            request.index, tokens, reason, stop_ids=self._stop_ids, decode=self._decode
        )

    def _are_ids(self, tokens: Any) -> TypeGuard[list[int]]:
        rows = self._shape.get("vocab_size") or 2**31
        return isinstance(tokens, list) and all(
            type(token) is int and 0 <= token < rows for token in tokens
        )


def served(config: ServerConfig) -> Mapping[str, Any]:
    """The model that a server serves, as /v1/models says it: part of what an answer came from.

    Raises `EvaluationError` if the server does not answer, or `config` is not enough to ask it.
    """
    return _Api(config).model_card(config.model)


def check(config: ServerConfig) -> None:
    """Raise `EvaluationError` where `config` is not enough to ask a server."""
    _Api(config)


class _Api:
    """HTTP to one server: what passes is tried again, what does not is an `EvaluationError`."""

    def __init__(self, config: ServerConfig) -> None:
        if config.url is None:
            raise EvaluationError(
                "evaluation.engine is server, but not which; give its address, such as "
                "evaluation.server.url=http://127.0.0.1:8000"
            )
        if reason := web.why_no_address(config.url):
            raise EvaluationError(
                f"evaluation.server.url cannot be asked: {reason}; give the address alone, and a "
                "key by evaluation.server.api_key_variable"
            )
        self.url = config.url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        self._key = "" if config.api_key_variable is None else _key(config.api_key_variable)
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"

    def client(self) -> web.Client:
        """What asks the server, in an event loop."""
        try:
            return web.Client(self.url, self._headers)
        except web.NoReply as error:
            raise EvaluationError(f"{self.url}: {error}") from None

    def model_card(self, name: str | None) -> Mapping[str, Any]:
        """What the server says of the model `name`, or of the only one it serves."""
        try:
            served = self._by_name(self._greet("/v1/models").get("data"))
        except _Passing as error:
            raise EvaluationError(
                f"{self.url}: no answer ({error}); start the server and wait until it is ready, "
                "or set evaluation.server.url. What is answered already can be graded without it: "
                "tools/grade.py --input ANSWERS.jsonl"
            ) from None
        names = self._shown(", ".join(served)) or "none"
        if name is None and len(served) != 1:
            raise EvaluationError(
                f"{self.url}: it serves {len(served)} models ({names}); "
                "say which with evaluation.server.model"
            )
        if name is not None and name not in served:
            raise EvaluationError(
                f"{self.url}: it serves no model {name!r}, but {names}; set evaluation.server.model"
            )
        return served[next(iter(served)) if name is None else name]

    def version(self) -> str:
        """vLLM's version; of other servers, that they tell none."""
        try:
            said = self._greet("/version", again=False).get("version", "unknown")
        except (_Passing, web.NotThere, EvaluationError):
            return "unknown"
        return str(said)[:_SHOWN_CHARACTERS]

    async def complete(self, client: web.Client, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The choice that answers `body`, which asks for one."""
        try:
            said = await self._ask(client, "/v1/completions", json.dumps(body).encode())
        except _Passing as error:
            raise EvaluationError(
                f"{self.url}: {error}; see the server's log and run the command again, "
                "which goes on where this one stopped"
            ) from None
        choices = said.get("choices")
        if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
            choices = []
        # a server may give more than was asked for, in whatever order
        found = [one for one in choices if one.get("index") == 0]
        if not found and len(choices) == 1 and choices[0].get("index") is None:
            found = choices
        if len(found) != 1:
            raise EvaluationError(
                f"{self.url}: expected one choice of index 0, given {self._shown(json.dumps(said))}"
            )
        return dict(found[0])

    def _greet(self, path: str, *, again: bool = True) -> Mapping[str, Any]:
        """What the server says at `path`; raises as `_ask`, or `_ask_once` without `again`."""

        async def greet() -> Mapping[str, Any]:
            async with self.client() as client:
                if again:
                    return await self._ask(client, path)
                return await self._ask_once(client, path, None, _GREETING_SECONDS)

        with start_blocking_portal() as portal:
            return portal.call(greet)

    async def _ask(
        self, client: web.Client, path: str, body: bytes | None = None
    ) -> Mapping[str, Any]:
        """What the server says, asked again while that may help and there is time.

        Without a `body` it is a greeting, which is not repeated where nobody is there. Raises
        `_Passing` where all tries failed.
        """
        until = time.monotonic() + (_GREETING_SECONDS if body is None else _ANSWER_SECONDS)
        tries = 0
        for delay in (*_DELAYS, math.inf):
            tries += 1
            try:
                return await self._ask_once(client, path, body, until - time.monotonic())
            except web.NotThere as error:
                if body is None:
                    raise _Passing(str(error)) from None
                reason, after = str(error), 0.0
            except _Passing as error:
                reason, after = str(error), error.after
            # not all at the same moment, and none before the server wants it
            wait = max(delay * random.uniform(0.5, 1.5), after)
            if time.monotonic() + wait + _SHORTEST_TRY_SECONDS > until:
                break
            await anyio.sleep(wait)
        if after:
            reason += f"; it wants to be asked again in {after:g} s"
        raise _Passing(f"{tries} tries failed ({reason})" if tries > 1 else reason)

    async def _ask_once(
        self, client: web.Client, path: str, body: bytes | None, seconds: float
    ) -> Mapping[str, Any]:
        """What the server says to one try.

        Raises `_Passing` where another may help, and `web.NotThere`.
        """
        where = self.url + path
        try:
            reply = await client.exchange(where, body, seconds=seconds, most_bytes=_REPLY_BYTES)
        except web.TooLong as error:
            raise EvaluationError(f"{where}: {error}; check evaluation.server.url") from None
        except web.NotThere:
            raise
        except web.NoReply as error:
            raise _Passing(str(error)) from None
        if reply.location is not None and 300 <= reply.status < 400:
            raise EvaluationError(
                f"{where}: HTTP {reply.status}, it sends the client to "
                f"{self._shown(reply.location)}, which is not followed, as an API key would go "
                "there too; set evaluation.server.url to that server, if it is meant"
            )
        if reply.status != 200:
            said = f"HTTP {reply.status}{client.via}: {self._shown(_message(reply.body))}"
            if reply.status >= 500 or reply.status in _PASSING_STATUSES:
                raise _Passing(said, reply.retry_after)
            raise EvaluationError(f"{where}: {said}")
        if reply.cut:
            raise _Passing(reply.cut)
        return self._content(where, reply.body)

    def _content(self, where: str, body: bytes) -> Mapping[str, Any]:
        """The JSON object of a reply; raises `_Passing` for one that is cut short or empty."""
        try:
            content = json.loads(body)
            if not isinstance(content, dict):
                raise TypeError(f"its JSON is no object, but {type(content).__name__}")
            if _is_deep(content):  # it could be read, and not be written or hashed
                raise RecursionError("its JSON is nested too deep")
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, ValueError) and body.lstrip()[:1] in (b"", b"{"):
                raise _Passing(f"its reply is empty or broken JSON: {error}") from None
            raise EvaluationError(
                f"{where}: not an answer of the OpenAI API ({self._shown(str(error))}); "
                "check evaluation.server.url"
            ) from None
        if content.get("error") or content.get("object") == "error":
            raise EvaluationError(f"{where}: {self._shown(_message(body))}")
        return content

    def _by_name(self, cards: Any) -> dict[str, Mapping[str, Any]]:
        """A list of models by their names, without what is new in each reply."""
        listed = cards if isinstance(cards, list) else [cards]
        if not all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in listed):
            raise EvaluationError(
                f"{self.url}/v1/models: expected a list of models, each with an id, given "
                f"{self._shown(json.dumps(cards))}; check evaluation.server.url"
            )
        return {
            card["id"]: {name: x for name, x in card.items() if name not in _PASSING_FIELDS}
            for card in listed
        }

    def _shown(self, said: str) -> str:
        """What a server says, short, and without the key, which some repeat."""
        shown = said.replace(self._key, "[the API key]") if self._key else said
        line = " ".join(shown.split())[:_SHOWN_CHARACTERS]
        # nothing that a terminal obeys
        return "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in line)


def _key(variable: str) -> str:
    """The API key that the environment holds, which no error shows."""
    key = os.environ.get(variable)
    said = f"evaluation.server.api_key_variable is {variable}"
    if not key:
        raise EvaluationError(
            f"{said}, which the environment does not hold; set it, or leave the field out"
        )
    if not web.fits_header(key):
        raise EvaluationError(
            f"{said}, whose value holds a line break, a blank at an end, or another character that "
            f"no HTTP header can hold; set it again, as by "
            f"export {variable}=\"$(tr -d '[:space:]' < FILE)\""
        )
    return key


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [x for each in inside for x in each if isinstance(x, dict | list)]
    return bool(level)


def _message(body: bytes) -> str:
    """What a server says of an error: its own words where they stand apart, else all of it."""
    whole = body.decode(errors="replace")
    try:
        content = json.loads(whole)
        said = content.get("error") or content
        said = said if isinstance(said, str) else said.get("message") or said["detail"]
    except (ValueError, LookupError, AttributeError, RecursionError):
        return whole
    return said if isinstance(said, str) else whole


class _Passing(Exception):
    """A failure that another try may not meet, after so many seconds where the server says so."""

    def __init__(self, said: str, after: float | None = None) -> None:
        super().__init__(said)
        self.after = after or 0.0
