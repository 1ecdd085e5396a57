// sum_l w_l LayerNorm(H_l) on a CPU: reads each state from memory once and writes each mixed depth once.
//
// Compiled by mix_cpu.py, together with mix_amx.c, for the processor it runs on. A token's L states of C channels fit the
// second-level cache; they are normalised there, a few channels at a time, and multiplied from the first level. Sums are
// in float32, in an order that depends only on L, D and C: a token's result is the same in every batch and thread.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define WIDE 16    // floats in a vector
#define CHANNELS 64  // channels normalised at a time: L x 64 floats stay in the first-level cache
#define ROWS 12    // depths multiplied at a time: with two vectors of channels each they fill the registers
#define TOKENS 16  // tokens whose contributions to the weights' gradient are summed together

typedef float vec __attribute__((vector_size(4 * WIDE)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDE)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDE)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDE)));

static inline vec load_f32(const void *base, int64_t i) {
    vec x;
    memcpy(&x, (const float *)base + i, sizeof x);
    return x;
}

static inline vec load_bf16(const void *base, int64_t i) {
    hvec x;
    memcpy(&x, (const uint16_t *)base + i, sizeof x);
    return (vec)(__builtin_convertvector(x, uvec) << 16);
}

static inline void store_f32(void *base, int64_t i, vec x) { memcpy((float *)base + i, &x, sizeof x); }

static inline void store_bf16(void *base, int64_t i, vec x) {
    uvec u = (uvec)x;
    uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    uvec nan = (uvec)(x != x);
    hvec h = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), hvec);
    memcpy((uint16_t *)base + i, &h, sizeof h);
}

static inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < WIDE; i++) total += x[i];
    return total;
}

// Sizes of the tensors, which are contiguous; C is a multiple of WIDE.
typedef struct {
    int64_t layers, batch, length, channels, depths;
    float eps;
} shape;

