"""Whose turn it is: who decodes, which prompts are filled in, and who has to give blocks back.

A task is the tokens of one answer, its prompt's first. What is computed of it is the length of its sequence, so there
is one rule for all: a task with one token to compute decodes, one with more is filled in, and a task that lost its
blocks or whose step failed simply has more to compute. It knows neither models nor text, and measures nothing itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moesaic.engine.serving.pace import Pace
from moesaic.engine.serving.runner import PrefillWork, StepRunner
from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.prefix_cache import PrefixCache

__all__ = ["Filling", "Scheduler", "Step", "Task"]


@dataclass(slots=True, eq=False)
class Task:
    """One answer on its way.

    Attributes:
        ids: tokens of the prompt and of the answer so far.
        sequence: what is computed of them; None while it waits.
        cached: tokens that were found in the prefix cache when it first began.
        preemptions: how often it had to give its blocks back.
        followers: answers to the same prompt, which wait until it is filled in.
        prompt_length: how many of the tokens are its prompt's.
    """

    ids: list[int]
    sequence: PagedSequence | None = None
    cached: int | None = None
    preemptions: int = 0
    followers: list[Task] = field(default_factory=list)
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are there."""
        return 0 if self.sequence is None else self.sequence.length

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one is known."""
        return len(self.ids) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether one token more is all it needs."""
        return self.missing == 1 and self.computed > 0


@dataclass(slots=True, eq=False)
class Filling:
    """Pieces of prompts that go through the layers together.

    Attributes:
        parts: tasks, each with its number of new tokens.
        work: set by who starts it.
    """

    parts: list[tuple[Task, int]]
    work: PrefillWork | None = None

    @property
    def num_tokens(self) -> int:
        """Of all its pieces."""
        return sum(count for _, count in self.parts)

    def __contains__(self, task: Task) -> bool:
        return any(part is task for part, _ in self.parts)


@dataclass(slots=True)
class Step:
    """What to do next.

    Attributes:
        decode: these tasks get one token each.
        chunk: and these pieces of prompts,
        num_layers: go through so many layers.
        refused: tasks that do not fit although nothing else runs; they are over.
    """

    decode: list[Task]
    chunk: Filling | None = None
    num_layers: int = 0
    refused: list[Task] = field(default_factory=list)


