/* The product: rounds activations, shares blocks of rows out to threads, and the portable kernel. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"
#include "latent.h"

/* --- portable kernel ------------------------------------------------------------------------------ */

/* 64 sums, one for each byte of a word: int16 holds 8 words x 4 fields of at most 2 * 128. */
static void add_words(const uint8_t *word, int64_t words, const int8_t *q, int16_t sums[WORD]) {
    for (int64_t i = 0; i < words; i++, word += WORD, q += 16)
        for (int f = 0; f < 4; f++) {
            int16_t x[WORD];
            for (int b = 0; b < WORD; b++) x[b] = q[4 * f + b % 4];
            for (int b = 0; b < WORD; b++) sums[b] += (int16_t)((word[b] >> 2 * f & 3) * x[b]);
        }
}

static void multiply_one(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                         int64_t token, float out[ROWS]) {
    const uint8_t *word = block + s->header;
    const int8_t *q = x->q + token * s->words * 16 * x->planes;
    const ternq_segment *at = x->segments + token * s->segments;
    for (int r = 0; r < ROWS; r++) out[r] = 0;
    for (int64_t g = 0; g < s->groups; g++) {
        uint16_t scale[ROWS], shift[ROWS] = {0};
        memcpy(scale, block + 2 * ROWS * g, sizeof scale);
        if (s->has_shift) memcpy(shift, block + 2 * ROWS * (s->groups + g), sizeof shift);
        for (int64_t left = group_words(s, g); left > 0; left -= SEGMENT_WORDS, at++) {
            int64_t words = min64(left, SEGMENT_WORDS);
            int16_t sums[2][WORD] = {0};
            for (int p = 0; p < x->planes; p++) add_words(word, words, q + p * s->words * 16, sums[p]);
            for (int r = 0; r < ROWS; r++) {
                int32_t dot = 0;
                for (int j = 0; j < 4; j++)
                    dot += x->planes == 2 ? 256 * sums[0][4 * r + j] + sums[1][4 * r + j]
                                          : sums[0][4 * r + j];
                out[r] += ternq_half(scale[r]) * at->step * (float)(dot - at->sum);
                out[r] += ternq_half(shift[r]) * at->total;
            }
            word += words * WORD, q += words * 16;
        }
    }
}

static void portable_multiply(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                              int64_t first, int64_t tokens, float (*out)[ROWS]) {
    for (int64_t t = 0; t < tokens; t++) multiply_one(s, block, x, first + t, out[t]);
}

static void portable_round(const float *x, int width, int8_t *high, int8_t *low, int planes,
                           ternq_segment *segment) {
    round_segment(x, width, high, low, planes, segment);
}

const ternq_kernel ternq_portable = {"portable", 1, portable_multiply, portable_round, ternarize,
                                     descend};

/* --- which kernel ---------------------------------------------------------------------------------- */

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

