/* Included by an x86 file behind its one_token and many_tokens: each compiled for one plane and two. */

TARGET static void multiply(const ternq_shape *s, const uint8_t *block, const ternq_rounded *x,
                            int64_t first, int64_t tokens, float (*out)[ROWS]) {
    if (tokens == 1 && x->planes == 1) one_token(s, block, x, first, out[0], 1);
    else if (tokens == 1) one_token(s, block, x, first, out[0], 2);
    else if (x->planes == 1) many_tokens(s, block, x, first, tokens, out, 1);
    else many_tokens(s, block, x, first, tokens, out, 2);
}
