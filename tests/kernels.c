/* Random shapes through the C kernels, against plain loops, every buffer exactly as large as it is said
 * to be: test_kernels.py runs this under AddressSanitizer and UBSan. Argument: rounds. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ternq.h"

static uint32_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float uniform(void) { return (float)draw(20001) / 10000.0f - 1.0f; }

static void fail(const char *what, const char *isa, int64_t rows, int64_t columns, int64_t group) {
    printf("%s: %s, %lld x %lld, groups of %lld\n", what, isa, (long long)rows, (long long)columns,
           (long long)group);
    exit(1);
}

static void one_round(const char *isa) {
    static const int64_t groups_of[] = {1, 7, 16, 64, 100, 128, 192, 5000};
    int64_t rows = 1 + draw(70), columns = 1 + draw(700), group = groups_of[draw(8)];
    int64_t n = draw(3) ? 1 + draw(40) : draw(2) * 131, groups = (columns + group - 1) / group;
    int64_t bytes = (columns + 4) / 5;
    int shifts = draw(2), act = draw(2), threads = 1 + draw(5);
    uint8_t *base3 = malloc((size_t)(rows * bytes)), *again = malloc((size_t)(rows * bytes));
    uint16_t *scale = malloc((size_t)(rows * groups) * 2), *shift = malloc((size_t)(rows * groups) * 2);
    for (int64_t i = 0; i < rows * bytes; i++) {
        int64_t left = columns - i % bytes * 5;
        int value = 0;
        for (int k = 0; k < 5; k++) value = 3 * value + (k < left ? (int)draw(3) : 1);
        base3[i] = (uint8_t)value;
    }
    for (int64_t i = 0; i < rows * groups; i++) {
        scale[i] = (uint16_t)(0x3000 + draw(0x800)); /* 0.125 ... 0.5 */
        shift[i] = (uint16_t)(0x2800 + draw(0x800)); /* 0.03125 ... 0.125 */
    }
    int64_t size = ternq_layout_bytes(rows, columns, group, shifts);
    uint8_t *data = malloc((size_t)size);
    float *weight = malloc((size_t)(rows * columns) * 4), *x = malloc((size_t)(n * columns) * 4 + 1);
    float *y = malloc((size_t)(n * rows) * 4 + 1), *bias = malloc((size_t)rows * 4);
    ternq_matrix w = {rows, columns, group, shifts, data};
    if (ternq_layout(base3, scale, shifts ? shift : NULL, rows, columns, group, data, threads) ||
        ternq_dense(&w, 0, rows, weight, TERNQ_FLOAT32, threads) ||
        ternq_restore(&w, again, scale, shifts ? shift : NULL, threads))
        fail("status", isa, rows, columns, group);
    if (memcmp(base3, again, (size_t)(rows * bytes))) fail("restored", isa, rows, columns, group);
    for (int64_t i = 0; i < n * columns; i++) x[i] = uniform();
    for (int64_t r = 0; r < rows; r++) bias[r] = uniform();
    int odd = n && draw(4) == 0;
    if (odd) x[draw((uint32_t)(n * columns))] = draw(2) ? NAN : INFINITY;
    if (ternq_linear(&w, x, n, y, bias, TERNQ_FLOAT32, act, threads)) fail("status", isa, rows, columns, group);
    for (int64_t t = 0; t < n; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = bias[r], length = 0;
            for (int64_t c = 0; c < columns; c++) {
                sum += (double)x[t * columns + c] * (double)weight[r * columns + c];
                length += fabs((double)weight[r * columns + c]);
            }
            double got = y[t * rows + r], most = (act == TERNQ_INT8 ? 5e-3 : 3e-5) * length + 1e-5;
            if (isfinite(sum) ? !(fabs(got - sum) <= most) : !(isnan(sum) ? isnan(got) : got == sum))
                fail("product", isa, rows, columns, group);
        }
    for (int dtype = TERNQ_BFLOAT16; dtype <= TERNQ_FLOAT16; dtype++) { /* as large as may be read */
        uint16_t *halves = calloc((size_t)(n * columns) + 1, 2), *out = malloc((size_t)(n * rows) * 2 + 1);
        if (ternq_linear(&w, halves, n, out, NULL, dtype, act, threads)) fail("status", isa, rows, columns, group);
        free(halves), free(out);
    }
    free(base3), free(again), free(scale), free(shift), free(data), free(weight), free(x), free(y), free(bias);
}

