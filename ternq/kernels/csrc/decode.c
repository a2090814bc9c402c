/* One step of a decoder of Llama's kind: token ids in, logits of the last one out.
 *
 * A step is some 200 small products with a few other operations between them; what makes it fast is
 * that nothing else happens. The threads of a decoder live as long as it does, and each of them
 * walks through the whole step: in every phase it does its share of the rows, heads or tokens, and
 * waits for the others at a barrier that spins. So a step is one call, whatever the model's depth.
 *
 * Activations, cache and sums are float32. Products of packed matrices are ternq_matmul's, with the
 * roundings of its `act`; tables (embedding, output head) are read in the type they are stored in.
 */
#define _GNU_SOURCE
#include "ternq.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast") /* which ISO C mode turns off: sums use fused products */
#endif
#define API __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#if defined(__aarch64__)
#define WIDTH 4
#else
#define WIDTH 8
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

enum { ROWS = 16 };      /* of a block of a packed matrix */
enum { AHEAD = 4096 };   /* bytes of a table, from what is asked for to what is used */

typedef struct {
    const void *rows; /* [vocabulary][hidden] */
    const uint16_t *scale;
    int64_t dtype;
} ternq_table;

typedef struct {
    ternq_matrix q, k, v, o, gate, up, down;
    const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* or NULL */
    const float *input_norm, *post_norm; /* [hidden] */
    const float *q_norm, *k_norm;        /* [head_dim], or NULL */
} ternq_block;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, wide, vocabulary; /* wide: gate's rows */
    float epsilon, rope_scale;
    const float *frequencies; /* [head_dim / 2], radians a position */
    const float *norm;        /* [hidden] */
    const ternq_block *blocks;
    ternq_table embedding, head;
} ternq_model;

typedef struct ternq_decoder {
    ternq_model model;
    int64_t context, batch; /* positions of the cache; tokens of one pass */
    int64_t padded;         /* head_dim, up to a multiple of WIDTH */
    int threads, act;

    /* [batch][...], shared by all threads */
    float *x, *normed, *q, *k, *v, *mixed, *inner, *angles;
    float *keys, *values; /* [layer][kv head][context][padded]; keys in columns of WIDTH positions */
    float *scratch; /* [threads][each] */
    int64_t each;

    /* the pass under way */
    const int64_t *ids;
    int64_t count, position;
    float *logits; /* or NULL */
    atomic_int status;

    /* the threads */
    atomic_uint arrived, phase, turn;
    pthread_t *workers;
    int started, leaving;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} ternq_decoder;

/* -- threads -------------------------------------------------------------------------------------- */

static INLINE void pause_core(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits for all threads. Whoever waits long gives its core away: it may be the one that is needed. */
static void barrier(ternq_decoder *d)
{
    unsigned phase = atomic_load_explicit(&d->phase, memory_order_relaxed);
    unsigned before = atomic_fetch_add_explicit(&d->arrived, 1, memory_order_acq_rel);
    if (before + 1 == (unsigned)d->threads) {
        atomic_store_explicit(&d->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&d->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&d->phase, memory_order_acquire) == phase; spins++)
        if (spins < 2000)
            pause_core();
        else
            sched_yield();
}

/* Waits for the next pass: spinning for the time that a sampler takes, then asleep. */
static int next_turn(ternq_decoder *d, unsigned seen)
{
    for (int spins = 0; spins < 10000; spins++) {
        if (atomic_load_explicit(&d->turn, memory_order_acquire) != seen)
            return !d->leaving;
        pause_core();
    }
    pthread_mutex_lock(&d->lock);
    while (atomic_load_explicit(&d->turn, memory_order_acquire) == seen)
        pthread_cond_wait(&d->wake, &d->lock);
    pthread_mutex_unlock(&d->lock);
    return !d->leaving;
}

static void give_turn(ternq_decoder *d)
{
    pthread_mutex_lock(&d->lock);
    atomic_fetch_add_explicit(&d->turn, 1, memory_order_release);
    pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->lock);
}

/* -- vectors --------------------------------------------------------------------------------------- */

