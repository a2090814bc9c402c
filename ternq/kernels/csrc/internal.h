/* What the C files share; see ternq.h for the layout in memory. */
#ifndef TERNQ_INTERNAL_H
#define TERNQ_INTERNAL_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "ternq.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are little-endian"
#endif

enum {
    ROWS = 16,             /* of a block */
    WORD = 64,             /* bytes of 16 rows x 16 columns */
    SEGMENT = 128,         /* columns that share a rounding of activations; int16 sums hold as many */
    SEGMENT_WORDS = SEGMENT / 16,
    CHUNK = 128,           /* tokens that are multiplied in one go */
    NEAR = 2048, FAR = 8192, /* bytes that are fetched ahead, into the first and second cache */
};

#define INLINE static inline __attribute__((always_inline))

/* Sizes that follow from those of a matrix. */
typedef struct {
    int64_t rows, columns, group, groups, blocks;
    int64_t words;    /* of a block */
    int64_t segments; /* of a row */
    int64_t header, stride; /* bytes before a block's words, and of a block */
    int has_shift;
} ternq_shape;

int ternq_shape_of(ternq_shape *s, int64_t rows, int64_t columns, int64_t group, int64_t has_shift);

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Columns of group g, and the words that hold them. */
INLINE int64_t group_width(const ternq_shape *s, int64_t g) {
    return min64(s->group, s->columns - g * s->group);
}
INLINE int64_t group_words(const ternq_shape *s, int64_t g) { return (group_width(s, g) + 15) / 16; }

/* Memory answers late: without this a third of the speed is lost. */
INLINE void fetch_ahead(const uint8_t *word) {
    __builtin_prefetch(word + NEAR, 0, 3);
    __builtin_prefetch(word + FAR, 0, 2);
}

/* How many threads a number of multiplications is worth. */
int ternq_threads(int64_t work, int threads);

float ternq_half(uint16_t bits);
void ternq_to_float(const void *from, float *to, int64_t n, int dtype);
void ternq_from_float(const float *from, void *to, int64_t n, int dtype);
size_t ternq_size_of(int dtype);

/* Rounded activations of some tokens, cut into tiles of tokens.
 *
 * A token's value is step * q, q of 16 bits = 256 * (plane 0) + (plane 1), or of 8 bits in one plane.
 * A tile of T tokens is int8 [planes][words][T][16], at q + first token * words * 16 * planes.
 */
typedef struct {
    float step, total; /* total = step * sum */
    int32_t sum;       /* of q */
} ternq_segment;

typedef struct {
    const int8_t *q;
    const ternq_segment *segments; /* [tokens][segments] */
    int planes;
} ternq_rounded;

/* What an instruction set brings. out[t][16] is the product of one block with a tile of tokens, T being
 * 1, 2, 4, ... tile; `first` is the tile's first token. round_segment makes the step NaN if x has a
 * value that is not finite, or so large that sums of its like are not. */
typedef struct {
    const char *name;
    int tile;
    void (*multiply)(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                     int64_t first, int64_t tokens, float (*out)[ROWS]);
    void (*round_segment)(const float *x, int width, int8_t *high, int8_t *low, int planes,
                          ternq_segment *segment);
    void (*ternarize)(const float *w, int64_t n, float scale, float shift, int8_t *codes,
                      void *values, int dtype);
    void (*descend)(float *restrict g, const int8_t *restrict codes, int64_t n, float scale, int ttq,
                    float sums[2]); /* see latent.h for both */
} ternq_kernel;

const ternq_kernel *ternq_kernel_in_use(void);

extern const ternq_kernel ternq_portable;
#if defined(__x86_64__)
extern const ternq_kernel ternq_avx2, ternq_avx512;
#elif defined(__aarch64__)
extern const ternq_kernel ternq_neon;
#endif

/* The body of round_segment; round_wide below is it, compiled for the instruction set of a file.
 *
 * Adding 1.5 * 2^23 to a float below 2^22 leaves it rounded to a whole number in the low bits.
 */
INLINE void round_segment(const float *x, int width, int8_t *high, int8_t *low, int planes,
                          ternq_segment *segment) {
    int32_t largest = 0, total = 0;
    for (int i = 0; i < width; i++) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff; /* of floats without a sign, the larger has the larger bits */
        largest = bits > largest ? bits : largest;
    }
    float top;
    memcpy(&top, &largest, 4);
    const float limit = planes == 2 ? 32639.0f : 127.0f; /* 256 * 127 + 127 */
    const int plain = !(top <= 1e34f); /* not finite, or sums of 128 such values would not be */
    if (plain || top < 1e-30f) {
        memset(high, 0, SEGMENT);
        memset(low, 0, SEGMENT);
        segment->step = plain ? NAN : 0;
        segment->total = 0;
        segment->sum = 0;
        return;
    }
    const float inverse = limit / top;
    for (int i = 0; i < width; i++) {
        float shifted = x[i] * inverse + 12582912.0f;
        int32_t q;
        memcpy(&q, &shifted, 4);
        q -= 0x4b400000;
        total += q;
        int32_t upper = planes == 2 ? (q + 128) >> 8 : q;
        high[i] = (int8_t)upper;
        low[i] = (int8_t)q; /* q - 256 * upper */
    }
    memset(high + width, 0, (size_t)(SEGMENT - width));
    memset(low + width, 0, (size_t)(SEGMENT - width));
    segment->step = top / limit;
    segment->total = segment->step * (float)total;
    segment->sum = total;
}

#ifdef TARGET /* what the compiler may use, in the file of an instruction set */
TARGET static void round_wide(const float *x, int width, int8_t *high, int8_t *low, int planes,
                              ternq_segment *segment) {
    if (planes == 2) round_segment(x, width, high, low, 2, segment);
    else round_segment(x, width, high, low, 1, segment);
}
#endif

#endif
