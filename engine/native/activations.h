/* The functions that bend numbers: of gated MLPs, and of the caps on scores and logits. */

#ifndef CASTOR_ACTIVATIONS_H
#define CASTOR_ACTIVATIONS_H

#include "vectors.h"

/* What a gated MLP does with its gate, as `decoder.py` numbers it. */
enum { UNGATED, SILU, GELU_TANH, CLAMPED_SILU };

/* CLAMPED_SILU (gpt-oss) keeps gate and up within a limit, and its sigmoid is steeper. Gates and ups are in turn where
 * they are `alternating`, else all ups follow all gates. */
typedef struct {
    int32_t activation, alternating;
    float steepness, limit;
} Gate;

/* tanh(x) as in Cephes (S. Moshier): a polynomial near zero, where 1 - 2 / (exp(2x) + 1) would lose digits. */
INLINE Floats hyperbolic_tangent(Floats x) {
    Floats size = choose(x < 0, -x, x), square = x * x;
    Floats far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    Floats p = all(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    return choose(size < 0.625f, p * square * x + x, choose(x < 0, -far, far));
}

/* Keep numbers within a cap: softly, so that their order stays. */
INLINE Floats softcapped(Floats x, float cap) { return cap * hyperbolic_tangent(x / cap); }

/* x times the sigmoid of s: with s = x it is silu. */
INLINE Floats times_sigmoid(Floats x, Floats s) { return x / (1.0f + exponential(-s)); }

/* GELU's approximation by tanh(u) is x times the sigmoid of 2u, with u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE Floats gated(const Gate *how, Floats gate, Floats up) {
    if (how->activation == CLAMPED_SILU) {
        Floats most = all(how->limit);
        gate = choose(gate > most, most, gate);
        up = choose(up > most, most, choose(up < -most, -most, up));
        return times_sigmoid(gate, how->steepness * gate) * (up + 1.0f);
    }
    if (how->activation == SILU) return times_sigmoid(gate, gate) * up;
    return times_sigmoid(gate, 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate)) * up;
}

#endif
