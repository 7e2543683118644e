// Scale-and-offset search: x ~ scale * q + offset with q in 0..max_q.
//
// Two stages, both weighted least squares in the spirit of Max (1960) and Lloyd (1982): `fit_affine` finds the
// real-valued pair of every sub-block by trying several ranges and then alternating "assign levels" and "solve for the
// pair"; `AffineSuperBlock` rounds the pairs of a super-block to small integers times two float16 factors and improves
// integers and factors in turn. No step is kept unless the error falls.
#pragma once

#include "quantize/half.h"
#include "quantize/lanes.h"

namespace moesaic::quantize {

template <int L>
struct AffineFit {
    float scale[L];  // >= 0
    float offset[L];
    float error[L];  // sum of w * (scale * q + offset - x)^2 at the best levels
};

// Sums that determine the best pair for one assignment of levels.
template <int L>
struct AffineSums {
    float w[L], wx[L], wxx[L];  // do not depend on the levels
    float wq[L], wqq[L], wxq[L];
};

template <int N, int L>
void accumulate_levels(const Group<N, L>& g, const float (&inverse)[L], const float (&start)[L], float max_q,
                       AffineSums<L>& s) {
    for (int l = 0; l < L; ++l) s.wq[l] = s.wqq[l] = s.wxq[l] = 0.0F;
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < L; ++l) {
            const float q = round_small(clamp((g.x[i][l] - start[l]) * inverse[l], 0.0F, max_q));
            const float wq = g.w[i][l] * q;
            s.wq[l] += wq;
            s.wqq[l] += wq * q;
            s.wxq[l] += wq * g.x[i][l];
        }
    }
}

// The pair with the least error for the levels in `s`. With `offset_at_most_zero` the offset is held at 0 if it would
// be positive.
template <int L>
void solve_affine(const AffineSums<L>& s, bool offset_at_most_zero, AffineFit<L>& fit) {
    constexpr float kSingular = 2e-6F;  // below this share the levels are all equal up to rounding
    for (int l = 0; l < L; ++l) {
        const float det = s.w[l] * s.wqq[l] - s.wq[l] * s.wq[l];
        const bool regular = det > kSingular * s.w[l] * s.wqq[l];
        float scale = regular ? (s.w[l] * s.wxq[l] - s.wx[l] * s.wq[l]) / (regular ? det : 1.0F) : 0.0F;
        float offset = (s.wx[l] - scale * s.wq[l]) / s.w[l];
        const bool held = offset_at_most_zero && offset > 0.0F;
        const float scale_through_zero = s.wqq[l] > 0.0F ? s.wxq[l] / s.wqq[l] : 0.0F;
        scale = held ? scale_through_zero : scale;
        scale = scale > 0.0F ? scale : 0.0F;
        offset = held ? 0.0F : offset;
        fit.scale[l] = scale;
        fit.offset[l] = offset;
        // ||x - fit||^2 = ||x||^2 - <x, fit> at a least-squares solution.
        fit.error[l] = s.wxx[l] - scale * s.wxq[l] - offset * s.wx[l];
    }
}

template <int L>
void keep_better(const AffineFit<L>& candidate, AffineFit<L>& best) {
    for (int l = 0; l < L; ++l) {
        const bool better = candidate.error[l] < best.error[l];
        best.scale[l] = better ? candidate.scale[l] : best.scale[l];
        best.offset[l] = better ? candidate.offset[l] : best.offset[l];
        best.error[l] = better ? candidate.error[l] : best.error[l];
    }
}

struct AffineSearch {
    float max_q;               // highest level
    bool offset_at_most_zero;  // K-formats store -offset as an unsigned integer
    float first, step;         // candidates take the range as (max_q + first + k * step) levels wide
    int num_steps;
    int num_refinements;
};

template <int N, int L>
AffineFit<L> fit_affine(const Group<N, L>& g, const AffineSearch& search) {
    AffineSums<L> s{};
    float low[L], range[L];
    for (int l = 0; l < L; ++l) {
        low[l] = search.offset_at_most_zero ? (g.x[0][l] < 0.0F ? g.x[0][l] : 0.0F) : g.x[0][l];
        range[l] = g.x[0][l];  // the maximum, for now
    }
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < L; ++l) {
            const float x = g.x[i][l];
            low[l] = x < low[l] ? x : low[l];
            range[l] = x > range[l] ? x : range[l];
            s.w[l] += g.w[i][l];
            s.wx[l] += g.w[i][l] * x;
            s.wxx[l] += g.w[i][l] * x * x;
        }
    }
    AffineFit<L> best{}, candidate{};
    for (int l = 0; l < L; ++l) {
        range[l] -= low[l];
        best.error[l] = INFINITY;
    }
    float inverse[L], start[L];
    for (int k = 0; k < search.num_steps; ++k) {
        const float levels = search.max_q + search.first + search.step * static_cast<float>(k);
        for (int l = 0; l < L; ++l) inverse[l] = range[l] > kSmallestRange ? levels / range[l] : 0.0F;
        accumulate_levels(g, inverse, low, search.max_q, s);
        solve_affine(s, search.offset_at_most_zero, candidate);
        keep_better(candidate, best);
    }
    for (int k = 0; k < search.num_refinements; ++k) {
        for (int l = 0; l < L; ++l) {
            inverse[l] = reciprocal(best.scale[l]);
            start[l] = best.offset[l];
        }
        accumulate_levels(g, inverse, start, search.max_q, s);
        solve_affine(s, search.offset_at_most_zero, candidate);
        keep_better(candidate, best);
    }
    return best;
}

