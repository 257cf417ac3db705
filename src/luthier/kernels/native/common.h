// Shared by the kernels: vectors, bfloat16, a small matrix product, the dropout mask, and LoRA's low-rank products, which
// process a few rows at a time while these are in the cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

#if defined(__AVX512F__)
constexpr int W = 16;  // floats per vector
constexpr int NV = 4;  // vectors per tile row
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int NV = 2;
#else
constexpr int W = 4;
constexpr int NV = 4;
#endif
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int RB = 8;  // rows processed together

struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float to_float(float x) { return x; }

inline void put(float x, float& out) { out = x; }
inline uint32_t to_nearest_even(float x) {  // a bf16 in the upper 16 bits
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u + 0x7fffu + ((u >> 16) & 1u);
}
inline void put(float x, bf16& out) { out.bits = uint16_t(to_nearest_even(x) >> 16); }

// the nearest value of the element type
template <class T>
inline float rounded(float x);
template <>
inline float rounded<float>(float x) {
    return x;
}
template <>
inline float rounded<bf16>(float x) {
    const uint32_t u = to_nearest_even(x) & 0xffff0000u;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

template <class T>
inline void widen(const T* __restrict in, float* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = to_float(in[i]);
}
template <class T>
inline void narrow(const float* __restrict in, T* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; i++) put(in[i], out[i]);
}

// exp to about 1e-7 relative, in a form that compilers vectorise. Source: Cephes' expf, public domain method.
inline float fast_exp(float x) {
    x = x > -87.0f ? x : -87.0f;  // two statements: compilers turn the nested form into branches
    x = x < 87.0f ? x : 87.0f;
    float n = x * 1.44269504088896341f;
    n = (n + 12582912.0f) - 12582912.0f;  // rounds to nearest
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// e^-|x| never overflows, so no division yields a denormal number (which would cost about 100 cycles)
inline float sigmoid(float x) {
    const float e = fast_exp(-std::fabs(x));
    const float r = 1.0f / (1.0f + e);
    return x >= 0.0f ? r : e * r;
}

// --- dropout: the mask depends on (key, row, column) only. Source: the 32-bit mixer "lowbias32", public domain.

inline uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}
struct Dropout {
    uint32_t key, threshold;  // elements whose hash is below the threshold are dropped
    const int64_t* rows;      // positions of the rows in the stream; null: 0, 1, 2, ...
    uint32_t start(int64_t row) const { return mixed(key + 0x9e3779b9u * uint32_t(rows ? rows[row] : row)); }
    static bool kept(uint32_t start, int64_t column, uint32_t threshold) {
        return mixed(start + 0x85ebca6bu * uint32_t(column)) >= threshold;
    }
    void apply(int64_t row, const float* __restrict in, float* __restrict out, int64_t n) const {
        if (!threshold) {
            std::memcpy(out, in, n * sizeof(float));
            return;
        }
        const uint32_t s = start(row);
        for (int64_t c = 0; c < n; c++) out[c] = kept(s, c, threshold) ? in[c] : 0.0f;
    }
    void apply(int64_t row, float* x, int64_t n) const {
        if (!threshold) return;
        const uint32_t s = start(row);
        for (int64_t c = 0; c < n; c++) x[c] = kept(s, c, threshold) ? x[c] : 0.0f;
    }
};

// --- C[m, n] (+)= A[m, k] B[k, n]; A is read with strides (ar, ac), B and C by rows.

template <int M, int N>
inline void tile(int64_t k, const float* a, int64_t ar, int64_t ac, const float* b, int64_t ldb, float* c, int64_t ldc,
                 bool add) {
    vf acc[M][N];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) acc[i][j] = add ? *(const vf*)(c + i * ldc + j * W) : vf{};
    for (int64_t p = 0; p < k; p++) {
        vf x[N];
        for (int j = 0; j < N; j++) x[j] = *(const vf*)(b + p * ldb + j * W);
        for (int i = 0; i < M; i++) {
            const float s = a[i * ar + p * ac];
            for (int j = 0; j < N; j++) acc[i][j] += s * x[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) *(vf*)(c + i * ldc + j * W) = acc[i][j];
}

template <int N>
inline void strip(int64_t m, int64_t k, const float* a, int64_t ar, int64_t ac, const float* b, int64_t ldb, float* c,
                  int64_t ldc, bool add) {
    int64_t i = 0;
    for (; i + 6 <= m; i += 6) tile<6, N>(k, a + i * ar, ar, ac, b, ldb, c + i * ldc, ldc, add);
    for (; i + 2 <= m; i += 2) tile<2, N>(k, a + i * ar, ar, ac, b, ldb, c + i * ldc, ldc, add);
    for (; i < m; i++) tile<1, N>(k, a + i * ar, ar, ac, b, ldb, c + i * ldc, ldc, add);
}

// n is rounded up to whole vectors: B and C must have room for that.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t ar, int64_t ac, const float* b, int64_t ldb,
                    float* c, int64_t ldc, bool add) {
    int64_t j = 0;
    for (; j + NV * W <= n; j += NV * W) strip<NV>(m, k, a, ar, ac, b + j, ldb, c + j, ldc, add);
    for (; j < n; j += W) strip<1>(m, k, a, ar, ac, b + j, ldb, c + j, ldc, add);
}

inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

// --- LoRA's low-rank products, RB rows [RB, k] in scratch at a time (k a multiple of W, rows past the end are zero)

struct Lora {
    int64_t rank;         // summed over all adapters that share this input
    const float* a;       // [rank, k]
    const float* factor;  // [rank] scaling / (1 - dropout)
    Dropout drop;
};

// z[r, j] = factor[j] * rows[r] . a[j]
inline void lora_in(const Lora& l, const float* __restrict rows, int64_t k, float* __restrict z) {
    for (int64_t j = 0; j < l.rank; j++) {
        vf acc[RB] = {};
        const float* a = l.a + j * k;
        for (int64_t c = 0; c < k; c += W) {
            const vf x = *(const vf*)(a + c);
            for (int r = 0; r < RB; r++) acc[r] += x * *(const vf*)(rows + r * k + c);
        }
        for (int r = 0; r < RB; r++) z[r * l.rank + j] = l.factor[j] * sum(acc[r]);
    }
}

// back[r] = factor * dz[r] @ a; grad_a[j] += factor[j] * sum over r of dz[r, j] * dropped[r]; dz is scaled in place
inline void lora_back(const Lora& l, float* __restrict dz, const float* __restrict dropped, int64_t k,
                      float* __restrict back, float* __restrict grad_a) {
    for (int r = 0; r < RB; r++)
        for (int64_t j = 0; j < l.rank; j++) dz[r * l.rank + j] *= l.factor[j];
    product(RB, k, l.rank, dz, l.rank, 1, l.a, k, back, k, false);
    product(l.rank, k, RB, dz, 1, l.rank, dropped, k, grad_a, k, true);
}

// This thread's share of RB-row blocks; the same for the same thread count.
struct Share {
    int64_t first, last;
    explicit Share(int64_t rows) {
        const int64_t blocks = (rows + RB - 1) / RB, n = omp_get_num_threads(), i = omp_get_thread_num();
        first = blocks * i / n * RB;
        last = std::min(rows, blocks * (i + 1) / n * RB);
    }
};
