"""Which experts get a place in VRAM."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.engine.gpu.promotion import Move, PromotionPolicy


def use(policy: PromotionPolicy, *experts: int, times: int = 1) -> None:
    """A token of a model with one layer that chooses these experts."""
    uses = np.zeros(policy.slot_of.shape, np.int64)
    for expert in experts:
        uses[0, expert] = 1
    for _ in range(times):
        policy.record(uses, 1)


def carry_out(policy: PromotionPolicy) -> list[Move]:
    moves = policy.moves()
    for move in moves:
        policy.complete(move)
    return moves


def test_the_busiest_experts_get_the_places() -> None:
    policy = PromotionPolicy(1, 8, num_slots=2, share=1.0)
    use(policy, 3, 5, times=20)
    use(policy, 1, 3, times=5)
    carry_out(policy)
    assert {expert for expert in range(8) if policy.slot_of[0, expert] >= 0} == {3, 5}


def test_an_expert_is_not_there_before_its_copy_is() -> None:
    policy = PromotionPolicy(1, 4, num_slots=1, share=1.0)
    use(policy, 2, times=3)
    (move,) = policy.moves()
    assert (move.layer, move.expert, move.evicted) == (0, 2, None)
    assert (policy.slot_of == -1).all()
    assert policy.moves() == []  # it is on its way, and not copied twice
    policy.complete(move)
    assert policy.slot_of[0, 2] == move.slot


def test_who_leaves_is_out_at_once() -> None:
    policy = PromotionPolicy(1, 4, num_slots=1, share=1.0)
    use(policy, 2, times=3)
    carry_out(policy)
    use(policy, 1, times=200)
    (move,) = policy.moves()
    assert move.evicted == (0, 2) and policy.slot_of[0, 2] == -1 and policy.slot_of[0, 1] == -1


def test_equals_do_not_take_turns() -> None:
    policy = PromotionPolicy(1, 4, num_slots=2, share=1.0)
    moves = []
    for _ in range(200):
        use(policy, 0, 1)
        use(policy, 2, 3)
        moves += carry_out(policy)
    assert len(moves) <= 4


def test_old_uses_are_forgotten() -> None:
    policy = PromotionPolicy(1, 4, num_slots=1, share=1.0, half_life=16)
    use(policy, 0, times=1000)
    carry_out(policy)
    use(policy, 1, times=64)
    assert [move.expert for move in carry_out(policy)] == [1]


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_copies_take_no_more_than_their_share(share: float) -> None:
    random = np.random.default_rng(0)
    policy = PromotionPolicy(4, 64, num_slots=32, share=share, advantage=0.0)
    read = copied = 0
    for _ in range(300):
        uses = np.zeros((4, 64), np.int64)
        for layer in range(4):
            uses[layer, random.choice(64, 8, replace=False)] = 1
        read += int(uses[policy.slot_of < 0].sum())
        policy.record(uses, 1)
        copied += len(carry_out(policy))
        assert copied <= share * read + 1
    assert copied > 0.5 * share * read or copied >= 32


def test_copies_that_cost_nothing_need_no_budget() -> None:
    policy = PromotionPolicy(1, 8, num_slots=4, share=0.0)
    use(policy, 1, 3, 5, times=9)
    assert policy.moves() == [] and policy.moves(most=2) == []
    assert [move.expert for move in policy.moves(most=2, is_free=True)] == [1, 3]
    assert [move.expert for move in policy.moves(is_free=True)] == [5]
    assert policy.moves(is_free=True) == []
    policy = PromotionPolicy(1, 8, num_slots=4, share=0.5)
    use(policy, 1, 3)  # a copy may be made
    assert len(policy.moves(most=1, is_free=True)) == 1
    assert len(policy.moves()) == 1  # it was not paid with the budget


def test_hit_rates_are_counted_by_layer() -> None:
    policy = PromotionPolicy(2, 4, num_slots=1, share=1.0)
    uses = np.zeros((2, 4), np.int64)
    uses[0, 0] = uses[1, 1] = 1
    for _ in range(10):
        policy.record(uses, 1)
        carry_out(policy)
    assert policy.hit_rates().tolist() == [0.9, 0.0]


def test_slots_of_copies_under_way_are_left_alone() -> None:
    policy = PromotionPolicy(1, 4, num_slots=1, share=1.0)
    use(policy, 2, times=3)
    (move,) = policy.moves()
    use(policy, 1, times=100)
    assert policy.moves(busy={move.slot}) == []


def test_free_slots_are_filled_evenly_and_given_up_to_whoever_is_used() -> None:
    policy = PromotionPolicy(3, 4, num_slots=6, share=1.0)
    use(policy, 2, times=3)
    assert policy.num_taken == 0
    carry_out(policy)
    assert policy.num_taken == 1
    moves = policy.fill([4, 4, 2])
    assert [(move.layer, move.expert) for move in moves] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert len({move.slot for move in moves} | {int(policy.slot_of[0, 2])}) == 6
    assert policy.num_taken == 6 and (policy.slot_of >= 0).sum() == 1
    for move in moves:
        policy.complete(move)
    assert (policy.slot_of >= 0).sum(axis=1).tolist() == [3, 2, 1]
    assert policy.fill([4, 4, 2]) == []
    use(policy, 3)  # once is enough, as for a free slot
    (move,) = policy.moves()
    assert move.expert == 3 and move.evicted is not None and policy.score[move.evicted] == 0.0


def test_there_may_be_more_slots_than_experts() -> None:
    assert len(PromotionPolicy(2, 4, num_slots=9).fill([4, 3])) == 7


def test_with_fewer_slots_the_busiest_stay() -> None:
    policy = PromotionPolicy(2, 4, num_slots=6, share=1.0)
    for move in policy.fill([4, 4]):
        policy.complete(move)
    assert policy.slot_of.tolist() == [[0, 2, 4, -1], [1, 3, 5, -1]]
    policy.seed(np.array([[5, 1, 9, 0], [4, 0, 2, 7]]), 1)
    copies = policy.resize(3)
    assert copies == [(4, 2)]  # (0, 2) takes the place of (0, 1); (1, 2) is worth less than what stays
    assert policy.slot_of.tolist() == [[0, -1, 2, -1], [1, -1, -1, -1]]
    assert policy.num_slots == 3
    assert policy.resize(5) == []
    moves = policy.fill([4, 4])
    assert [(move.slot, move.layer, move.expert) for move in moves] == [(3, 1, 3), (4, 1, 2)]
    assert policy.resize(1) == [(2, 0)] and policy.num_slots == 1  # those on their way are not moved
    assert policy.slot_of.tolist() == [[-1, -1, 0, -1], [-1] * 4]


def test_slots_of_copies_under_way_are_not_given_to_those_that_move() -> None:
    policy = PromotionPolicy(1, 6, num_slots=4, share=1.0)
    for move in policy.fill([6]):
        policy.complete(move)
    use(policy, 5, times=30)
    (move,) = policy.moves()
    assert move.slot == 0
    policy.seed(np.array([[0, 1, 1, 50, 0, 60]]), 1)
    assert policy.resize(2) == [(3, 1)]
    policy.complete(move)
    assert policy.slot_of.tolist() == [[-1, -1, -1, 1, -1, 0]]
