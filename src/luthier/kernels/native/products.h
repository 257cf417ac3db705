// Products of a few to a few hundred input rows with a weight matrix that is read from memory once. Quantised weights are
// decoded in registers or, for many rows, a block at a time into the cache; they are never written to memory.
//
// An output is summed in parts of the input; within a part, vector lanes first, then across the vector. Neither the
// number of rows nor that of threads changes this order.
#pragma once
#include "common.h"
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum Kind : int64_t { FLOAT, BFLOAT, FOUR, EIGHT };

// One weight matrix [n, k]. data: rows ld elements apart (FLOAT, BFLOAT), else without gaps.
// FOUR: value = table[code] * scale; one scale per 64 codes: absmax, or code[absmax8] * nested + offset if that is set.
// EIGHT: value * absmax of the row.
struct Matrix {
    int64_t kind, n, k, ld;
    const void* data;
    const float* bias;
    const float *table, *absmax;
    const uint8_t* absmax8;
    const float *code, *nested;
    float offset;
};

typedef float Input;  // storage of one input value in any form

// How a matrix reads its input: as floats or bf16, and in which order. PAIRS: of every 64 values, those at even places, then
// the others. QUADS: of every 128, those at places 1, 5, 9, ..., then 0, 4, ..., then 3, 7, ..., then 2, 6, ...; the same
// for 64 at the end of a row.
enum Order { PLAIN, PAIRS, QUADS };
struct Form {
    bool bfloat;
    Order order;
};

template <class T>
constexpr bool DOT_BF16 = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool DOT_BF16<bf16> = true;
#endif

template <class T>
Form form_of(const Matrix& w) {
    const bool bfloat = DOT_BF16<T> && w.kind != EIGHT && w.kind != FLOAT;
    return {bfloat, w.kind != FOUR ? PLAIN : bfloat ? QUADS : PAIRS};
}

inline int64_t place(int64_t column, int64_t k, Order order) {
    if (order == PAIRS) return column - column % 64 + column % 2 * 32 + column % 64 / 2;
    const int64_t size = column < k / 128 * 128 ? 128 : 64, start = column / 128 * 128, i = column - start;
    return start + (i % 4 ^ 1) * (size / 4) + i / 4;
}

// Store n values of a row of k, which starts at ``row``, from a column on.
template <class E>
void pack_as(const float* __restrict x, E* __restrict row, int64_t k, int64_t column, int64_t n, Order order) {
    if (order == PLAIN) return narrow(x, row + column, n);
    for (int64_t i = 0; i < n; i++) put(x[i], row[place(column + i, k, order)]);
}
void pack(const float* x, Input* to, int64_t row, int64_t k, int64_t column, int64_t n, Form form) {
    form.bfloat ? pack_as(x, (bf16*)to + row, k, column, n, form.order)
                : pack_as(x, (float*)to + row, k, column, n, form.order);
}

inline vf widened(const float* x) { return *(const vf*)x; }
inline vf widened(const bf16* x) {
#if defined(__AVX512F__)
    return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
#elif defined(__AVX2__)
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
#else
    vf y;
    for (int i = 0; i < W; i++) y[i] = to_float(x[i]);
    return y;
#endif
}

inline float tree_sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

// Load a vector once: compilers would load it again for each product.
template <class V>
inline void in_register(V& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#endif
}

#if defined(__AVX512F__)
inline __m256 upper_half(__m512 x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
#endif

// to[i] += the sum of x[i], for 4 vectors
inline void add_sums(const vf* x, float* to) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 halves[4];
    for (int i = 0; i < 4; i++)
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), upper_half((__m512)x[i]));
#else
    const __m256 halves[4] = {(__m256)x[0], (__m256)x[1], (__m256)x[2], (__m256)x[3]};
#endif
    const __m256 a = _mm256_hadd_ps(halves[0], halves[1]), b = _mm256_hadd_ps(halves[2], halves[3]);
    const __m256 c = _mm256_hadd_ps(a, b);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
#else
    for (int i = 0; i < 4; i++) to[i] += tree_sum(x[i]);
#endif
}

inline float dot(const float* a, const float* b, int64_t n) {
    vf sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W)
        for (int v = 0; v < 4; v++) sums[v] += *(const vf*)(a + c + v * W) * *(const vf*)(b + c + v * W);
    for (; c < n; c += W) sums[0] += *(const vf*)(a + c) * *(const vf*)(b + c);
    return tree_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

