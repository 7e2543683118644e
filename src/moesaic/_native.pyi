"""
Kernels of Moesaic: pointers and shapes in, numbers out. Knows neither PyTorch nor files.
"""

from collections.abc import Sequence
import enum

def isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""

def left_out_isas() -> list[str]:
    """
    Those that it could run, too, but that this build leaves out, best first.
    """

def active_isa() -> str:
    """The instruction set that kernels run with."""

def set_isa(name: str) -> None:
    """Force an instruction set; ValueError if it cannot run here."""

def cpu_features() -> dict:
    """Processor features that kernels may use, and whether they are present."""

def num_threads() -> int:
    """Threads of the pool."""

def set_num_threads(num_threads: int) -> None:
    """Replace the pool of threads."""

def set_independent_rows(on: bool) -> bool:
    """
    Whether products that this thread asks for give a token the same whatever the number of tokens; returns what it was.
    """

def set_pinning(pin: bool) -> None:
    """Whether threads are confined to a core each."""

def numa_nodes() -> list:
    """
    Memory nodes that threads and experts are divided over: (the system's number, CPUs); number -1: pretended.
    """

def set_num_nodes(count: int) -> None:
    """
    Pretend that the cores belong to so many nodes; 0: the nodes of the system.
    """

def place_memory(ptr: int, num_bytes: int, node: int) -> None:
    """
    Let untouched memory lie on a node of numa_nodes(), by its position there; -1: spread over all.
    """

def num_usable_cores() -> int:
    """Physical cores that this process may use."""

def native_seconds() -> float:
    """
    Seconds that calls of this module have spent computing since it was loaded.
    """

def formats() -> list:
    """
    The weight formats, as dicts of the fields of moesaic.quant.WeightFormat.
    """

def packed_nbytes(format: int, rows: int, cols: int) -> int:
    """Bytes of a packed matrix: rows are padded to a multiple of 16."""

def pack(format: int, rows: int, cols: int, src_ptr: int, src_stride: int, dst_ptr: int, source: int) -> None:
    """
    Rows of blocks of the format `source`, src_stride bytes apart, into a packed matrix. The source is the format itself, or the one that it recodes.
    """

def unpack(format: int, rows: int, cols: int, src_ptr: int, dst_ptr: int) -> None:
    """The inverse of pack, bit by bit."""

def dequantize(format: int, rows: int, cols: int, src_ptr: int, dst_ptr: int) -> None:
    """Contiguous rows of blocks (not packed) to float32 [rows, cols]."""

def grid_places(format: int) -> list[int]:
    """
    By number in packed matrices, the place of an entry of the codebook in the published grid; empty if the same.
    """

def gather_rows(format: int, rows: int, cols: int, packed_ptr: int, ids_ptr: int, num_ids: int, dst_ptr: int) -> None:
    """
    Rows of a packed matrix as float32 [num_ids, cols]; IndexError for an id outside it.
    """

def bf16_from(format: int) -> int:
    """
    From how many tokens on products with this format are computed in bfloat16 by tiles; 0: never, on the active instruction set.
    """

def linear(
    format: int,
    rows: int,
    cols: int,
    weights_ptr: int,
    first_row: int,
    num_rows: int,
    bias_ptr: int,
    out_ptr: int,
    out_stride: int,
    x_ptr: int,
    x_stride: int,
    num_tokens: int,
) -> None:
    """
    out[t] = W[first_row : first_row + num_rows] x[t] + bias; strides in floats, bias_ptr may be 0.
    """

def linear_multi(
    jobs: Sequence[tuple[int, int, int, int, int, int, int, int, int]], x_ptr: int, x_stride: int, num_tokens: int
) -> None:
    """
    linear of several matrices with the same input; a job is the first nine arguments of linear.
    """

def linear_heads(
    format: int,
    rows: int,
    cols: int,
    weights_ptr: int,
    matrix_bytes: int,
    row_step: int,
    num_heads: int,
    first_row: int,
    num_rows: int,
    x_ptr: int,
    x_token_stride: int,
    x_head_stride: int,
    out_ptr: int,
    out_token_stride: int,
    out_head_stride: int,
    num_tokens: int,
) -> None:
    """out[t, h] = W_h x[t, h]; see csrc/kernels/linear.h."""

def linear_transposed_heads(
    format: int,
    rows: int,
    cols: int,
    weights_ptr: int,
    matrix_bytes: int,
    row_step: int,
    num_heads: int,
    first_row: int,
    num_rows: int,
    x_ptr: int,
    x_token_stride: int,
    x_head_stride: int,
    out_ptr: int,
    out_token_stride: int,
    out_head_stride: int,
    num_tokens: int,
) -> None:
    """out[t, h] = x[t, h] W_h, in float32."""

