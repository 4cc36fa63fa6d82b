"""The engine for a model that is served elsewhere: an OpenAI-compatible completions API.

    Requests  ->  POST /v1/completions, many at once  ->  Completions

Prompts go as token ids, so the server tokenizes nothing. vLLM tells the ids that it wrote; of a
server that does not, the text is taken as it comes.
"""

import json
import os
import queue
import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from mcore_sft.base import web
from mcore_sft.config import EvaluationConfig, ServerConfig
from mcore_sft.evaluation.engine import Completion, Decode, Engine, Request, completion
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
        return {"the server's max_model_len": limit if isinstance(limit, int) else None}

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
        asked: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in requests:
            asked.put(request)
        done: queue.SimpleQueue[tuple[Request, Any] | Exception] = queue.SimpleQueue()
        over = threading.Event()
        for _ in range(min(self._config.server.concurrency, len(requests))):
            # daemons: an answer that nobody waits for any more does not hold up the end
            threading.Thread(target=self._ask, args=(asked, done, over), daemon=True).start()
        try:
            waiting = len(requests)
            while waiting:
                found = [done.get()]
                while not done.empty():
                    found.append(done.get())
                answers = [self._completion(*one) for one in found if isinstance(one, tuple)]
                if answers:
                    yield answers
                for one in found:
                    if isinstance(one, Exception):
                        raise one
                waiting -= len(answers)
        finally:
            over.set()

    def _ask(
        self,
        asked: "queue.SimpleQueue[Request]",
        done: "queue.SimpleQueue[tuple[Request, Any] | Exception]",
        over: threading.Event,
    ) -> None:
        """One of the threads that wait for the server."""
        while not over.is_set():
            try:
                request = asked.get_nowait()
                done.put((request, self._api.complete(self._body(request), over)))
            except queue.Empty:
                return
            except Exception as error:  # whatever it is, the thread that reads `done` raises it
                done.put(error)
                return

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

    def _completion(self, request: Request, choice: Any) -> Completion:
        """Raises `EvaluationError` for what is no answer to `request`."""
        if not isinstance(choice, dict):
            raise EvaluationError(f"{self._api.url}: its answer has no choice that can be read")
        reason, text, tokens = (choice.get(x) for x in ("finish_reason", "text", "token_ids"))
        if reason not in ("stop", "length"):
            raise EvaluationError(
                f"{self._api.url}: it ended an answer with {reason!r}, expected 'stop' or 'length'"
            )
        got = choice.get("prompt_token_ids")
        if got is not None and got != list(request.prompt_ids):
            size = len(got) if isinstance(got, list) else 0
            raise EvaluationError(
                f"{self._api.url}: it continued a prompt of {size} tokens where "
                f"{len(request.prompt_ids)} were sent; it must take token ids as they are"
            )
        if tokens is None and isinstance(text, str):
            return Completion(index=request.index, tokens=(), text=text, finish_reason=reason)
        if not self._are_ids(tokens):
            raise EvaluationError(
                f"{self._api.url}: it answered with neither text nor token ids of this model; "
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

    def model_card(self, name: str | None) -> Mapping[str, Any]:
        """What the server says of the model `name`, or of the only one it serves."""
        try:
            served = _by_name(self._open("/v1/models", "data", seconds=_GREETING_SECONDS))
        except _Passing as error:
            raise EvaluationError(
                f"{self.url}: no answer ({error}); start the server and wait until it is ready, "
                "or set evaluation.server.url. What is answered already can be graded without it: "
                "tools/grade.py --input ANSWERS.jsonl"
            ) from None
        names = ", ".join(served) or "none"
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
            said = str(self._open("/version", "version", seconds=_GREETING_SECONDS))
        except (_Passing, EvaluationError):
            return "unknown"
        return said[:_SHOWN_CHARACTERS]

    def complete(self, body: Mapping[str, Any], over: threading.Event) -> Any:
        """The choice that answers `body`, tried again while it may help and `over` is not set."""
        asked, tries = json.dumps(body).encode(), 0
        until = time.monotonic() + _ANSWER_SECONDS
        for delay in (*_DELAYS, None):
            tries += 1
            try:
                left = until - time.monotonic()
                choices = self._open("/v1/completions", "choices", asked, seconds=left)
                return choices[0] if isinstance(choices, list) and choices else None
            except _Passing as error:
                reason = error
            if delay is None:
                break
            wait = delay * random.uniform(0.5, 1.5)  # not all threads at the same moment
            if time.monotonic() + wait + _SHORTEST_TRY_SECONDS > until or over.wait(wait):
                break
        raise EvaluationError(
            f"{self.url}: {tries} tries failed ({reason}); see the server's log and run "
            "the command again, which goes on where this one stopped"
        )

    def _open(self, path: str, member: str, body: bytes | None = None, *, seconds: float) -> Any:
        """One try; what the answer's JSON holds under `member`."""
        where = self.url + path
        try:
            reply = web.exchange(
                where, body, self._headers, seconds=max(0.001, seconds), most_bytes=_REPLY_BYTES
            )
        except web.TooLong as error:
            raise EvaluationError(f"{where}: {error}; check evaluation.server.url") from None
        except web.NoReply as error:
            raise _Passing(str(error)) from None
        if reply.location is not None and 300 <= reply.status < 400:
            raise EvaluationError(
                f"{where}: HTTP {reply.status}, it sends the client to "
                f"{self._shown(reply.location)}, which is not followed, as an API key would go "
                "there too; set evaluation.server.url to that server, if it is meant"
            )
        if reply.status != 200:
            said = f"HTTP {reply.status}: {self._shown(reply.body.decode(errors='replace'))}"
            if reply.status >= 500 or reply.status == 429:
                raise _Passing(said)
            raise EvaluationError(f"{where}: {said}")
        try:
            return json.loads(reply.body)[member]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise EvaluationError(
                f"{where}: not an answer of the OpenAI API ({self._shown(repr(error))}); "
                "check evaluation.server.url"
            ) from None

    def _shown(self, said: str) -> str:
        """What a server says, short, and without the key, which some repeat."""
        shown = said.replace(self._key, "[the API key]") if self._key else said
        return shown[:_SHOWN_CHARACTERS]


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


def _by_name(cards: Any) -> dict[str, Mapping[str, Any]]:
    """What can be read of a list of models, by their names, without what is new in each reply."""
    return {
        card["id"]: {name: x for name, x in card.items() if name not in _PASSING_FIELDS}
        for card in (cards if isinstance(cards, list) else ())
        if isinstance(card, dict) and isinstance(card.get("id"), str)
    }


class _Passing(Exception):
    """A failure that another try may not meet."""
