/* AVX2: maddubs adds two products of an unsigned and a signed byte in an int16 lane. A half of a word
 * is 8 rows, four bytes each, so two lanes belong to a row and are added once for a segment. */

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))

#include "internal.h"
#include "latent.h"

/* Keeps the compiler from gathering many additions and spilling their operands. */
#define KEEP(a) __asm__("" : "+x"(a))

TARGET INLINE __m256i four(const int8_t *q) { /* four activations for every row */
    int32_t bits;
    memcpy(&bits, q, 4);
    return _mm256_set1_epi32(bits);
}

TARGET INLINE __m256i half_word(const uint8_t *word) {
    return _mm256_loadu_si256((const __m256i *)word);
}

TARGET INLINE __m256 halves(const uint8_t *from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

TARGET INLINE void add_product(__m256i *sum, __m256i codes, __m256i q) {
    *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, q));
    KEEP(*sum);
}

/* out += scale * step * (dot - sum) + shift * step * sum */
TARGET INLINE __m256 add_segment(__m256 out, __m256i dot, __m256 scale, __m256 shift, int has_shift,
                                 const ternq_segment *at) {
    dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(at->sum));
    out = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(at->step)), _mm256_cvtepi32_ps(dot), out);
    return has_shift ? _mm256_fmadd_ps(shift, _mm256_set1_ps(at->total), out) : out;
}

/* Adds a word of 16 rows to the sums of one token's planes. With one plane, fields 1 and 3 are masked
 * where they stand, 4 times too large, and have sums of their own: 16 products of 2 * 8 * 128 just fit
 * in an int16. Two planes would need more registers than there are. */
TARGET INLINE void add_word(__m256i sums[2][2][2], const uint8_t *word, const int8_t *q,
                            int64_t plane, int planes) {
    const __m256i even = _mm256_set1_epi8(0x03), odd = _mm256_set1_epi8(0x0c);
    const __m256i v[2] = {half_word(word), half_word(word + WORD / 2)};
    const int apart = planes == 1;
    fetch_ahead(word);
    for (int f = 0; f < 4; f++) {
        __m256i codes[2];
        for (int h = 0; h < 2; h++)
            codes[h] = _mm256_and_si256(_mm256_srli_epi16(v[h], 2 * (apart ? f / 2 * 2 : f)),
                                        apart && f % 2 ? odd : even);
        for (int p = 0; p < planes; p++) {
            const __m256i x = four(q + p * plane + 4 * f);
            for (int h = 0; h < 2; h++) add_product(&sums[p][h][apart * (f % 2)], codes[h], x);
        }
    }
}

/* Dot products of 16 rows, in halves, with a segment of one token. */
TARGET INLINE void dot_segment(const uint8_t *word, int64_t words, const int8_t *q, int64_t plane,
                               int planes, __m256i dot[2]) {
    const __m256i ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
    __m256i sums[2][2][2]; /* of planes, halves, and even and odd fields */
    for (int p = 0; p < planes; p++)
        for (int h = 0; h < 2; h++) sums[p][h][0] = sums[p][h][1] = _mm256_setzero_si256();
    if (planes == 2 && words == SEGMENT_WORDS) { /* rolled, sums are spilled at every turn */
#pragma GCC unroll 8
        for (int i = 0; i < SEGMENT_WORDS; i++)
            add_word(sums, word + i * WORD, q + i * 16, plane, planes);
    } else {
        for (int64_t i = 0; i < words; i++)
            add_word(sums, word + i * WORD, q + i * 16, plane, planes);
    }
    for (int h = 0; h < 2; h++) {
        if (planes == 1) {
            const __m256i four_times = _mm256_add_epi32(_mm256_madd_epi16(sums[0][h][0], fours),
                                                        _mm256_madd_epi16(sums[0][h][1], ones));
            dot[h] = _mm256_srai_epi32(four_times, 2);
        } else {
            const __m256i high = _mm256_madd_epi16(sums[0][h][0], ones);
            const __m256i low = _mm256_madd_epi16(sums[1][h][0], ones);
            dot[h] = _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
        }
    }
}

