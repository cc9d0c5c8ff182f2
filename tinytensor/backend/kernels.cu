// CUDA kernels of the ops that a transformer spends its time in; attention's own are in flash.cu.
//
// T is float or bf16, the type of activations between matrix products; the residual stream, statistics, weights and their
// gradients are float, and every sum is taken in float. Nothing is added up by atomics: a sum that crosses blocks is written
// as one partial sum a block, and sum_rows adds those in order, so the same inputs give the same bits.

#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float LOWEST = -3.402823466e38f;  // below any score; NVRTC knows no INFINITY

__device__ inline float number(float x) { return x; }
__device__ inline float number(bf16 x) { return __bfloat162float(x); }
__device__ inline void put(float& y, float x) { y = x; }
__device__ inline void put(bf16& y, float x) { y = __float2bfloat16(x); }

template <typename T, int N> struct alignas(N * sizeof(T)) Vector {
    T at[N];
};

// Elements of one access: 16 bytes, or all N where that is less
template <typename T, int N> constexpr int lanes = N * sizeof(T) < 16 ? N : 16 / sizeof(T);

// x[0 … N) as floats, by wide loads where all of it lies before the end and is aligned; zeros from the end on
template <int N, typename T> __device__ void load(float (&out)[N], const T* x, long long left)
{
    constexpr int L = lanes<T, N>;
    if (left >= N && reinterpret_cast<u64>(x) % (L * sizeof(T)) == 0) {
        for (int i = 0; i < N / L; ++i) {
            Vector<T, L> v = reinterpret_cast<const Vector<T, L>*>(x)[i];
            for (int j = 0; j < L; ++j) out[i * L + j] = number(v.at[j]);
        }
    } else {
        for (int i = 0; i < N; ++i) out[i] = i < left ? number(x[i]) : 0.0f;
    }
}

template <int N, typename T> __device__ void store(T* y, const float (&in)[N], long long left)
{
    constexpr int L = lanes<T, N>;
    if (left >= N && reinterpret_cast<u64>(y) % (L * sizeof(T)) == 0) {
        for (int i = 0; i < N / L; ++i) {
            Vector<T, L> v;
            for (int j = 0; j < L; ++j) put(v.at[j], in[i * L + j]);
            reinterpret_cast<Vector<T, L>*>(y)[i] = v;
        }
    } else {
        for (int i = 0; i < N; ++i)
            if (i < left) put(y[i], in[i]);
    }
}

__device__ inline long long thread_index() { return blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; }

