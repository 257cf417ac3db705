// Attention over the segments of a flat stream, forward and backward. A segment sees its ancestors and, causally, itself.
//
// One task is one segment and one key/value head: its keys and values are gathered and converted to fp32 once, then
// processed with blocks of queries (all heads of the group together). The backward pass needs only q, k and v.
#include "common.h"
#include <numeric>
#include <vector>

namespace {

constexpr int64_t QB = 16;  // queries per block

struct Segments {
    int64_t count;
    const int64_t *offsets, *parents;  // [count + 1], [count]
    int64_t shared;                    // number of rows at the start of the stream that other segments attend to too
};

// Queries of all segments: rows offsets[s] .. offsets[s + 1] belong to segment s; rows: their positions in the stream.
struct Queries {
    const int64_t *offsets, *rows;
    int64_t place(int64_t i) const { return rows ? rows[i] : i; }
};

struct Shape {
    int64_t heads, kv, dim;
    int64_t window;  // number of keys that a query sees, its own included; 0: all up to its own
    float scale;
    int64_t groups() const { return heads / kv; }
    int64_t first(int64_t limit) const { return window && limit > window ? limit - window : 0; }
};

struct Task {
    int64_t segment, head;
    double cost;
};

// Assigns tasks to threads: largest task first, to the least loaded thread. Depends on the thread count only.
std::vector<std::vector<Task>> shares(const Segments& g, const Queries& q, const Shape& shape,
                                      const std::vector<std::vector<int64_t>>& seen, int threads) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < g.count; s++)
        for (int64_t h = 0; h < shape.kv; h++)
            if (q.offsets[s + 1] > q.offsets[s])
                tasks.push_back({s, h, double(seen[s].size()) * (16.0 + double(q.offsets[s + 1] - q.offsets[s]))});
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    std::vector<std::vector<Task>> assigned(threads);
    std::vector<double> load(threads, 0.0);
    for (const Task& t : tasks) {
        const size_t least = std::min_element(load.begin(), load.end()) - load.begin();
        assigned[least].push_back(t);
        load[least] += t.cost;
    }
    return assigned;
}

// The stream rows that each segment sees: those of its ancestors from the root, then its own.
std::vector<std::vector<int64_t>> visible(const Segments& g) {
    std::vector<std::vector<int64_t>> seen(g.count);
    for (int64_t s = 0; s < g.count; s++) {
        if (g.parents[s] >= 0) seen[s] = seen[g.parents[s]];
        const size_t before = seen[s].size();
        seen[s].resize(before + g.offsets[s + 1] - g.offsets[s]);
        std::iota(seen[s].begin() + before, seen[s].end(), g.offsets[s]);
    }
    return seen;
}

int64_t whole(int64_t n) { return (n + W - 1) / W * W; }

// Scratch of one thread, grown as needed.
struct Scratch {
    std::vector<float> kt, k, vt, v, q, o, s, d, dq, dk, dv;
    static float* room(std::vector<float>& x, size_t n) {
        if (x.size() < n) x.resize(n);
        return x.data();
    }
};

// rows of a head as fp32: by rows [n, dim] and, for wide > 0, transposed [dim, wide]
template <class T>
void gather(const T* x, int64_t ld, const std::vector<int64_t>& rows, int64_t dim, float* plain, float* turned,
            int64_t wide) {
    for (size_t i = 0; i < rows.size(); i++) widen(x + rows[i] * ld, plain + i * dim, dim);
    if (!wide) return;
    const int64_t n = int64_t(rows.size());
    for (int64_t i = 0; i < n; i += W)
        for (int64_t c = 0; c < dim; c++)
            for (int64_t j = i; j < std::min(n, i + W); j++) turned[c * wide + j] = plain[j * dim + c];
    for (int64_t c = 0; c < dim; c++) std::fill(turned + c * wide + n, turned + (c + 1) * wide, 0.0f);
}

// Softmax of one row in place over columns first .. limit; other columns up to width become 0. Returns 1 / sum of exp.
inline float softmax(float* __restrict row, int64_t first, int64_t limit, int64_t width) {
    for (int64_t j = 0; j < first; j++) row[j] = 0.0f;
    float most = row[first];
#pragma omp simd reduction(max : most)
    for (int64_t j = first; j < limit; j++) most = row[j] > most ? row[j] : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = first; j < limit; j++) {
        const float e = fast_exp(row[j] - most);
        row[j] = e;
        sum += e;
    }
    for (int64_t j = limit; j < width; j++) row[j] = 0.0f;
    return 1.0f / sum;
}

template <class T>
void load_queries(const T* q, int64_t ld, int64_t first, int64_t count, const Shape& a, int64_t head, float factor,
                  float* out) {
    const int64_t g = a.groups();
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < g; j++) {
            float* row = out + (i * g + j) * a.dim;
            widen(q + (first + i) * ld + (head * g + j) * a.dim, row, a.dim);
            for (int64_t c = 0; c < a.dim; c++) row[c] *= factor;
        }
}