class ActivationKind(enum.Enum):
    silu = 0

    gelu = 1

    gelu_tanh = 2

    relu = 3

    relu2 = 4

    swiglu_oai = 5

class Experts:
    """The projections of one layer's experts, described once."""

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        slices: Sequence[tuple[int, Sequence[tuple[int, int, int, int, int]]]],
        activation: int,
        alpha: float,
        limit: float,
    ) -> None:
        """
        slices: of the intermediate rows, one per node: their number, and (format, weights_ptr, matrix_bytes, bias_ptr, bias_stride in floats) of gate, up and down; weights_ptr 0: no gate.
        """

def moe_forward(
    experts: Experts,
    experts_ptr: int,
    weights_ptr: int,
    top_k: int,
    x_ptr: int,
    x_stride: int,
    num_tokens: int,
    out_ptr: int,
) -> None:
    """
    out[t] = sum over k of weights[t, k] * expert experts[t, k] of x[t]; ids outside the experts count as none.
    """

def writable_formats() -> list[int]:
    """ggml numbers of the formats that `quantize` writes."""

def largest_magnitude(format: int) -> float:
    """The largest magnitude of a weight that the format can hold."""

def quantize(
    format: int, rows: int, cols: int, row_bytes: int, src_ptr: int, dst_ptr: int, importance_ptr: int = 0
) -> int:
    """
    Quantise float32 [rows, cols] into blocks [rows, row_bytes]; importance is float32 [cols] or 0. Returns -1, or the first row with a weight that is not finite or too large (dst is then incomplete).
    """

def rms_norm(
    x_ptr: int,
    x_stride: int,
    weight_ptr: int,
    weight_offset: float,
    eps: float,
    out_ptr: int,
    out_stride: int,
    residual_ptr: int,
    residual_stride: int,
    residual_scale: float,
    num_rows: int,
    width: int,
) -> None:
    """
    out = rms_norm(x) * (weight + weight_offset); with a residual: residual += residual_scale * x comes first and is what is normalised. float32.
    """

def layer_norm(
    x_ptr: int,
    x_stride: int,
    weight_ptr: int,
    bias_ptr: int,
    eps: float,
    out_ptr: int,
    out_stride: int,
    num_rows: int,
    width: int,
) -> None:
    """
    out = layer_norm(x) * weight + bias; weight and bias may be 0 (absent). float32.
    """

def norm_and_rotate(
    q_ptr: int,
    q_strides: tuple,
    num_heads: int,
    k_ptr: int,
    k_strides: tuple,
    num_kv_heads: int,
    batch: int,
    num_tokens: int,
    head_dim: int,
    cos_ptr: int,
    sin_ptr: int,
    angle_strides: tuple,
    num_pairs: int,
    layout: int,
    norm: int,
    q_weight_ptr: int,
    k_weight_ptr: int,
    eps: float,
    weight_offset: float,
) -> None:
    """
    Normalise and rotate the heads of q and k [batch, heads, tokens, head_dim] in place. float32.
    """

class RopeLayout(enum.IntEnum):
    HALF = 0

    INTERLEAVED = 1

    INTERLEAVED_TO_HALF = 2

class HeadNorm(enum.IntEnum):
    NONE = 0

    PER_HEAD = 1

    PER_HEAD_AFTER_ROPE = 2

    ALL_HEADS = 3

MAX_ROTARY_PAIRS: int = 512

def attention(
    q_ptr: int,
    q_strides: tuple,
    k_ptr: int,
    k_strides: tuple,
    v_ptr: int,
    v_strides: tuple,
    cache_type: int,
    out_ptr: int,
    out_strides: tuple,
    batch: int,
    num_kv_heads: int,
    group: int,
    num_queries: int,
    num_keys: int,
    key_dim: int,
    value_dim: int,
    scale: float,
    softcap: float,
    causal: bool,
    causal_offset: int,
    causal_offset_ptr: int,
    sliding_window: int,
    sinks_ptr: int,
    mask_type: int,
    mask_ptr: int,
    mask_strides: tuple,
) -> None:
    """
    softmax(scale q k^T + mask) v over [batch, heads, tokens, dim]; group = heads / num_kv_heads.
    """

class CacheType(enum.IntEnum):
    F32 = 0

    BF16 = 1

    F16 = 2

class MaskType(enum.IntEnum):
    NONE = 0

    BOOL = 1

    ADDITIVE = 2

