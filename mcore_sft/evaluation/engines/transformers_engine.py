"""The engine that needs nothing but this environment: transformers, a batch at a time.

    ids of each prompt  ->  batches of like length, left-padded  ->  tokens  ->  text, finish reason

B = rows of a batch, T = prompt length, S = tokens seen so far, V = vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines.engine import (
    Completion,
    Decode,
    Engine,
    Request,
    check_weights,
    completion,
)
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.runtime.device import device, torch_dtype

# Rows that are done are taken out of the cache once they are this share of a batch: copying the
# cache costs about as much as some ten steps of the rows that leave.
_SHARE_DONE = 0.25
_REASON_CHARACTERS = 500


class TransformersEngine(Engine):
    """A Hugging Face folder that answers prompts, several side by side."""

    def __init__(
        self, folder: Path, config: EvaluationConfig, *, stop_ids: Collection[int], decode: Decode
    ) -> None:
        super().__init__(folder, config, stop_ids=stop_ids, decode=decode)
        check_weights(folder)
        self._device = device()
        self._model = _load(folder, config).to(self._device).eval()
        self._shape = self._model.config.to_dict()  # with what config.json leaves unsaid
        self._stop = torch.tensor(sorted(stop_ids), device=self._device)

    def close(self) -> None:
        """Free the model's memory."""
        del self._model

    def describe(self) -> dict[str, str]:
        """What answers: torch, transformers and the device."""
        packages = {name: version(name) for name in ("torch", "transformers")}
        return {"engine": "transformers", **packages, "device": str(self._device)}

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Answer all `requests`, batch by batch; prompts of like length share a batch."""
        self.check(requests)
        ordered = sorted(requests, key=lambda request: (len(request.prompt_ids), request.index))
        size = self._config.batch_size
        # the longest first: what does not fit into memory shows at once
        starts = reversed(range(0, len(ordered), size))
        for start in starts:
            yield self._batch(ordered[start : start + size])

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        rows = _Rows(requests, self._device)
        written: list[list[int]] = [[] for _ in requests]
        limit = self._config.max_new_tokens
        logits_BV = self._forward(rows.tokens_BT, rows)
        for step in range(limit):
            tokens_B = rows.choose(logits_BV)
            for row, token in zip(rows.alive, tokens_B.tolist(), strict=True):
                if not rows.finished[row]:
                    written[row].append(token)
            rows.finish(torch.isin(tokens_B, self._stop))
            if all(rows.finished) or step == limit - 1:
                break
            tokens_B = tokens_B[rows.drop_finished()]
            logits_BV = self._forward(tokens_B[:, None], rows)
        return [
            completion(
                request.index,
                tokens,
                "stop" if done else "length",
                stop_ids=self._stop_ids,
                decode=self._decode,
            )
            for request, tokens, done in zip(requests, written, rows.finished, strict=True)
        ]

    def _forward(self, tokens_BT: torch.Tensor, rows: "_Rows") -> torch.Tensor:
        """Logits [B, V] of what follows the last of `tokens_BT`."""
        out = self._model(
            input_ids=tokens_BT,
            attention_mask=rows.grow(tokens_BT.shape[1]),
            position_ids=rows.positions(tokens_BT.shape[1]),
            past_key_values=rows.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits


class _Rows:
    """The rows of a batch that are still in the cache."""

    def __init__(self, requests: Sequence[Request], where: torch.device) -> None:
        from transformers import DynamicCache

        longest = max(len(request.prompt_ids) for request in requests)
        pads = [longest - len(request.prompt_ids) for request in requests]
        self.tokens_BT = torch.tensor(
            [[0] * pad + list(r.prompt_ids) for pad, r in zip(pads, requests, strict=True)],
            device=where,
        )
        self._pads_B1 = torch.tensor(pads, device=where)[:, None]
        self._seen = 0
        self.cache: Any = DynamicCache()
        self.alive = list(range(len(requests)))
        self.finished = [False] * len(requests)
        self._requests = requests
        self._chance = [torch.Generator().manual_seed(request.seed) for request in requests]

    def grow(self, new: int) -> torch.Tensor:
        """Attention mask [B, S] after `new` more tokens: padding on the left is never seen."""
        self._seen += new
        steps_S = torch.arange(self._seen, device=self._pads_B1.device)
        return (steps_S[None] >= self._pads_B1).long()

    def positions(self, new: int) -> torch.Tensor:
        """Positions [B, new] of the newest tokens, which begin at 0 after the padding."""
        steps = torch.arange(self._seen - new, self._seen, device=self._pads_B1.device)
        return (steps[None] - self._pads_B1).clamp_min(0)

    def choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next token [B] of each row: the likeliest, or one drawn from its nucleus."""
        tokens_B = logits_BV.argmax(-1)
        drawn = [place for place, row in enumerate(self.alive) if self._requests[row].temperature]
        if drawn:
            rows = [self.alive[place] for place in drawn]
            places = torch.tensor(drawn, device=logits_BV.device)
            tokens_B[places] = _sample(
                logits_BV[places] / self._column([self._requests[row].temperature for row in rows]),
                self._column([self._requests[row].top_p for row in rows]),
                self._column([torch.rand((), generator=self._chance[r]).item() for r in rows]),
            )
        return tokens_B

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self._pads_B1.device)[:, None]

    def finish(self, stopped_B: torch.Tensor) -> None:
        """Note which rows have said their stop token."""
        for row, stopped in zip(self.alive, stopped_B.tolist(), strict=True):
            self.finished[row] |= stopped

    def drop_finished(self) -> torch.Tensor:
        """Take finished rows out where they are many; positions [B'] of the rows that stay."""
        stay = [place for place, row in enumerate(self.alive) if not self.finished[row]]
        if len(self.alive) - len(stay) < _SHARE_DONE * len(self.alive):
            stay = list(range(len(self.alive)))
        chosen = torch.tensor(stay, device=self._pads_B1.device)
        if len(stay) < len(self.alive):
            self.alive = [self.alive[place] for place in stay]
            self._pads_B1 = self._pads_B1[chosen]
            self.cache.batch_select_indices(chosen)
        return chosen