TARGET INLINE void one_token(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                             int64_t token, float *out, int planes) {
    const uint8_t *word = block + s->header;
    const int8_t *q = x->q + token * s->words * 16 * planes;
    const int64_t plane = s->words * 16;
    const ternq_segment *at = x->segments + token * s->segments;
    __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t g = 0; g < s->groups; g++) {
        const uint8_t *scale = block + 2 * ROWS * g;
        const uint8_t *shift = s->has_shift ? scale + 2 * ROWS * s->groups : scale;
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS, at++) {
            const int64_t words = min64(left, SEGMENT_WORDS);
            __m256i dot[2];
            if (words == SEGMENT_WORDS) dot_segment(word, SEGMENT_WORDS, q, plane, planes, dot);
            else dot_segment(word, words, q, plane, planes, dot);
            for (int h = 0; h < 2; h++)
                total[h] = add_segment(total[h], dot[h], halves(scale + 16 * h), halves(shift + 16 * h),
                                       s->has_shift, at);
            word += words * WORD, q += words * 16;
        }
    }
    _mm256_storeu_ps(out, total[0]);
    _mm256_storeu_ps(out + 8, total[1]);
}

typedef struct {
    __m256i codes[4 * SEGMENT_WORDS][2]; /* codes + 1, of both halves */
    __m256 scale[2], shift[2];
    int64_t words, word, segment; /* how many, the first, and the segment's number */
} opened;

TARGET INLINE void open_words(const uint8_t *word, int64_t words, opened *o) {
    const __m256i mask = _mm256_set1_epi8(3);
    for (int64_t i = 0; i < words; i++)
        for (int h = 0; h < 2; h++) {
            const __m256i v = half_word(word + WORD * i + WORD / 2 * h);
            o->codes[4 * i][h] = _mm256_and_si256(v, mask);
            o->codes[4 * i + 1][h] = _mm256_and_si256(_mm256_srli_epi16(v, 2), mask);
            o->codes[4 * i + 2][h] = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
            o->codes[4 * i + 3][h] = _mm256_and_si256(_mm256_srli_epi16(v, 6), mask);
        }
}

/* A tile of tokens with an opened segment. */
TARGET INLINE void segment_tile(const ternq_shape *s, const opened *o, const ternq_rounded *x,
                                int64_t token, int planes, int tile, float (*out)[ROWS]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t *q = x->q + (token * s->words * planes + o->word * tile) * 16;
    __m256i dot[4][2];
    for (int p = 0; p < planes; p++, q += s->words * 16 * tile) {
        __m256i a[4][2];
        for (int t = 0; t < tile; t++) a[t][0] = a[t][1] = _mm256_setzero_si256();
        for (int64_t i = 0; i < o->words; i++)
            for (int f = 0; f < 4; f++) {
                const __m256i *codes = o->codes[4 * i + f];
                for (int t = 0; t < tile; t++) {
                    const __m256i four_q = four(q + (i * tile + t) * 16 + 4 * f);
                    add_product(&a[t][0], codes[0], four_q);
                    add_product(&a[t][1], codes[1], four_q);
                }
            }
        for (int t = 0; t < tile; t++)
            for (int h = 0; h < 2; h++) {
                const __m256i of_plane = _mm256_madd_epi16(a[t][h], ones);
                dot[t][h] = p ? _mm256_add_epi32(_mm256_slli_epi32(dot[t][h], 8), of_plane) : of_plane;
            }
    }
    for (int t = 0; t < tile; t++) {
        const ternq_segment *at = x->segments + (token + t) * s->segments + o->segment;
        for (int h = 0; h < 2; h++) {
            const __m256 sum = o->segment ? _mm256_loadu_ps(out[t] + 8 * h) : _mm256_setzero_ps();
            _mm256_storeu_ps(out[t] + 8 * h, add_segment(sum, dot[t][h], o->scale[h], o->shift[h],
                                                         s->has_shift, at));
        }
    }
}

TARGET INLINE void many_tokens(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                               int64_t first, int64_t tokens, float (*out)[ROWS], int planes) {
    opened o;
    o.word = o.segment = 0;
    for (int64_t g = 0; g < s->groups; g++) {
        const uint8_t *scale = block + 2 * ROWS * g;
        const uint8_t *shift = s->has_shift ? scale + 2 * ROWS * s->groups : scale;
        for (int h = 0; h < 2; h++) {
            o.scale[h] = halves(scale + 16 * h);
            o.shift[h] = halves(shift + 16 * h);
        }
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS) {
            o.words = min64(left, SEGMENT_WORDS);
            open_words(block + s->header + WORD * o.word, o.words, &o);
            int64_t t = 0;
            for (; t + 4 <= tokens; t += 4) segment_tile(s, &o, x, first + t, planes, 4, out + t);
            if (tokens - t >= 2) segment_tile(s, &o, x, first + t, planes, 2, out + t), t += 2;
            if (tokens - t >= 1) segment_tile(s, &o, x, first + t, planes, 1, out + t);
            o.word += o.words, o.segment++;
        }
    }
}

#include "x86.h"

const ternq_kernel ternq_avx2 = {"avx2", 4, multiply, round_wide, ternarize, descend};

#endif
