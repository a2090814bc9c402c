/* From the file's form to the one in memory, back, and to numbers. */

#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

int ternq_shape_of(ternq_shape *s, int64_t rows, int64_t columns, int64_t group,
                   int64_t has_shift) {
    if (rows < 0 || columns < 1 || group < 1 || rows > INT32_MAX || columns > INT32_MAX) return TERNQ_BAD;
    group = min64(group, columns);
    int64_t groups = (columns + group - 1) / group, last = columns - (groups - 1) * group;
    s->rows = rows, s->columns = columns, s->group = group, s->groups = groups;
    s->has_shift = has_shift != 0;
    s->blocks = (rows + ROWS - 1) / ROWS;
    s->words = (groups - 1) * ((group + 15) / 16) + (last + 15) / 16;
    s->segments = (groups - 1) * ((group + SEGMENT - 1) / SEGMENT) + (last + SEGMENT - 1) / SEGMENT;
    s->header = (groups * ROWS * 2 * (1 + s->has_shift) + 63) / 64 * 64;
    s->stride = s->header + s->words * WORD;
    return 0;
}

int64_t ternq_layout_bytes(int64_t rows, int64_t columns, int64_t group, int64_t has_shift) {
    ternq_shape s;
    int status = ternq_shape_of(&s, rows, columns, group, has_shift);
    return status ? status : s.blocks * s.stride;
}

/* --- parallel passes over blocks --------------------------------------------------------------- */

typedef struct {
    const ternq_shape *s;
    uint8_t *data, *base3;
    uint16_t *scale, *shift;
    void *out;
    int64_t first, last;
    int dtype;
    int (*pass)(int64_t block, const void *task);
    atomic_llong next;
    atomic_int status;
} layout_task;

static void run_blocks(void *given) {
    layout_task *task = given;
    for (;;) {
        int64_t block = atomic_fetch_add(&task->next, 1);
        if (block >= (task->last + ROWS - 1) / ROWS) return;
        int status = task->pass(block, task);
        if (status) atomic_store(&task->status, status);
    }
}

static int over_blocks(layout_task *task, int threads) {
    atomic_init(&task->next, task->first / ROWS);
    atomic_init(&task->status, 0);
    int64_t weights = (task->last - task->first) * task->s->columns;
    ternq_parallel(run_blocks, task, ternq_threads(4 * weights, threads));
    return atomic_load(&task->status);
}

/* --- base-3 to words ----------------------------------------------------------------------------- */

static uint8_t five[256][8]; /* code + 1 of the five codes of a byte; 0 stands behind them */
static atomic_int five_ready;

static void make_five(void) { /* two threads may both do it: they write the same */
    if (atomic_load(&five_ready)) return;
    for (int byte = 0; byte < 256; byte++)
        for (int k = 4, rest = byte; k >= 0; k--, rest /= 3) five[byte][k] = (uint8_t)(rest % 3);
    atomic_store(&five_ready, 1);
}

/* Transposes 16 rows of 4-column pieces: a word from codes [16][width]. */
static void put_word(const uint8_t *codes, int64_t width, uint8_t *word) {
    for (int r = 0; r < ROWS; r++, codes += width) {
        uint32_t part[4];
        memcpy(part, codes, 16);
        uint32_t bits = part[0] | part[1] << 2 | part[2] << 4 | part[3] << 6;
        memcpy(word + 4 * r, &bits, 4);
    }
}

static int layout_block(int64_t block, const void *given) {
    const layout_task *task = given;
    const ternq_shape *s = task->s;
    int64_t bytes = (s->columns + 4) / 5, width = bytes * 5 + 19;
    uint8_t *data = task->data + block * s->stride;
    int64_t rows = min64(ROWS, s->rows - block * ROWS);
    uint8_t *codes = calloc((size_t)width, ROWS);
    if (!codes) return TERNQ_MEMORY;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *from = task->base3 + (block * ROWS + r) * bytes;
        uint8_t *to = codes + r * width;
        for (int64_t i = 0; i < bytes; i++, to += 5) memcpy(to, five[from[i]], 8);
    }
    memset(data, 0, (size_t)s->header);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < s->groups; g++) {
            int64_t at = (block * ROWS + r) * s->groups + g;
            memcpy(data + 2 * (g * ROWS + r), task->scale + at, 2);
            if (s->has_shift) memcpy(data + 2 * ((s->groups + g) * ROWS + r), task->shift + at, 2);
        }
    uint8_t *word = data + s->header;
    for (int64_t g = 0; g < s->groups; g++)
        for (int64_t i = 0; i < group_words(s, g); i++, word += WORD)
            put_word(codes + g * s->group + 16 * i, width, word);
    free(codes);
    return 0;
}

