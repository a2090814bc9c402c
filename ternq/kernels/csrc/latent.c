/* Latent weights in training: rows are shared out to threads, groups are the instruction set's. */

#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

enum { SHARE = 1 << 16 }; /* weights that a thread takes at once */

typedef struct {
    const ternq_kernel *kernel;
    const ternq_latent *of;
    int64_t groups, step; /* rows that are taken at once */
    int backward;
    atomic_llong next;
    atomic_int status;
} latent_task;

static void *row_of(void *of, int64_t row, int64_t columns, int dtype) {
    return of ? (char *)of + (size_t)(row * columns) * ternq_size_of(dtype) : NULL;
}

static void round_row(const latent_task *task, int64_t row, float *room) {
    const ternq_latent *of = task->of;
    float *w = row_of(of->numbers, row, of->columns, of->dtype);
    char *values = row_of(of->values, row, of->columns, of->value_dtype);
    if (room) ternq_to_float(w, room, of->columns, of->dtype), w = room;
    for (int64_t g = 0; g < task->groups; g++) {
        const int64_t at = g * of->group, n = min64(of->group, of->columns - at);
        const float scale = of->scale ? of->scale[row * task->groups + g] : 0;
        const float shift = of->shift ? of->shift[row * task->groups + g] : 0;
        void *into = values ? values + (size_t)at * ternq_size_of(of->value_dtype) : NULL;
        task->kernel->ternarize(w + at, n, scale, shift, of->codes + row * of->columns + at, into,
                                of->value_dtype);
    }
}

static void descend_row(const latent_task *task, int64_t row, float *room) {
    const ternq_latent *of = task->of;
    float *from = row_of(of->numbers, row, of->columns, of->dtype), *g = from;
    void *into = row_of(of->values, row, of->columns, of->value_dtype);
    if (into && of->value_dtype == TERNQ_FLOAT32) g = into;
    else if (room) g = room;
    if (g != from) ternq_to_float(from, g, of->columns, of->dtype);
    for (int64_t i = 0; i < task->groups; i++) {
        const int64_t at = i * of->group, n = min64(of->group, of->columns - at);
        const int64_t group = row * task->groups + i;
        float sums[2];
        task->kernel->descend(g + at, of->codes + row * of->columns + at, n, of->scale[group],
                              into && of->ttq, sums);
        if (of->to_scale) of->to_scale[group] = sums[0];
        if (of->to_shift) of->to_shift[group] = sums[1];
    }
    if (into && g != into) ternq_from_float(g, into, of->columns, of->value_dtype);
}

static void run_rows(void *given) {
    latent_task *task = given;
    const ternq_latent *of = task->of;
    const int as_it_is = of->dtype == TERNQ_FLOAT32 && !(task->backward && of->values);
    float *room = as_it_is ? NULL : malloc((size_t)of->columns * sizeof(float));
    if (!as_it_is && !room) {
        atomic_store(&task->status, TERNQ_MEMORY);
        return;
    }
    for (;;) {
        int64_t row = atomic_fetch_add(&task->next, task->step);
        if (row >= of->rows) break;
        for (int64_t last = min64(row + task->step, of->rows); row < last; row++)
            task->backward ? descend_row(task, row, room) : round_row(task, row, room);
    }
    free(room);
}

static int over_rows(const ternq_latent *of, int backward, int threads) {
    if (of->rows < 0 || of->columns < 1 || of->group < 1) return TERNQ_BAD;
    if (!ternq_size_of(of->dtype) || (of->values && !ternq_size_of(of->value_dtype))) return TERNQ_BAD;
    const int64_t step = SHARE / of->columns;
    latent_task task = {.kernel = ternq_kernel_in_use(), .of = of, .backward = backward,
                        .groups = (of->columns + of->group - 1) / of->group,
                        .step = step < 1 ? 1 : step};
    ternq_parallel(run_rows, &task, ternq_threads(4 * of->rows * of->columns, threads));
    return atomic_load(&task.status);
}

int ternq_ternarize(const ternq_latent *of, int threads) { return over_rows(of, 0, threads); }

int ternq_descend(const ternq_latent *of, int threads) { return over_rows(of, 1, threads); }
