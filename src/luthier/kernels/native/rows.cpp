// Row-wise kernels of a decoder layer: norm, SwiGLU, rotary positions, and LoRA's products on the same rows.
#include "common.h"
#include <vector>

namespace {

// Store z in columns k .. k + rank of the row it was computed from (further columns become 0) and in saved.
template <class T>
void store_z(const Lora& l, const float* z, int64_t first, int64_t rows, int64_t k, T* out, int64_t ldo, T* saved) {
    for (int64_t r = 0; r < rows; r++) {
        T* row = out + (first + r) * ldo + k;
        for (int64_t j = 0; j < l.rank; j++) {
            put(z[r * l.rank + j], row[j]);
            saved[(first + r) * l.rank + j] = row[j];
        }
        for (int64_t j = l.rank; j < ldo - k; j++) put(0.0f, row[j]);
    }
}

// Sum of every thread's accumulator, in the order of threads.
void reduce(const float* parts, int threads, int64_t n, float* out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float s = 0;
        for (int t = 0; t < threads; t++) s += parts[t * n + i];
        out[i] = s;
    }
}

// make(first, rows, block): fill RB rows of k floats. Stores them and z into the extended rows.
template <class T, class Make>
void forward_rows(int64_t n, int64_t k, const Lora& l, T* out, int64_t ldo, T* saved, bool keep, Make make) {
#pragma omp parallel
    {
        std::vector<float> block(RB * k), dropped(RB * k), z(RB * std::max<int64_t>(1, l.rank));
        const Share share(n);
        for (int64_t i = share.first; i < share.last; i += RB) {
            const int64_t rows = std::min<int64_t>(RB, share.last - i);
            make(i, rows, block.data());
            if (keep)
                for (int64_t r = 0; r < rows; r++) narrow(&block[r * k], out + (i + r) * ldo, k);
            if (l.rank) {
                for (int64_t r = 0; r < rows; r++) l.drop.apply(i + r, &block[r * k], &dropped[r * k], k);
                lora_in(l, dropped.data(), k, z.data());
            }
            store_z(l, z.data(), i, rows, k, out, ldo, saved);
        }
    }
}

// make(first, rows, block): recompute the input rows. use(row, input, gradient): consume the gradient of one row.
template <class T, class Make, class Use>
void backward_rows(int64_t n, int64_t k, const Lora& l, const T* grad, int64_t ldg, float* grad_a, Make make, Use use) {
    const int threads = omp_get_max_threads();
    std::vector<float> parts(size_t(threads) * l.rank * k, 0.0f);
    int used = 1;
#pragma omp parallel
    {
#pragma omp single
        used = omp_get_num_threads();
        std::vector<float> block(RB * k), dropped(RB * k), back(RB * k), g(k), dz(RB * std::max<int64_t>(1, l.rank));
        float* mine = parts.data() + size_t(omp_get_thread_num()) * l.rank * k;
        const Share share(n);
        for (int64_t i = share.first; i < share.last; i += RB) {
            const int64_t rows = std::min<int64_t>(RB, share.last - i);
            make(i, rows, block.data());
            if (l.rank) {
                std::fill(dz.begin(), dz.end(), 0.0f);
                for (int64_t r = 0; r < rows; r++) {
                    widen(grad + (i + r) * ldg + k, &dz[r * l.rank], l.rank);
                    l.drop.apply(i + r, &block[r * k], &dropped[r * k], k);
                }
                lora_back(l, dz.data(), dropped.data(), k, back.data(), mine);
            }
            for (int64_t r = 0; r < rows; r++) {
                widen(grad + (i + r) * ldg, g.data(), k);
                if (l.rank) {
                    float* b = &back[r * k];
                    l.drop.apply(i + r, b, k);
                    for (int64_t c = 0; c < k; c++) g[c] += b[c];
                }
                use(i + r, &block[r * k], g.data());
            }
        }
    }
    if (l.rank) reduce(parts.data(), used, l.rank * k, grad_a);
}

template <class T>
void norm_row(const T* x, const T* w, float rstd, float* __restrict out, int64_t k) {
    for (int64_t c = 0; c < k; c++) out[c] = rounded<T>(to_float(w[c]) * rounded<T>(to_float(x[c]) * rstd));
}

template <class T>
void norm_forward(int64_t n, int64_t k, const T* x, const T* w, float eps, const Lora& l, T* out, int64_t ldo, T* saved,
                  float* rstd) {
    forward_rows(n, k, l, out, ldo, saved, true, [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) {
            const T* row = x + (first + r) * k;
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int64_t c = 0; c < k; c++) s += to_float(row[c]) * to_float(row[c]);
            rstd[first + r] = 1.0f / std::sqrt(s / k + eps);
            norm_row(row, w, rstd[first + r], block + r * k, k);
        }
    });
}