static INLINE vec load(const float *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

static INLINE vec splat(float value) { return (vec){0} + value; }

static INLINE float sum(vec v)
{
    float total = 0;
    for (int i = 0; i < WIDTH; i++)
        total += v[i];
    return total;
}

static INLINE vec choose(bits mask, vec yes, vec no)
{
    return (vec)((mask & (bits)yes) | (~mask & (bits)no));
}

/* e^x within 2 units in the last place, for x from -87 to 88; beyond, the value at the bound. x is
 * n ln 2 + r, and e^r a Taylor polynomial. */
static INLINE vec exponential(vec x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    x = choose((bits)(x > splat(88.0f)), splat(88.0f), x);
    x = choose((bits)(x < splat(-87.0f)), splat(-87.0f), x);
    vec t = x * 1.44269504f + round;
    vec n = t - round;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec e = splat(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 7; i++)
        e = e * r + terms[i];
    return (vec)((bits)e + ((bits)t << 23));
}

static INLINE float half_to_float(uint16_t half)
{
    uint32_t low = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    memcpy(&value, &low, 4);
    value *= 0x1p112f; /* float16's exponent is smaller by 112; exact for subnormals too */
    memcpy(&low, &value, 4);
    low |= sign;
    memcpy(&value, &low, 4);
    return value;
}

/* WIDTH consecutive entries of a row of a table, not of int8. */
static INLINE vec entries(const void *row, int64_t at, int64_t dtype)
{
    halves h;
    if (dtype == TERNQ_FLOAT32)
        return load((const float *)row + at);
    memcpy(&h, (const uint16_t *)row + at, sizeof h);
    bits wide = __builtin_convertvector(h, bits);
    if (dtype == TERNQ_BFLOAT16)
        return (vec)(wide << 16);
    vec value = (vec)((wide & 0x7fff) << 13) * 0x1p112f;
    return (vec)((bits)value | (wide & 0x8000) << 16);
}

static INLINE float entry(const void *row, int64_t at, int64_t dtype)
{
    if (dtype == TERNQ_FLOAT32)
        return ((const float *)row)[at];
    if (dtype == TERNQ_TABLE_INT8)
        return ((const int8_t *)row)[at];
    uint16_t half = ((const uint16_t *)row)[at];
    if (dtype == TERNQ_FLOAT16)
        return half_to_float(half);
    uint32_t wide = (uint32_t)half << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static const void *table_row(const ternq_table *t, int64_t row, int64_t columns)
{
    const int64_t size[] = {4, 2, 2, 1};
    return (const char *)t->rows + row * columns * size[t->dtype];
}

/* -- what a step is made of ------------------------------------------------------------------------ */

/* The share of thread `id` in `total` things: the first, and one beyond the last. */
static INLINE void share(const ternq_decoder *d, int id, int64_t total, int64_t *a, int64_t *b)
{
    *a = total * id / d->threads;
    *b = total * (id + 1) / d->threads;
}

static INLINE void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    vec squares = {0};
    float total = 0;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        squares += load(x + i) * load(x + i);
    for (; i < n; i++)
        total += x[i] * x[i];
    float scale = 1.0f / sqrtf((total + sum(squares)) / (float)n + eps);
    for (i = 0; i < n; i++)
        y[i] = weight[i] * (x[i] * scale);
}

static INLINE void norm_tokens(ternq_decoder *d, int id, const float *weight)
{
    int64_t a, b, hidden = d->model.hidden;
    share(d, id, d->count, &a, &b);
    for (int64_t t = a; t < b; t++)
        rms_norm(d->x + t * hidden, weight, hidden, d->model.epsilon, d->normed + t * hidden);
    barrier(d);
}

/* Rows of the embedding; cosines and sines of the positions. */
static INLINE void begin(ternq_decoder *d, int id)
{
    const ternq_model *m = &d->model;
    int64_t a, b, half = m->head_dim / 2;
    share(d, id, d->count, &a, &b);
    for (int64_t t = a; t < b; t++) {
        const void *row = table_row(&m->embedding, d->ids[t], m->hidden);
        int8_t scaled = m->embedding.dtype == TERNQ_TABLE_INT8;
        float scale = scaled ? half_to_float(m->embedding.scale[d->ids[t]]) : 1.0f;
        for (int64_t i = 0; i < m->hidden; i++)
            d->x[t * m->hidden + i] = scale * entry(row, i, m->embedding.dtype);
        float *angles = d->angles + t * m->head_dim;
        for (int64_t i = 0; i < half; i++) {
            float angle = (float)(d->position + t) * m->frequencies[i];
            angles[i] = cosf(angle) * m->rope_scale;
            angles[half + i] = sinf(angle) * m->rope_scale;
        }
    }
}

/* This thread's rows of x W' + bias, in `out` [count][returned number]; `first` is the first row. */
static INLINE int64_t product(ternq_decoder *d, int id, const ternq_matrix *w, const float *bias,
                              const float *x, float *out, int64_t *first)
{
    int64_t a, b;
    share(d, id, (w->rows + ROWS - 1) / ROWS, &a, &b);
    ternq_matrix own = *w;
    own.data += a * ternq_layout_bytes(ROWS, w->columns, w->group, w->has_shift);
    own.rows = (b * ROWS < w->rows ? b * ROWS : w->rows) - a * ROWS;
    *first = a * ROWS;
    if (own.rows <= 0)
        return 0;
    int status = ternq_matmul(&own, x, d->count, out, d->act, 1);
    if (status)
        atomic_store(&d->status, status);
    if (bias)
        for (int64_t t = 0; t < d->count; t++)
            for (int64_t r = 0; r < own.rows; r++)
                out[t * own.rows + r] += bias[*first + r];
    return own.rows;
}

/* y = x W' + bias, or y += it. */
static INLINE void linear(ternq_decoder *d, int id, const ternq_matrix *w, const float *bias,
                          const float *x, float *y, int add)
{
    float *out = d->scratch + id * d->each;
    int64_t first, rows = product(d, id, w, bias, x, out, &first);
    for (int64_t t = 0; t < d->count; t++) {
        float *to = y + t * w->rows + first;
        for (int64_t r = 0; r < rows; r++)
            to[r] = add ? to[r] + out[t * rows + r] : out[t * rows + r];
    }
}

/* inner = silu(x gate') * x up' */
static INLINE void gated(ternq_decoder *d, int id, const ternq_block *block)
{
    float *gate = d->scratch + id * d->each, *up;
    int64_t first, wide = d->model.wide;
    int64_t rows = product(d, id, &block->gate, block->gate_bias, d->normed, gate, &first);
    up = gate + d->count * rows;
    product(d, id, &block->up, block->up_bias, d->normed, up, &first);
    for (int64_t t = 0; t < d->count; t++)
        for (int64_t r = 0; r < rows; r += WIDTH) {
            const float *g = gate + t * rows + r, *u = up + t * rows + r;
            float *to = d->inner + t * wide + first + r;
            if (r + WIDTH <= rows)
                store(to, load(g) * load(u) / (1.0f + exponential(-load(g))));
            else
                for (int64_t i = 0; i < rows - r; i++)
                    to[i] = g[i] * u[i] / (1.0f + expf(-g[i]));
        }
}

static INLINE void rotate(float *head, const float *angles, int64_t size)
{
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * angles[i] - b * angles[half + i];
        head[half + i] = b * angles[i] + a * angles[half + i];
    }
}