int ternq_layout(const uint8_t *base3, const uint16_t *scale, const uint16_t *shift, int64_t rows,
                 int64_t columns, int64_t group, uint8_t *data, int threads) {
    ternq_shape s;
    int status = ternq_shape_of(&s, rows, columns, group, shift != NULL);
    if (status) return status;
    make_five();
    layout_task task = {.s = &s, .data = data, .base3 = (uint8_t *)base3, .scale = (uint16_t *)scale,
                        .shift = (uint16_t *)shift, .last = rows, .pass = layout_block};
    return over_blocks(&task, threads);
}

/* --- back ------------------------------------------------------------------------------------------ */

/* The codes + 1 of one row. */
static void read_row(const ternq_shape *s, const uint8_t *words, int64_t r, uint8_t *codes) {
    for (int64_t g = 0; g < s->groups; g++) {
        int64_t width = group_width(s, g);
        for (int64_t c = 0; c < width; c += 16, words += WORD) {
            uint32_t bits, part[4];
            memcpy(&bits, words + 4 * r, 4);
            for (int f = 0; f < 4; f++) part[f] = bits >> 2 * f & 0x03030303;
            memcpy(codes + g * s->group + c, part, (size_t)min64(16, width - c));
        }
    }
}

static int restore_block(int64_t block, const void *given) {
    const layout_task *task = given;
    const ternq_shape *s = task->s;
    int64_t bytes = (s->columns + 4) / 5;
    const uint8_t *data = task->data + block * s->stride;
    uint8_t *codes = malloc((size_t)bytes * 5);
    if (!codes) return TERNQ_MEMORY;
    memset(codes, 1, (size_t)bytes * 5); /* rows are filled up with code 0 */
    for (int64_t r = 0; r < min64(ROWS, s->rows - block * ROWS); r++) {
        int64_t row = block * ROWS + r;
        read_row(s, data + s->header, r, codes);
        for (int64_t i = 0; i < bytes; i++) {
            const uint8_t *c = codes + 5 * i;
            task->base3[row * bytes + i] = (uint8_t)(81 * c[0] + 27 * c[1] + 9 * c[2] + 3 * c[3] + c[4]);
        }
        for (int64_t g = 0; g < s->groups; g++) {
            memcpy(task->scale + row * s->groups + g, data + 2 * (g * ROWS + r), 2);
            if (s->has_shift)
                memcpy(task->shift + row * s->groups + g, data + 2 * ((s->groups + g) * ROWS + r), 2);
        }
    }
    free(codes);
    return 0;
}

int ternq_restore(const ternq_matrix *w, uint8_t *base3, uint16_t *scale, uint16_t *shift,
                  int threads) {
    ternq_shape s;
    int status = ternq_shape_of(&s, w->rows, w->columns, w->group, w->has_shift);
    if (status) return status;
    layout_task task = {.s = &s, .data = (uint8_t *)w->data, .base3 = base3, .scale = scale,
                        .shift = shift, .last = w->rows, .pass = restore_block};
    return over_blocks(&task, threads);
}

/* --- numbers --------------------------------------------------------------------------------------- */

/* Puts one of three values, of 16 or 32 bits, for every code + 1; without branches, for speed. */
#define PUT_VALUES(type)                                                                          \
    static void put_##type(const uint8_t *codes, int64_t n, const void *three, void *out) {       \
        type v[3], *to = out;                                                                     \
        memcpy(v, three, sizeof v);                                                               \
        const type low = v[0] ^ v[1], high = v[2] ^ v[1];                                         \
        for (int64_t c = 0; c < n; c++)                                                           \
            to[c] = (type)(v[1] ^ (low & -(type)(codes[c] == 0)) ^ (high & -(type)(codes[c] == 2))); \
    }
