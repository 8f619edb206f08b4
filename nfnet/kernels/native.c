/* Loops of one pass over memory for the CPU: weight standardisation, scaled activations, and the update.
 *
 * reference.py defines the arithmetic of each in plain torch; cpu.py binds them. Tensors come as dense memory:
 * (rows, n) where a row is one output unit, or flat. Nothing here allocates, and a row is worked on by one thread, so
 * results do not depend on the number of threads. Compiled for several instruction sets; the loader takes the best.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define VECTORISED __attribute__((noinline))
#endif
#define EXPORT __attribute__((visibility("default")))
#define SMALL 32768 /* elements below which threads cost more than they save */

/* Number of this file's interface: raised with every change of an exported function's arguments, here and in cpu.py, which
 * takes no library with another number. */
EXPORT int nf_interface(void) { return 2; }

/* ---- bfloat16 ---- */
static inline float widen(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t narrow(float f) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)0x7fc0 : (uint16_t)rounded;
}

/* ---- weight standardisation ---- */
VECTORISED static void row_moments(const float *w, int64_t n, float *mean, float *var) {
    float sum = 0.0f, squares = 0.0f;
    for (int64_t j = 0; j < n; j++) sum += w[j];
    const float m = sum / (float)n;
    for (int64_t j = 0; j < n; j++) squares += (w[j] - m) * (w[j] - m);
    *mean = m;
    *var = squares / (float)n;
}

VECTORISED static void row_scaled(const float *w, float m, float s, float *out, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = (w[j] - m) * s;
}

VECTORISED static void row_scaled_half(const float *w, float m, float s, uint16_t *out, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = narrow((w[j] - m) * s);
}

/* A row (channels, positions) written as (positions, channels), what a channels-last convolution reads. */
VECTORISED static void row_scaled_turned(const float *w, float m, float s, float *out, int64_t channels, int64_t positions) {
    for (int64_t p = 0; p < positions; p++)
        for (int64_t c = 0; c < channels; c++) out[p * channels + c] = (w[c * positions + p] - m) * s;
}

VECTORISED static void row_scaled_turned_half(const float *w, float m, float s, uint16_t *out, int64_t channels,
                                              int64_t positions) {
    for (int64_t p = 0; p < positions; p++)
        for (int64_t c = 0; c < channels; c++) out[p * channels + c] = narrow((w[c * positions + p] - m) * s);
}

/* positions: 0 where out lies in memory as w does, else the kernel's size, and a row is turned. */
EXPORT void nf_standardise(const float *w, const float *gain, void *out, int half, float *mean, float *rstd,
                           uint8_t *floored, int64_t rows, int64_t n, int64_t positions, float floor_, float added_eps) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (int64_t i = 0; i < rows; i++) {
        float m, var;
        row_moments(w + i * n, n, &m, &var);
        const float scaled = added_eps < 0 ? var * (float)n : (var + added_eps) * (float)n;
        const int low = added_eps < 0 && scaled < floor_;
        const float r = 1.0f / sqrtf(low ? floor_ : scaled);
        mean[i] = m;
        rstd[i] = r;
        floored[i] = (uint8_t)low;
        if (positions && half)
            row_scaled_turned_half(w + i * n, m, r * gain[i], (uint16_t *)out + i * n, n / positions, positions);
        else if (positions)
            row_scaled_turned(w + i * n, m, r * gain[i], (float *)out + i * n, n / positions, positions);
        else if (half)
            row_scaled_half(w + i * n, m, r * gain[i], (uint16_t *)out + i * n, n);
        else
            row_scaled(w + i * n, m, r * gain[i], (float *)out + i * n, n);
    }
}

VECTORISED static void row_products(const float *g, const float *w, float m, int64_t n, float *sum, float *product) {
    float a = 0.0f, b = 0.0f;
    for (int64_t j = 0; j < n; j++) {
        a += g[j];
        b += g[j] * (w[j] - m);
    }
    *sum = a;
    *product = b;
}

VECTORISED static void row_back(const float *g, const float *w, float m, float a, float b, float c, float *out, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = a * (g[j] - b) - c * (w[j] - m);
}

VECTORISED static void row_widen(const uint16_t *from, float *to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = widen(from[j]);
}

