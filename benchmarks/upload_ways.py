"""Decode steps with uploads as they choose and without, on one runner: what `paired_turns` switches between.

Uploads learn from their own steps only, as if no others were between them.
"""

from __future__ import annotations

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.upload_shares import numbers_of
from moesaic.engine.gpu.uploads import MissUploads
from timed_decode import DecodeWays, TimedDecode

__all__ = ["UploadWays"]


class UploadWays(DecodeWays):
    """Steps as the uploads choose, and steps without them: `Ways`.

    Args:
        runner: of a loaded model.
        uploads: of the runner.
        batch: sequences of a step.

    Attributes:
        decode: makes the steps.
        shares: the usual one after each turn's steps, in eighths.
    """

    def __init__(self, runner: ModelRunner, uploads: MissUploads, batch: int) -> None:
        super().__init__(TimedDecode(runner, batch))
        self._uploads, self._batch = uploads, batch
        self._none = [0] * (uploads.landing.max_distinct + 1)
        self.shares = list[int]()
        uploads.fixed = self._none
        runner.steps.bucket(batch)  # all graphs, so that none is captured in a step that is timed

    def switch(self, is_with: bool) -> None:
        """As `Ways`; the step after it has the usual share, and is no part of any trial."""
        landing, share = self._uploads.landing, self._uploads.shares.usual(self._batch)
        if not is_with:
            self.shares.append(share)
        usual = numbers_of(share, landing.max_distinct, landing.num_slots)
        self._uploads.fixed = usual if is_with else self._none
        self.decode.step()
        self._uploads.fixed = None if is_with else self._none