def _sample(
    logits_BV: torch.Tensor, top_p_B1: torch.Tensor, draws_B1: torch.Tensor
) -> torch.Tensor:
    """Tokens [B]: the nucleus' cumulated probabilities inverted at `draws_B1` in [0, 1)."""
    probs_BV, order_BV = logits_BV.softmax(-1).sort(stable=True, dim=-1, descending=True)
    cumulated_BV = probs_BV.cumsum(-1)
    outside_BV = cumulated_BV - probs_BV >= top_p_B1
    mass_B1 = probs_BV.masked_fill(outside_BV, 0).sum(-1, keepdim=True)
    kept_B1 = (~outside_BV).sum(-1, keepdim=True)
    place_B1 = torch.searchsorted(cumulated_BV, draws_B1 * mass_B1, right=True)
    chosen_B1: torch.Tensor = order_BV.gather(-1, torch.minimum(place_B1, kept_B1 - 1))
    return chosen_B1[:, 0]


def _load(folder: Path, config: EvaluationConfig) -> Any:
    import transformers

    hugging_face: Any = transformers
    hugging_face.logging.set_verbosity_error()
    hugging_face.logging.disable_progress_bar()
    try:
        model, found = hugging_face.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype(config.precision),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are said below, each by its name
        )
    except Exception as error:  # what a damaged folder raises has no class in common
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EvaluationError(
            f"{folder}: transformers cannot load this model ({reason[:_REASON_CHARACTERS]}); "
            "mend its config.json, or export the model again"
        ) from None
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        raise EvaluationError(
            f"{folder}: {len(missing)} tensors are missing, {missing[0]} first; export it again"
        )
    differing = sorted(found.get("mismatched_keys", ()))
    if differing:
        name, stored, expected = differing[0]
        raise EvaluationError(
            f"{folder}: {len(differing)} tensors have another shape than config.json says, {name} "
            f"first: {list(stored)}, expected {list(expected)}; mend it, or export the model again"
        )
    return model