VECTORISED static void row_turned_back(const float *from, float *to, int64_t channels, int64_t positions) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < positions; p++) to[c * positions + p] = from[p * channels + c];
}

VECTORISED static void row_turned_back_half(const uint16_t *from, float *to, int64_t channels, int64_t positions) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < positions; p++) to[c * positions + p] = widen(from[p * channels + c]);
}

/* grad_w may be the memory of grad_out where that is fp32 and not turned. */
EXPORT void nf_standardise_backward(const void *grad_out, int half, const float *w, const float *gain, const float *mean,
                                    const float *rstd, const uint8_t *floored, float *grad_w, float *grad_gain,
                                    int64_t rows, int64_t n, int64_t positions) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (int64_t i = 0; i < rows; i++) {
        const float *g = (const float *)grad_out + i * n;
        if (half || positions) { /* through the place of the result */
            if (positions && half)
                row_turned_back_half((const uint16_t *)grad_out + i * n, grad_w + i * n, n / positions, positions);
            else if (positions)
                row_turned_back(g, grad_w + i * n, n / positions, positions);
            else
                row_widen((const uint16_t *)grad_out + i * n, grad_w + i * n, n);
            g = grad_w + i * n;
        }
        float sum, product;
        row_products(g, w + i * n, mean[i], n, &sum, &product);
        const float r = rstd[i], a = r * gain[i];
        grad_gain[i] = r * product;
        row_back(g, w + i * n, mean[i], a, sum / (float)n, floored[i] ? 0.0f : a * r * r * product, grad_w + i * n, n);
    }
}

/* ---- scaled activations ---- */
static inline float exp_(float x) { /* relative error below 2e-7; a polynomial on [-ln 2 / 2, ln 2 / 2] */
    x = x > 87.0f ? 87.0f : (x < -87.0f ? -87.0f : x);
    const float k = rintf(x * 1.44269504088896341f);
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)k + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* tanh GELU as x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
#define TWO_U(x) (1.5957691216057308f * (x) * (1.0f + 0.044715f * (x) * (x)))
#define TWO_DU(x) (1.5957691216057308f * (1.0f + 0.134145f * (x) * (x)))

#define GELU(x) ((x) / (1.0f + exp_(-TWO_U(x))))
#define SILU(x) ((x) / (1.0f + exp_(-(x))))
#define RELU(x) ((x) > 0.0f ? (x) : ((x) != (x) ? (x) : 0.0f))

static inline float gelu_slope(float x) {
    const float s = 1.0f / (1.0f + exp_(-TWO_U(x)));
    return s + x * s * (1.0f - s) * TWO_DU(x);
}
static inline float silu_slope(float x) {
    const float s = 1.0f / (1.0f + exp_(-x));
    return s + x * s * (1.0f - s);
}
static inline float relu_slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }

#define ACTIVATION(NAME, VALUE, SLOPE)                                                                                     \
    VECTORISED static void NAME##_f(const float *x, float *y, int64_t n, float factor, float before) {                     \
        for (int64_t j = 0; j < n; j++) { const float v = x[j] * before; y[j] = VALUE(v) * factor; }                       \
    }                                                                                                                      \
    VECTORISED static void NAME##_h(const uint16_t *x, uint16_t *y, int64_t n, float factor, float before) {               \
        for (int64_t j = 0; j < n; j++) { const float v = widen(x[j]) * before; y[j] = narrow(VALUE(v) * factor); }        \
    }                                                                                                                      \
    VECTORISED static void NAME##_bf(const float *g, const float *x, float *out, int64_t n, float factor, float before) {  \
        for (int64_t j = 0; j < n; j++) out[j] = g[j] * SLOPE(x[j] * before) * (factor * before);                          \
    }                                                                                                                      \
    VECTORISED static void NAME##_bh(const uint16_t *g, const uint16_t *x, uint16_t *out, int64_t n, float factor,         \
                                     float before) {                                                                       \
        for (int64_t j = 0; j < n; j++)                                                                                    \
            out[j] = narrow(widen(g[j]) * SLOPE(widen(x[j]) * before) * (factor * before));                                \
    }
ACTIVATION(gelu, GELU, gelu_slope)
ACTIVATION(silu, SILU, silu_slope)
ACTIVATION(relu, RELU, relu_slope)

