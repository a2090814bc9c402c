/* A random decoder, stepped by one thread and by several: the same logits, and nothing for a
 * sanitizer to complain of. test_decoder.py compiles it with the C files of the package. */
#include "decode.c"

#include <stdio.h>

enum { HIDDEN = 44, WIDE = 50, HEADS = 4, KV = 2, SIZE = 20, WORDS = 61, LAYERS = 2, GROUP = 16 };
enum { CONTEXT = 45, BATCH = 8 };

static uint32_t state = 1;

static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }

static void *kept[200]; /* so that what is never freed is no leak */

static void *keep(void *memory)
{
    static int count;
    return kept[count++] = memory;
}

/* Exactly as many bytes as are needed, so that a read beyond them is found. */
static void *filled(int64_t count, int type)
{
    void *data = keep(malloc((size_t)count * (type == 0 ? 4 : type == 3 ? 1 : 2)));
    for (int64_t i = 0; i < count; i++) {
        float value = (float)(draw() >> 8) / (1 << 23) - 1;
        if (type == 0)
            ((float *)data)[i] = value;
        else if (type == 1)
            ((uint16_t *)data)[i] = (uint16_t)(0x3c00 | draw() >> 25); /* bfloat16, small */
        else if (type == 2)
            ((uint16_t *)data)[i] = (uint16_t)(0x2000 | draw() >> 23); /* float16, small */
        else
            ((int8_t *)data)[i] = (int8_t)(draw() >> 24);
    }
    return data;
}

static ternq_matrix matrix(int64_t rows, int64_t columns)
{
    int64_t groups = (columns + GROUP - 1) / GROUP, width = (columns + 4) / 5;
    uint8_t *base3 = malloc((size_t)(rows * width)), *data;
    uint16_t *scale = filled(rows * groups, 2), *shift = filled(rows * groups, 2);
    int64_t size = ternq_layout_bytes(rows, columns, GROUP, 1);
    for (int64_t i = 0; i < rows * width; i++)
        base3[i] = (uint8_t)(draw() % 243);
    data = keep(aligned_alloc(64, (size_t)(size + 63) / 64 * 64));
    if (ternq_layout(base3, scale, shift, rows, columns, GROUP, data, 1))
        exit(2);
    free(base3);
    return (ternq_matrix){rows, columns, GROUP, 1, data};
}

static ternq_block block(void)
{
    int64_t q = HEADS * SIZE, kv = KV * SIZE;
    return (ternq_block){
        .q = matrix(q, HIDDEN),       .k = matrix(kv, HIDDEN),     .v = matrix(kv, HIDDEN),
        .o = matrix(HIDDEN, q),       .gate = matrix(WIDE, HIDDEN), .up = matrix(WIDE, HIDDEN),
        .down = matrix(HIDDEN, WIDE), .q_bias = filled(q, 0),      .up_bias = filled(WIDE, 0),
        .input_norm = filled(HIDDEN, 0), .post_norm = filled(HIDDEN, 0),
        .q_norm = filled(SIZE, 0),    .k_norm = filled(SIZE, 0)};
}

/* Logits of a prompt, of single steps up to the end of the context, and after going back. */
static void walk_through(const ternq_model *m, int threads, int act, float *out)
{
    int64_t ids[CONTEXT];
    ternq_decoder *d = ternq_decoder_new(m, CONTEXT, BATCH, threads);
    for (int i = 0; i < CONTEXT; i++)
        ids[i] = (i * 7) % WORDS;
    int bad = !d || ternq_decoder_step(d, ids, 20, 0, act, out);
    for (int i = 20; i < CONTEXT; i++)
        bad |= ternq_decoder_step(d, ids + i, 1, i, act, out + WORDS);
    bad |= ternq_decoder_step(d, ids, 11, 9, act, out + 2 * WORDS);
    bad |= ternq_decoder_step(d, ids, 7, CONTEXT, act, out) != TERNQ_BAD;
    ternq_decoder_free(d);
    if (bad)
        exit(3);
}

int main(void)
{
#ifdef ISA
    if (ternq_set_isa(ISA))
        return 4;
#endif
    ternq_block blocks[LAYERS] = {block(), block()};
    ternq_model m = {LAYERS, HIDDEN, HEADS, KV, SIZE, WIDE, WORDS, 1e-6f, 1.0f,
                     filled(SIZE / 2, 0), filled(HIDDEN, 0), blocks, {0}, {0}};
    uint16_t *scale = filled(WORDS, 2);
    for (int type = 0; type < 4; type++) {
        m.embedding = m.head = (ternq_table){filled(WORDS * HIDDEN, type), scale, type};
        for (int act = 0; act < 2; act++) {
            float one[3 * WORDS], several[3 * WORDS];
            walk_through(&m, 1, act, one);
            walk_through(&m, 3, act, several);
            for (int i = 0; i < 3 * WORDS; i++)
                if (!(one[i] == several[i]) || !isfinite(one[i]))
                    return 1;
        }
    }
    puts("alike");
    return 0;
}