// L sub-blocks whose scales and minima are small integers times two float16 factors:
// x[i][l] ~ d * scale[l] * q[i][l] - dmin * min[l].
template <int N, int L>
struct AffineSuperBlock {
    float d, dmin;           // exactly representable in float16
    float scale[L], min[L];  // integers in 0..max_scale
    float error;

    void round_factors(float d_wanted, float dmin_wanted) {
        d = round_to_half(d_wanted);
        dmin = round_to_half(dmin_wanted > 0.0F ? dmin_wanted : 0.0F);
    }

    // q of every weight for the current factors and integers, into `q`.
    void assign(const Group<N, L>& g, float max_q, float (&q)[N][L]) const {
        float inverse[L], minimum[L];
        for (int l = 0; l < L; ++l) {
            inverse[l] = reciprocal(d * scale[l]);
            minimum[l] = dmin * min[l];
        }
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < L; ++l)
                q[i][l] = round_small(clamp((g.x[i][l] + minimum[l]) * inverse[l], 0.0F, max_q));
        }
    }

    // Each lane takes the best of the 3 x 3 integer pairs around its present one.
    void improve_integers(const Group<N, L>& g, float max_q, float max_scale) {
        float best_scale[L]{}, best_min[L]{}, best_error[L]{};
        for (int l = 0; l < L; ++l) best_error[l] = INFINITY;
        for (int candidate = 0; candidate < 9; ++candidate) {
            float s[L], m[L], error[L];
            const auto ds = static_cast<float>(candidate % 3 - 1);
            const auto dm = static_cast<float>(candidate / 3 - 1);
            for (int l = 0; l < L; ++l) {
                s[l] = clamp(scale[l] + ds, 0.0F, max_scale);
                m[l] = clamp(min[l] + dm, 0.0F, max_scale);
            }
            lane_errors(g, max_q, s, m, error);
            for (int l = 0; l < L; ++l) {
                const bool better = error[l] < best_error[l];
                best_error[l] = better ? error[l] : best_error[l];
                best_scale[l] = better ? s[l] : best_scale[l];
                best_min[l] = better ? m[l] : best_min[l];
            }
        }
        for (int l = 0; l < L; ++l) {
            scale[l] = best_scale[l];
            min[l] = best_min[l];
        }
        error = sum(best_error);
    }

    // The two factors with the least error for the present integers and levels.
    void improve_factors(const Group<N, L>& g, float max_q) {
        float q[N][L];
        assign(g, max_q, q);
        float a[L]{}, b[L]{}, c[L]{}, p[L]{}, r[L]{};
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < L; ++l) {
                const float u = scale[l] * q[i][l];
                const float wu = g.w[i][l] * u;
                const float wm = g.w[i][l] * min[l];
                a[l] += wu * u;
                b[l] += wu * min[l];
                c[l] += wm * min[l];
                p[l] += wu * g.x[i][l];
                r[l] += wm * g.x[i][l];
            }
        }
        const double sa = sum(a), sb = sum(b), sc = sum(c), sp = sum(p), sr = sum(r);
        const double det = sa * sc - sb * sb;
        if (det > 1e-6 * sa * sc) {
            round_factors(static_cast<float>((sc * sp - sb * sr) / det), static_cast<float>((sb * sp - sa * sr) / det));
        } else if (sa > 0.0) {
            round_factors(static_cast<float>((sp + sb * dmin) / sa), dmin);
        }
    }

  private:
    void lane_errors(const Group<N, L>& g, float max_q, const float (&s)[L], const float (&m)[L],
                     float (&error)[L]) const {
        float step[L], inverse[L], minimum[L];
        for (int l = 0; l < L; ++l) {
            step[l] = d * s[l];
            inverse[l] = reciprocal(step[l]);
            minimum[l] = dmin * m[l];
            error[l] = 0.0F;
        }
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < L; ++l) {
                const float shifted = g.x[i][l] + minimum[l];
                const float q = round_small(clamp(shifted * inverse[l], 0.0F, max_q));
                const float e = step[l] * q - shifted;
                error[l] += g.w[i][l] * e * e;
            }
        }
    }
};

template <int N, int L>
AffineSuperBlock<N, L> fit_affine_super_block(const Group<N, L>& g, const AffineSearch& search, float max_scale,
                                              int num_rounds) {
    const AffineFit<L> fit = fit_affine(g, search);
    float largest_scale = 0.0F, largest_min = 0.0F;
    for (int l = 0; l < L; ++l) {
        largest_scale = fit.scale[l] > largest_scale ? fit.scale[l] : largest_scale;
        largest_min = -fit.offset[l] > largest_min ? -fit.offset[l] : largest_min;
    }
    AffineSuperBlock<N, L> block{};
    block.round_factors(largest_scale / max_scale, largest_min / max_scale);
    for (int l = 0; l < L; ++l) {
        block.scale[l] = block.d > 0.0F ? round_small(clamp(fit.scale[l] / block.d, 0.0F, max_scale)) : 0.0F;
        block.min[l] = block.dmin > 0.0F ? round_small(clamp(-fit.offset[l] / block.dmin, 0.0F, max_scale)) : 0.0F;
    }
    block.improve_integers(g, search.max_q, max_scale);
    AffineSuperBlock<N, L> best = block;
    for (int round = 0; round < num_rounds; ++round) {
        block.improve_factors(g, search.max_q);
        block.improve_integers(g, search.max_q, max_scale);
        if (!(block.error < best.error)) break;
        best = block;
    }
    return best;
}

}  // namespace moesaic::quantize