#define DEFINE(TYPE)                                                                                                   \
                                                                                                                       \
    /* Mean and 1 / deviation of one state. */                                                                         \
    static inline void moments_##TYPE(const void *h, int64_t at, int64_t C, float eps, float *mean, float *rstd) {     \
        vec a = {0}, b = {0};                                                                                          \
        for (int64_t c = 0; c + WIDE < C; c += 2 * WIDE) {                                                             \
            a += load_##TYPE(h, at + c);                                                                               \
            b += load_##TYPE(h, at + c + WIDE);                                                                        \
        }                                                                                                              \
        if (C / WIDE % 2) a += load_##TYPE(h, at + C - WIDE);                                                          \
        float m = sum(a + b) / C;                                                                                      \
        a = b = (vec){0};                                                                                              \
        for (int64_t c = 0; c + WIDE < C; c += 2 * WIDE) {                                                             \
            vec x = load_##TYPE(h, at + c) - m, y = load_##TYPE(h, at + c + WIDE) - m;                                 \
            a += x * x;                                                                                                \
            b += y * y;                                                                                                \
        }                                                                                                              \
        if (C / WIDE % 2) {                                                                                            \
            vec x = load_##TYPE(h, at + C - WIDE) - m;                                                                 \
            a += x * x;                                                                                                \
        }                                                                                                              \
        *mean = m;                                                                                                     \
        *rstd = 1 / sqrtf(sum(a + b) / C + eps);                                                                       \
    }                                                                                                                  \
                                                                                                                       \
    /* n depths of two vectors of channels: out[d] = sum_l w[d][l] x[l]. n is known when this is compiled. */          \
    static inline __attribute__((always_inline)) void rows_##TYPE(const int n, const float *w, const float *x,         \
                                                                  int64_t L, void *out, int64_t at, int64_t stride,    \
                                                                  const int two) {                                     \
        vec a[ROWS], b[ROWS];                                                                                          \
        for (int d = 0; d < n; d++) a[d] = b[d] = (vec){0};                                                            \
        for (int64_t l = 0; l < L; l++) {                                                                              \
            vec p = load_f32(x, l * CHANNELS), q = load_f32(x, l * CHANNELS + WIDE);                                   \
            for (int d = 0; d < n; d++) {                                                                              \
                a[d] += w[d * L + l] * p;                                                                              \
                b[d] += w[d * L + l] * q;                                                                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int d = 0; d < n; d++) {                                                                                  \
            store_##TYPE(out, at + d * stride, a[d]);                                                                  \
            if (two) store_##TYPE(out, at + d * stride + WIDE, b[d]);                                                  \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Tokens first..last of batch x length; w has D x L weights for each sample, or for all (step 0). x has room for */ \
    /* L x CHANNELS floats. */                                                                                         \
    void mix_##TYPE(const shape *s, const void *h, const float *w, int64_t step, float *x, void *out, float *mean,     \
                    float *rstd, int64_t first, int64_t last) {                                                        \
        const int64_t L = s->layers, C = s->channels, D = s->depths, tokens = s->batch * s->length;                    \
        memset(x, 0, sizeof(float) * L * CHANNELS);                                                                    \
        for (int64_t t = first; t < last; t++) {                                                                       \
            const float *weights = w + t / s->length * step;                                                           \
            for (int64_t l = 0; l < L; l++)                                                                            \
                moments_##TYPE(h, (l * tokens + t) * C, C, s->eps, mean + l * tokens + t, rstd + l * tokens + t);      \
            for (int64_t c = 0; c < C; c += CHANNELS) {                                                                \
                const int64_t n = C - c < CHANNELS ? C - c : CHANNELS;                                                 \
                for (int64_t l = 0; l < L; l++)                                                                        \
                    for (int64_t i = 0; i < n; i += WIDE)                                                              \
                        store_f32(x, l * CHANNELS + i,                                                                 \
                                  (load_##TYPE(h, (l * tokens + t) * C + c + i) - mean[l * tokens + t]) *              \
                                      rstd[l * tokens + t]);                                                           \
                for (int64_t i = 0; i < n; i += 2 * WIDE) {                                                            \
                    const int two = n - i > WIDE;                                                                      \
                    for (int64_t d = 0; d < D;) {                                                                      \
                        const float *rows = weights + d * L;                                                           \
                        const int64_t at = (d * tokens + t) * C + c + i, stride = tokens * C;                          \
                        if (D - d >= ROWS) {                                                                           \
                            rows_##TYPE(ROWS, rows, x + i, L, out, at, stride, two);                                   \
                            d += ROWS;                                                                                 \
                        } else if (D - d >= 4) {                                                                       \
                            rows_##TYPE(4, rows, x + i, L, out, at, stride, two);                                      \
                            d += 4;                                                                                    \
                        } else {                                                                                       \
                            rows_##TYPE(1, rows, x + i, L, out, at, stride, two);                                      \
                            d += 1;                                                                                    \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* n x m sums over one chunk of channels of g[d] x[l], added to vectors in memory. */                              \
    static inline __attribute__((always_inline)) void inner_##TYPE(const int n, const int m, const float *g,           \
                                                                   const float *x, vec *total, int64_t L) {            \
        vec a[n][m];                                                                                                   \
        for (int d = 0; d < n; d++)                                                                                    \
            for (int l = 0; l < m; l++) a[d][l] = total[d * L + l];                                                    \
        for (int i = 0; i < CHANNELS; i += WIDE) {                                                                     \
            vec p[m];                                                                                                  \
            for (int l = 0; l < m; l++) p[l] = load_f32(x, l * CHANNELS + i);                                          \
            for (int d = 0; d < n; d++) {                                                                              \
                vec q = load_f32(g, d * CHANNELS + i);                                                                 \
                for (int l = 0; l < m; l++) a[d][l] += q * p[l];                                                       \
            }                                                                                                          \
        }                                                                                                              \
        for (int d = 0; d < n; d++)                                                                                    \
            for (int l = 0; l < m; l++) total[d * L + l] = a[d][l];                                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* Chunks first..last, each of TOKENS tokens of one sample: out[chunk][d][l] = sum of g . LayerNorm(H). */         \
    void mix_backward_##TYPE(const shape *s, const void *g, const void *h, const float *mean, const float *rstd,       \
                             vec *total, float *out, int64_t first, int64_t last) {                                    \
        const int64_t L = s->layers, C = s->channels, D = s->depths, tokens = s->batch * s->length;                    \
        const int64_t chunks = (s->length + TOKENS - 1) / TOKENS;                                                      \
        float x[L * CHANNELS], y[D * CHANNELS];                                                                        \
        memset(x, 0, sizeof x);                                                                                        \
        memset(y, 0, sizeof y);                                                                                        \
        for (int64_t k = first; k < last; k++) {                                                                       \
            const int64_t start = k / chunks * s->length, from = start + k % chunks * TOKENS;                          \
            const int64_t to = from + TOKENS < start + s->length ? from + TOKENS : start + s->length;                  \
            memset(total, 0, D * L * sizeof(vec));                                                                     \
            for (int64_t t = from; t < to; t++)                                                                        \
                for (int64_t c = 0; c < C; c += CHANNELS) {                                                            \
                    const int64_t n = C - c < CHANNELS ? C - c : CHANNELS;                                             \
                    for (int64_t i = n; i < CHANNELS; i += WIDE)                                                       \
                        for (int64_t l = 0; l < L; l++) store_f32(x, l * CHANNELS + i, (vec){0});                      \
                    for (int64_t l = 0; l < L; l++)                                                                    \
                        for (int64_t i = 0; i < n; i += WIDE)                                                          \
                            store_f32(x, l * CHANNELS + i,                                                             \
                                      (load_##TYPE(h, (l * tokens + t) * C + c + i) - mean[l * tokens + t]) *          \
                                          rstd[l * tokens + t]);                                                       \
                    for (int64_t d = 0; d < D; d++)                                                                    \
                        for (int64_t i = 0; i < n; i += WIDE)                                                          \
                            store_f32(y, d * CHANNELS + i, load_##TYPE(g, (d * tokens + t) * C + c + i));              \
                    int64_t d = 0;                                                                                     \
                    for (; d + 4 <= D; d += 4) {                                                                       \
                        int64_t l = 0;                                                                                 \
                        for (; l + 6 <= L; l += 6)                                                                     \
                            inner_##TYPE(4, 6, y + d * CHANNELS, x + l * CHANNELS, total + d * L + l, L);              \
                        for (; l < L; l++) inner_##TYPE(4, 1, y + d * CHANNELS, x + l * CHANNELS, total + d * L + l, L); \
                    }                                                                                                  \
                    for (; d < D; d++) {                                                                               \
                        int64_t l = 0;                                                                                 \
                        for (; l + 6 <= L; l += 6)                                                                     \
                            inner_##TYPE(1, 6, y + d * CHANNELS, x + l * CHANNELS, total + d * L + l, L);              \
                        for (; l < L; l++) inner_##TYPE(1, 1, y + d * CHANNELS, x + l * CHANNELS, total + d * L + l, L); \
                    }                                                                                                  \
                }                                                                                                      \
            for (int64_t i = 0; i < D * L; i++) out[k * D * L + i] = sum(total[i]);                                    \
        }                                                                                                              \
    }

DEFINE(f32)
DEFINE(bf16)