def mla_attention(
    q_latent_ptr: int,
    q_latent_strides: tuple,
    q_rope_ptr: int,
    q_rope_strides: tuple,
    latent_ptr: int,
    latent_strides: tuple,
    rope_ptr: int,
    rope_strides: tuple,
    cache_type: int,
    out_ptr: int,
    out_strides: tuple,
    batch: int,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    latent_dim: int,
    rope_dim: int,
    scale: float,
    softcap: float,
    causal: bool,
    causal_offset: int,
    causal_offset_ptr: int,
    sliding_window: int,
    sinks_ptr: int,
    mask_type: int,
    mask_ptr: int,
    mask_strides: tuple,
) -> None:
    """
    Absorbed multi-head latent attention: keys are (latent, rope), values are latent, one cache for all heads.
    """

def route(
    logits_ptr: int,
    logits_stride: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    score: int,
    bias_ptr: int,
    group_score: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    sum_offset: float,
    sum_minimum: float,
    scale: float,
    indices_ptr: int,
    weights_ptr: int,
) -> None:
    """Experts and weights of each token from its router logits."""

class RouteScore(enum.IntEnum):
    SOFTMAX = 0

    SIGMOID = 1

    SOFTMAX_OF_CHOSEN = 2

class GroupScore(enum.IntEnum):
    NONE = 0

    SUM_OF_TWO = 1

    MAXIMUM = 2

MAX_ROUTE_EXPERTS: int = 4096

def row_op(
    op: int,
    x_ptr: int,
    x_stride: int,
    y_ptr: int,
    y_stride: int,
    out_ptr: int,
    out_stride: int,
    gate_ptr: int,
    scale: float,
    num_rows: int,
    width: int,
) -> None:
    """One elementwise operation over rows of float32; see RowOp."""

def argmax(x_ptr: int, stride: int, num_rows: int, width: int, indices_ptr: int) -> None:
    """Index of the largest value of each row."""

class RowOp(enum.IntEnum):
    SILU_MUL = 0

    GELU_MUL = 1

    GELU_TANH_MUL = 2

    SIGMOID_MUL = 3

    ADD_SCALED = 4

    ADD_GATED = 5

def read_bandwidth(num_bytes: int, seconds: float) -> tuple[float, float]:
    """Best and median GB/s at which all threads read memory of their own."""

def peak_ops(kind: int, seconds: float) -> tuple[float, float]:
    """
    Best and median 10^9 operations per second of all threads, from registers.
    """

class PeakKind(enum.IntEnum):
    MULTIPLY_ADD_F32 = 0

    DOT_I8 = 1

    TILE_BF16 = 2

class AttentionBlock:
    """Norm, projections, rotary embedding, attention and residual."""

    def __init__(
        self,
        norm: tuple[int, float],
        q: tuple[int, int, int, int, int],
        k: tuple[int, int, int, int, int],
        v: tuple[int, int, int, int, int],
        o: tuple[int, int, int, int, int],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        head_norm: int,
        q_norm: tuple[int, float],
        k_norm: tuple[int, float],
        rope_layout: int,
        num_pairs: int,
        scale: float,
        sinks_ptr: int,
        residual_scale: float,
    ) -> None: ...
    def __call__(
        self,
        x_ptr: int,
        batch: int,
        num_tokens: int,
        cos_ptr: int,
        sin_ptr: int,
        angle_strides: tuple,
        cache: tuple[int, tuple, int, tuple],
        cache_type: int,
        num_past: int,
        mask_type: int,
        mask_ptr: int,
        mask_strides: tuple,
        out_ptr: int,
    ) -> None:
        """
        out = x + residual_scale * attention of x; appends to the cache (keys_ptr, key_strides, values_ptr, value_strides) behind its num_past tokens.
        """

class LatentAttentionBlock:
    """Multi-head latent attention, absorbed."""

    def __init__(
        self,
        norm: tuple[int, float],
        q_a: tuple[int, int, int, int, int],
        q_a_norm: tuple[int, float],
        q_b: tuple[int, int, int, int, int],
        kv_a: tuple[int, int, int, int, int],
        kv_a_norm: tuple[int, float],
        o: tuple[int, int, int, int, int],
        k_b: tuple[int, int, int, int, int, int, int, int],
        k_b_transposed: bool,
        v_b: tuple[int, int, int, int, int, int, int, int],
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        value_dim: int,
        rope_layout: int,
        scale: float,
        residual_scale: float,
    ) -> None: ...
    def __call__(
        self,
        x_ptr: int,
        batch: int,
        num_tokens: int,
        cos_ptr: int,
        sin_ptr: int,
        angle_strides: tuple,
        cache: tuple[int, tuple, int, tuple],
        cache_type: int,
        num_past: int,
        mask_type: int,
        mask_ptr: int,
        mask_strides: tuple,
        out_ptr: int,
    ) -> None:
        """
        out = x + residual_scale * attention of x; appends to the cache (keys_ptr, key_strides, values_ptr, value_strides) behind its num_past tokens.
        """