__device__ inline float warp_sum(float x)
{
    for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ inline float warp_max(float x)
{
    for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// Philox4x64-10 (Salmon et al. 2011), the generator of backend/random.py: bit i of the result says whether element
// 16·block + i is kept, which is so when its 16 random bits are not below the threshold. Its key is (seed, stream), its
// counter (block, call, micro_step, step); the last two are read from memory, so that a captured graph can be told others.
__device__ u32 keep16(u64 block, u64 seed, u64 stream, u64 call, const u64* place, u32 threshold)
{
    u64 c0 = block + 1, c1 = call, c2 = place[1], c3 = place[0];  // NumPy counts before it draws
    for (int round = 0; round < 10; ++round) {
        constexpr u64 M0 = 0xD2E7470EE14C6C93ull, M1 = 0xCA5A826395121157ull;
        u64 high0 = __umul64hi(M0, c0), low0 = M0 * c0, high1 = __umul64hi(M1, c2), low1 = M1 * c2;
        c0 = high1 ^ c1 ^ seed;
        c1 = low1;
        c2 = high0 ^ c3 ^ stream;
        c3 = low0;
        seed += 0x9E3779B97F4A7C15ull;
        stream += 0xBB67AE8584CAA73Bull;
    }
    u32 bits = 0;
    for (int i = 0; i < 4; ++i) {
        bits |= static_cast<u32>((c0 >> 16 * i & 0xffff) >= threshold) << i;
        bits |= static_cast<u32>((c1 >> 16 * i & 0xffff) >= threshold) << (i + 4);
        bits |= static_cast<u32>((c2 >> 16 * i & 0xffff) >= threshold) << (i + 8);
        bits |= static_cast<u32>((c3 >> 16 * i & 0xffff) >= threshold) << (i + 12);
    }
    return bits;
}

__global__ void set_place(u64* place, u64 step, u64 micro_step)
{
    place[0] = step;
    place[1] = micro_step;
}

// The mask of attention's weights (…, T, S), a bit each; words that lie after the diagonal are left as they are
__global__ void keep_bits(
    u16* bits, long long n, int T, int S, u64 seed, u64 stream, u64 call, const u64* place, u32 threshold)
{
    long long word = thread_index(), first = word * 16;
    if (first >= n) return;
    long long row = first / S;
    bool future = first - row * S > row % T + S - T;
    if (future && (first + 15) / S == row) return;
    bits[word] = keep16(word, seed, stream, call, place, threshold);
}

// y = x·m/q; the derivative is the same function of g
template <typename T>
__global__ void dropout(
    const float* x, T* y, long long n, u64 seed, u64 stream, u64 call, const u64* place, u32 threshold, float scale)
{
    long long block = thread_index(), i = block * 16;
    if (i >= n) return;
    u32 keep = threshold ? keep16(block, seed, stream, call, place, threshold) : 0xffffu;
    float v[16];
    load(v, x + i, n - i);
    for (int j = 0; j < 16; ++j) v[j] = keep >> j & 1 ? v[j] * scale : 0.0f;
    store(y + i, v, n - i);
}

// y = r + x·m/q
template <typename T>
__global__ void dropout_add(
    const T* x, const float* r, float* y, long long n, u64 seed, u64 stream, u64 call, const u64* place, u32 threshold,
    float scale)
{
    long long block = thread_index(), i = block * 16;
    if (i >= n) return;
    u32 keep = threshold ? keep16(block, seed, stream, call, place, threshold) : 0xffffu;
    float v[16], w[16];
    load(v, x + i, n - i);
    load(w, r + i, n - i);
    for (int j = 0; j < 16; ++j) w[j] += keep >> j & 1 ? v[j] * scale : 0.0f;
    store(y + i, w, n - i);
}

// σ(2u) = (1 + tanh u)/2 of u = c(x + a·x³), which loses no digits where tanh u is near −1
__device__ inline float gate(float x) { return 1.0f / (1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x))); }

// y = x/2·(1 + tanh u) = x·s,  s = σ(2u)
template <typename T> __global__ void gelu(const T* x, T* y, long long n)
{
    long long i = thread_index() * 8;
    if (i >= n) return;
    float v[8];
    load(v, x + i, n - i);
    for (float& e : v) e *= gate(e);
    store(y + i, v, n - i);
}

// dx = g·(s + x·s(1 − s)·2c(1 + 3a·x²))
template <typename T> __global__ void gelu_backward(const T* g, const T* x, T* dx, long long n)
{
    long long i = thread_index() * 8;
    if (i >= n) return;
    float v[8], d[8];
    load(v, x + i, n - i);
    load(d, g + i, n - i);
    for (int j = 0; j < 8; ++j) {
        float e = v[j], s = gate(e);
        d[j] *= s + e * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * e * e);
    }
    store(dx + i, d, n - i);
}

__global__ void cast(const float* x, bf16* y, long long n)
{
    long long i = thread_index() * 8;
    if (i >= n) return;
    float v[8];
    load(v, x + i, n - i);
    store(y + i, v, n - i);
}

// y += b on each row, whose start is `stride` after the last one's
template <typename T> __global__ void add_bias(T* y, const float* b, long long rows, int width, int stride)
{
    long long i = thread_index();
    if (i >= rows * width) return;
    long long row = i / width;
    int column = i - row * width;
    T& e = y[row * stride + column];
    put(e, number(e) + b[column]);
}