// out = residual + the norm's input gradient
template <class T>
void norm_backward(int64_t n, int64_t k, const T* x, const T* w, const float* rstd, const Lora& l, const T* grad,
                   int64_t ldg, const T* residual, T* out, float* grad_a) {
    auto make = [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) norm_row(x + (first + r) * k, w, rstd[first + r], block + r * k, k);
    };
    backward_rows(n, k, l, grad, ldg, grad_a, make, [&](int64_t row, const float*, float* g) {
        if (!out) return;
        const T *xr = x + row * k, *res = residual + row * k;
        T* o = out + row * k;
        const float s = rstd[row];
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < k; c++) {
            g[c] *= to_float(w[c]);
            dot += g[c] * to_float(xr[c]);
        }
        const float m = dot * s * s * s / k;
        for (int64_t c = 0; c < k; c++) put(to_float(res[c]) + g[c] * s - to_float(xr[c]) * m, o[c]);
    });
}

template <class T>
void silu_row(const T* __restrict gu, int64_t k, float* __restrict out) {
#pragma omp simd
    for (int64_t c = 0; c < k; c++) {
        const float g = to_float(gu[c]);
        out[c] = rounded<T>(rounded<T>(g * sigmoid(g)) * to_float(gu[k + c]));
    }
}

template <class T>
void swiglu_forward(int64_t n, int64_t k, const T* gu, const Lora& l, T* out, int64_t ldo, T* saved) {
    forward_rows(n, k, l, out, ldo, saved, true, [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) silu_row(gu + (first + r) * 2 * k, k, block + r * k);
    });
}

template <class T>
void swiglu_backward(int64_t n, int64_t k, const T* gu, const Lora& l, const T* grad, int64_t ldg, T* out, float* grad_a) {
    auto make = [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) silu_row(gu + (first + r) * 2 * k, k, block + r * k);
    };
    backward_rows(n, k, l, grad, ldg, grad_a, make, [&](int64_t row, const float*, const float* d) {
        const T* __restrict in = gu + row * 2 * k;
        T* __restrict o = out + row * 2 * k;
#pragma omp simd
        for (int64_t c = 0; c < k; c++) {
            const float g = to_float(in[c]), u = to_float(in[k + c]);
            const float s = sigmoid(g);
            put(d[c] * u * s * (1.0f + g * (1.0f - s)), o[c]);
            put(d[c] * g * s, o[k + c]);
        }
    });
}

template <class T>
void lora_forward(int64_t n, int64_t k, T* x, int64_t ld, const Lora& l, T* saved) {
    forward_rows(n, k, l, x, ld, saved, false, [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) widen(x + (first + r) * ld, block + r * k, k);
    });
}

template <class T>
void lora_backward(int64_t n, int64_t k, const T* x, int64_t ld, const Lora& l, const T* grad, int64_t ldg, T* out,
                   float* grad_a) {
    auto make = [&](int64_t first, int64_t rows, float* block) {
        for (int64_t r = 0; r < rows; r++) widen(x + (first + r) * ld, block + r * k, k);
    };
    backward_rows(n, k, l, grad, ldg, grad_a, make,
                  [&](int64_t row, const float*, const float* g) { narrow(g, out + row * k, k); });
}

// grad_b[m, rank] = grad[:, columns]^T z[:, ranks]; summed in fp32, transposed while summing
template <class T>
void lora_grad_b(int64_t n, int64_t m, const T* grad, int64_t ldg, const T* z, int64_t ldz, int64_t rank, float* grad_b) {
    const int threads = omp_get_max_threads();
    const int64_t wide = (m + W - 1) / W * W;
    std::vector<float> parts(size_t(threads) * rank * wide, 0.0f);
    int used = 1;
#pragma omp parallel
    {
#pragma omp single
        used = omp_get_num_threads();
        std::vector<float> g(RB * wide, 0.0f), zs(RB * rank);
        float* mine = parts.data() + size_t(omp_get_thread_num()) * rank * wide;
        const Share share(n);
        for (int64_t i = share.first; i < share.last; i += RB) {
            const int64_t rows = std::min<int64_t>(RB, share.last - i);
            for (int64_t r = 0; r < rows; r++) {
                widen(grad + (i + r) * ldg, &g[r * wide], m);
                widen(z + (i + r) * ldz, &zs[r * rank], rank);
            }
            product(rank, wide, rows, zs.data(), 1, rank, g.data(), wide, mine, wide, true);
        }
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < rank; j++) {
            float s = 0;
            for (int t = 0; t < used; t++) s += parts[(size_t(t) * rank + j) * wide + i];
            grad_b[i * rank + j] = s;
        }
}

