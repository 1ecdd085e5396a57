// The mix in bfloat16 on the matrix units (AMX) of current Intel processors: sixteen times the products of a cycle.
//
// The products need bfloat16 weights. Each w / deviation is the sum of two of them, which keeps 16 bits. Nothing else is
// rounded that mix_cpu.c does not round. Compiled after mix_cpu.c as one source.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16  // rows of a tile, and its columns in float32
#define MAX_LAYERS 256
#define MAX_DEPTHS 256
#define UP(n, m) (((n) + (m)-1) / (m) * (m))

int has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ask the kernel for the tile registers

static void configure(int a_rows, int b_rows) {
    struct __attribute__((packed)) {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = i < 6 ? (uint8_t)a_rows : 0;
    }
    config.rows[6] = (uint8_t)a_rows;
    config.rows[7] = (uint8_t)b_rows;
    _tile_loadconfig(&config);
}

static inline __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
static inline __m512 odd(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}

// Mean and 1 / deviation in one pass, from sums of the differences to the mean of the first channels; and a copy.
static inline void moments_tiles(const uint16_t *h, int64_t C, float eps, float *mean, float *rstd, uint16_t *copy) {
    __m512i x = _mm512_loadu_si512(h);
    const float shift = (_mm512_reduce_add_ps(even(x)) + _mm512_reduce_add_ps(odd(x))) / 32;
    const __m512 s = _mm512_set1_ps(shift);
    __m512 a = _mm512_setzero_ps(), b = a, aa = a, bb = a;
    for (int64_t c = 0; c < C; c += 32) {
        x = _mm512_loadu_si512(h + c);
        _mm512_store_si512(copy + c, x);
        __m512 p = _mm512_sub_ps(even(x), s), q = _mm512_sub_ps(odd(x), s);
        a = _mm512_add_ps(a, p);
        b = _mm512_add_ps(b, q);
        aa = _mm512_fmadd_ps(p, p, aa);
        bb = _mm512_fmadd_ps(q, q, bb);
    }
    const float first = _mm512_reduce_add_ps(_mm512_add_ps(a, b)) / C;
    const float second = _mm512_reduce_add_ps(_mm512_add_ps(aa, bb)) / C;
    *mean = shift + first;
    *rstd = 1 / sqrtf(fmaxf(second - first * first, 0) + eps);
}

// As mix_bf16, for C a multiple of 32. w has D rows of UP(L, 32) weights for each sample, zero beyond L. token has room
// for L x (C + 32) states: layers are a power of two apart in memory, and would evict each other from the caches.
void mix_tiles(const shape *s, const uint16_t *h, const float *w, int64_t step, uint16_t *token, uint16_t *out,
               float *mean, float *rstd, int64_t first, int64_t last) {
    const int64_t L = s->layers, C = s->channels, D = s->depths, tokens = s->batch * s->length;
    const int64_t K = UP(L, 32), stride = tokens * C, near = C + 32;
    static const uint16_t order[64] = {
        0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32);
    uint16_t hi[MAX_DEPTHS * MAX_LAYERS] __attribute__((aligned(64))), lo[MAX_DEPTHS * MAX_LAYERS] __attribute__((aligned(64)));
    uint16_t x[2][MAX_LAYERS * TILE] __attribute__((aligned(64)));  // two columns of tiles, pairs of layers interleaved
    float y[4][TILE * TILE] __attribute__((aligned(64))), mu[MAX_LAYERS], r[MAX_LAYERS], offset[MAX_DEPTHS];
    memset(hi, 0, sizeof(uint16_t) * UP(D, TILE) * K);
    memset(lo, 0, sizeof(uint16_t) * UP(D, TILE) * K);
    memset(x, 0, sizeof x);
    memset(mu, 0, sizeof mu);
    memset(r, 0, sizeof r);
    configure(TILE, TILE);
    for (int64_t t = first; t < last; t++) {
        const float *weights = w + t / s->length * step;
        for (int64_t l = 0; l < L; l++) {
            moments_tiles(h + l * stride + t * C, C, s->eps, mu + l, r + l, token + l * near);
            mean[l * tokens + t] = mu[l];
            rstd[l * tokens + t] = r[l];
        }
        for (int64_t d = 0; d < D; d++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t l = 0; l < K; l += 16) {
                __m512 a = _mm512_mul_ps(_mm512_loadu_ps(weights + d * K + l), _mm512_loadu_ps(r + l));
                __m256bh p = _mm512_cvtneps_pbh(a);
                __m512 big = _mm512_cvtpbh_ps(p);
                __m256bh q = _mm512_cvtneps_pbh(_mm512_sub_ps(a, big));
                _mm256_storeu_si256((__m256i *)(hi + d * K + l), (__m256i)p);
                _mm256_storeu_si256((__m256i *)(lo + d * K + l), (__m256i)q);
                sum = _mm512_fmadd_ps(_mm512_add_ps(big, _mm512_cvtpbh_ps(q)), _mm512_loadu_ps(mu + l), sum);
            }
            offset[d] = -_mm512_reduce_add_ps(sum);
        }
        for (int64_t c = 0; c < C; c += 32) {
            for (int64_t l = 0; l < L; l += 2) {
                __m512i a = _mm512_load_si512(token + l * near + c);
                __m512i b = l + 1 < L ? _mm512_load_si512(token + (l + 1) * near + c) : _mm512_setzero_si512();
                _mm512_store_si512(x[0] + l * TILE, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(x[1] + l * TILE, _mm512_permutex2var_epi16(a, high, b));
            }
            for (int64_t m = 0; m < D; m += 2 * TILE) {
                const int two = D - m > TILE;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int64_t k = 0; k < L; k += 32) {
                    _tile_loadd(6, x[0] + k * TILE, 64);
                    _tile_loadd(7, x[1] + k * TILE, 64);
                    for (int part = 0; part < 2; part++) {
                        const uint16_t *a = (part ? lo : hi) + m * K + k;
                        _tile_loadd(4, a, 2 * K);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                        if (two) {
                            _tile_loadd(5, a + TILE * K, 2 * K);
                            _tile_dpbf16ps(2, 5, 6);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                    }
                }
                _tile_stored(0, y[0], 64);
                _tile_stored(1, y[1], 64);
                if (two) {
                    _tile_stored(2, y[2], 64);
                    _tile_stored(3, y[3], 64);
                }
                for (int64_t d = m; d < D && d < m + 2 * TILE; d++) {
                    const float *left = y[(d - m) / TILE * 2] + (d - m) % TILE * TILE;
                    const __m512 o = _mm512_set1_ps(offset[d]);
                    __m512 p = _mm512_add_ps(_mm512_load_ps(left), o);
                    __m512 q = _mm512_add_ps(_mm512_load_ps(left + TILE * TILE), o);
                    __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(q, p);
                    _mm512_storeu_si512(out + d * stride + t * C + c, packed);
                }
            }
        }
    }
    _tile_release();
}