enum { CHUNK = 8192 };
enum { GELU_KIND = 0, SILU_KIND = 1, RELU_KIND = 2 };

EXPORT void nf_activation(int kind, const void *x, void *y, int half, int64_t n, float factor, float before) {
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t m = n - start < CHUNK ? n - start : CHUNK;
#define CALL(NAME)                                                                                                         \
    do {                                                                                                                   \
        if (half) NAME##_h((const uint16_t *)x + start, (uint16_t *)y + start, m, factor, before);                         \
        else NAME##_f((const float *)x + start, (float *)y + start, m, factor, before);                                    \
    } while (0)
        if (kind == GELU_KIND) CALL(gelu);
        else if (kind == SILU_KIND) CALL(silu);
        else CALL(relu);
#undef CALL
    }
}

EXPORT void nf_activation_backward(int kind, const void *g, const void *x, void *out, int half, int64_t n, float factor,
                                   float before) {
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t m = n - start < CHUNK ? n - start : CHUNK;
#define CALL(NAME)                                                                                                         \
    do {                                                                                                                   \
        if (half) NAME##_bh((const uint16_t *)g + start, (const uint16_t *)x + start, (uint16_t *)out + start, m, factor,  \
                            before);                                                                                       \
        else NAME##_bf((const float *)g + start, (const float *)x + start, (float *)out + start, m, factor, before);       \
    } while (0)
        if (kind == GELU_KIND) CALL(gelu);
        else if (kind == SILU_KIND) CALL(silu);
        else CALL(relu);
#undef CALL
    }
}

/* ---- a branch added to its shortcut: out = s + x * c, images channels-last, c one fp32 number a sample and channel ---- */
VECTORISED static void row_scaled_add(const float *s, const float *x, const float *c, float *out, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = s[j] + x[j] * c[j];
}

VECTORISED static void row_scaled_add_half(const uint16_t *s, const uint16_t *x, const float *c, uint16_t *out, int64_t n) {
    for (int64_t j = 0; j < n; j++) out[j] = narrow(widen(s[j]) + widen(x[j]) * c[j]);
}

VECTORISED static void row_scaled_add_back(const float *g, const float *x, const float *c, float *gx, float *gc, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        gx[j] = g[j] * c[j];
        gc[j] += g[j] * x[j];
    }
}

VECTORISED static void row_scaled_add_back_half(const uint16_t *g, const uint16_t *x, const float *c, uint16_t *gx, float *gc,
                                                int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        gx[j] = narrow(widen(g[j]) * c[j]);
        gc[j] += widen(g[j]) * widen(x[j]);
    }
}

EXPORT void nf_scaled_add(const void *s, const void *x, const float *c, void *out, int half, int64_t samples, int64_t pixels,
                          int64_t channels) {
#pragma omp parallel for schedule(static) if (samples * pixels * channels > SMALL)
    for (int64_t k = 0; k < samples * pixels; k++) {
        const int64_t at = k * channels;
        const float *of_sample = c + k / pixels * channels;
        if (half)
            row_scaled_add_half((const uint16_t *)s + at, (const uint16_t *)x + at, of_sample, (uint16_t *)out + at, channels);
        else
            row_scaled_add((const float *)s + at, (const float *)x + at, of_sample, (float *)out + at, channels);
    }
}

EXPORT void nf_scaled_add_backward(const void *g, const void *x, const float *c, void *gx, int half, float *gc,
                                   int64_t samples, int64_t pixels, int64_t channels) {
    const int64_t width = 256, parts = (channels + width - 1) / width; /* a thread sums a part of the channels */
#pragma omp parallel for schedule(static) if (samples * pixels * channels > SMALL)
    for (int64_t k = 0; k < samples * parts; k++) {
        const int64_t i = k / parts, first = k % parts * width, n = channels - first < width ? channels - first : width;
        const float *by = c + i * channels + first;
        float *sum = gc + i * channels + first;
        memset(sum, 0, (size_t)n * sizeof(float));
        for (int64_t p = 0; p < pixels; p++) {
            const int64_t at = (i * pixels + p) * channels + first;
            if (half)
                row_scaled_add_back_half((const uint16_t *)g + at, (const uint16_t *)x + at, by, (uint16_t *)gx + at, sum, n);
            else
                row_scaled_add_back((const float *)g + at, (const float *)x + at, by, (float *)gx + at, sum, n);
        }
    }
}

