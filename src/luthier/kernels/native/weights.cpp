// Dequantise weights into rows that may be wider than the weight.
#include "common.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// 64 four-bit codes, the first of a pair in the high half of its byte -> floats table[code] * scale
template <class T>
void block(const uint8_t* packed, const float* table, float scale, T* out) {
#if defined(__AVX512F__)
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
    float wide[64];
    for (int part = 0; part < 2; part++) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + 16 * part)));
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
        const __m512 low = _mm512_permutexvar_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), values);
        const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_ps(wide + 32 * part, _mm512_permutex2var_ps(high, first, low));
        _mm512_storeu_ps(wide + 32 * part + 16, _mm512_permutex2var_ps(high, second, low));
    }
    narrow(wide, out, 64);
#else
    for (int i = 0; i < 32; i++) {
        put(table[packed[i] >> 4] * scale, out[2 * i]);
        put(table[packed[i] & 15] * scale, out[2 * i + 1]);
    }
#endif
}

template <class T>
void four_bits(int64_t n, int64_t k, const uint8_t* packed, const float* scales, const float* table, T* out, int64_t ldo) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < k; c += 64)
            block(packed + (row * k + c) / 2, table, scales[(row * k + c) / 64], out + row * ldo + c);
}

template <class T>
void eight_bits(int64_t n, int64_t k, const int8_t* values, const float* scales, T* out, int64_t ldo) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < n; row++)
        for (int64_t c = 0; c < k; c++) put(float(values[row * k + c]) * scales[row], out[row * ldo + c]);
}

}  // namespace

#define EXPORT(T, S)                                                                                                 \
    extern "C" void four_bits_##S(int64_t n, int64_t k, const uint8_t* packed, const float* scales,                  \
                                  const float* table, T* out, int64_t ldo) {                                         \
        four_bits<T>(n, k, packed, scales, table, out, ldo);                                                         \
    }                                                                                                                \
    extern "C" void eight_bits_##S(int64_t n, int64_t k, const int8_t* values, const float* scales, T* out,          \
                                   int64_t ldo) {                                                                    \
        eight_bits<T>(n, k, values, scales, out, ldo);                                                               \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