class FeedForwardBlock:
    """Norm, router, experts, shared experts and residual."""

    def __init__(
        self,
        norm: tuple[int, float],
        router: tuple[int, int, int, int, int],
        top_k: int,
        score: int,
        bias_ptr: int,
        group_score: int,
        num_groups: int,
        topk_groups: int,
        normalize: bool,
        sum_offset: float,
        sum_minimum: float,
        scale: float,
        experts: Experts,
        shared: Experts | None,
        shared_gate: tuple[int, int, int, int, int],
        residual_scale: float,
    ) -> None: ...
    def __call__(self, x_ptr: int, num_tokens: int) -> None:
        """x += residual_scale * feed-forward of x, in place."""

class DecoderStack:
    """Decoder layers one after the other."""

    def __init__(self, blocks: Sequence[tuple[object, FeedForwardBlock]]) -> None:
        """
        blocks: (attention, feed_forward) of each layer, which the caller keeps alive.
        """

    def __call__(
        self,
        x_ptr: int,
        batch: int,
        num_tokens: int,
        cos_ptr: int,
        sin_ptr: int,
        angle_strides: tuple,
        caches: Sequence[tuple[int, tuple, int, tuple]],
        cache_type: int,
        num_past: int,
        mask_type: int,
        mask_ptr: int,
        mask_strides: tuple,
        even_out_ptr: int,
        odd_out_ptr: int,
    ) -> None:
        """
        All layers; x stays as it is. Layers with even numbers write to even_out, so the result is in even_out if their number is odd.
        """

ATTENTION_KEY_BLOCK: int = 64

def paged_attention(
    first: tuple[int, tuple, int, tuple, int],
    second: tuple[int, tuple, int, tuple, int],
    v_ptr: int,
    v_strides: tuple,
    value_dim: int,
    cache_type: int,
    out_ptr: int,
    out_strides: tuple,
    num_tokens: int,
    num_kv_heads: int,
    group: int,
    tables_ptr: int,
    table_width: int,
    lengths_ptr: int,
    starts_ptr: int,
    num_sequences: int,
    block_size: int,
    num_blocks: int,
    scale: float,
    softcap: float,
    sliding_window: int,
    sinks_ptr: int,
) -> None:
    """
    Causal attention of the last tokens of sequences over blocks of a pool. first, second: (q_ptr, q_strides, k_ptr, k_strides, dim) of the score's terms, dim 0: absent; strides of (unused or block, head, token).
    """

class PagedStack:
    """Decoder layers on a cache in pages."""

    def __init__(
        self,
        stack: DecoderStack,
        caches: Sequence[tuple[int, tuple, int, tuple, int]],
        cache_type: int,
        block_size: int,
        num_blocks: int,
    ) -> None:
        """
        caches: (keys_ptr, strides, values_ptr, strides, window) of each layer, strides of block, head and position; window 0: none.
        """

    def __call__(
        self,
        x_ptr: int,
        num_tokens: int,
        first: int,
        count: int,
        cos_ptr: int,
        sin_ptr: int,
        num_pairs: int,
        slots_ptr: int,
        tables_ptr: int,
        table_width: int,
        lengths_ptr: int,
        starts_ptr: int,
        num_sequences: int,
    ) -> None:
        """
        Layers first to first + count - 1 on x [num_tokens, hidden], in place. ValueError if starts, lengths, tables or slots do not go together, or lead out of the pool.
        """

    def finish(
        self,
        x_ptr: int,
        num_tokens: int,
        cos_ptr: int,
        sin_ptr: int,
        num_pairs: int,
        slots_ptr: int,
        tables_ptr: int,
        table_width: int,
        lengths_ptr: int,
        starts_ptr: int,
        num_sequences: int,
        out_ptr: int,
    ) -> None:
        """
        The last layer for the last token of each sequence, into out [num_sequences, hidden]; the others leave keys and values. ValueError as for the call, or if a sequence has no token.
        """

