/* Products with packed ternary matrices: the C interface, which Python reaches through ctypes.
 *
 * A matrix is scale * code + shift, code in {-1, 0, 1}; `group` consecutive columns of a row share a
 * scale and a shift, the last group of a row may be shorter.
 *
 * In memory the rows are taken in blocks of 16, the last filled up with zeros. A block is
 *     scale   float16 [groups][16]
 *     shift   float16 [groups][16], if the matrix has shifts
 *     zeros up to a multiple of 64 bytes
 *     words   uint8 [64] each, ceil(width / 16) of them for every group
 * A word is 16 rows x 16 columns: bits 2f and 2f + 1 of byte 4r + j are code + 1 of row r, column
 * 4f + j. Columns beyond the end of a group hold anything: they are multiplied by zero.
 * Blocks stand alone, so matrices with equal columns, group and shift, and rows that are multiples of
 * 16 (q, k and v, or gate and up) are joined by joining their bytes.
 *
 * Functions return 0, or a negative number: TERNQ_BAD (sizes) or TERNQ_MEMORY. None keeps a pointer.
 * All but ternq_set_isa and ternq_set_parallel may be called from several threads at once. x86-64 and
 * 64-bit ARM have kernels of their own; others, little-endian ones, run the portable one.
 */
#ifndef TERNQ_H
#define TERNQ_H

#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#define TERNQ_ABI 2 /* counts changes of this file that a caller must know */
int ternq_abi(void);

enum { TERNQ_BAD = -1, TERNQ_MEMORY = -2 };
enum { TERNQ_EXACT = 0, TERNQ_INT8 = 1 };                       /* act */
enum { TERNQ_FLOAT32 = 0, TERNQ_BFLOAT16 = 1, TERNQ_FLOAT16 = 2 }; /* dtype */

typedef struct {
    int64_t rows, columns, group;
    int64_t has_shift;   /* 0 or 1 */
    const uint8_t *data; /* ternq_layout_bytes; fastest at a multiple of 64 */
} ternq_matrix;

/* Bytes of a matrix in memory, or TERNQ_BAD. */
int64_t ternq_layout_bytes(int64_t rows, int64_t columns, int64_t group, int64_t has_shift);

/* From the file's form (base3 uint8 [rows][ceil(columns / 5)], scale and shift float16
 * [rows][groups], shift NULL if there is none) to `data`, and back. */
int ternq_layout(const uint8_t *base3, const uint16_t *scale, const uint16_t *shift, int64_t rows,
                 int64_t columns, int64_t group, uint8_t *data, int threads);
int ternq_restore(const ternq_matrix *w, uint8_t *base3, uint16_t *scale, uint16_t *shift,
                  int threads);

/* Rows first ... last - 1 as numbers, [last - first][columns] of dtype. */
int ternq_dense(const ternq_matrix *w, int64_t first, int64_t last, void *out, int dtype,
                int threads);

/* y[n][rows] = x[n][columns] W'. Activations are rounded per (at most) 128 columns, to 16 bits
 * (TERNQ_EXACT) or 8 (TERNQ_INT8); infinities and NaN propagate as in a dense product. */
int ternq_matmul(const ternq_matrix *w, const float *x, int64_t n, float *y, int act, int threads);

/* The same with x, y and bias [rows] (or NULL) of any dtype. */
int ternq_linear(const ternq_matrix *w, const void *x, int64_t n, void *y, const void *bias,
                 int dtype, int act, int threads);

/* y[n][rows] = x[n][columns] W' of an output head W [rows][columns] and a few tokens. dtype is that of
 * W: one of those above, or TERNQ_TABLE_INT8, int8 with a float16 scale for each row. */
enum { TERNQ_TABLE_INT8 = 3 };
int ternq_table_product(const void *table, const uint16_t *scale, int64_t dtype, int64_t rows,
                        int64_t columns, const float *x, int64_t n, float *y, int threads);

/* Latent weights in training, [rows][columns] in groups of `group` columns (the last of a row may be
 * shorter), scale and shift float32 [rows][groups]; codes are int8 [rows][columns]. */
typedef struct {
    int64_t rows, columns, group;
    void *numbers; /* latent weights, or the gradient of their values; never written */
    void *values;  /* the values, or the gradient of the latent weights; NULL: not wanted */
    int8_t *codes;
    const float *scale, *shift;
    float *to_scale, *to_shift; /* gradients; NULL: not wanted */
    int dtype, value_dtype;     /* of `numbers` and of `values` */
    int ttq;                    /* a gradient is multiplied with the scale where the code is not 0 */
} ternq_latent;

/* Codes: the sign where |w| > 0.7 mean |w| of the group, else 0; with `values` also scale * code +
 * shift. A group with a weight that is not finite has codes 0 and values NaN. */
int ternq_ternarize(const ternq_latent *of, int threads);

/* Gradients straight through the rounding: of scale sum g * code, of shift sum g, of weights g. */
int ternq_descend(const ternq_latent *of, int threads);

/* Runs body(task) in `threads` threads at once and waits; the body shares the work out by an atomic
 * counter, so that it is right whatever number of threads really comes. */
void ternq_parallel(void (*body)(void *), void *task, int threads);

/* Hands over OpenMP's GOMP_parallel of the runtime that the process has already (torch's), so that
 * there is one pool of threads; without it threads are made for each call. */
void ternq_set_parallel(void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned));

/* The instruction set in use: "portable", "avx2", "avx512" or "neon". Setting one that this machine
 * does not have (or NULL: the best) is TERNQ_BAD. */
const char *ternq_isa(void);
int ternq_set_isa(const char *name);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