/* Where the cache of a layer's kv head begins. */
static INLINE int64_t cached(const ternq_decoder *d, int64_t layer, int64_t head)
{
    return (layer * d->model.kv_heads + head) * d->context * d->padded;
}

/* Turns queries and keys, and puts keys and values into the cache. */
static INLINE void place(ternq_decoder *d, int id, int64_t layer)
{
    const ternq_model *m = &d->model;
    const ternq_block *block = m->blocks + layer;
    int64_t a, b, size = m->head_dim, each = m->heads + m->kv_heads;
    share(d, id, d->count * each, &a, &b);
    for (int64_t task = a; task < b; task++) {
        int64_t t = task / each, h = task % each, at = d->position + t, kv = h - m->heads;
        const float *angles = d->angles + t * size, *norm = kv < 0 ? block->q_norm : block->k_norm;
        float *own = kv < 0 ? d->q + (t * m->heads + h) * size : d->k + (t * m->kv_heads + kv) * size;
        if (norm)
            rms_norm(own, norm, size, m->epsilon, own);
        rotate(own, angles, size);
        if (kv < 0)
            continue;
        float *keys = d->keys + cached(d, layer, kv) + at / WIDTH * WIDTH * d->padded + at % WIDTH;
        float *values = d->values + cached(d, layer, kv) + at * d->padded;
        for (int64_t i = 0; i < size; i++)
            keys[i * WIDTH] = own[i];
        memcpy(values, d->v + (t * m->kv_heads + kv) * size, (size_t)size * sizeof(float));
    }
}

