/* A group of latent weights: its rounding, and the gradients through it. Included by the file of an
 * instruction set and compiled for it. Sums are made in LANES lanes whatever the instruction set, so
 * that codes are the same to the bit everywhere. */

#ifndef TARGET
#define TARGET
#endif

enum { LANES = 16 };

TARGET static float sum_of(float lane[LANES]) {
    for (int step = LANES / 2; step; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

TARGET static float magnitude(const float *w, int64_t n) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += fabsf(w[i + j]);
    for (int j = 0; i < n; i++, j++) lane[j] += fabsf(w[i]);
    return sum_of(lane);
}

/* Codes of one group, and its values where `values` is not NULL, of 2 or 4 bytes each; `zero` and what
 * `plus` and `minus` differ from it are their bits. */
TARGET INLINE void choose(const float *restrict w, int64_t n, float threshold, int8_t *restrict codes,
                          void *restrict values, int wide, uint32_t zero, uint32_t plus, uint32_t minus) {
    uint16_t *restrict half = values;
    uint32_t *restrict full = values;
    for (int64_t i = 0; i < n; i++) {
        const int32_t up = w[i] > threshold, down = w[i] < -threshold;
        const uint32_t bits = zero ^ (plus & (uint32_t)-up) ^ (minus & (uint32_t)-down);
        codes[i] = (int8_t)(up - down);
        if (wide == 4) full[i] = bits;
        if (wide == 2) half[i] = (uint16_t)bits;
    }
}

TARGET static void ternarize(const float *w, int64_t n, float scale, float shift, int8_t *codes,
                             void *values, int dtype) {
    const float threshold = magnitude(w, n) * (float)(0.7 / (double)n);
    if (!values) {
        choose(w, n, threshold, codes, NULL, 0, 0, 0, 0);
        return;
    }
    /* a weight that is not finite has no code: its group becomes NaN, for the loss to tell */
    const float size = scale + threshold * 0.0f;
    const float of_codes[3] = {0.0f * size + shift, size + shift, shift - size};
    uint32_t bits[3] = {0};
    if (dtype == TERNQ_FLOAT32) {
        memcpy(bits, of_codes, sizeof bits);
        choose(w, n, threshold, codes, values, 4, bits[0], bits[0] ^ bits[1], bits[0] ^ bits[2]);
        return;
    }
    for (int i = 0; i < 3; i++) ternq_from_float(of_codes + i, bits + i, 1, dtype); /* little-endian */
    choose(w, n, threshold, codes, values, 2, bits[0], bits[0] ^ bits[1], bits[0] ^ bits[2]);
}

/* Of the gradient g of a group's values: sums[0] = sum g * code, sums[1] = sum g. With `ttq` g becomes,
 * in place, that of the latent weights: times the scale where the code is not 0. */
TARGET static void descend(float *restrict g, const int8_t *restrict codes, int64_t n, float scale,
                           int ttq, float sums[2]) {
    float of_scale[LANES] = {0}, of_shift[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            of_scale[j] += g[i + j] * (float)codes[i + j];
            of_shift[j] += g[i + j];
        }
    for (int j = 0; i < n; i++, j++) {
        of_scale[j] += g[i] * (float)codes[i];
        of_shift[j] += g[i];
    }
    sums[0] = sum_of(of_scale);
    sums[1] = sum_of(of_shift);
    if (ttq)
        for (i = 0; i < n; i++) g[i] *= codes[i] ? scale : 1.0f;
}