/* ---- norms and the update ---- */
VECTORISED static float row_squares(const float *x, int64_t n) {
    float sum = 0.0f;
    for (int64_t j = 0; j < n; j++) sum += x[j] * x[j];
    return sum;
}

/* A row in parts, so that a long one (a vector of a million elements) neither loses digits nor hangs on one thread. */
static float squares(const float *x, int64_t n) {
    double sum = 0.0;
    for (int64_t start = 0; start < n; start += CHUNK)
        sum += (double)row_squares(x + start, n - start < CHUNK ? n - start : CHUNK);
    return (float)sum;
}

/* Both loops below take all tensors of a network at once, tensor t of (rows[t], n[t]): threads meet once a call and not once
 * a tensor, and one that another program holds up has less to do. A row is still one thread's. */
static int64_t total(const int64_t *rows, const int64_t *n, int64_t count) {
    int64_t sum = 0;
    for (int64_t t = 0; t < count; t++) sum += rows[t] * n[t];
    return sum;
}

/* Rows that a thread takes at a time. */
static int64_t share(int64_t n) { return n < SMALL ? 1 + SMALL / (n + 1) : 1; }

/* sums: (rows of all tensors,), one tensor after the other. */
EXPORT void nf_square_sums(const float *const *x, float *sums, const int64_t *rows, const int64_t *n, int64_t count) {
#pragma omp parallel if (total(rows, n, count) > SMALL)
    {
        float *of_tensor = sums;
        for (int64_t t = 0; t < count; of_tensor += rows[t++]) {
#pragma omp for schedule(dynamic, share(n[t])) nowait
            for (int64_t i = 0; i < rows[t]; i++) of_tensor[i] = squares(x[t] + i * n[t], n[t]);
        }
    }
}

VECTORISED static void row_update(float *w, const float *g, float *m, float *e, int64_t n, float scale, float lr,
                                  float momentum, float decay, float drop) {
    if (e)
        for (int64_t j = 0; j < n; j++) {
            const float d = g[j] * scale + decay * w[j];
            const float v = momentum * m[j] + d;
            const float u = w[j] - lr * (d + momentum * v);
            m[j] = v;
            w[j] = u;
            e[j] += drop * (u - e[j]);
        }
    else
        for (int64_t j = 0; j < n; j++) {
            const float d = g[j] * scale + decay * w[j];
            const float v = momentum * m[j] + d;
            m[j] = v;
            w[j] -= lr * (d + momentum * v);
        }
}

static void update_part(float *w, const float *g, float *m, float *e, int64_t rows, int64_t n, int64_t k, const float *factors,
                        float lr, float momentum, float decay, float drop) {
    const int64_t i = rows > 1 ? k : 0, start = rows > 1 ? 0 : k * CHUNK;
    const int64_t size = rows > 1 ? n : (n - start < CHUNK ? n - start : CHUNK), at = i * n + start;
    row_update(w + at, g + at, m + at, e ? e + at : NULL, size, factors ? factors[i] : 1.0f, lr, momentum, decay, drop);
}

/* e: the averages, or NULL for none. factors: (rows of all tensors,) what each row's gradient is multiplied with, or NULL for 1. */
EXPORT void nf_update(float *const *w, const float *const *g, float *const *m, float *const *e, const int64_t *rows,
                      const int64_t *n, int64_t count, const float *factors, float lr, float momentum, float decay, float drop) {
#pragma omp parallel if (total(rows, n, count) > SMALL)
    {
        int64_t first = 0;
        for (int64_t t = 0; t < count; first += rows[t++]) {
            const int64_t parts = rows[t] > 1 ? rows[t] : (n[t] + CHUNK - 1) / CHUNK; /* a vector's are not its rows */
#pragma omp for schedule(dynamic, rows[t] > 1 ? share(n[t]) : 1) nowait
            for (int64_t k = 0; k < parts; k++)
                update_part(w[t], g[t], m[t], e ? e[t] : NULL, rows[t], n[t], k, factors ? factors + first : NULL, lr, momentum,
                            decay, drop);
        }
    }
}
