"""Head norms, rotary positions and the way into a pool, against the kernels of the CPU, which have their own tests."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels import ops
from moesaic.kernels.triton.rotary import RotaryTable, latent_rotate_append, norm_rotate_append

TOKENS, HEADS, KV_HEADS, BLOCK_SIZE = 4, 6, 2, 16
SLOTS = [37, -1, 15, 16]
POSITIONS = [5, 0, 9, 3]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def table_of(num_pairs):
    angles = torch.rand(10, num_pairs, device=DEVICE) * 6
    return RotaryTable(angles.cos(), angles.sin())


def step():
    return torch.tensor(POSITIONS, device=DEVICE), torch.tensor(SLOTS, device=DEVICE)


def on_cpu(x, table, **options):
    """`ops.norm_and_rotate_` of heads `[tokens, heads, dim]`; options: layout, norm, q_norm, eps."""
    rotated = x.cpu().transpose(0, 1).unsqueeze(0).contiguous()
    cos, sin = (angles.cpu()[POSITIONS].unsqueeze(0) for angles in (table.cos, table.sin))
    ops.norm_and_rotate_(rotated, None, cos, sin, **options)
    return rotated[0].transpose(0, 1).to(DEVICE)


def close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * max(1.0, expected.abs().max())


def check(head_dim, value_dim, num_pairs, layout="half", norm="none", dtype=torch.float32):
    q, k, v = random(TOKENS, HEADS, head_dim), random(TOKENS, KV_HEADS, head_dim), random(TOKENS, KV_HEADS, value_dim)
    table, (positions, slots) = table_of(num_pairs), step()
    weights = {}
    if norm != "none":
        over_all = norm == "all_heads"
        weights = {"q_norm": random(HEADS * head_dim if over_all else head_dim), "eps": 1e-3}
        weights["k_norm"] = random(KV_HEADS * head_dim if over_all else head_dim)
    keys = torch.full((3, BLOCK_SIZE, KV_HEADS, head_dim), 7.0, dtype=dtype, device=DEVICE)
    values = torch.full((3, BLOCK_SIZE, KV_HEADS, value_dim), 7.0, dtype=dtype, device=DEVICE)
    before = q.clone(), k.clone()
    options = {"layout": layout, "norm": norm}
    actual = norm_rotate_append(q, k, v, table, positions, keys, values, slots, **options, **weights)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in weights.items()}
    k_weight = cpu.pop("k_norm", None)
    close(actual, on_cpu(q, table, **options, **cpu))
    expected_keys = on_cpu(k, table, **options, **{**cpu, **({} if k_weight is None else {"q_norm": k_weight})})
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    used = [slot for slot in SLOTS if slot >= 0]
    kept = [token for token, slot in enumerate(SLOTS) if slot >= 0]
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    close(flat_keys[used], expected_keys[kept], tolerance)
    close(flat_values[used], v[kept], tolerance)
    others = [slot for slot in range(3 * BLOCK_SIZE) if slot not in used]
    assert (flat_keys[others] == 7).all() and (flat_values[others] == 7).all()


@pytest.mark.parametrize("layout", ops.ROPE_LAYOUTS)
@pytest.mark.parametrize("norm", ops.HEAD_NORMS)
def test_every_layout_with_every_norm(layout, norm):
    check(32, 32, 16, layout, norm)


@pytest.mark.parametrize(("head_dim", "value_dim", "num_pairs"), [(64, 48, 16), (96, 96, 48), (40, 40, 3), (32, 64, 0)])
@pytest.mark.parametrize("layout", ["half", "interleaved_to_half"])
def test_partial_rotation_and_odd_dimensions(head_dim, value_dim, num_pairs, layout):
    check(head_dim, value_dim, num_pairs, layout, "per_head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pools_of_half_precision(dtype):
    check(32, 32, 16, dtype=dtype)


def test_a_norm_over_more_heads_than_are_summed_at_once():
    q, k, v = random(TOKENS, 19, 16), random(TOKENS, 1, 16), random(TOKENS, 1, 16)
    pool, weight = torch.empty(3, BLOCK_SIZE, 1, 16, device=DEVICE), random(19 * 16)
    options = {"norm": "all_heads", "q_norm": weight, "eps": 1e-6}
    table, (positions, slots) = table_of(8), step()
    actual = norm_rotate_append(q, k, v, table, positions, pool, pool.clone(), slots, k_norm=random(16), **options)
    close(actual, on_cpu(q, table, **{**options, "q_norm": weight.cpu()}))


def test_views_of_one_projection():
    fused = random(TOKENS, (HEADS + 2 * KV_HEADS) * 32).view(TOKENS, -1, 32)
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], 1)
    keys, values = (torch.zeros(3, BLOCK_SIZE, KV_HEADS, 32, device=DEVICE) for _ in range(2))
    table, (positions, slots) = table_of(16), step()
    out = torch.empty(TOKENS, HEADS, 40, device=DEVICE)[..., :32]
    assert norm_rotate_append(q, k, v, table, positions, keys, values, slots, out=out) is out
    close(out, on_cpu(q, table))
    close(keys.flatten(0, 1)[37], on_cpu(k, table)[0])
    close(values.flatten(0, 1)[37], v[0])


@pytest.mark.parametrize("layout", ops.ROPE_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [3, 20])
def test_latents(layout, dtype, heads):
    latent_dim, rope_dim = 48, 16
    compressed, query = random(TOKENS, latent_dim + rope_dim), random(TOKENS, heads, 24 + rope_dim)
    weight, table, (positions, slots) = random(latent_dim), table_of(rope_dim // 2), step()
    cache = torch.full((3, BLOCK_SIZE, latent_dim + rope_dim), 7.0, dtype=dtype, device=DEVICE)
    q_rope = query[..., 24:]
    actual = latent_rotate_append(compressed, q_rope, table, positions, cache, slots, weight, 1e-3, layout=layout)
    assert actual.is_contiguous()
    close(actual, on_cpu(q_rope, table, layout=layout))
    latent = compressed[:, :latent_dim].double()
    latent = latent / (latent.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    key = on_cpu(compressed[:, None, latent_dim:], table, layout=layout)[:, 0]
    expected = torch.cat([latent, key.double()], -1)
    flat = cache.flatten(0, 1)
    used = [slot for slot in SLOTS if slot >= 0]
    kept = [token for token, slot in enumerate(SLOTS) if slot >= 0]
    close(flat[used], expected[kept], 2e-6 if dtype == torch.float32 else 8e-3)
    assert (flat[[slot for slot in range(3 * BLOCK_SIZE) if slot not in used]] == 7).all()


def test_no_tokens():
    table, nothing = table_of(8), torch.empty(0, dtype=torch.int64, device=DEVICE)
    pool, cache = torch.empty(1, 4, 1, 16, device=DEVICE), torch.empty(1, 4, 24, device=DEVICE)
    x = torch.empty(0, 1, 16, device=DEVICE)
    assert norm_rotate_append(x, x, x, table, nothing, pool, pool, nothing).shape == (0, 1, 16)
    weight = random(8)
    rows = torch.empty(0, 24, device=DEVICE)
    assert latent_rotate_append(rows, x, table, nothing, cache, nothing, weight, 1e-6).shape == (0, 1, 16)


def test_wrong_arguments_are_refused():
    x, pool, table = random(2, 1, 16), torch.empty(1, 4, 1, 16, device=DEVICE), table_of(8)
    index, weight = torch.zeros(2, dtype=torch.int64, device=DEVICE), random(16)

    def call(q=x, k=x, v=x, table=table, positions=index, keys=pool, values=pool, slots=index, **options):
        return norm_rotate_append(q, k, v, table, positions, keys, values, slots, **options)

    bad = [
        ("q is", lambda: call(q=x.double())),
        ("k has shape", lambda: call(k=x[..., :8])),
        ("v has shape", lambda: call(v=x[:1])),
        ("keys has shape", lambda: call(keys=pool[..., :8])),
        ("a pool is", lambda: call(values=pool.half())),
        ("positions is", lambda: call(positions=index.int())),
        ("slot_mapping is", lambda: call(slots=index[:1])),
        ("9 rotary pairs", lambda: call(table=table_of(9))),
        ("layout is", lambda: call(layout="quarter")),
        ("norm is", lambda: call(norm="layer")),
        ("q_norm is missing", lambda: call(norm="per_head")),
        ("k_norm is float32", lambda: call(norm="per_head", q_norm=weight, k_norm=weight[:8])),
        ("cos is", lambda: RotaryTable(weight, weight)),
        ("sin is", lambda: RotaryTable(table.cos, table.sin[:2])),
    ]
    cache, rows = torch.empty(1, 4, 24, device=DEVICE), random(2, 24)

    def latents(rows=rows, table=table, cache=cache, weight=random(8)):  # noqa: B008
        return latent_rotate_append(rows, x, table, index, cache, index, weight, 1e-6)

    bad += [
        ("compressed is", lambda: latents(rows=rows[:1])),
        ("cache has shape", lambda: latents(cache=cache[..., :20])),
        ("norm_weight is", lambda: latents(weight=weight)),
        ("7 rotary pairs for 16", lambda: latents(table=table_of(7))),
    ]
    for message, attempt in bad:
        with pytest.raises(KernelError, match=message):
            attempt()