PUT_VALUES(uint16_t)
PUT_VALUES(uint32_t)

static int dense_block(int64_t block, const void *given) {
    const layout_task *task = given;
    const ternq_shape *s = task->s;
    const uint8_t *data = task->data + block * s->stride;
    uint8_t *codes = malloc((size_t)s->columns);
    if (!codes) return TERNQ_MEMORY;
    const int64_t size = (int64_t)ternq_size_of(task->dtype);
    const int64_t last = min64(task->last, (block + 1) * ROWS);
    for (int64_t row = block * ROWS < task->first ? task->first : block * ROWS; row < last; row++) {
        const int64_t r = row % ROWS;
        char *out = (char *)task->out + (row - task->first) * s->columns * size;
        read_row(s, data + s->header, r, codes);
        for (int64_t g = 0; g < s->groups; g++) {
            uint16_t half[2] = {0, 0};
            memcpy(half, data + 2 * (g * ROWS + r), 2);
            if (s->has_shift) memcpy(half + 1, data + 2 * ((s->groups + g) * ROWS + r), 2);
            const float scale = ternq_half(half[0]), shift = ternq_half(half[1]);
            const float values[3] = {s->has_shift ? shift - scale : -scale, shift, scale + shift};
            float three[3];
            ternq_from_float(values, three, 3, task->dtype);
            void *to = out + g * s->group * size;
            if (size == 2) put_uint16_t(codes + g * s->group, group_width(s, g), three, to);
            else put_uint32_t(codes + g * s->group, group_width(s, g), three, to);
        }
    }
    free(codes);
    return 0;
}

int ternq_dense(const ternq_matrix *w, int64_t first, int64_t last, void *out, int dtype,
                int threads) {
    ternq_shape s;
    int status = ternq_shape_of(&s, w->rows, w->columns, w->group, w->has_shift);
    if (status) return status;
    if (first < 0 || last > w->rows || !ternq_size_of(dtype)) return TERNQ_BAD;
    if (last <= first) return 0;
    layout_task task = {.s = &s, .data = (uint8_t *)w->data, .out = out, .first = first,
                        .last = last, .dtype = dtype, .pass = dense_block};
    return over_blocks(&task, threads);
}

/* --- types ------------------------------------------------------------------------------------------ */

size_t ternq_size_of(int dtype) {
    return dtype == TERNQ_FLOAT32 ? 4 : dtype == TERNQ_BFLOAT16 || dtype == TERNQ_FLOAT16 ? 2 : 0;
}

/* A float16 is a float32 whose exponent counts from another place: a multiplication moves it. */
float ternq_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float value;
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000; /* infinity, NaN */
    memcpy(&value, &bits, 4);
    if ((half & 0x7c00) != 0x7c00) value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

static uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and above are infinite */
    if (bits < 0x38800000) { /* below 2^-14 the last bit is 2^-24: let an addition round */
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112 << 10));
}

static uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void ternq_to_float(const void *from, float *to, int64_t n, int dtype) {
    const uint16_t *halves = from;
    if (dtype == TERNQ_FLOAT32) memcpy(to, from, (size_t)n * 4);
    if (dtype == TERNQ_FLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = ternq_half(halves[i]);
    if (dtype == TERNQ_BFLOAT16)
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = (uint32_t)halves[i] << 16;
            memcpy(to + i, &bits, 4);
        }
}

void ternq_from_float(const float *from, void *to, int64_t n, int dtype) {
    uint16_t *halves = to;
    if (dtype == TERNQ_FLOAT32) memcpy(to, from, (size_t)n * 4);
    if (dtype == TERNQ_FLOAT16)
        for (int64_t i = 0; i < n; i++) halves[i] = to_half(from[i]);
    if (dtype == TERNQ_BFLOAT16)
        for (int64_t i = 0; i < n; i++) halves[i] = to_bfloat(from[i]);
}