/* exp(q K' / sqrt(size) - the highest) over n positions, into p [n up to a multiple of WIDTH];
 * returns their sum. */
static INLINE float weigh(const float *q, const float *keys, int64_t n, int64_t size,
                          int64_t padded, float *p)
{
    float scale = 1.0f / sqrtf((float)size), highest = -INFINITY;
    vec top = splat(-INFINITY), total = {0};
    for (int64_t j = 0; j < n; j += WIDTH) {
        const float *column = keys + j * padded;
        vec part[4] = {{0}, {0}, {0}, {0}};
        int64_t i = 0;
        for (; i + 4 <= size; i += 4) {
            for (int line = 0; line < 4 * WIDTH; line += 16)
                __builtin_prefetch(column + i * WIDTH + line + AHEAD / 4);
            for (int u = 0; u < 4; u++)
                part[u] += q[i + u] * load(column + (i + u) * WIDTH);
        }
        for (; i < size; i++)
            part[0] += q[i] * load(column + i * WIDTH);
        store(p + j, scale * ((part[0] + part[1]) + (part[2] + part[3])));
    }
    for (int64_t j = n; j % WIDTH; j++)
        p[j] = -INFINITY;
    for (int64_t j = 0; j < n; j += WIDTH)
        top = choose((bits)(load(p + j) > top), load(p + j), top);
    for (int u = 0; u < WIDTH; u++)
        highest = top[u] > highest ? top[u] : highest;
    for (int64_t j = 0; j < n; j += WIDTH) {
        vec e = exponential(load(p + j) - highest);
        total += e;
        store(p + j, e);
    }
    return sum(total);
}

/* y = sum of p_j values_j, over n positions, times `scale`. */
static INLINE void mix(const float *p, const float *values, int64_t n, int64_t size, int64_t padded,
                       float scale, float *y)
{
    int64_t i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) {
        vec part[4] = {{0}, {0}, {0}, {0}};
        for (int64_t j = 0; j < n; j++) {
            const float *from = values + j * padded + i;
            for (int line = 0; line < 4 * WIDTH; line += 16)
                __builtin_prefetch(from + line + AHEAD / 4);
            for (int u = 0; u < 4; u++)
                part[u] += p[j] * load(from + u * WIDTH);
        }
        for (int u = 0; u < 4; u++)
            store(y + i + u * WIDTH, scale * part[u]);
    }
    for (; i < size; i++) {
        y[i] = 0;
        for (int64_t j = 0; j < n; j++)
            y[i] += p[j] * values[j * padded + i];
        y[i] *= scale;
    }
}

/* Head by head, so that consecutive tasks read the same keys and values. */
static INLINE void attend(ternq_decoder *d, int id, int64_t layer)
{
    const ternq_model *m = &d->model;
    int64_t a, b, size = m->head_dim, shared = m->heads / m->kv_heads;
    float *p = d->scratch + id * d->each;
    share(d, id, d->count * m->heads, &a, &b);
    for (int64_t task = a; task < b; task++) {
        int64_t h = task / d->count, t = task % d->count, n = d->position + t + 1;
        int64_t from = cached(d, layer, h / shared), at = (t * m->heads + h) * size;
        float total = weigh(d->q + at, d->keys + from, n, size, d->padded, p);
        mix(p, d->values + from, n, size, d->padded, 1.0f / total, d->mixed + at);
    }
}