constexpr int NB = 16, KB = 1024;  // outputs and inputs that are processed together

// --- rows of a weight. STEP values are read at a time, as PARTS vectors; add(): their products with the input.

struct FloatRow {
    typedef float In;
    static constexpr int STEP = W, PARTS = 1;
    typedef vf Vector;
    const float* w;
    const float* at(int64_t c) const { return w + c; }
    void load(int64_t c, Vector* to) const { to[0] = *(const vf*)(w + c); }
    static Vector input(const In* x) { return *(const vf*)x; }
    static void add(vf& sum, Vector a, Vector b) { sum += a * b; }
};

struct BfloatRow : FloatRow {
    const bf16* w;
    const bf16* at(int64_t c) const { return w + c; }
    void load(int64_t c, Vector* to) const { to[0] = widened(w + c); }
};

struct EightRow : FloatRow {
    const int8_t* w;
    const int8_t* at(int64_t c) const { return w + c; }
    void load(int64_t c, Vector* to) const {
#if defined(__AVX512F__)
        to[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(w + c))));
#elif defined(__AVX2__)
        to[0] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(w + c))));
#else
        for (int i = 0; i < W; i++) to[0][i] = float(w[c + i]);
#endif
    }
};

struct FourRow {
    typedef float In;
    static constexpr int STEP = 64, PARTS = 64 / W;
    typedef vf Vector;
    const uint8_t* w;
    const float* table;
    float scales[KB / 64];  // of the current part

    const uint8_t* at(int64_t c) const { return w + c / 2; }
    float scale(int64_t c) const { return scales[c % KB / 64]; }
    // the scales of the part [at, at + width) of the matrix, counted in values
    void begin(const Matrix& m, int64_t at, int64_t width) {
        const int64_t first = at / 64, count = width / 64;
        if (!m.absmax8) return (void)std::copy(m.absmax + first, m.absmax + first + count, scales);
        for (int64_t i = 0; i < count; i++) scales[i] = m.code[m.absmax8[first + i]];
        for (int64_t i = 0; i < count;) {  // as far as one nested scale applies
            const int64_t limit = std::min(count, ((first + i) / 256 + 1) * 256 - first);
            for (const float nested = m.nested[(first + i) / 256]; i < limit; i++) scales[i] = scales[i] * nested + m.offset;
        }
    }
    void load(int64_t c, Vector* to) const {
        const uint8_t* packed = at(c);
        const float s = scale(c);
#if defined(__AVX512F__)
        const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(s));
        for (int part = 0; part < 2; part++) {  // the permutation reads the lower 4 bits of an index only
            const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + 16 * part)));
            to[part] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
            to[2 + part] = (vf)_mm512_permutexvar_ps(bytes, values);
        }
#elif defined(__AVX2__)
        const __m256 factor = _mm256_set1_ps(s);
        const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(table), factor);
        const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(table + 8), factor);
        auto look_up = [&](__m256i index) {  // bit 3 chooses the half of the table
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
            return (vf)_mm256_blendv_ps(a, b, upper);
        };
        for (int part = 0; part < 4; part++) {
            const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(packed + 8 * part)));
            to[part] = look_up(_mm256_srli_epi32(bytes, 4));
            to[4 + part] = look_up(bytes);
        }
#else
        float* out = (float*)to;
        for (int i = 0; i < 32; i++) {
            out[i] = table[packed[i] >> 4] * s;
            out[32 + i] = table[packed[i] & 15] * s;
        }
