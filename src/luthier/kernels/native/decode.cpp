// A whole model's forward pass for a few tokens of several sequences, with the keys and values of earlier tokens in pages.
//
// Every number is summed in an order that depends on the model, the processor and the token's position only: a token's
// logits are the same bits alone or beside others, in one chunk or several, on any number of threads.
#include "products.h"
#include <vector>

namespace {

constexpr int64_t PAGE = 32;  // tokens per page
constexpr int64_t PART = 1024;

struct Group {
    int64_t count, n, k;
    Matrix matrices[3];
};

// An adapter's change of one matrix: bt^T a x. a [rank, k], scaled; bt [rank, n].
struct Update {
    int64_t rank;
    const float *a, *bt;
};

struct DecoderLayer {
    const float *norm, *norm2;
    float eps, eps2;
    int64_t window;  // number of keys that a query sees, its own included; 0: all up to its own
    Group groups[4];  // q k v, o, gate up, down
};

struct Model {
    int64_t layers, hidden, heads, kv, dim, rotary, interleaved, mlp;
    float scale, eps;
    const DecoderLayer* layer;
    const float* norm;
    Matrix head;
    const Update* updates;  // [adapters, layers, 4, 3]
    int64_t page_bytes;     // of one page: all layers' keys and values
};

// tokens: x [count, hidden] are their embeddings; outputs: indices of the tokens whose logits are computed
struct Step {
    int64_t count, outputs, pages_per_row;
    float* x;
    const float *cos, *sin;           // [count, rotary]
    const int64_t *positions, *rows;  // [count]: position in its sequence; row of the page table
    const int64_t* adapters;          // [count]: index of its adapter, -1 for none
    const int64_t* pages;             // [rows, pages_per_row]: indices into the pool
    uint8_t* pool;
    const int64_t* output;  // [outputs]
    float* logits;          // [outputs, vocabulary]
};

// Scratch of the calling thread, shared by the team and kept between calls.
struct Workspace {
    std::vector<float> h, wide, z, input;
    static float* room(std::vector<float>& x, size_t n) {  // from a cache line on
        if (x.size() < n + 16) x.resize(n + 16);
        return (float*)(((uintptr_t)x.data() + 63) / 64 * 64);
    }
};

template <class T>
struct Decoder {
    const Model& m;
    const Step& s;
    float *h, *wide, *z;  // [count, widest input], [count, widest output], [count, ranks]
    Input* input;         // [count, widest input]
    int64_t ranks;

    int64_t q_width() const { return m.heads * m.dim; }
    int64_t kv_width() const { return m.kv * m.dim; }
    const Update* updates(int64_t token, int64_t layer, int64_t group) const {
        const int64_t adapter = s.adapters[token];
        return adapter < 0 ? nullptr : m.updates + ((adapter * m.layers + layer) * 4 + group) * 3;
    }
    T* page(int64_t token, int64_t index, int64_t layer) const {
        const int64_t number = s.pages[s.rows[token] * s.pages_per_row + index];
        return (T*)(s.pool + number * m.page_bytes) + layer * 2 * kv_width() * PAGE;
    }

    // keys are stored by feature [kv, dim, PAGE], values by token [kv, PAGE, dim]
    T* keys(T* page, int64_t head) const { return page + head * m.dim * PAGE; }
    T* values(T* page, int64_t head) const { return page + (m.kv + head) * PAGE * m.dim; }

    void norm(const float* x, const float* weight, float eps, int64_t i, int64_t row, Form form) const {
        const int64_t k = m.hidden;
        const float* in = x + i * k;
        vf squares = {};
        for (int64_t c = 0; c < k; c += W) squares += *(const vf*)(in + c) * *(const vf*)(in + c);
        const float r = 1.0f / std::sqrt(tree_sum(squares) / k + eps);
        float* out = h + row * k;
        for (int64_t c = 0; c < k; c++) out[c] = weight[c] * (in[c] * r);
        pack(out, input, row * k, k, 0, k, form);
    }