// A warp a row, four columns a lane: y = γ·(x − μ)/σ + β, and μ and 1/σ for the derivative. width % 4 = 0
template <typename T>
__global__ void layer_norm(
    const float* x, const float* weight, const float* bias, T* y, float* mean, float* rstd, int rows, int width, float eps)
{
    int row = thread_index() / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    x += static_cast<long long>(row) * width;
    y += static_cast<long long>(row) * width;
    float v[4], w[4], b[4], sum = 0, squares = 0;
    for (int i = 4 * lane; i < width; i += 128) {
        load(v, x + i, 4);
        sum += (v[0] + v[1]) + (v[2] + v[3]);
    }
    float mu = warp_sum(sum) / width;
    for (int i = 4 * lane; i < width; i += 128) {
        load(v, x + i, 4);
        for (float e : v) squares += (e - mu) * (e - mu);
    }
    float r = rsqrtf(warp_sum(squares) / width + eps);
    for (int i = 4 * lane; i < width; i += 128) {
        load(v, x + i, 4);
        load(w, weight + i, 4);
        load(b, bias ? bias + i : x, bias ? 4 : 0);
        for (int j = 0; j < 4; ++j) v[j] = (v[j] - mu) * r * w[j] + b[j];
        store(y + i, v, 4);
    }
    if (lane == 0) {
        mean[row] = mu;
        rstd[row] = r;
    }
}

// h = g·γ;  dx = (h − mean h − x̂·mean(h·x̂))/σ, added to `base` where that is given
template <typename T>
__global__ void layer_norm_backward(
    const T* g, const float* x, const float* weight, const float* mean, const float* rstd, const float* base, float* dx,
    int rows, int width)
{
    int row = thread_index() / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    long long start = static_cast<long long>(row) * width;
    float mu = mean[row], r = rstd[row], v[4], w[4], d[4], sum = 0, along = 0;
    for (int i = 4 * lane; i < width; i += 128) {
        load(d, g + start + i, 4);
        load(w, weight + i, 4);
        load(v, x + start + i, 4);
        for (int j = 0; j < 4; ++j) {
            sum += d[j] * w[j];
            along += d[j] * w[j] * (v[j] - mu) * r;
        }
    }
    sum = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (int i = 4 * lane; i < width; i += 128) {
        float b[4];
        load(d, g + start + i, 4);
        load(w, weight + i, 4);
        load(v, x + start + i, 4);
        load(b, base ? base + start + i : x, base ? 4 : 0);
        for (int j = 0; j < 4; ++j) v[j] = b[j] + (d[j] * w[j] - sum - (v[j] - mu) * r * along) * r;
        store(dx + start + i, v, 4);
    }
}

// Sums down the columns: 32 columns a block, a stretch of rows for each blockIdx.y, whose sum is row blockIdx.y of the result
template <typename F> __device__ void sum_columns(float* y, long long rows, int width, int accumulate, F term)
{
    __shared__ float sums[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    long long first = rows * blockIdx.y / gridDim.y, last = rows * (blockIdx.y + 1) / gridDim.y;
    float sum = 0;
    if (column < width)
        for (long long row = first + warp; row < last; row += 8) sum += term(row, column);
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= width) return;
    for (int i = 1; i < 8; ++i) sum += sums[i][lane];
    float& out = y[static_cast<long long>(blockIdx.y) * width + column];
    out = accumulate ? out + sum : sum;
}

// y (+)= Σ over rows of x
template <typename T>
__global__ void sum_rows(const T* x, float* y, long long rows, int width, int stride, int accumulate)
{
    sum_columns(y, rows, width, accumulate, [=](long long row, int column) { return number(x[row * stride + column]); });
}

