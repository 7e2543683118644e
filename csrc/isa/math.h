// Functions in the words of the vocabulary; included by each isa/<name>.h at its end.
#pragma once

namespace moesaic {
namespace {

// e^x with a relative error below 2e-7 for -87.3 <= x <= 88.37, constant beyond.
MOESAIC_INLINE vf exp(vf x) {
    x = min(set1(88.37f), max(set1(-87.3f), x));           // in this order NaN stays NaN
    const vi n = to_int(mul(x, set1(1.44269504088896f)));  // x = n ln 2 + r, |r| <= ln 2 / 2
    const vf nf = to_float(n);
    vf r = fma(nf, set1(-0.693359375f), x);  // ln 2 in two parts (Cody and Waite)
    r = fma(nf, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);  // minimax polynomial of (e^r - 1 - r) / r^2 (Cephes expf)
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(mul(p, r), r, r), set1(1.0f));
    return mul(p, as_float(shl(add(n, set1_i(127)), 23)));
}

MOESAIC_INLINE vf sigmoid(vf x) {
    const vf one = set1(1.0f);
    return div(one, add(one, exp(sub(set1(0.0f), x))));
}

MOESAIC_INLINE vf tanh(vf x) { return sub(mul(set1(2.0f), sigmoid(add(x, x))), set1(1.0f)); }

MOESAIC_INLINE vf silu(vf x) { return mul(x, sigmoid(x)); }

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written with the sigmoid of twice the argument
MOESAIC_INLINE vf gelu_tanh(vf x) {
    const vf inner = mul(x, fma(mul(x, x), set1(0.044715f), set1(1.0f)));
    return mul(x, sigmoid(mul(inner, set1(1.5957691216057308f))));
}

// x/2 (1 + erf(x / sqrt 2)); erfc by Abramowitz and Stegun 7.1.26, absolute error below 2e-7
MOESAIC_INLINE vf gelu_erf(vf x) {
    const vf z = mul(abs(x), set1(0.7071067811865476f));
    const vf t = div(set1(1.0f), fma(z, set1(0.3275911f), set1(1.0f)));
    vf p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const vf half_erfc = mul(mul(mul(p, t), exp(sub(set1(0.0f), mul(z, z)))), set1(0.5f));
    return mul(x, select_positive(x, sub(set1(1.0f), half_erfc), half_erfc));
}

}  // namespace
}  // namespace moesaic