/* x [columns] in the order in which rows of int8 are taken: of 4 WIDTH columns every fourth from the
 * first, then every fourth from the second. */
static INLINE void by_fours(const float *x, int64_t columns, float *y)
{
    int64_t i = 0;
    for (; i + 4 * WIDTH <= columns; i += 4 * WIDTH)
        for (int u = 0; u < 4; u++)
            for (int lane = 0; lane < WIDTH; lane++)
                y[i + u * WIDTH + lane] = x[i + 4 * lane + u];
    for (; i < columns; i++)
        y[i] = x[i];
}

/* Rows first ... last - 1 of a table times each of n tokens x [n][columns] (by_fours for int8), to
 * y [n][rows]. A table is larger than any cache: rows are read in the order of memory, and asked for
 * well before they are needed. */
static INLINE void typed_rows(const ternq_table *t, int64_t dtype, const float *x, int64_t n,
                              int64_t columns, int64_t first, int64_t last, int64_t rows, float *y)
{
    const int64_t step = 4 * WIDTH;
    for (int64_t r = first; r < last; r++) {
        const char *row = table_row(t, r, columns), *end = table_row(t, r + 1, columns);
        for (const char *line = row; line < end; line += 64)
            __builtin_prefetch(line + AHEAD);
        for (int64_t token = 0; token < n; token++) {
            const float *own = x + token * columns;
            vec part[4] = {{0}, {0}, {0}, {0}};
            float total = 0;
            int64_t i = 0;
            for (; i + step <= columns; i += step)
                if (dtype == TERNQ_TABLE_INT8) { /* byte u of every word; compilers widen bytes slowly */
                    ints words;
                    memcpy(&words, row + i, sizeof words);
                    for (int u = 0; u < 4; u++)
                        part[u] += load(own + i + u * WIDTH) *
                                   __builtin_convertvector(words << (24 - 8 * u) >> 24, vec);
                } else {
                    for (int u = 0; u < 4; u++)
                        part[u] += load(own + i + u * WIDTH) * entries(row, i + u * WIDTH, dtype);
                }
            for (; i < columns; i++)
                total += own[i] * entry(row, i, dtype);
            total += sum((part[0] + part[1]) + (part[2] + part[3]));
            y[token * rows + r] = dtype == TERNQ_TABLE_INT8 ? total * half_to_float(t->scale[r]) : total;
        }
    }
}

static INLINE void table_rows(const ternq_table *t, const float *x, int64_t n, int64_t columns,
                              int64_t first, int64_t last, int64_t rows, float *y)
{
    if (t->dtype == TERNQ_FLOAT32)
        typed_rows(t, TERNQ_FLOAT32, x, n, columns, first, last, rows, y);
    else if (t->dtype == TERNQ_BFLOAT16)
        typed_rows(t, TERNQ_BFLOAT16, x, n, columns, first, last, rows, y);
    else if (t->dtype == TERNQ_FLOAT16)
        typed_rows(t, TERNQ_FLOAT16, x, n, columns, first, last, rows, y);
    else
        typed_rows(t, TERNQ_TABLE_INT8, x, n, columns, first, last, rows, y);
}

static INLINE void finish(ternq_decoder *d, int id)
{
    const ternq_model *m = &d->model;
    int64_t a, b;
    float *x = m->head.dtype == TERNQ_TABLE_INT8 ? d->x : d->normed;
    if (id == 0) {
        rms_norm(d->x + (d->count - 1) * m->hidden, m->norm, m->hidden, m->epsilon, d->normed);
        if (x != d->normed)
            by_fours(d->normed, m->hidden, x);
    }
    barrier(d);
    share(d, id, m->vocabulary, &a, &b);
    table_rows(&m->head, x, 1, m->hidden, a, b, m->vocabulary, d->logits);
}