class Scheduler:
    """Shares a runner among tasks; first come, first served.

    Args:
        runner: whose blocks are shared out.
        max_running: most tasks at once; no more than decode in a step.
        pace: how large a piece of a prompt may be.
        cache: contents that are kept, or None.

    Attributes:
        max_running: as given, or fewer.
        waiting: tasks without blocks, in the order in which they will get some.
        running: tasks with blocks, in the order in which they got them.
        preemptions: so far.
    """

    def __init__(self, runner: StepRunner, max_running: int, pace: Pace, cache: PrefixCache | None = None) -> None:
        self._runner, self._pool, self._pace, self._cache = runner, runner.pool, pace, cache
        states = max_running if runner.states is None else runner.states.num_slots
        self.max_running = min(max_running, runner.max_batch, states)
        self._chunk: Filling | None = None
        self._may_fit = True  # the first who waits; no need to look again before somebody has given something back
        self._num_following = 0
        self.waiting: deque[Task] = deque()
        self.running: list[Task] = []
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Tasks without blocks; may be read from any thread."""
        return len(self.waiting) + self._num_following

    def add(self, tasks: Sequence[Task]) -> None:
        """Answers to one prompt: the first is filled in, then the others begin with its blocks if they can."""
        self._may_fit = True
        if self._cache is None:
            self.waiting.extend(tasks)
        else:
            tasks[0].followers = list(tasks[1:])
            self._num_following += len(tasks) - 1
            self.waiting.append(tasks[0])

    def next(self) -> Step:
        """Decide; what the step needs is free afterwards."""
        decode = self._ready()
        while not self._make_room(growth := sum(self._growth(task, 1) for task in decode)):
            self._preempt(self.running[-1])
            decode = self._ready()
        step = Step(decode)
        if self._chunk is None and (self._pace.knows_decoding or not decode):
            self._chunk = self._next_chunk(growth, step)
        if self._chunk is not None:
            step.chunk = self._chunk
            step.num_layers = self._pace.layers(self._chunk.num_tokens, bool(decode))
        return step

    def filled(self) -> None:
        """The chunk is through all layers."""
        assert self._chunk is not None
        parts, self._chunk, self._may_fit = self._chunk.parts, None, True
        for task, _ in parts:
            if task.missing == 0:
                self._keep(task)
                self._release_followers(task)

    def remove(self, task: Task) -> None:
        """The task has ended, or nobody wants it any more; what it holds is free, or kept for its contents."""
        if self._chunk is not None and task in self._chunk:
            self.drop_chunk()
        if task in self.running:
            self.running.remove(task)
        elif task in self.waiting:
            self.waiting.remove(task)
        self._free(task)
        if task.followers:  # it was never filled in: the next one goes ahead
            ahead, *ahead.followers = task.followers
            self._num_following -= 1
            self.waiting.appendleft(ahead)

    def drop_chunk(self) -> None:
        """What the chunk has computed is lost; its tasks will be filled in again."""
        chunk, self._chunk = self._chunk, None
        if chunk is not None and chunk.work is not None:
            chunk.work.abandon()

    def _ready(self) -> list[Task]:
        """Who can decode."""
        chunk = self._chunk
        return [task for task in self.running if task.decodes and (chunk is None or task not in chunk)]

    def _next_chunk(self, reserved: int, step: Step) -> Filling | None:
        """Go on with prompts that have begun, and begin new ones while there is room beside the reserved blocks."""
        self._admit(reserved, step)
        unfilled = [task for task in self.running if not task.decodes]
        if not unfilled:
            return None
        if self._runner.states is not None:
            unfilled = _mixable(unfilled)
        parts: list[tuple[Task, int]] = []
        counts = _share([task.missing for task in unfilled], self._pace.chunk(bool(step.decode)))
        for task, count in zip(unfilled, counts, strict=True):
            reserved += self._growth(task, count)
            if not self._make_room(reserved):
                break
            if count:
                parts.append((task, count))
        if parts:
            return Filling(parts)
        if step.decode:  # those who decode will end some time
            return None
        self._preempt(self.running[-1])
        return self._next_chunk(0, step)

    def _admit(self, reserved: int, step: Step) -> None:
        """Begin with those who wait, as long as all that has begun could be filled in."""
        reserved += sum(self._growth(task, task.missing) for task in self.running if not task.decodes)
        while self.waiting and self._may_fit and len(self.running) < self.max_running:
            needed = self._begin(self.waiting[0], reserved)
            if needed is not None:
                reserved += needed
                self.running.append(task := self.waiting.popleft())
                if task.decodes:  # all but its last token was in the cache
                    self._release_followers(task)
            elif self.running:
                self._may_fit = False
            else:
                step.refused.append(self.waiting.popleft())

    def _begin(self, task: Task, reserved: int) -> int | None:
        """Give a task a sequence, with what the cache has of it.

        Returns:
            Blocks that it will need for all its tokens and the next one; None if they are not there, beside the
            reserved ones.
        """
        found = [] if self._cache is None else self._cache.match(task.ids[: self._shared(task)])
        needed = self._pool.blocks_for(len(task.ids) + 1) - len(found)
        if not self._make_room(reserved + needed):
            self._pool.give_back(found)
            return None
        task.sequence = self._runner.new_sequence()
        task.sequence.prompt_length = task.prompt_length
        if found:
            task.sequence.adopt(found)
        if task.cached is None:
            task.cached = task.computed
        return needed

    def _make_room(self, count: int) -> bool:
        """Whether so many blocks are free, perhaps after forgetting contents that nobody uses.

        They are forgotten rather than that the pool grows at others' cost.
        """
        pool, cache = self._pool, self._cache
        short = count - pool.num_free_backed
        if short > 0 and cache is not None and cache.num_idle >= count - pool.num_free:
            cache.evict(short)
        return pool.num_free >= count

    def _growth(self, task: Task, num_tokens: int) -> int:
        """Blocks that a task needs for so many more tokens."""
        return self._pool.blocks_for(task.computed + num_tokens) - self._pool.blocks_for(task.computed)

    def _preempt(self, task: Task) -> None:
        """Take a task's blocks; it is the next to get some."""
        if self._chunk is not None and task in self._chunk:
            self.drop_chunk()
        self.running.remove(task)
        self._free(task)
        task.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(task)

    def _keep(self, task: Task) -> None:
        if self._cache is not None and task.sequence is not None:
            self._cache.insert(task.ids[: min(task.computed, self._shared(task))], task.sequence.blocks)

    def _shared(self, task: Task) -> int:
        """How many of a task's first positions are the same in all tasks that begin like it."""
        most = self._runner.shared_positions
        if most is None:
            return len(task.ids)
        return most if task.prompt_length <= most else 0

    def _free(self, task: Task) -> None:
        self._may_fit = True
        if task.sequence is not None:
            self._keep(task)
            self._runner.forget(task.sequence)
            task.sequence = None

    def _release_followers(self, task: Task) -> None:
        """The answers to the same prompt begin with its blocks."""
        self.waiting.extendleft(reversed(task.followers))
        self._num_following -= len(task.followers)
        task.followers = []


def _share(missing: list[int], size: int) -> list[int]:
    """How many tokens of a chunk each gets: who came first at least half, then the shortest.

    So a long prompt does not keep short ones from their answers.
    """
    if not missing:
        return []
    first = min(missing[0], max(size - size // 2, size - sum(missing[1:])))
    counts, left = [first] + [0] * (len(missing) - 1), size - first
    for index in sorted(range(1, len(missing)), key=missing.__getitem__):
        counts[index] = min(missing[index], left)
        left -= counts[index]
    return counts


def _mixable(unfilled: list[Task]) -> list[Task]:
    """Of tasks with recurrent states, those that may share a chunk: if it is dropped, nobody loses more than that."""
    if unfilled and unfilled[0].computed:
        return unfilled[:1]
    return [task for task in unfilled if not task.computed]
