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
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from mcore_sft.config import EvaluationConfig, ServerConfig
from mcore_sft.evaluation.engine import Completion, Decode, Engine, Request, completion
from mcore_sft.evaluation.errors import EvaluationError

# Seconds between tries: a server that restarts, or a proxy that stumbles, has a good minute.
_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_GREETING_SECONDS = 30.0
_ANSWER_SECONDS = 3600.0
_BODY_CHARACTERS = 500


class ServerEngine(Engine):
    """A model behind an address; `folder` is what it is said to serve, and gives the tokens."""

    def __init__(
        self, folder: Path, config: EvaluationConfig, *, stop_ids: Collection[int], decode: Decode
    ) -> None:
        self._api = _Api(config.server)
        self._card = self._api.model_card(config.server.model)
        super().__init__(folder, config, stop_ids=stop_ids, decode=decode)

    def _limits(self) -> Mapping[str, int | None]:
        return {"the server's max_model_len": self._card.get("max_model_len")}

    def describe(self) -> dict[str, str]:
        """The server and the model as it calls it; vLLM's version, where it is one."""
        return {
            "engine": "server",
            "url": self._api.url,
            "model": self._card["id"],
            "owned_by": str(self._card.get("owned_by", "")),
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

    def _completion(self, request: Request, choice: Mapping[str, Any]) -> Completion:
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise EvaluationError(
                f"{self._api.url}: it ended an answer with {reason!r}, expected 'stop' or 'length'"
            )
        got = choice.get("prompt_token_ids")
        if got is not None and tuple(got) != request.prompt_ids:
            raise EvaluationError(
                f"{self._api.url}: it continued a prompt of {len(got)} tokens where "
                f"{len(request.prompt_ids)} were sent; it must take token ids as they are"
            )
        tokens = choice.get("token_ids")
        if tokens is None:
            return Completion(
                index=request.index, tokens=(), text=choice["text"], finish_reason=reason
            )
        return completion(
            request.index, tokens, reason, stop_ids=self._stop_ids, decode=self._decode
        )


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
        self.url = config.url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_variable is not None:
            key = os.environ.get(config.api_key_variable)
            if not key:
                raise EvaluationError(
                    f"evaluation.server.api_key_variable is {config.api_key_variable}, which the "
                    "environment does not hold; set it, or leave the field out"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def model_card(self, name: str | None) -> Mapping[str, Any]:
        """What the server says of the model `name`, or of the only one it serves."""
        try:
            served = {card["id"]: card for card in self._open("/v1/models", "data")}
        except _Passing as error:
            raise EvaluationError(
                f"{self.url}: no answer ({error}); start the server and wait until it is ready, "
                "or set evaluation.server.url"
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
        card: Mapping[str, Any] = served[next(iter(served)) if name is None else name]
        return card

    def version(self) -> str:
        """vLLM's version; of other servers, that they tell none."""
        try:
            return str(self._open("/version", "version"))
        except (_Passing, EvaluationError):
            return "unknown"

    def complete(self, body: Mapping[str, Any], over: threading.Event) -> Any:
        """The choice that answers `body`, tried again while it may help and `over` is not set."""
        for delay in (*_DELAYS, None):
            try:
                return self._open("/v1/completions", "choices", json.dumps(body).encode())[0]
            except _Passing as error:
                reason = error
            # not all threads at the same moment
            if delay is None or over.wait(delay * random.uniform(0.5, 1.5)):
                break
        raise EvaluationError(
            f"{self.url}: {len(_DELAYS) + 1} tries failed ({reason}); see the server's log and run "
            "the command again, which goes on where this one stopped"
        )

    def _open(self, path: str, member: str, body: bytes | None = None) -> Any:
        """One try; what the answer's JSON holds under `member`."""
        seconds = _GREETING_SECONDS if body is None else _ANSWER_SECONDS
        try:
            request = urllib.request.Request(self.url + path, body, self._headers)
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                return json.load(answer)[member]
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:_BODY_CHARACTERS]
            if error.code >= 500 or error.code == 429:
                raise _Passing(f"HTTP {error.code}: {said}") from None
            raise EvaluationError(f"{self.url + path}: HTTP {error.code}: {said}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise EvaluationError(
                f"{self.url + path}: not an answer of the OpenAI API ({error!r}); "
                "check evaluation.server.url"
            ) from None
        except (OSError, HTTPException) as error:
            raise _Passing(str(getattr(error, "reason", error)) or type(error).__name__) from None


class _Passing(Exception):
    """A failure that another try may not meet."""
