/* AVX-512 with VNNI: dpbusd adds four products of an unsigned and a signed byte to an int32 lane, and
 * a lane is a row of the block, so that nothing is ever added across lanes. */

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

#include "internal.h"
#include "latent.h"

TARGET INLINE __m512i four(const int8_t *q) { /* four activations for every row */
    int32_t bits;
    memcpy(&bits, q, 4);
    return _mm512_set1_epi32(bits);
}

TARGET INLINE __m512 halves(const uint8_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

/* out += scale * step * (dot - sum) + shift * step * sum */
TARGET INLINE __m512 add_segment(__m512 out, __m512i dot, __m512 scale, __m512 shift, int has_shift,
                                 const ternq_segment *at) {
    dot = _mm512_sub_epi32(dot, _mm512_set1_epi32(at->sum));
    out = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(at->step)), _mm512_cvtepi32_ps(dot), out);
    return has_shift ? _mm512_fmadd_ps(shift, _mm512_set1_ps(at->total), out) : out;
}

/* One token. The fields of a word are masked where they stand, without shifts: that of field f is
 * 4^f times too large, which is put right once for a segment. */
TARGET INLINE void one_token(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                             int64_t token, float *out, int planes) {
    const __m512i mask0 = _mm512_set1_epi8(0x03), mask1 = _mm512_set1_epi8(0x0c);
    const __m512i mask2 = _mm512_set1_epi8(0x30), mask3 = _mm512_set1_epi8((char)0xc0);
    const uint8_t *word = block + s->header;
    const int8_t *q = x->q + token * s->words * 16 * planes;
    const int64_t plane = s->words * 16;
    const ternq_segment *at = x->segments + token * s->segments;
    __m512 total = _mm512_setzero_ps();
    for (int64_t g = 0; g < s->groups; g++) {
        const __m512 scale = halves(block + 2 * ROWS * g);
        const __m512 shift = s->has_shift ? halves(block + 2 * ROWS * (s->groups + g)) : scale;
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS, at++) {
            const int64_t words = min64(left, SEGMENT_WORDS);
            __m512i a[2][4];
            for (int p = 0; p < planes; p++)
                for (int f = 0; f < 4; f++) a[p][f] = _mm512_setzero_si512();
            for (int64_t i = 0; i < words; i++, word += WORD, q += 16) {
                const __m512i v = _mm512_loadu_si512(word);
                fetch_ahead(word);
                for (int p = 0; p < planes; p++) {
                    const int8_t *from = q + p * plane;
                    a[p][0] = _mm512_dpbusd_epi32(a[p][0], _mm512_and_si512(v, mask0), four(from));
                    a[p][1] = _mm512_dpbusd_epi32(a[p][1], _mm512_and_si512(v, mask1), four(from + 4));
                    a[p][2] = _mm512_dpbusd_epi32(a[p][2], _mm512_and_si512(v, mask2), four(from + 8));
                    a[p][3] = _mm512_dpbusd_epi32(a[p][3], _mm512_and_si512(v, mask3), four(from + 12));
                }
            }
            __m512i dot = _mm512_setzero_si512();
            for (int p = 0; p < planes; p++) {
                const __m512i low = _mm512_add_epi32(a[p][0], _mm512_srai_epi32(a[p][1], 2));
                const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(a[p][2], 4),
                                                      _mm512_srai_epi32(a[p][3], 6));
                dot = _mm512_add_epi32(_mm512_slli_epi32(dot, 8), _mm512_add_epi32(low, high));
            }
            total = add_segment(total, dot, scale, shift, s->has_shift, at);
        }
    }
    _mm512_storeu_ps(out, total);
}

/* A segment's words as 4 * words vectors of codes + 1. */
TARGET INLINE void open_words(const uint8_t *word, int64_t words, __m512i *codes) {
    const __m512i mask = _mm512_set1_epi8(3);
    for (int64_t i = 0; i < words; i++) {
        const __m512i v = _mm512_loadu_si512(word + WORD * i);
        codes[4 * i] = _mm512_and_si512(v, mask);
        codes[4 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 2), mask);
        codes[4 * i + 2] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        codes[4 * i + 3] = _mm512_and_si512(_mm512_srli_epi16(v, 6), mask);
    }
}

/* A tile of tokens with an opened segment; q is that of the tile at the segment's first word. */
TARGET INLINE void add_tile(const __m512i *codes, int64_t words, const int8_t *q, int64_t plane,
                            int planes, int tile, __m512i *dot) {
    for (int t = 0; t < tile; t++) dot[t] = _mm512_setzero_si512();
    for (int p = 0; p < planes; p++) {
        const int8_t *at = q + p * plane * tile;
        for (int t = 0; t < tile; t++) dot[t] = _mm512_slli_epi32(dot[t], 8);
        for (int64_t i = 0; i < words; i++, at += 16 * tile)
            for (int f = 0; f < 4; f++)
                for (int t = 0; t < tile; t++)
                    dot[t] = _mm512_dpbusd_epi32(dot[t], codes[4 * i + f], four(at + 16 * t + 4 * f));
    }
}

typedef struct {
    __m512i codes[4 * SEGMENT_WORDS];
    __m512 scale, shift;
    int64_t words, word, segment; /* how many, the first, and the segment's number */
} opened;

TARGET INLINE void segment_tile(const ternq_shape *s, const opened *o, const ternq_rounded *x,
                                int64_t token, int planes, int tile, float (*out)[ROWS]) {
    __m512i dot[16];
    const int8_t *q = x->q + (token * s->words * planes + o->word * tile) * 16;
    add_tile(o->codes, o->words, q, s->words * 16, planes, tile, dot);
    for (int t = 0; t < tile; t++) {
        const ternq_segment *at = x->segments + (token + t) * s->segments + o->segment;
        const __m512 sum = o->segment ? _mm512_loadu_ps(out[t]) : _mm512_setzero_ps();
        _mm512_storeu_ps(out[t], add_segment(sum, dot[t], o->scale, o->shift, s->has_shift, at));
    }
}

TARGET INLINE void many_tokens(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                               int64_t first, int64_t tokens, float (*out)[ROWS], int planes) {
    opened o;
    o.word = o.segment = 0;
    for (int64_t g = 0; g < s->groups; g++) {
        o.scale = halves(block + 2 * ROWS * g);
        o.shift = s->has_shift ? halves(block + 2 * ROWS * (s->groups + g)) : o.scale;
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS) {
            o.words = min64(left, SEGMENT_WORDS);
            open_words(block + s->header + WORD * o.word, o.words, o.codes);
            int64_t t = 0;
            for (; t + 16 <= tokens; t += 16) segment_tile(s, &o, x, first + t, planes, 16, out + t);
            if (tokens - t >= 8) segment_tile(s, &o, x, first + t, planes, 8, out + t), t += 8;
            if (tokens - t >= 4) segment_tile(s, &o, x, first + t, planes, 4, out + t), t += 4;
            if (tokens - t >= 2) segment_tile(s, &o, x, first + t, planes, 2, out + t), t += 2;
            if (tokens - t >= 1) segment_tile(s, &o, x, first + t, planes, 1, out + t);
            o.word += o.words, o.segment++;
        }
    }
}

#include "x86.h"

const ternq_kernel ternq_avx512 = {"avx512", 16, multiply, round_wide, ternarize, descend};

#endif