template <class T>
void attend_forward(const Segments& segments, const Queries& queries, const Shape& a, const T* q, int64_t ldq,
                    const T* k, const T* v, int64_t ldk, T* out, int64_t ldo) {
    const auto seen = visible(segments);
    const auto tasks = shares(segments, queries, a, seen, omp_get_max_threads());
    const int64_t g = a.groups(), m = QB * g;
#pragma omp parallel
    {
        Scratch mine;
        for (size_t t = omp_get_thread_num(); t < tasks.size(); t += omp_get_num_threads())
            for (const Task& task : tasks[t]) {
                const auto& rows = seen[task.segment];
                const int64_t n = rows.size(), wide = whole(n);
                const int64_t before = n - (segments.offsets[task.segment + 1] - segments.offsets[task.segment]);
                float* kt = mine.room(mine.kt, a.dim * wide);
                float* vs = mine.room(mine.v, n * a.dim);
                float* qs = mine.room(mine.q, m * a.dim);
                float* s = mine.room(mine.s, m * wide);
                float* o = mine.room(mine.o, m * a.dim);
                float* sums = mine.room(mine.d, m);
                gather(k + task.head * a.dim, ldk, rows, a.dim, vs, kt, wide);
                gather(v + task.head * a.dim, ldk, rows, a.dim, vs, (float*)nullptr, 0);
                const int64_t last = queries.offsets[task.segment + 1];
                for (int64_t i = queries.offsets[task.segment]; i < last; i += QB) {
                    const int64_t count = std::min(QB, last - i);
                    auto limit = [&](int64_t x) {
                        return before + queries.place(i + x) - segments.offsets[task.segment] + 1;
                    };
                    const int64_t most = limit(count - 1);
                    load_queries(q, ldq, i, count, a, task.head, a.scale, qs);
                    product(count * g, most, a.dim, qs, a.dim, 1, kt, wide, s, wide, false);
                    for (int64_t r = 0; r < count * g; r++) sums[r] = softmax(s + r * wide, a.first(limit(r / g)), limit(r / g), most);
                    product(count * g, a.dim, most, s, wide, 1, vs, a.dim, o, a.dim, false);
                    for (int64_t r = 0; r < count * g; r++) {
                        float* row = o + r * a.dim;
                        for (int64_t c = 0; c < a.dim; c++) row[c] *= sums[r];
                        narrow(row, out + (i + r / g) * ldo + (task.head * g + r % g) * a.dim, a.dim);
                    }
                }
            }
    }
}

// One task's part of the gradients: dq is written, dk and dv [n, dim] in scratch are filled.
template <class T>
void task_backward(const Segments& segments, const Queries& queries, const Shape& a, const Task& task,
                   const std::vector<int64_t>& rows, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk,
                   const T* grad, int64_t ldg, T* dq, int64_t lddq, Scratch& mine) {
    const int64_t g = a.groups(), m = QB * g, n = rows.size(), wide = whole(n), dim = a.dim;
    const int64_t before = n - (segments.offsets[task.segment + 1] - segments.offsets[task.segment]);
    float *kt = mine.room(mine.kt, dim * wide), *ks = mine.room(mine.k, n * dim);
    float *vt = mine.room(mine.vt, dim * wide), *vs = mine.room(mine.v, n * dim);
    float *qs = mine.room(mine.q, m * dim), *go = mine.room(mine.o, m * dim), *dqs = mine.room(mine.dq, m * dim);
    float *s = mine.room(mine.s, m * wide), *d = mine.room(mine.d, m * wide);
    float *dk = mine.room(mine.dk, n * dim), *dv = mine.room(mine.dv, n * dim);
    std::fill(dk, dk + n * dim, 0.0f);
    std::fill(dv, dv + n * dim, 0.0f);
    gather(k + task.head * dim, ldk, rows, dim, ks, kt, wide);
    gather(v + task.head * dim, ldk, rows, dim, vs, vt, wide);
    const int64_t last = queries.offsets[task.segment + 1];
    for (int64_t i = queries.offsets[task.segment]; i < last; i += QB) {
        const int64_t count = std::min(QB, last - i), r_count = count * g;
        auto limit = [&](int64_t x) { return before + queries.place(i + x) - segments.offsets[task.segment] + 1; };
        const int64_t most = limit(count - 1);
        load_queries(q, ldq, i, count, a, task.head, a.scale, qs);
        load_queries(grad, ldg, i, count, a, task.head, 1.0f, go);
        product(r_count, most, dim, qs, dim, 1, kt, wide, s, wide, false);
        product(r_count, most, dim, go, dim, 1, vt, wide, d, wide, false);
        for (int64_t r = 0; r < r_count; r++) {
            float *p = s + r * wide, *dp = d + r * wide;
            const float inverse = softmax(p, a.first(limit(r / g)), limit(r / g), most);
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < most; j++) {
                p[j] *= inverse;
                dot += p[j] * dp[j];
            }
            for (int64_t j = 0; j < most; j++) dp[j] = p[j] * (dp[j] - dot);
        }
        product(most, dim, r_count, s, 1, wide, go, dim, dv, dim, true);
        product(most, dim, r_count, d, 1, wide, qs, dim, dk, dim, true);  // qs carries the scale
        product(r_count, dim, most, d, wide, 1, ks, dim, dqs, dim, false);
        for (int64_t r = 0; r < r_count; r++) {
            float* row = dqs + r * dim;
            for (int64_t c = 0; c < dim; c++) row[c] *= a.scale;
            narrow(row, dq + (i + r / g) * lddq + (task.head * g + r % g) * dim, dim);
        }
    }
}