    void norms(const float* weight, float eps, Form form) const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.count; i++) norm(s.x, weight, eps, i, i, form);
    }

    // z = a h for the adapters of this group
    void adapters_in(int64_t layer, int64_t group, const Group& g) const {
        if (!ranks) return;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.count; i++) {
            const Update* u = updates(i, layer, group);
            float* out = z + i * ranks;
            for (int64_t j = 0; u && j < g.count; j++)
                for (int64_t r = 0; r < u[j].rank; r++) *out++ = dot(u[j].a + r * g.k, h + i * g.k, g.k);
        }
    }

    // out[i, columns] (+)= the group's matrices times the input, plus the adapters' updates and biases
    void multiply(int64_t layer, int64_t group, const Group& g, float* out, bool add) const {
        for (int64_t j = 0, column = 0; j < g.count; column += g.matrices[j++].n) {
            const Matrix& w = g.matrices[j];
            auto store = [&](int64_t i, int64_t first, int64_t count, float* sums) {
                if (const Update* u = ranks ? updates(i, layer, group) : nullptr) {
                    const float* mine = z + i * ranks;
                    for (int64_t before = 0; before < j; before++) mine += u[before].rank;
                    for (int64_t r = 0; r < u[j].rank; r++)
                        for (int64_t c = 0; c < count; c++) sums[c] += mine[r] * u[j].bt[r * w.n + first + c];
                }
                float* to = out + i * g.n + column + first;
                for (int64_t c = 0; c < count; c++) {
                    const float y = w.bias ? sums[c] + w.bias[first + c] : sums[c];
                    to[c] = add ? to[c] + y : y;
                }
            };
            product<T>(w, input, s.count, store);
        }
#pragma omp barrier
    }

    void turn(float* x, int64_t token) const {
        const float *cos = s.cos + token * m.rotary, *sin = s.sin + token * m.rotary;
        const int64_t half = m.rotary / 2;
        for (int64_t i = 0; i < half; i++) {
            float &p = m.interleaved ? x[2 * i] : x[i], &q = m.interleaved ? x[2 * i + 1] : x[i + half];
            const float a = p, b = q;
            p = a * cos[i] - b * sin[i];
            q = b * cos[i] + a * sin[i];
        }
    }

    // rotate the new keys and store keys and values in their pages
    void append(int64_t layer) const {
        const int64_t n = q_width() + 2 * kv_width();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.count * m.kv; task++) {
            const int64_t i = task / m.kv, head = task % m.kv, at = s.positions[i] % PAGE;
            float* key = wide + i * n + q_width() + head * m.dim;
            turn(key, i);
            T* to = page(i, s.positions[i] / PAGE, layer);
            for (int64_t c = 0; c < m.dim; c++) put(key[c], keys(to, head)[c * PAGE + at]);
            narrow(key + kv_width(), values(to, head) + at * m.dim, m.dim);
        }
    }

    // scores[j] of the keys of one page
    void score(const float* q, const T* key, float* scores) const {
        vf sums[PAGE / W] = {};
        for (int64_t c = 0; c < m.dim; c++)
            for (int64_t v = 0; v < PAGE / W; v++) sums[v] += q[c] * widened(key + c * PAGE + v * W);
        for (int64_t v = 0; v < PAGE / W; v++) *(vf*)(scores + v * W) = sums[v];
    }

    // out[dim] += weights[j] values[j] of one page
    void collect(const float* weights, const T* value, int64_t first, int64_t limit, float* out) const {
        for (int64_t c = 0; c < m.dim; c += W) {
            vf sum = *(vf*)(out + c);
            for (int64_t j = first; j < limit; j++) sum += weights[j] * widened(value + j * m.dim + c);
            *(vf*)(out + c) = sum;
        }
    }

    void attend(int64_t layer, int64_t window, Form form) const {
        const int64_t n = q_width() + 2 * kv_width(), groups = m.heads / m.kv;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.count * m.kv; task++) {
            const int64_t i = task / m.kv, head = task % m.kv, limit = s.positions[i] + 1;
            const int64_t first = window && limit > window ? limit - window : 0, start = first / PAGE * PAGE;
            thread_local std::vector<float> scores;
            scores.resize((limit - start + PAGE - 1) / PAGE * PAGE);
            for (int64_t g = 0; g < groups; g++) {
                const int64_t column = (head * groups + g) * m.dim;
                float *q = wide + i * n + column, *out = h + i * q_width() + column;
                turn(q, i);
                for (int64_t c = 0; c < m.dim; c++) q[c] *= m.scale;
                for (int64_t p = start; p < limit; p += PAGE)
                    score(q, keys(page(i, p / PAGE, layer), head), scores.data() + p - start);
                const float factor = softmax(scores.data(), first - start, limit - start);
                std::fill(out, out + m.dim, 0.0f);
                for (int64_t p = start; p < limit; p += PAGE)
                    collect(scores.data() + p - start, values(page(i, p / PAGE, layer), head),
                            std::max<int64_t>(0, first - p), std::min(PAGE, limit - p), out);
                for (int64_t c = 0; c < m.dim; c++) out[c] *= factor;
                pack(out, input, i * q_width(), q_width(), column, m.dim, form);
            }
        }
    }

    // exp of the scores from first to limit, relative to the largest, in place; returns 1 / their sum
    static float softmax(float* scores, int64_t first, int64_t limit) {
        float most = scores[first], total = 0;
        for (int64_t j = first; j < limit; j++) most = scores[j] > most ? scores[j] : most;
        for (int64_t j = first; j < limit; j++) scores[j] = fast_exp(scores[j] - most);
        for (int64_t j = first; j < limit; j++) total += scores[j];
        return 1.0f / total;
    }

    void swiglu(Form form) const {
        const int64_t k = m.mlp, parts = (k + PART - 1) / PART;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.count * parts; task++) {
            const int64_t i = task / parts, first = task % parts * PART, limit = std::min(k, first + PART);
            const float *gate = wide + i * 2 * k, *up = gate + k;
            float* out = h + i * k;
#pragma omp simd
            for (int64_t c = first; c < limit; c++) out[c] = gate[c] * sigmoid(gate[c]) * up[c];
            pack(out + first, input, i * k, k, first, limit - first, form);
        }
    }

    void layer(int64_t l) const {
        const DecoderLayer& layer = m.layer[l];
        const Group &qkv = layer.groups[0], &o = layer.groups[1], &gate_up = layer.groups[2], &down = layer.groups[3];
        norms(layer.norm, layer.eps, form_of<T>(qkv.matrices[0]));
        adapters_in(l, 0, qkv);
        multiply(l, 0, qkv, wide, false);
        append(l);
        attend(l, layer.window, form_of<T>(o.matrices[0]));
        adapters_in(l, 1, o);
        multiply(l, 1, o, s.x, true);
        norms(layer.norm2, layer.eps2, form_of<T>(gate_up.matrices[0]));
        adapters_in(l, 2, gate_up);
        multiply(l, 2, gate_up, wide, false);
        swiglu(form_of<T>(down.matrices[0]));
        adapters_in(l, 3, down);
        multiply(l, 3, down, s.x, true);
    }

    void logits() const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.outputs; i++) norm(s.x, m.norm, m.eps, s.output[i], i, form_of<T>(m.head));
        product<T>(m.head, input, s.outputs, [&](int64_t i, int64_t first, int64_t count, const float* sums) {
            std::copy(sums, sums + count, s.logits + i * m.head.n + first);
        });