/* A whole pass, as one thread walks through it. */
static INLINE void walk(ternq_decoder *d, int id)
{
    begin(d, id);
    barrier(d);
    for (int64_t layer = 0; layer < d->model.layers; layer++) {
        const ternq_block *block = d->model.blocks + layer;
        norm_tokens(d, id, block->input_norm);
        linear(d, id, &block->q, block->q_bias, d->normed, d->q, 0);
        linear(d, id, &block->k, block->k_bias, d->normed, d->k, 0);
        linear(d, id, &block->v, block->v_bias, d->normed, d->v, 0);
        barrier(d);
        place(d, id, layer);
        barrier(d);
        attend(d, id, layer);
        barrier(d);
        linear(d, id, &block->o, block->o_bias, d->mixed, d->x, 1);
        barrier(d);
        norm_tokens(d, id, block->post_norm);
        gated(d, id, block);
        barrier(d);
        linear(d, id, &block->down, block->down_bias, d->inner, d->x, 1);
        barrier(d);
    }
    if (d->logits)
        finish(d, id);
    barrier(d);
}

static void walk_portable(ternq_decoder *d, int id) { walk(d, id); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void walk_avx2(ternq_decoder *d, int id) { walk(d, id); }
#endif

static void pass(ternq_decoder *d, int id)
{
#if defined(__x86_64__)
    if (strcmp(ternq_isa(), "portable")) {
        walk_avx2(d, id);
        return;
    }
#endif
    walk_portable(d, id);
}

/* -- a table alone --------------------------------------------------------------------------------- */

typedef struct {
    const ternq_table *table;
    const float *x;
    float *y;
    int64_t n, columns, rows;
    atomic_llong next;
} table_task;

static INLINE void multiply_table(table_task *task)
{
    enum { SHARE = 256 }; /* rows; every thread reads on where it stands, as long as it can */
    for (;;) {
        int64_t first = atomic_fetch_add(&task->next, SHARE);
        int64_t last = first + SHARE < task->rows ? first + SHARE : task->rows;
        if (first >= task->rows)
            return;
        table_rows(task->table, task->x, task->n, task->columns, first, last, task->rows, task->y);
    }
}

static void table_portable(void *task) { multiply_table(task); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void table_avx2(void *task) { multiply_table(task); }
#endif

int ternq_table_product(const void *table, const uint16_t *scale, int64_t dtype, int64_t rows,
                        int64_t columns, const float *x, int64_t n, float *y, int threads)
{
    if (rows < 0 || columns < 1 || n < 0 || dtype < 0 || dtype > TERNQ_TABLE_INT8)
        return TERNQ_BAD;
    const ternq_table t = {table, scale, dtype};
    float *turned = NULL;
    if (dtype == TERNQ_TABLE_INT8) {
        turned = malloc((size_t)(n * columns) * sizeof(float) + 1);
        if (!turned)
            return TERNQ_MEMORY;
        for (int64_t token = 0; token < n; token++)
            by_fours(x + token * columns, columns, turned + token * columns);
        x = turned;
    }
    table_task task = {.table = &t, .x = x, .y = y, .n = n, .columns = columns, .rows = rows};
    void (*body)(void *) = table_portable;
#if defined(__x86_64__)
    if (strcmp(ternq_isa(), "portable"))
        body = table_avx2;
#endif
    ternq_parallel(body, &task, n * rows * columns < 1 << 18 ? 1 : threads);
    free(turned);
    return 0;
}

/* -- the decoder ----------------------------------------------------------------------------------- */

typedef struct {
    ternq_decoder *decoder;
    int id;
} worker_start;

static void *work(void *start)
{
    ternq_decoder *d = ((worker_start *)start)->decoder;
    int id = ((worker_start *)start)->id;
    free(start);
    for (unsigned seen = 0; next_turn(d, seen); seen++)
        pass(d, id);
    return NULL;
}

/* Zeros. What is large takes memory only where it is written. */
static float *floats(int64_t count) { return calloc((size_t)count + WIDTH, sizeof(float)); }

API void ternq_decoder_free(ternq_decoder *d)
{
    if (!d)
        return;
    if (d->started) {
        d->leaving = 1;
        give_turn(d);
        for (int i = 0; i < d->started; i++)
            pthread_join(d->workers[i], NULL);
    }
    float *all[] = {d->x,     d->normed, d->q,    d->k,      d->v,      d->mixed,
                    d->inner, d->angles, d->keys, d->values, d->scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    free(d->workers);
    pthread_mutex_destroy(&d->lock);
    pthread_cond_destroy(&d->wake);
    free(d);
}

static int allocate(ternq_decoder *d)
{
    const ternq_model *m = &d->model;
    int64_t n = d->batch, q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim;
    int64_t rows = 2 * (m->wide / d->threads + ROWS); /* gate and up, the largest share of rows */
    int64_t most = q > m->hidden ? q : m->hidden;
    if (most / d->threads + ROWS > rows)
        rows = most / d->threads + ROWS;
    d->each = n * rows > d->context ? n * rows : d->context;
    d->each += ROWS; /* no two threads write one line of cache */
    int64_t cache = m->layers * m->kv_heads * d->context * d->padded;
    d->x = floats(n * m->hidden);
    d->normed = floats(n * m->hidden);
    d->q = floats(n * q);
    d->k = floats(n * kv);
    d->v = floats(n * kv);
    d->mixed = floats(n * q);
    d->inner = floats(n * m->wide);
    d->angles = floats(n * m->head_dim);
    d->keys = floats(cache);
    d->values = floats(cache);
    d->scratch = floats(d->threads * d->each);
    d->workers = calloc((size_t)d->threads, sizeof(pthread_t));
    return d->x && d->normed && d->q && d->k && d->v && d->mixed && d->inner && d->angles &&
           d->keys && d->values && d->scratch && d->workers;
}

static int start_workers(ternq_decoder *d)
{
    for (int id = 1; id < d->threads; id++) {
        worker_start *start = malloc(sizeof *start);
        if (!start)
            return 0;
        *start = (worker_start){d, id};
        if (pthread_create(d->workers + d->started, NULL, work, start)) {
            free(start);
            return 0;
        }
        d->started++;
    }
    return 1;
}

/* A decoder with an empty cache of `context` positions, which takes up to `batch` tokens at a time.
 * It reads the model's arrays as long as it lives; the structure itself is copied, but for its
 * blocks. NULL: not enough memory, or threads. */
API ternq_decoder *ternq_decoder_new(const ternq_model *model, int64_t context, int64_t batch,
                                 int threads)
{
    ternq_decoder *d = calloc(1, sizeof *d);
    if (!d)
        return NULL;
    d->model = *model;
    d->context = (context + WIDTH - 1) / WIDTH * WIDTH;
    d->batch = batch;
    d->threads = threads;
    d->padded = (model->head_dim + WIDTH - 1) / WIDTH * WIDTH;
    pthread_mutex_init(&d->lock, NULL);
    pthread_cond_init(&d->wake, NULL);
    if (allocate(d) && start_workers(d))
        return d;
    ternq_decoder_free(d);
    return NULL;
}

/* Reads `count` ids at `position` and after, where those before it were read already (0 begins anew;
 * an earlier one forgets what came after), and writes the logits [vocabulary] after the last. */
API int ternq_decoder_step(ternq_decoder *d, const int64_t *ids, int64_t count, int64_t position,
                       int act, float *logits)
{
    if (count < 1 || position < 0 || position + count > d->context)
        return TERNQ_BAD;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= d->model.vocabulary)
            return TERNQ_BAD;
    d->act = act;
    atomic_store(&d->status, 0);
    for (int64_t done = 0; done < count; done += d->count) {
        d->count = count - done < d->batch ? count - done : d->batch;
        d->ids = ids + done;
        d->position = position + done;
        d->logits = done + d->count == count ? logits : NULL;
        give_turn(d);
        pass(d, 0);
    }
    return atomic_load(&d->status);
}
