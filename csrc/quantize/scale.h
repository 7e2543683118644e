// Scale search without offset: x ~ scale * q with q on a grid of levels. The scale may be negative, so that the level
// that has no counterpart of the other sign can serve a large weight of either sign. Stages as in affine.h.
#pragma once

#include "quantize/grid.h"
#include "quantize/half.h"
#include "quantize/lanes.h"

namespace moesaic::quantize {

template <int L>
struct ScaleFit {
    float scale[L];
    float gain[L];  // <x, q>^2 / <q, q>, weighted: how much of ||x||^2 the best scale explains
};

template <class Grid>
struct ScaleSearch {
    Grid grid;
    float first, step;  // candidates put the largest weight at (grid.largest() + first + k * step)
    int num_steps;
    int num_refinements;
};

template <int N, int L, class Grid>
void try_inverse(const Group<N, L>& g, const Grid& grid, const float (&inverse)[L], ScaleFit<L>& best) {
    float qq[L]{}, xq[L]{};
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < L; ++l) {
            const float q = grid.nearest(g.x[i][l] * inverse[l]);
            const float wq = g.w[i][l] * q;
            qq[l] += wq * q;
            xq[l] += wq * g.x[i][l];
        }
    }
    for (int l = 0; l < L; ++l) {
        const float denominator = qq[l] > 0.0F ? qq[l] : 1.0F;
        const float gain = xq[l] * xq[l] / denominator;
        const bool better = gain > best.gain[l];
        best.gain[l] = better ? gain : best.gain[l];
        best.scale[l] = better ? xq[l] / denominator : best.scale[l];
    }
}

template <int N, int L, class Grid>
ScaleFit<L> fit_scale(const Group<N, L>& g, const ScaleSearch<Grid>& search) {
    float extreme[L]{};  // the weight of largest magnitude, with its sign
    for (int i = 0; i < N; ++i) {
        for (int l = 0; l < L; ++l) extreme[l] = std::fabs(g.x[i][l]) > std::fabs(extreme[l]) ? g.x[i][l] : extreme[l];
    }
    ScaleFit<L> best{};
    float inverse[L];
    for (int sign = -1; sign <= 1; sign += 2) {
        for (int k = 0; k < search.num_steps; ++k) {
            const float top = search.grid.largest() + search.first + search.step * static_cast<float>(k);
            for (int l = 0; l < L; ++l) {
                inverse[l] = static_cast<float>(sign) * top * reciprocal(extreme[l]);
            }
            try_inverse(g, search.grid, inverse, best);
        }
    }
    for (int k = 0; k < search.num_refinements; ++k) {
        for (int l = 0; l < L; ++l) {
            inverse[l] = reciprocal(best.scale[l]);
        }
        try_inverse(g, search.grid, inverse, best);
    }
    return best;
}

// L sub-blocks whose scales are small signed integers times one float16 factor: x[i][l] ~ d * scale[l] * q[i][l].
template <int N, int L, class Grid>
struct ScaledSuperBlock {
    Grid grid;
    float d;         // exactly representable in float16
    float scale[L];  // integers in -max_scale..max_scale-1

    void assign(const Group<N, L>& g, float (&q)[N][L]) const {
        float inverse[L];
        for (int l = 0; l < L; ++l) {
            inverse[l] = reciprocal(d * scale[l]);
        }
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < L; ++l) q[i][l] = grid.nearest(g.x[i][l] * inverse[l]);
        }
    }

    // Each lane takes the best of its present integer and the two next to it.
    void improve_integers(const Group<N, L>& g, float max_scale) {
        float best_scale[L]{}, best_error[L]{};
        for (int l = 0; l < L; ++l) best_error[l] = INFINITY;
        for (int delta = -1; delta <= 1; ++delta) {
            float s[L], e[L];
            for (int l = 0; l < L; ++l)
                s[l] = clamp(scale[l] + static_cast<float>(delta), -max_scale, max_scale - 1.0F);
            lane_errors(g, s, e);
            for (int l = 0; l < L; ++l) {
                const bool better = e[l] < best_error[l];
                best_error[l] = better ? e[l] : best_error[l];
                best_scale[l] = better ? s[l] : best_scale[l];
            }
        }
        for (int l = 0; l < L; ++l) scale[l] = best_scale[l];
    }

  private:
    void lane_errors(const Group<N, L>& g, const float (&s)[L], float (&error)[L]) const {
        float step[L], inverse[L];
        for (int l = 0; l < L; ++l) {
            step[l] = d * s[l];
            inverse[l] = reciprocal(step[l]);
            error[l] = 0.0F;
        }
        for (int i = 0; i < N; ++i) {
            for (int l = 0; l < L; ++l) {
                const float q = grid.nearest(g.x[i][l] * inverse[l]);
                const float e = step[l] * q - g.x[i][l];
                error[l] += g.w[i][l] * e * e;
            }
        }
    }
};

template <int N, int L, class Grid>
ScaledSuperBlock<N, L, Grid> fit_scaled_super_block(const Group<N, L>& g, const ScaleSearch<Grid>& search,
                                                    float max_scale) {
    const ScaleFit<L> fit = fit_scale(g, search);
    float extreme = 0.0F;
    for (int l = 0; l < L; ++l) extreme = std::fabs(fit.scale[l]) > std::fabs(extreme) ? fit.scale[l] : extreme;
    ScaledSuperBlock<N, L, Grid> block{};
    block.grid = search.grid;
    block.d = round_to_half(extreme / -max_scale);
    for (int l = 0; l < L; ++l) {
        block.scale[l] =
            block.d != 0.0F ? round_small(clamp(fit.scale[l] / block.d, -max_scale, max_scale - 1.0F)) : 0.0F;
    }
    block.improve_integers(g, max_scale);
    return block;
}

}  // namespace moesaic::quantize
