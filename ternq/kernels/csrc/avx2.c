/* AVX2: maddubs adds two products of an unsigned and a signed byte in an int16 lane. A half of a word
 * is 8 rows, four bytes each, so two lanes belong to a row and are added once for a segment. */

#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))

/* Keeps the compiler from gathering many additions and spilling their operands. */
#define KEEP(a) __asm__("" : "+x"(a))

/* Memory answers late: without this a third of the speed is lost. */
INLINE void fetch_ahead(const uint8_t *word) {
    _mm_prefetch((const char *)word + NEAR, _MM_HINT_T0);
    _mm_prefetch((const char *)word + FAR, _MM_HINT_T1);
}

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

/* Dot products of 8 rows with a segment of one token. Fields 1 and 3 are masked where they stand, 4
 * times too large: 16 sums of 2 * 8 * 128 just fit in an int16. */
TARGET INLINE __m256i half_dot(const uint8_t *word, int64_t words, const int8_t *q, int64_t plane,
                               int planes, int ahead) {
    const __m256i even = _mm256_set1_epi8(0x03), odd = _mm256_set1_epi8(0x0c);
    __m256i a[2][2];
    for (int p = 0; p < planes; p++) a[p][0] = a[p][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < words; i++, word += WORD, q += 16) {
        if (ahead) fetch_ahead(word);
        const __m256i v = half_word(word), w = _mm256_srli_epi16(v, 4);
        const __m256i f0 = _mm256_and_si256(v, even), f1 = _mm256_and_si256(v, odd);
        const __m256i f2 = _mm256_and_si256(w, even), f3 = _mm256_and_si256(w, odd);
        for (int p = 0; p < planes; p++) {
            add_product(&a[p][0], f0, four(q + p * plane));
            add_product(&a[p][1], f1, four(q + p * plane + 4));
            add_product(&a[p][0], f2, four(q + p * plane + 8));
            add_product(&a[p][1], f3, four(q + p * plane + 12));
        }
    }
    const __m256i ones = _mm256_set1_epi16(1), fours = _mm256_set1_epi16(4);
    __m256i dot = _mm256_setzero_si256();
    for (int p = 0; p < planes; p++) {
        __m256i both = _mm256_add_epi32(_mm256_madd_epi16(a[p][0], fours),
                                        _mm256_madd_epi16(a[p][1], ones));
        dot = _mm256_add_epi32(_mm256_slli_epi32(dot, 8), both);
    }
    return _mm256_srai_epi32(dot, 2);
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
            for (int h = 0; h < 2; h++) {
                const uint8_t *half = word + WORD / 2 * h;
                const __m256i dot = words == SEGMENT_WORDS
                                        ? half_dot(half, SEGMENT_WORDS, q, plane, planes, h == 0)
                                        : half_dot(half, words, q, plane, planes, h == 0);
                total[h] = add_segment(total[h], dot, halves(scale + 16 * h), halves(shift + 16 * h),
                                       s->has_shift, at);
            }
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

TARGET static void multiply(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                            int64_t first, int64_t tokens, float (*out)[ROWS]) {
    if (tokens == 1 && x->planes == 1) one_token(s, block, x, first, out[0], 1);
    else if (tokens == 1) one_token(s, block, x, first, out[0], 2);
    else if (x->planes == 1) many_tokens(s, block, x, first, tokens, out, 1);
    else many_tokens(s, block, x, first, tokens, out, 2);
}

TARGET static void round_wide(const float *x, int width, int8_t *high, int8_t *low, int planes,
                              ternq_segment *segment) {
    if (planes == 2) round_segment(x, width, high, low, 2, segment);
    else round_segment(x, width, high, low, 1, segment);
}

const ternq_kernel ternq_avx2 = {"avx2", 4, multiply, round_wide};

#endif