#endif
    }
    static Vector input(const In* x) { return *(const vf*)x; }
    static void add(vf& sum, Vector a, Vector b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
struct BfloatDotRow {
    typedef bf16 In;
    static constexpr int STEP = 32, PARTS = 1;
    typedef __m512i Vector;
    const bf16* w;
    const bf16* at(int64_t c) const { return w + c; }
    void load(int64_t c, Vector* to) const { to[0] = _mm512_loadu_si512(w + c); }
    static Vector input(const In* x) { return _mm512_loadu_si512(x); }
    static void add(vf& sum, Vector a, Vector b) {
        sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};

struct FourDotRow : FourRow {
    typedef bf16 In;
    static constexpr int STEP = 128, PARTS = 4;
    typedef __m512i Vector;

    // Lanes 0 .. 15 of a vector look into the lower half of the table, which has the values of the first 64 codes.
    static void look_up(__m512i codes, __m512 first, __m512 second, Vector* to) {
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        const __m512i low = _mm512_set1_epi16(15), half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        auto values = [&](__m512i index) {  // (index & low) | half
            return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(index, low, half, 0xea), table);
        };
        to[0] = values(codes);
        to[1] = values(_mm512_srli_epi16(codes, 4));
        to[2] = values(_mm512_srli_epi16(codes, 8));
        to[3] = values(_mm512_srli_epi16(codes, 12));
    }
    __m512 scaled(int64_t c) const { return _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale(c))); }
    void load(int64_t c, Vector* to) const { look_up(_mm512_loadu_si512(at(c)), scaled(c), scaled(c + 64), to); }
    // 64 values at the end of a row, as 2 vectors
    void load_half(int64_t c, Vector* to) const {
        Vector parts[4];
        const __m512 values = scaled(c);
        look_up(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at(c))), values, values, parts);
        for (int i = 0; i < 2; i++)
            to[i] = _mm512_inserti64x4(parts[2 * i], _mm512_castsi512_si256(parts[2 * i + 1]), 1);
    }
    static Vector input(const In* x) { return _mm512_loadu_si512(x); }
    static void add(vf& sum, Vector a, Vector b) { BfloatDotRow::add(sum, a, b); }
};
#endif

constexpr int TILE = W == 16 ? 4 : 2;  // input rows per tile: as many as the registers hold

// sums[m, n] += rows[n] . x[m] over ``width`` columns from ``first`` on, for 4 rows. AHEAD: also move what is ``ahead`` bytes
// further into the cache, since a processor does so by itself only within a row.
template <int M, bool AHEAD, class Row>
void tile(const Row* rows, const typename Row::In* x, int64_t ldx, int64_t first, int64_t width, int64_t ahead,
          float* sums) {
    typedef typename Row::Vector Vector;
    vf acc[M][4] = {};
    int64_t c = first;
    for (; c + Row::STEP <= first + width; c += Row::STEP) {
        if constexpr (Row::PARTS == 1) {
            Vector w[4];
            for (int n = 0; n < 4; n++) {
                rows[n].load(c, w + n);
                if (AHEAD) __builtin_prefetch((const char*)rows[n].at(c) + ahead);
            }
            for (int m = 0; m < M; m++) {
                Vector in = Row::input(x + m * ldx + c);
                in_register(in);
                for (int n = 0; n < 4; n++) Row::add(acc[m][n], w[n], in);
            }
        } else {
            for (int n = 0; n < 4; n++) {
                Vector w[Row::PARTS];
                rows[n].load(c, w);
                if (AHEAD) __builtin_prefetch((const char*)rows[n].at(c) + ahead);
                for (int m = 0; m < M; m++)
                    for (int p = 0; p < Row::PARTS; p++)
                        Row::add(acc[m][n], w[p], Row::input(x + m * ldx + c + p * (Row::STEP / Row::PARTS)));
            }
        }
    }
#if defined(__AVX512BF16__)
    if constexpr (Row::STEP == 32)
        if (c < first + width)  // 16 columns are left
            for (int n = 0; n < 4; n++)
                for (int m = 0; m < M; m++)
                    Row::add(acc[m][n], _mm512_maskz_loadu_epi16(0xffff, rows[n].w + c),
                             _mm512_maskz_loadu_epi16(0xffff, x + m * ldx + c));
    if constexpr (Row::STEP == 128)
        if (c < first + width)  // 64 columns are left
            for (int n = 0; n < 4; n++) {
                Vector w[2];
                rows[n].load_half(c, w);
                for (int m = 0; m < M; m++)
                    for (int p = 0; p < 2; p++) Row::add(acc[m][n], w[p], Row::input(x + m * ldx + c + 32 * p));
            }
#endif
    for (int m = 0; m < M; m++) add_sums(acc[m], sums + m * NB);
}

// ahead: bytes between a row and the next one, 0 if the rows are in the cache
template <class Row>
void tiles(const Row* rows, int64_t count, const typename Row::In* x, int64_t ldx, int64_t m, int64_t first,
           int64_t width, int64_t ahead, float* sums) {
    int64_t i = 0;
    for (; i + TILE <= m; i += TILE)
        for (int64_t n = 0; n < count; n += 4)
            if (i == 0 && ahead)
                tile<TILE, true>(rows + n, x, ldx, first, width, NB * ahead, sums + n);
            else
                tile<TILE, false>(rows + n, x + i * ldx, ldx, first, width, 0, sums + i * NB + n);
    for (; i < m; i++)
        for (int64_t n = 0; n < count; n += 4)
            if (i == 0 && ahead)
                tile<1, true>(rows + n, x, ldx, first, width, 8 * ahead, sums + n);
            else
                tile<1, false>(rows + n, x + i * ldx, ldx, first, width, 0, sums + i * NB + n);
}