#pragma omp barrier
    }
};

int64_t most_ranks(const Model& m, const Step& s) {
    int64_t most = 0;
    for (int64_t i = 0; i < s.count; i++)
        for (int64_t j = 0; s.adapters[i] >= 0 && j < m.layers * 4; j++) {
            const Update* u = m.updates + (s.adapters[i] * m.layers * 4 + j) * 3;
            most = std::max(most, u[0].rank + u[1].rank + u[2].rank);
        }
    return most;
}

template <class T>
void decode(const Model& m, const Step& s) {
    thread_local Workspace mine;
    int64_t in = m.hidden, out = 0;
    for (const Group& g : m.layer[0].groups) in = std::max(in, g.k), out = std::max(out, g.n);
    const int64_t ranks = most_ranks(m, s);
    float *h = mine.room(mine.h, s.count * in), *input = mine.room(mine.input, s.count * in);
    const Decoder<T> d{m, s, h, mine.room(mine.wide, s.count * out), mine.room(mine.z, s.count * ranks), input, ranks};
#pragma omp parallel
    {
        for (int64_t l = 0; l < m.layers; l++) d.layer(l);
        if (s.outputs) d.logits();
    }
}

// out [count, n] = the matrix times x [count, k]
template <class T>
void multiply(const Matrix& w, int64_t count, const float* x, float* out) {
    thread_local Workspace mine;
    Input* input = mine.room(mine.input, count * w.k);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) pack(x + i * w.k, input, i * w.k, w.k, 0, w.k, form_of<T>(w));
        product<T>(w, input, count, [&](int64_t i, int64_t first, int64_t n, const float* sums) {
            for (int64_t c = 0; c < n; c++) out[i * w.n + first + c] = sums[c] + (w.bias ? w.bias[first + c] : 0.0f);
        });
    }
}

}  // namespace

extern "C" void multiply_f32(const Matrix* w, int64_t count, const float* x, float* out) {
    multiply<float>(*w, count, x, out);
}
extern "C" void multiply_bf16(const Matrix* w, int64_t count, const float* x, float* out) {
    multiply<bf16>(*w, count, x, out);
}
extern "C" void decode_f32(const Model* model, const Step* step) { decode<float>(*model, *step); }
extern "C" void decode_bf16(const Model* model, const Step* step) { decode<bf16>(*model, *step); }