static void one_table(const char *isa) {
    int64_t rows = draw(700), columns = 1 + draw(200), n = draw(5);
    int8_t *table = malloc((size_t)(rows * columns) + 1);
    uint16_t *scale = malloc((size_t)rows * 2 + 1);
    float *x = malloc((size_t)(n * columns) * 4 + 1), *y = malloc((size_t)(n * rows) * 4 + 1);
    for (int64_t i = 0; i < rows * columns; i++) table[i] = (int8_t)((int)draw(255) - 127);
    for (int64_t i = 0; i < n * columns; i++) x[i] = uniform();
    for (int64_t r = 0; r < rows; r++) scale[r] = 0x2c00; /* 1 / 16 */
    if (ternq_table_product(table, scale, TERNQ_TABLE_INT8, rows, columns, x, n, y, 1 + (int)draw(3)))
        fail("status", isa, rows, columns, n);
    for (int64_t t = 0; t < n; t++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < columns; c++)
                sum += (double)x[t * columns + c] * table[r * columns + c] / 16;
            if (!(fabs(y[t * rows + r] - sum) < 1e-3)) fail("table", isa, rows, columns, n);
        }
    free(table), free(scale), free(x), free(y);
}

static void one_latent(const char *isa) {
    static const int64_t groups_of[] = {1, 7, 16, 64, 100, 128, 5000};
    int64_t rows = 1 + draw(40), columns = 1 + draw(700), group = groups_of[draw(7)];
    int64_t groups = (columns + group - 1) / group, size = rows * columns;
    int dtype = (int)draw(3), value_dtype = (int)draw(3), threads = 1 + (int)draw(5);
    size_t wide = dtype ? 2 : 4, value_wide = value_dtype ? 2 : 4;
    uint8_t *numbers = malloc((size_t)size * wide), *values = malloc((size_t)size * value_wide);
    int8_t *codes = malloc((size_t)size);
    float *of_groups[4];
    for (int i = 0; i < 4; i++) of_groups[i] = malloc((size_t)(rows * groups) * 4);
    for (int64_t i = 0; i < rows * groups; i++) of_groups[0][i] = uniform(), of_groups[1][i] = uniform();
    for (int64_t i = 0; i < size; i++) { /* 1.0, -1.0, 0.25: exact in all types */
        static const float drawn[3] = {1.0f, -1.0f, 0.25f};
        static const uint16_t bf16[3] = {0x3f80, 0xbf80, 0x3e80}, half[3] = {0x3c00, 0xbc00, 0x3400};
        uint32_t k = draw(3);
        memcpy(numbers + wide * (size_t)i, dtype == 0 ? (const void *)(drawn + k) : dtype == 1 ? (const void *)(bf16 + k) : half + k, wide);
    }
    ternq_latent of = {.rows = rows, .columns = columns, .group = group, .numbers = numbers, .values = draw(3) ? values : NULL,
                       .codes = codes, .scale = of_groups[0], .shift = draw(2) ? of_groups[1] : NULL,
                       .dtype = dtype, .value_dtype = value_dtype};
    if (ternq_ternarize(&of, threads)) fail("status", isa, rows, columns, group);
    for (int64_t i = 0; i < size; i++)
        if (codes[i] < -1 || codes[i] > 1) fail("codes", isa, rows, columns, group);
    of.to_scale = draw(2) ? of_groups[2] : NULL, of.to_shift = draw(2) ? of_groups[3] : NULL;
    of.ttq = (int)draw(2);
    if (ternq_descend(&of, threads)) fail("status", isa, rows, columns, group);
    for (int64_t r = 0; of.to_shift && r < rows; r++) {
        double sum = 0, whole = 0;
        for (int64_t c = 0; c < columns; c++) {
            uint32_t bits = 0;
            memcpy(&bits, numbers + wide * (size_t)(r * columns + c), wide);
            sum += bits == 0x3f800000 || bits == 0x3f80 || bits == 0x3c00 ? 1 : bits >> (8 * wide - 1) ? -1 : 0.25;
        }
        for (int64_t g = 0; g < groups; g++) whole += of.to_shift[r * groups + g];
        if (fabs(sum - whole) > 1e-3) fail("sums", isa, rows, columns, group);
    }
    free(numbers), free(values), free(codes);
    for (int i = 0; i < 4; i++) free(of_groups[i]);
}

int main(int count, char **arguments) {
    static const char *const names[] = {"portable", "avx2", "avx512", "neon"};
    int rounds = count > 1 ? atoi(arguments[1]) : 100;
    for (int i = 0; i < 4; i++) {
        if (ternq_set_isa(names[i])) continue;
        for (int round = 0; round < rounds; round++) one_round(names[i]), one_table(names[i]), one_latent(names[i]);
        printf("%s: %d rounds\n", names[i], rounds);
    }
    return ternq_layout_bytes(INT64_MAX, 1, 1, 0) == TERNQ_BAD && ternq_layout_bytes(1, 0, 1, 0) == TERNQ_BAD ? 0 : 1;
}