template <class T>
void attend_backward(const Segments& segments, const Queries& queries, const Shape& a, const T* q, int64_t ldq,
                     const T* k, const T* v, int64_t ldk, const T* grad, int64_t ldg, T* dq, int64_t lddq, T* dk, T* dv,
                     int64_t lddk) {
    const auto seen = visible(segments);
    const int threads = omp_get_max_threads();
    const auto tasks = shares(segments, queries, a, seen, threads);
    const int64_t width = a.kv * a.dim, dim = a.dim, part = segments.shared * width;
    std::vector<float> sums(size_t(threads) * 2 * part, 0.0f);
    const int64_t total = segments.offsets[segments.count];
#pragma omp parallel
    {
        Scratch mine;
        for (size_t t = omp_get_thread_num(); t < tasks.size(); t += omp_get_num_threads()) {
            float *sk = sums.data() + t * 2 * part, *sv = sk + part;
            for (const Task& task : tasks[t]) {
                const auto& rows = seen[task.segment];
                task_backward(segments, queries, a, task, rows, q, ldq, k, v, ldk, grad, ldg, dq, lddq, mine);
                for (size_t i = 0; i < rows.size(); i++) {
                    const float *gk = &mine.dk[i * dim], *gv = &mine.dv[i * dim];
                    const int64_t row = rows[i], at = row * width + task.head * dim;
                    if (row < segments.shared)
                        for (int64_t c = 0; c < dim; c++) sk[at + c] += gk[c], sv[at + c] += gv[c];
                    else {
                        narrow(gk, dk + row * lddk + task.head * dim, dim);
                        narrow(gv, dv + row * lddk + task.head * dim, dim);
                    }
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < total; row++) {
            if (row < segments.shared) {
                for (int64_t c = 0; c < width; c++) {
                    float x = 0, y = 0;
                    for (int t = 0; t < threads; t++) {
                        x += sums[size_t(t) * 2 * part + row * width + c];
                        y += sums[size_t(t) * 2 * part + part + row * width + c];
                    }
                    put(x, dk[row * lddk + c]);
                    put(y, dv[row * lddk + c]);
                }
            }
        }
        // no segment attends to a leaf without queries
#pragma omp for schedule(static)
        for (int64_t s = 0; s < segments.count; s++)
            if (queries.offsets[s + 1] == queries.offsets[s])
                for (int64_t row = std::max(segments.shared, segments.offsets[s]); row < segments.offsets[s + 1]; row++)
                    for (int64_t c = 0; c < width; c++) put(0.0f, dk[row * lddk + c]), put(0.0f, dv[row * lddk + c]);
    }
}

}  // namespace

#define PLACE                                                                                                  \
    int64_t count, const int64_t *offsets, const int64_t *parents, int64_t shared, const int64_t *query_offsets, \
        const int64_t *query_rows, int64_t heads, int64_t kv, int64_t dim, int64_t window, float scale
#define PLACE_VALUES Segments{count, offsets, parents, shared}, Queries{query_offsets, query_rows}, Shape{heads, kv, dim, window, scale}
#define EXPORT(T, S)                                                                                                   \
    extern "C" void attend_forward_##S(PLACE, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk, T* out,    \
                                       int64_t ldo) {                                                                  \
        attend_forward<T>(PLACE_VALUES, q, ldq, k, v, ldk, out, ldo);                                                  \
    }                                                                                                                  \
    extern "C" void attend_backward_##S(PLACE, const T* q, int64_t ldq, const T* k, const T* v, int64_t ldk,           \
                                        const T* grad, int64_t ldg, T* dq, int64_t lddq, T* dk, T* dv, int64_t lddk) { \
        attend_backward<T>(PLACE_VALUES, q, ldq, k, v, ldk, grad, ldg, dq, lddq, dk, dv, lddk);                        \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
