"""An answer while it is made: its tokens, the text of them, where it ends, and how long it took.

It knows neither whose turn it is nor what computes logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moesaic.engine.serving.outputs import Chunk, FinishReason, RequestStats, TokenLogprob
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.scheduler import Task
from moesaic.engine.serving.text import Detokenizer

__all__ = ["Answer"]


@dataclass(slots=True, eq=False, kw_only=True)
class Answer(Task):
    """One of the answers to a request.

    Attributes:
        request_id: of the request.
        index: which of its answers.
        params: of the request.
        sampler: chooses its tokens.
        text: makes text of them; None: there is no tokenizer.
        stop_ids: tokens that end it.
        limit: most tokens.
        added: when the request came.
        stats: what is known so far.
        failures: steps that were lost since its last token.
    """

    request_id: str
    index: int
    params: SamplingParams
    sampler: RequestSampler
    text: Detokenizer | None
    stop_ids: frozenset[int]
    limit: int
    added: float
    stats: RequestStats = field(default_factory=RequestStats)
    failures: int = 0
    _started: float | None = None
    _first: float | None = None
    _uses: tuple[int, int] = (0, 0)

    @property
    def has_begun(self) -> bool:
        """Whether its first step has."""
        return self._started is not None

    def begin(self, now: float, expert_uses: tuple[int, int]) -> None:
        """Its first step begins."""
        self._started, self._uses = now, expert_uses
        self.stats.queue_seconds = now - self.added
        self.stats.cached_tokens = self.cached or 0

    def take(self, token: int, logprob: TokenLogprob | None, now: float) -> Chunk:
        """The next token; the piece has a finish reason if it is the last.

        Raises:
            GenerationError: the grammar does not take it.
        """
        if self._first is None:
            self._first = now
        self.failures = 0
        self.sampler.accept(token)
        self.ids.append(token)
        self.stats.generated_tokens += 1
        text, reason, stop = self._judge(token)
        return Chunk(self.index, text, (token,), () if logprob is None else (logprob,), reason, stop)

    def _judge(self, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """New text, and whether and why the answer ends here."""
        text = self.text
        if token in self.stop_ids:
            return self._rest(), "stop", token if token in self.params.stop_token_ids else None
        new = "" if text is None else text.push((token,))
        if text is not None and text.stopped is not None:
            return new, "stop", text.stopped
        matcher = self.sampler.matcher
        is_finished = matcher is not None and matcher.is_finished
        if not is_finished and self.stats.generated_tokens < self.limit:
            return new, None, None
        new += self._rest()
        if text is not None and text.stopped is not None:  # it was complete, but could have been part of a longer one
            return new, "stop", text.stopped
        return new, "stop" if is_finished else "length", None

    def end(self, reason: FinishReason) -> Chunk:
        """A last piece without a token."""
        return Chunk(self.index, self._rest(), finish_reason=reason)

    def close(self, now: float, expert_uses: tuple[int, int]) -> RequestStats:
        """It has ended; its stats are complete."""
        if self._started is not None:
            first = now if self._first is None else self._first
            self.stats.prefill_seconds, self.stats.decode_seconds = first - self._started, now - first
            self.stats.expert_hits = expert_uses[0] - self._uses[0]
            self.stats.expert_lookups = expert_uses[1] - self._uses[1]
        return self.stats

    def _rest(self) -> str:
        return "" if self.text is None else self.text.finish()