// As ``tiles``; for many input rows, the weights are first decoded into the cache, with gaps between rows: at a distance of
// a power of two they would displace one another.
template <class Row, class Dense>
void block(const Row* rows, int64_t count, const typename Row::In* x, int64_t ldx, int64_t m, int64_t first,
           int64_t width, int64_t ahead, float* sums) {
    typedef typename Row::In In;
    if (m <= TILE) return tiles(rows, count, x, ldx, m, first, width, ahead, sums);
    alignas(64) In values[NB][KB + 64 / sizeof(In)];
    Dense dense[NB];
    for (int64_t n = 0; n < count; n++) {
        int64_t c = 0;
        for (; c + Row::STEP <= width; c += Row::STEP) {
            typename Row::Vector w[Row::PARTS];
            rows[n].load(first + c, w);
            __builtin_prefetch((const char*)rows[n].at(first + c) + 4 * ahead);
            std::memcpy(&values[n][c], w, Row::STEP * sizeof(In));
        }
        if constexpr (Row::STEP == 32)
            if (c < width) std::memcpy(&values[n][c], rows[n].at(first + c), 16 * sizeof(In));
        if constexpr (Row::STEP == 128)
            if (c < width) {
                typename Row::Vector w[2];
                rows[n].load_half(first + c, w);
                std::memcpy(&values[n][c], w, 64 * sizeof(In));
            }
        dense[n].w = values[n];
    }
    tiles(dense, count, x + first, ldx, m, 0, width, 0, sums);
}

template <class T>
void part(const Matrix& w, const Input* in, int64_t m, const int64_t* index, int64_t count, int64_t first,
          int64_t width, float* sums) {
    auto run = [&](auto row, auto type, auto plain, int64_t ld) {
        typedef decltype(row) Row;
        Row rows[NB];
        for (int64_t n = 0; n < count; n++) {
            rows[n].w = (decltype(type))w.data + index[n] * ld;
            if constexpr (Row::STEP >= 64) rows[n].table = w.table, rows[n].begin(w, index[n] * w.k + first, width);
        }
        block<Row, decltype(plain)>(rows, count, (const typename Row::In*)in, w.k, m, first, width, ld * sizeof(*type),
                                    sums);
    };
    const float* floats = nullptr;
    const bf16* bfloats = nullptr;
    const uint8_t* bytes = nullptr;
    const int8_t* signed_bytes = nullptr;
    if (w.kind == FLOAT) return run(FloatRow{}, floats, FloatRow{}, w.ld);
    if (w.kind == EIGHT) return run(EightRow{}, signed_bytes, FloatRow{}, w.k);
#if defined(__AVX512BF16__)
    if constexpr (DOT_BF16<T>)
        return w.kind == FOUR ? run(FourDotRow{}, bytes, BfloatDotRow{}, w.k / 2)
                              : run(BfloatDotRow{}, bfloats, BfloatDotRow{}, w.ld);
#endif
    return w.kind == FOUR ? run(FourRow{}, bytes, FloatRow{}, w.k / 2) : run(BfloatRow{}, bfloats, FloatRow{}, w.ld);
}

// store(row, first, count, sums): takes the outputs first .. first + count of one input row. To be called by all threads
// of a team, which do not wait for each other at the end.
template <class T, class Store>
void product(const Matrix& w, const Input* in, int64_t m, Store store) {
    thread_local std::vector<float> sums;
    sums.resize(m * NB);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < w.n; n += NB) {
        const int64_t count = std::min<int64_t>(NB, w.n - n), padded = (count + 3) / 4 * 4;
        int64_t index[NB];
        for (int64_t i = 0; i < padded; i++) index[i] = std::min(n + i, w.n - 1);  // the last row again
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t first = 0; first < w.k; first += KB)
            part<T>(w, in, m, index, padded, first, std::min<int64_t>(KB, w.k - first), sums.data());
        for (int64_t i = 0; i < m; i++) {
            float* row = &sums[i * NB];
            for (int64_t c = 0; w.kind == EIGHT && c < count; c++) row[c] *= w.absmax[n + c];
            store(i, n, count, row);
        }
    }
}

}  // namespace
