// Cross-entropy and its gradient in one pass over the logits, and dropout with the counter-based mask.
#include "common.h"

namespace {

// losses[i] = -log softmax(logits[i])[targets[i]]; the gradient softmax - one-hot overwrites the logits.
template <class T>
void cross_entropy(int64_t n, int64_t vocabulary, T* logits, int64_t ld, const int64_t* targets, float* losses) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        T* __restrict row = logits + i * ld;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < vocabulary; j++) most = to_float(row[j]) > most ? to_float(row[j]) : most;
        const float target = to_float(row[targets[i]]) - most;
        float lanes[64] = {};
        int64_t j = 0;
        for (; j + 64 <= vocabulary; j += 64)
#pragma omp simd
            for (int l = 0; l < 64; l++) lanes[l] += fast_exp(to_float(row[j + l]) - most);
        double sum = 0;
        for (float lane : lanes) sum += lane;
        for (; j < vocabulary; j++) sum += fast_exp(to_float(row[j]) - most);
        losses[i] = float(std::log(sum)) - target;
        const float inverse = float(1.0 / sum);
        for (j = 0; j < vocabulary; j++) put(fast_exp(to_float(row[j]) - most) * inverse, row[j]);
        put(float(std::exp(double(target)) / sum - 1.0), row[targets[i]]);
    }
}

template <class T>
void dropout(int64_t n, int64_t k, const T* x, T* out, uint32_t key, uint32_t threshold, float factor) {
    const Dropout drop{key, threshold, nullptr};
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t start = drop.start(i);
        for (int64_t c = 0; c < k; c++)
            put(Dropout::kept(start, c, threshold) ? to_float(x[i * k + c]) * factor : 0.0f, out[i * k + c]);
    }
}

}  // namespace

#define EXPORT(T, S)                                                                                                   \
    extern "C" void cross_entropy_##S(int64_t n, int64_t vocabulary, T* logits, int64_t ld, const int64_t* targets,    \
                                      float* losses) {                                                                 \
        cross_entropy<T>(n, vocabulary, logits, ld, targets, losses);                                                  \
    }                                                                                                                  \
    extern "C" void dropout_##S(int64_t n, int64_t k, const T* x, T* out, uint32_t key, uint32_t threshold,            \
                                float factor) {                                                                        \
        dropout<T>(n, k, x, out, key, threshold, factor);                                                              \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