class PagedModel:
    """Decode steps of a whole model on a cache in pages."""

    def __init__(
        self,
        stack: PagedStack,
        embedding: tuple[int, int, int, int, int],
        embedding_scale: float,
        norm: tuple[int, float],
        head: tuple[int, int, int, int, int],
        logit_scale: float,
        cos_ptr: int,
        sin_ptr: int,
        num_positions: int,
        num_pairs: int,
    ) -> None:
        """norm: (weight_ptr, eps); cos and sin: [num_positions, num_pairs]."""

    def decode(
        self,
        ids_ptr: int,
        positions_ptr: int,
        slots_ptr: int,
        tables_ptr: int,
        table_width: int,
        lengths_ptr: int,
        count: int,
        logits_ptr: int,
        independent: bool,
    ) -> None:
        """
        logits [count, vocabulary] of one new token of each sequence. ValueError if tokens and tables do not go together or lead out of the pool, IndexError for an id outside the embedding.
        """

MAX_DELTA_KEY_DIM: int = 256

MAX_DELTA_TAPS: int = 16

def delta_net(
    x_ptr: int,
    x_stride: int,
    columns: tuple[int, int, int, int],
    sizes: tuple[int, int, int, int, int],
    weights: tuple[int, int, int, int, float],
    states: tuple[int, int, int],
    step: tuple[int, int, int, int, int],
    mixed_ptr: int,
    gates_ptr: int,
    out_ptr: int,
) -> None:
    """
    Gated delta rule between a layer's projections and its output matrix. columns: (conv, gate, beta, decay); sizes: (key heads, heads, key_dim, value_dim, taps); weights: (conv, rate, step_bias, norm, eps); states: (conv, recurrent, slots); step: (tokens, sequences, starts, slots, positions). ValueError if starts or slots do not go together.
    """

GAVE_UP: int = 9223372036854775807

def copy_now_ptr() -> int:
    """
    Address of a copy_ptr (see ExpertUploads) for memory of the CPU: a copy is done when it is asked for.
    """

class CopyRefused(Exception):
    pass

class ExpertUploads:
    """Brings routed experts to a device; see csrc/uploads.h."""

    def __init__(
        self,
        copy_ptr: int,
        queue: int,
        arena: int,
        slots: int,
        arrived: int,
        slot_bytes: int,
        num_slots: int,
        max_tokens: int,
        top_k: int,
        layers: Sequence[tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]],
        records_ptr: int,
        record_bytes: int,
    ) -> None:
        """
        copy_ptr: int (uint64 to, const void* from, size_t num_bytes, void* queue), 0 if it took note of the copy. arena, slots, arrived: addresses of the device. layers: (address, bytes of a matrix, offset in a slot) of gate, up and down of each; records_ptr: record_bytes for each layer: int64, and int32 [max_tokens, top_k].
        """

    def set_numbers(self, numbers: Sequence[int]) -> None:
        """
        How many experts are brought if 0, 1, ... distinct ones are to be computed.
        """

    def bring(self, layer: int, experts: Sequence[int]) -> None:
        """Put experts of a layer into the queue, into the first slots."""

    @property
    def num_missing(self) -> int: ...
    @property
    def num_brought(self) -> int: ...
    @property
    def num_ahead(self) -> int: ...
    @property
    def num_asked(self) -> int: ...

class ExpertServer:
    """Answers a GPU's requests for routed experts; see csrc/handoff.h."""

    def __init__(
        self,
        requested_ptr: int,
        answered_ptr: int,
        hidden_ptr: int,
        chosen_ptr: int,
        experts_ptr: int,
        weights_ptr: int,
        output_ptr: int,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
        layers: Sequence[tuple[Experts, int]],
    ) -> None:
        """
        layers: (experts, uses_ptr) of each; uses_ptr is uint32 [num_experts] to count in, or 0.
        """

    def serve(
        self,
        first_layer: int,
        num_layers: int,
        first_request: int,
        num_tokens: int,
        timeout_seconds: float,
        times_ptr: int = 0,
        uploads: ExpertUploads | None = None,
    ) -> int:
        """
        Answer one request for each of these layers; how many came in time. times_ptr: int64 [num_layers, 3], nanoseconds of the monotonic clock when a request was seen, answered, and all of it computed; or 0. uploads: what brings some of the experts to the device, of the same layers; or None.
        """

    def defer(self, count: int) -> None:
        """
        From the next step on, the `count` experts of each token with the lowest weights come with the next layer's answer, but for the last layer's.
        """

    def set_forecast(self, foretold_ptr: int, experts_ptr: int) -> None:
        """
        Where requests are foretold: int64, the number of one, and int64 [max_tokens, top_k]; 0: nowhere.
        """

    @property
    def num_read(self) -> int: ...
    @property
    def num_asked(self) -> int: ...
    def forget(self) -> None:
        """What the last layer that was served has put off will not be wanted."""