static int runs(const ternq_kernel *kernel) {
    (void)kernel;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (kernel == &ternq_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    if (kernel == &ternq_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
    if (kernel == &ternq_neon) return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* asimddp */
#endif
    return 1;
}

static const ternq_kernel *const kernels[] = { /* the best first */
#if defined(__x86_64__)
    &ternq_avx512, &ternq_avx2,
#elif defined(__aarch64__)
    &ternq_neon,
#endif
    &ternq_portable, NULL,
};

static _Atomic(const ternq_kernel *) chosen;

int ternq_set_isa(const char *name) {
    for (int i = 0; kernels[i]; i++)
        if ((!name || !strcmp(name, kernels[i]->name)) && runs(kernels[i])) {
            atomic_store(&chosen, kernels[i]);
            return 0;
        }
    return TERNQ_BAD;
}

const ternq_kernel *ternq_kernel_in_use(void) {
    if (!atomic_load(&chosen)) ternq_set_isa(NULL);
    return atomic_load(&chosen);
}

int ternq_abi(void) { return TERNQ_ABI; }

const char *ternq_isa(void) { return ternq_kernel_in_use()->name; }

/* --- threads ---------------------------------------------------------------------------------------- */

static void (*gomp)(void (*)(void *), void *, unsigned, unsigned);

void ternq_set_parallel(void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    gomp = gomp_parallel;
}

/* Waking OpenMP's threads takes 1 or 2 microseconds, making new ones 20 or more. */
int ternq_threads(int64_t work, int threads) {
    return threads < 1 || work < (gomp ? 1 << 18 : 1 << 22) ? 1 : threads;
}

typedef struct {
    void (*body)(void *);
    void *task;
} thread_task;

static void *run_thread(void *given) {
    thread_task *work = given;
    work->body(work->task);
    return NULL;
}

void ternq_parallel(void (*body)(void *), void *task, int threads) {
    enum { MOST = 64 };
    if (threads <= 1) {
        body(task);
    } else if (gomp) {
        gomp(body, task, (unsigned)threads, 0);
    } else { /* a thread that cannot be made is not missed: the others do its work */
        pthread_t others[MOST];
        thread_task work = {body, task};
        int made = 0;
        while (made < threads - 1 && made < MOST && !pthread_create(&others[made], NULL, run_thread, &work))
            made++;
        body(task);
        while (made > 0) pthread_join(others[--made], NULL);
    }
}

/* --- the product ------------------------------------------------------------------------------------- */

typedef struct {
    const ternq_kernel *kernel;
    const ternq_shape *s;
    const uint8_t *data;
    const char *x; /* of the chunk */
    char *y;
    const float *bias;
    int64_t tokens; /* of the chunk */
    int dtype;
    int8_t *q;
    ternq_segment *segments;
    uint8_t *finite; /* [tokens] */
    int planes;
    int64_t shares; /* a thread takes one of so many parts of the blocks that are left */
    atomic_llong next;
    atomic_int status;
} product;

/* The tile that begins at a token: the largest power of two that still fits. */
static int64_t tile_at(const product *p, int64_t token) {
    int64_t tile = p->kernel->tile;
    while (tile > p->tokens - token) tile /= 2;
    return tile;
}

static const char *token_at(const product *p, int64_t token) {
    return p->x + (size_t)(token * p->s->columns) * ternq_size_of(p->dtype);
}

/* Round token `token`, the t-th of a tile, into its place there. */
static void round_token(const product *p, int64_t token, int64_t t, int64_t tile, const float *x) {
    const ternq_shape *s = p->s;
    int8_t *q = p->q + (token - t) * s->words * 16 * p->planes + 16 * t;
    int64_t plane = s->words * 16 * tile, segment = token * s->segments;
    p->finite[token] = 1;
    for (int64_t g = 0; g < s->groups; g++) {
        int64_t width = group_width(s, g);
        for (int64_t c = 0; c < width; c += SEGMENT, segment++) {
            int8_t rounded[2][SEGMENT];
            int part = (int)min64(SEGMENT, width - c);
            ternq_segment *made = p->segments + segment;
            p->kernel->round_segment(x + g * s->group + c, part, rounded[0], rounded[1], p->planes, made);
            if (made->step != made->step) p->finite[token] = 0;
            for (int i = 0; i < part; i += 16, q += 16 * tile)
                for (int plane_no = 0; plane_no < p->planes; plane_no++)
                    memcpy(q + plane * plane_no, rounded[plane_no] + i, 16);
        }
    }
}

static void round_tiles(void *given) {
    product *p = given;
    float *row = p->dtype == TERNQ_FLOAT32 ? NULL : malloc((size_t)p->s->columns * sizeof(float));
    if (p->dtype != TERNQ_FLOAT32 && !row) {
        atomic_store(&p->status, TERNQ_MEMORY);
        return;
    }
    int64_t largest = p->kernel->tile;
    for (;;) { /* a share is as many tokens as the largest tile has */
        int64_t token = atomic_fetch_add(&p->next, 1) * largest;
        if (token >= p->tokens) break;
        int64_t last = min64(token + largest, p->tokens);
        while (token < last) {
            int64_t tile = tile_at(p, token);
            for (int64_t t = 0; t < tile; t++, token++) {
                if (row) ternq_to_float(token_at(p, token), row, p->s->columns, p->dtype);
                round_token(p, token, t, tile, row ? row : (const float *)token_at(p, token));
            }
        }
    }
    free(row);
}

/* One token with one block in plain arithmetic, for activations that are not finite. */
static void multiply_plainly(const product *p, const uint8_t *block, int64_t token, float *out) {
    const ternq_shape *s = p->s;
    const char *x = token_at(p, token);
    size_t size = ternq_size_of(p->dtype);
    for (int r = 0; r < ROWS; r++) {
        const uint8_t *word = block + s->header;
        double sum = 0;
        for (int64_t g = 0; g < s->groups; g++) {
            uint16_t scale, shift = 0;
            memcpy(&scale, block + 2 * (g * ROWS + r), 2);
            if (s->has_shift) memcpy(&shift, block + 2 * ((s->groups + g) * ROWS + r), 2);
            for (int64_t c = 0; c < group_width(s, g); c++) {
                float value;
                ternq_to_float(x + size * (size_t)(g * s->group + c), &value, 1, p->dtype);
                int code = (word[c / 16 * WORD + 4 * r + c % 4] >> c % 16 / 4 * 2 & 3) - 1;
                sum += (double)value * ((float)code * ternq_half(scale) + ternq_half(shift));
            }
            word += group_words(s, g) * WORD;
        }
        out[r] = (float)sum;
    }
}

/* The block's products into y, with the bias added. */
static void store(const product *p, int64_t block, float (*out)[ROWS]) {
    const int64_t row = block * ROWS, rows = min64(ROWS, p->s->rows - row);
    float bias[ROWS] = {0};
    if (p->bias) memcpy(bias, p->bias + row, (size_t)rows * sizeof(float));
    for (int64_t t = 0; t < p->tokens; t++) {
        char *y = p->y + (size_t)(t * p->s->rows + row) * ternq_size_of(p->dtype);
        for (int r = 0; r < ROWS; r++) out[t][r] += bias[r];
        if (rows == ROWS && p->dtype == TERNQ_FLOAT32) memcpy(y, out[t], sizeof out[t]);
        else ternq_from_float(out[t], y, rows, p->dtype);
    }
}

static void multiply_blocks(void *given) {
    product *p = given;
    const ternq_shape *s = p->s;
    const ternq_rounded x = {p->q, p->segments, p->planes};
    float out[CHUNK][ROWS];
    for (;;) {
        long long block = atomic_load(&p->next);
        int64_t last;
        do { /* less and less, so that all threads end together */
            last = block + (s->blocks - block + p->shares - 1) / p->shares;
        } while (block < last && !atomic_compare_exchange_weak(&p->next, &block, last));
        for (; block < last; block++) {
            const uint8_t *data = p->data + block * s->stride;
            p->kernel->multiply(s, data, &x, 0, p->tokens, out);
            for (int64_t t = 0; t < p->tokens; t++)
                if (!p->finite[t]) multiply_plainly(p, data, t, out[t]);
            store(p, block, out);
        }
        if (last == s->blocks) return;
    }
}

static void in_parallel(void (*body)(void *), product *p, int threads, int64_t work) {
    atomic_store(&p->next, 0);
    ternq_parallel(body, p, ternq_threads(work, threads));
}

static int multiply_chunk(product *p, int threads) {
    const ternq_shape *s = p->s;
    p->shares = 2 * threads;
    in_parallel(round_tiles, p, threads, 4 * p->tokens * s->columns);
    if (atomic_load(&p->status)) return atomic_load(&p->status);
    in_parallel(multiply_blocks, p, threads, p->tokens * s->rows * s->columns);
    return 0;
}

int ternq_linear(const ternq_matrix *w, const void *x, int64_t n, void *y, const void *bias,
                 int dtype, int act, int threads) {
    ternq_shape s;
    int status = ternq_shape_of(&s, w->rows, w->columns, w->group, w->has_shift);
    if (status) return status;
    if (n < 0 || (act != TERNQ_EXACT && act != TERNQ_INT8) || !ternq_size_of(dtype)) return TERNQ_BAD;
    if (n == 0 || s.rows == 0) return 0;
    int planes = act == TERNQ_EXACT ? 2 : 1;
    int64_t most = min64(n, CHUNK);
    size_t q = (size_t)(most * s.words * 16 * planes);
    size_t of_segments = (size_t)(most * s.segments) * sizeof(ternq_segment);
    size_t of_bias = bias ? (size_t)s.rows * 4 : 0;
    char *room = malloc(q + of_segments + of_bias + CHUNK); /* parts stay aligned to 4 */
    if (!room) return TERNQ_MEMORY;
    float *wide_bias = bias ? (float *)(room + q + of_segments) : NULL;
    if (bias) ternq_to_float(bias, wide_bias, s.rows, dtype);
    product p = {.kernel = ternq_kernel_in_use(), .s = &s, .data = w->data, .bias = wide_bias,
                 .dtype = dtype, .planes = planes, .q = (int8_t *)room,
                 .segments = (ternq_segment *)(room + q),
                 .finite = (uint8_t *)(room + q + of_segments + of_bias)};
    size_t size = ternq_size_of(dtype);
    for (int64_t token = 0; token < n && !status; token += CHUNK) {
        p.tokens = min64(CHUNK, n - token);
        p.x = (const char *)x + (size_t)(token * s.columns) * size;
        p.y = (char *)y + (size_t)(token * s.rows) * size;
        status = multiply_chunk(&p, threads < 1 ? 1 : threads);
    }
    free(room);
    return status;
}

int ternq_matmul(const ternq_matrix *w, const float *x, int64_t n, float *y, int act, int threads) {
    return ternq_linear(w, x, n, y, NULL, TERNQ_FLOAT32, act, threads);
}