// Pairs (i, i + half) or, interleaved, (2i, 2i + 1) rotated by the position's angle; back: by the negative angle.
template <class T>
void turn(T* x, const T* cos, const T* sin, int64_t rotary, bool interleaved, bool back) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        T &p = interleaved ? x[2 * i] : x[i], &q = interleaved ? x[2 * i + 1] : x[i + half];
        const float c = to_float(cos[i]), s = back ? -to_float(sin[i]) : to_float(sin[i]);
        const float a = to_float(p), b = to_float(q);
        put(a * c - b * s, p);
        put(b * c + a * s, q);
    }
}

template <class T>
void rotate(int64_t n, T* x, int64_t ld, int64_t heads, int64_t dim, int64_t rotary, int interleaved, int back,
            const T* cos, const T* sin, int64_t ldc, const T* bias, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < n; t++) {
        T* row = x + t * ld;
        if (bias)
            for (int64_t c = 0; c < width; c++) put(to_float(row[c]) + to_float(bias[c]), row[c]);
        for (int64_t h = 0; h < heads; h++) turn(row + h * dim, cos + t * ldc, sin + t * ldc, rotary, interleaved, back);
    }
}

}  // namespace

#define LORA const int64_t rank, const float *a, const float *factor, uint32_t key, uint32_t threshold, const int64_t *places
#define LORA_VALUES Lora{rank, a, factor, Dropout{key, threshold, places}}
#define EXPORT(T, S)                                                                                                     \
    extern "C" void norm_forward_##S(int64_t n, int64_t k, const T* x, const T* w, float eps, LORA, T* out, int64_t ldo, \
                                     T* saved, float* rstd) {                                                            \
        norm_forward<T>(n, k, x, w, eps, LORA_VALUES, out, ldo, saved, rstd);                                            \
    }                                                                                                                    \
    extern "C" void norm_backward_##S(int64_t n, int64_t k, const T* x, const T* w, const float* rstd, LORA,             \
                                      const T* grad, int64_t ldg, const T* residual, T* out, float* grad_a) {            \
        norm_backward<T>(n, k, x, w, rstd, LORA_VALUES, grad, ldg, residual, out, grad_a);                               \
    }                                                                                                                    \
    extern "C" void swiglu_forward_##S(int64_t n, int64_t k, const T* gu, LORA, T* out, int64_t ldo, T* saved) {         \
        swiglu_forward<T>(n, k, gu, LORA_VALUES, out, ldo, saved);                                                       \
    }                                                                                                                    \
    extern "C" void swiglu_backward_##S(int64_t n, int64_t k, const T* gu, LORA, const T* grad, int64_t ldg, T* out,     \
                                        float* grad_a) {                                                                 \
        swiglu_backward<T>(n, k, gu, LORA_VALUES, grad, ldg, out, grad_a);                                               \
    }                                                                                                                    \
    extern "C" void lora_forward_##S(int64_t n, int64_t k, T* x, int64_t ld, LORA, T* saved) {                           \
        lora_forward<T>(n, k, x, ld, LORA_VALUES, saved);                                                                \
    }                                                                                                                    \
    extern "C" void lora_backward_##S(int64_t n, int64_t k, const T* x, int64_t ld, LORA, const T* grad, int64_t ldg,    \
                                      T* out, float* grad_a) {                                                           \
        lora_backward<T>(n, k, x, ld, LORA_VALUES, grad, ldg, out, grad_a);                                              \
    }                                                                                                                    \
    extern "C" void lora_grad_b_##S(int64_t n, int64_t m, const T* grad, int64_t ldg, const T* z, int64_t ldz,           \
                                    int64_t rank, float* grad_b) {                                                       \
        lora_grad_b<T>(n, m, grad, ldg, z, ldz, rank, grad_b);                                                           \
    }                                                                                                                    \
    extern "C" void rotate_##S(int64_t n, T* x, int64_t ld, int64_t heads, int64_t dim, int64_t rotary, int interleaved, \
                               int back, const T* cos, const T* sin, int64_t ldc, const T* bias, int64_t width) {        \
        rotate<T>(n, x, ld, heads, dim, rotary, interleaved, back, cos, sin, ldc, bias, width);                          \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
