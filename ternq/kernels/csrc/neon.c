/* NEON with dot products (ARMv8.2): sdot adds four products of signed bytes to an int32 lane, and a lane
 * is a row. Compiled for and tested against emulated intrinsics; never timed on such a machine. */

#if defined(__aarch64__)
#include <arm_neon.h>

#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif

#include "internal.h"
#include "latent.h"

TARGET INLINE float32x4_t halves(const uint8_t *from) {
    uint16x4_t bits;
    memcpy(&bits, from, sizeof bits);
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

/* A quarter of a word, 4 rows, with a tile of tokens. */
TARGET INLINE void add_quarter(const uint8_t *quarter, const int8_t *q, int tile, int32x4_t *dot) {
    const uint8x16_t v = vld1q_u8(quarter), mask = vdupq_n_u8(3);
    const int8x16_t c0 = vreinterpretq_s8_u8(vandq_u8(v, mask));
    const int8x16_t c1 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 2), mask));
    const int8x16_t c2 = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 4), mask));
    const int8x16_t c3 = vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
    for (int t = 0; t < tile; t++) {
        const int8x16_t x = vld1q_s8(q + 16 * t);
        dot[t] = vdotq_laneq_s32(dot[t], c0, x, 0);
        dot[t] = vdotq_laneq_s32(dot[t], c1, x, 1);
        dot[t] = vdotq_laneq_s32(dot[t], c2, x, 2);
        dot[t] = vdotq_laneq_s32(dot[t], c3, x, 3);
    }
}

/* A tile of tokens with a segment of `words` words, of which `before` lie before it in the block. */
TARGET INLINE void segment_tile(const ternq_shape *s, const uint8_t *block, int64_t group,
                                int64_t before, int64_t words, int64_t segment,
                                const ternq_rounded *x, int64_t token, int tile, float (*out)[ROWS]) {
    const uint8_t *word = block + s->header + before * WORD;
    const int8_t *q = x->q + (token * s->words * x->planes + before * tile) * 16;
    int32x4_t dot[4][4]; /* [quarter][token] */
    for (int k = 0; k < 4; k++)
        for (int t = 0; t < tile; t++) dot[k][t] = vdupq_n_s32(0);
    for (int p = 0; p < x->planes; p++, q += s->words * 16 * tile)
        for (int k = 0; k < 4; k++) {
            for (int t = 0; t < tile; t++) dot[k][t] = vshlq_n_s32(dot[k][t], 8);
            for (int64_t i = 0; i < words; i++)
                add_quarter(word + WORD * i + 16 * k, q + 16 * tile * i, tile, dot[k]);
        }
    const uint8_t *scale = block + 2 * ROWS * group, *shift = scale + 2 * ROWS * s->groups;
    for (int t = 0; t < tile; t++) {
        const ternq_segment *at = x->segments + (token + t) * s->segments + segment;
        for (int k = 0; k < 4; k++) {
            const int32x4_t codes = vsubq_s32(dot[k][t], vdupq_n_s32(at->sum));
            float32x4_t total = segment ? vld1q_f32(out[t] + 4 * k) : vdupq_n_f32(0);
            total = vfmaq_f32(total, vmulq_n_f32(halves(scale + 8 * k), at->step), vcvtq_f32_s32(codes));
            if (s->has_shift) total = vfmaq_n_f32(total, halves(shift + 8 * k), at->total);
            vst1q_f32(out[t] + 4 * k, total);
        }
    }
}

TARGET static void multiply(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                            int64_t first, int64_t tokens, float (*out)[ROWS]) {
    int64_t before = 0, segment = 0;
    for (int64_t g = 0; g < s->groups; g++)
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS) {
            const int64_t words = min64(left, SEGMENT_WORDS);
            int64_t t = 0;
            for (; t + 4 <= tokens; t += 4)
                segment_tile(s, block, g, before, words, segment, x, first + t, 4, out + t);
            if (tokens - t >= 2)
                segment_tile(s, block, g, before, words, segment, x, first + t, 2, out + t), t += 2;
            if (tokens - t >= 1)
                segment_tile(s, block, g, before, words, segment, x, first + t, 1, out + t);
            before += words, segment++;
        }
}

const ternq_kernel ternq_neon = {"neon", 4, multiply, round_wide, ternarize, descend};

#endif