// ∂L/∂γ = Σ g·x̂
template <typename T>
__global__ void layer_norm_weight(const T* g, const float* x, const float* mean, const float* rstd, float* y, int rows, int width)
{
    sum_columns(y, rows, width, 0, [=](long long row, int column) {
        return number(g[row * width + column]) * (x[row * width + column] - mean[row]) * rstd[row];
    });
}

// y[v] (+)= the rows of g whose id is v. A block for each v and each stretch of positions; width ≤ 2048
__global__ void __launch_bounds__(256) embedding_backward(
    const float* g, const int* ids, float* y, int count, int width, int accumulate)
{
    __shared__ u32 found[8];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, id = blockIdx.x;
    int first = static_cast<long long>(count) * blockIdx.y / gridDim.y;
    int last = static_cast<long long>(count) * (blockIdx.y + 1) / gridDim.y;
    float sum[8] = {};
    for (int start = first; start < last; start += 256) {
        int i = start + threadIdx.x;
        u32 here = __ballot_sync(0xffffffffu, i < last && ids[i] == id);
        if (lane == 0) found[warp] = here;
        __syncthreads();
        for (int w = 0; w < 8; ++w)
            for (u32 rest = found[w]; rest; rest &= rest - 1) {
                const float* row = g + static_cast<long long>(start + 32 * w + __ffs(rest) - 1) * width;
                for (int j = 0; j < 8; ++j)
                    if (threadIdx.x + 256 * j < width) sum[j] += row[threadIdx.x + 256 * j];
            }
        __syncthreads();
    }
    y += (static_cast<long long>(blockIdx.y) * gridDim.x + id) * width;
    for (int j = 0; j < 8; ++j)
        if (int column = threadIdx.x + 256 * j; column < width) y[column] = accumulate ? y[column] + sum[j] : sum[j];
}

// A warp a row of a (…, T, S): softmax over the keys up to the diagonal, in place; 0 after it
template <typename T> __global__ void causal_softmax(T* a, long long rows, int queries, int keys)
{
    long long row = thread_index() / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, seen = row % queries + keys - queries + 1;
    a += row * keys;
    float top = LOWEST, sum = 0;
    for (int j = lane; j < seen; j += 32) top = fmaxf(top, number(a[j]));
    top = warp_max(top);
    for (int j = lane; j < seen; j += 32) sum += __expf(number(a[j]) - top);
    float scale = 1.0f / warp_sum(sum);
    for (int j = lane; j < keys; j += 32) put(a[j], j < seen ? __expf(number(a[j]) - top) * scale : 0.0f);
}

__device__ inline bool kept(const u16* keep, long long element) { return keep[element / 16] >> element % 16 & 1; }

// y = a·m/q
template <typename T> __global__ void mask_weights(const T* a, T* y, const u16* keep, float inverse, long long n, int queries, int keys)
{
    long long i = thread_index();
    if (i >= n) return;
    bool past = i % keys <= i / keys % queries + keys - queries;
    put(y[i], past && kept(keep, i) ? number(a[i]) * inverse : 0.0f);
}

// da ← a(da·m/q − Σ da·m/q·a)/√d, a warp a row, in place
template <typename T>
__global__ void causal_softmax_backward(
    const T* a, T* da, const u16* keep, float inverse, float scale, long long rows, int queries, int keys)
{
    long long row = thread_index() / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, seen = row % queries + keys - queries + 1;
    a += row * keys;
    da += row * keys;
    float along = 0;
    for (int j = lane; j < seen; j += 32)
        if (!keep || kept(keep, row * keys + j)) along += number(a[j]) * number(da[j]) * inverse;
    along = warp_sum(along);
    for (int j = lane; j < keys; j += 32) {
        float share = j < seen && (!keep || kept(keep, row * keys + j)) ? number(da[j]) * inverse : 0.0f;
        put(da[j], j < seen ? number(a[j]) * (share - along) * scale : 0.0f);
    }
}