// 16 rows of 16 pairs of bfloat16 to 16 pairs of 16 rows.
static inline void transpose(__m512i *r) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0x88);
            a[8 * j + i + 4] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

// As mix_backward_bf16, for C a multiple of 32.
void mix_backward_tiles(const shape *s, const uint16_t *g, const uint16_t *h, const float *mean, const float *rstd,
                        vec *total, float *out, int64_t first, int64_t last) {
    const int64_t L = s->layers, C = s->channels, D = s->depths, tokens = s->batch * s->length, stride = tokens * C;
    const int64_t chunks = (s->length + TOKENS - 1) / TOKENS;
    const int64_t tiles = (L + TILE - 1) / TILE, rows = (L + tiles - 1) / tiles;  // the last tile may repeat rows
    float y[6][TILE * TILE] __attribute__((aligned(64)));
    uint16_t x[2][TILE * 32] __attribute__((aligned(64)));
    (void)total;
    configure((int)rows, TILE);
    for (int64_t k = first; k < last; k++) {
        const int64_t start = k / chunks * s->length, from = start + k % chunks * TOKENS;
        const int64_t to = from + TOKENS < start + s->length ? from + TOKENS : start + s->length;
        float *sums = out + k * D * L;
        memset(sums, 0, sizeof(float) * D * L);
        for (int64_t t = from; t < to; t++)
            for (int64_t m = 0; m < D; m += 2 * TILE) {
                const int64_t depths = D - m < 2 * TILE ? D - m : 2 * TILE;
                for (int64_t j = 0; j < tiles; j += 3) {  // three tiles of layers and two of depths are six sums
                    int64_t at[3];
                    for (int i = 0; i < 3; i++) at[i] = (j + i) * rows + rows <= L ? (j + i) * rows : L - rows;
                    __m512 all[2 * TILE];
                    for (int d = 0; d < 2 * TILE; d++) all[d] = _mm512_setzero_ps();
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                    _tile_zero(4);
                    _tile_zero(5);
                    for (int64_t c = 0; c < C; c += 32) {
                        for (int64_t half = 0; half < depths; half += TILE) {
                            __m512i r[TILE];
                            for (int d = 0; d < TILE; d++) {
                                r[d] = half + d < depths ? _mm512_loadu_si512(g + (m + half + d) * stride + t * C + c)
                                                         : _mm512_setzero_si512();
                                all[half + d] = _mm512_add_ps(all[half + d], _mm512_add_ps(even(r[d]), odd(r[d])));
                            }
                            transpose(r);
                            for (int i = 0; i < TILE; i++) _mm512_store_si512(x[half / TILE] + 32 * i, r[i]);
                        }
                        const uint16_t *a = h + t * C + c;
                        _tile_loadd(7, x[0], 64);
                        _tile_loadd(6, a + at[0] * stride, 2 * stride);
                        _tile_dpbf16ps(0, 6, 7);
                        _tile_loadd(6, a + at[1] * stride, 2 * stride);
                        _tile_dpbf16ps(1, 6, 7);
                        _tile_loadd(6, a + at[2] * stride, 2 * stride);
                        _tile_dpbf16ps(2, 6, 7);
                        if (depths > TILE) {
                            _tile_loadd(7, x[1], 64);
                            _tile_dpbf16ps(5, 6, 7);
                            _tile_loadd(6, a + at[1] * stride, 2 * stride);
                            _tile_dpbf16ps(4, 6, 7);
                            _tile_loadd(6, a + at[0] * stride, 2 * stride);
                            _tile_dpbf16ps(3, 6, 7);
                        }
                    }
                    _tile_stored(0, y[0], 64);
                    _tile_stored(1, y[1], 64);
                    _tile_stored(2, y[2], 64);
                    _tile_stored(3, y[3], 64);
                    _tile_stored(4, y[4], 64);
                    _tile_stored(5, y[5], 64);
                    for (int64_t d = 0; d < depths; d++) {
                        const float whole = _mm512_reduce_add_ps(all[d]);
                        for (int i = 0; i < 3 && j + i < tiles; i++)
                            for (int64_t l = (j + i) * rows; l < (j + i + 1) * rows && l < L; l++)
                                sums[(m + d) * L + l] +=
                                    (y[i + d / TILE * 3][(l - at[i]) * TILE + d % TILE] - mean[l * tokens + t] * whole) *
                                    rstd[l * tokens + t];
                    }
                }
            }
    }
    _tile_release();
}

#else

int has_tiles(void) { return 0; }

#endif
