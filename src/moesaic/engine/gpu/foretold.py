"""What came of forecasts: routers that say, before attention, what they will probably ask the CPU for.

It counts and knows neither who foretells nor what the CPU does about it; see docs/architecture.md ("Read ahead").
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.handoff import ExpertServer

__all__ = ["Foretold", "ForetoldCounts", "foretold_counts"]


@dataclass(frozen=True, slots=True)
class Foretold:
    """Of a layer in a step, mean.

    Attributes:
        read: experts that the CPU read into its caches before the request.
        read_asked: share of these that the request asked for; 0 if there was none.
        sent: experts that were sent to the GPU before the request.
        sent_asked: share of these that it asked for.
    """

    read: float
    read_asked: float
    sent: float
    sent_asked: float


@dataclass(frozen=True, slots=True)
class ForetoldCounts:
    """Numbers of experts: read ahead, of these asked for, sent ahead, of these asked for."""

    read: int = 0
    read_asked: int = 0
    sent: int = 0
    sent_asked: int = 0

    def since(self, before: ForetoldCounts, num_requests: int) -> Foretold | None:
        """What came of so many requests; None if nothing was foretold."""
        read, read_asked, sent, sent_asked = (
            now - then for now, then in zip(astuple(self), astuple(before), strict=True)
        )
        if not num_requests or not read + sent:
            return None
        return Foretold(
            read / num_requests,
            read_asked / read if read else 0.0,
            sent / num_requests,
            sent_asked / sent if sent else 0.0,
        )


def foretold_counts(server: ExpertServer | None, uploads: MissUploads | None) -> ForetoldCounts:
    """Of all steps so far."""
    read = (0, 0) if server is None else (server.num_read, server.num_asked)
    sent = (0, 0) if uploads is None else (uploads.sender.num_ahead, uploads.sender.num_asked)
    return ForetoldCounts(*read, *sent)