// A block a row of logits: −ln p[target], and ln Σ e^logit for the derivative; 0 where the target is to be ignored, NaN where
// there is no such column
template <typename T>
__global__ void __launch_bounds__(128) cross_entropy(
    const T* logits, const int* targets, float* losses, float* lse, int vocab, int stride, int ignore)
{
    __shared__ float tops[4], sums[4];
    const T* row = logits + static_cast<long long>(blockIdx.x) * stride;
    float top = LOWEST, sum = 0;
    for (int j = threadIdx.x; j < vocab; j += 128) top = fmaxf(top, number(row[j]));
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
    for (int j = threadIdx.x; j < vocab; j += 128) sum += __expf(number(row[j]) - top);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    float total = logf(sums[0] + sums[1] + sums[2] + sums[3]) + top;
    int target = targets[blockIdx.x];
    float logit = target >= 0 && target < vocab ? number(row[target]) : __int_as_float(0x7fffffff);
    lse[blockIdx.x] = total;
    losses[blockIdx.x] = target == ignore ? 0.0f : total - logit;
}

// mean[0] = mean of the losses that count, mean[1] = 1/their number. One block of 1,024 threads
__global__ void mean_loss(const float* losses, const int* targets, float* mean, int rows, int ignore)
{
    __shared__ float sums[32];
    __shared__ int counts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = 0;
    float sum = 0;
    for (int i = threadIdx.x; i < rows; i += 1024) {
        sum += losses[i];
        count += targets[i] != ignore;
    }
    sum = warp_sum(sum);
    for (int step = 16; step; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
    if (lane == 0) {
        sums[warp] = sum;
        counts[warp] = count;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 32; ++i) {
        sum += sums[i];
        count += counts[i];
    }
    mean[0] = sum / count;
    mean[1] = 1.0f / count;
}

// dlogits = (p − onehot(target))·g/n
template <typename T>
__global__ void cross_entropy_backward(
    const float* g, const float* mean, const T* logits, const int* targets, const float* lse, T* dlogits, int vocab, int stride,
    int dstride, int ignore)
{
    long long row = blockIdx.x;
    int target = targets[row];
    float scale = target == ignore ? 0.0f : g[0] * mean[1], total = lse[row];
    for (int j = threadIdx.x; j < vocab; j += blockDim.x) {
        float p = __expf(number(logits[row * stride + j]) - total) - (j == target);
        put(dlogits[row * dstride + j], scale ? p * scale : 0.0f);
    }
}

// One partial sum of squares a block
__global__ void __launch_bounds__(256) sum_of_squares(const float* x, float* sums, long long n)
{
    __shared__ float parts[8];
    float sum = 0;
    for (long long i = thread_index() * 4; i < n; i += gridDim.x * 1024ll) {
        float v[4];
        load(v, x + i, n - i);
        for (float e : v) sum += e * e;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    for (int i = 1; i < 8; ++i) sum += parts[i];
    sums[blockIdx.x] = sum;
}

// m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  p ← p·decay − rate·m/(√v·correction + ε)
// rest = 1 − β, which would lose digits if it were computed here
__global__ void adamw(
    float* p, const float* g, float* m, float* v, long long n, float beta1, float rest1, float beta2, float rest2, float decay,
    float rate, float correction, float eps)
{
    long long i = thread_index() * 4;
    if (i >= n) return;
    float a[4], b[4], c[4], d[4];
    load(a, p + i, n - i);
    load(b, g + i, n - i);
    load(c, m + i, n - i);
    load(d, v + i, n - i);
    for (int j = 0; j < 4; ++j) {
        c[j] = beta1 * c[j] + rest1 * b[j];
        d[j] = beta2 * d[j] + rest2 * b[j] * b[j];
        a[j] = a[j] * decay - rate * c[j] / (sqrtf(d[j]) * correction + eps);
    }
    store(p + i, a, n - i);
    store(m + i, c, n - i);
    store(v + i, d, n - i);
}
