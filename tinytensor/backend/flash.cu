// Causal attention without its T × S matrix, in tiles of 64 queries × 64 keys that never leave the chip.
//
// The softmax is taken online (Milakov & Gimelshein 2018): a row carries its maximum m and its sum l over the tiles so far, and
// what it has added up is shrunk when m grows. Backward computes each tile's probabilities anew from the row's log-sum-exp
// (Dao et al. 2022), once in blocks that own queries, for dq, and once in blocks that own keys, for dk and dv (Dao 2023): no
// block adds to what another has written, so there are no atomics and the same inputs give the same bits.
//
//   a = softmax(c·q kᵀ) where key ≤ query + S − T,  c = 1/√D,   y = (a·m/p) v,   lse = ln Σ exp(c·q kᵀ)
//   delta = Σ g·y,  ds = a·((g vᵀ)·m/p − delta),    dq = c·ds k,   dk = c·dsᵀ q,   dv = (a·m/p)ᵀ g
//
// A grid is (⌈T/64⌉, H, B) blocks, or (⌈S/64⌉, H, B) for flash_backward_keys, of 128 threads. Rows of D elements start at
// multiples of 16 bytes; the strides of batch, head and position are counted in elements. lse and delta are (B, H, T). Bit
// e % 16 of keep[e / 16] tells whether dropout keeps element e of (B, H, T, S), if the query sees the key; inverse is 1/p for
// the probability p of keeping. Without dropout keep is null and inverse 1.
//
// Each of a block's 4 warps owns 16 rows of the tile (its queries, or its keys), and multiplies 16 × 16 by 16 × 8 at a time.
// What lane 4g + t of a warp holds of such a product, by (row, column):
//
//   A, 16 × 16: 4 pairs                      B, 16 × 8: 2 pairs             C, 16 × 8: 4 floats
//   a0 (g, 2t…)      a2 (g, 2t + 8…)         b0 (2t…, g)                    c0 c1 (g, 2t…)
//   a1 (g + 8, 2t…)  a3 (g + 8, 2t + 8…)     b1 (2t + 8…, g)                c2 c3 (g + 8, 2t…)
//
// Two C side by side are thus an A: the probabilities go from one product to the next without leaving their registers.

#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int ROWS = 64, THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f;

#ifndef EMULATED
// c += a b
__device__ inline void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The B of 16 rows of 8, of which lane n points at row n % 16
__device__ inline void load_transposed(u32 (&b)[2], const bf16* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
}
#endif

__device__ inline float infinity() { return __int_as_float(0x7f800000); }  // the runtime compiler has no <math.h>

// Of the 16 rows of this thread's warp it holds own_row() and own_row() + 8; of 8 columns, own_column() and the next
__device__ inline int warp_row() { return threadIdx.x / 32 * 16; }
__device__ inline int own_row() { return warp_row() + threadIdx.x % 32 / 4; }
__device__ inline int own_column() { return threadIdx.x % 4 * 2; }

// This block's head of an array laid out by these strides
template <typename P> __device__ P* of_head(P* array, long long batch, long long head)
{
    return array + blockIdx.z * batch + blockIdx.y * head;
}

__device__ inline long long head_index() { return blockIdx.z * static_cast<long long>(gridDim.y) + blockIdx.y; }

// 64 rows of a head in shared memory. A row is D/2 + 4 words long, which is 4 times an odd number: 8 rows start in 8 different
// groups of 4 of the 32 banks, so neither a warp's loads of pairs (8 rows × 4 words) nor load_transposed's meet in a bank.
template <int D> struct alignas(16) Tile {
    bf16 at[ROWS][D + 8];

    // Rows first … first + 63 of this block's head, zeros from row `end` on
    __device__ void load(const bf16* array, long long batch, long long head, long long stride, int first, int end)
    {
        const bf16* rows = of_head(array, batch, head);
        for (int n = threadIdx.x; n < ROWS * D / 8; n += THREADS) {
            int row = n / (D / 8), column = n % (D / 8) * 8;
            uint4 eight = make_uint4(0, 0, 0, 0);
            if (first + row < end) eight = *reinterpret_cast<const uint4*>(rows + (first + row) * stride + column);
            *reinterpret_cast<uint4*>(&at[row][column]) = eight;
        }
    }

    __device__ u32 pair(int row, int column) const { return *reinterpret_cast<const u32*>(&at[row][column]); }
};

// The warp's 16 rows of a tile as D/16 A's
template <int D> __device__ void own_rows(u32 (&a)[D / 16][4], const Tile<D>& tile)
{
    for (int k = 0; k < D / 16; ++k)
        for (int n = 0; n < 4; ++n) a[k][n] = tile.pair(own_row() + n % 2 * 8, 16 * k + own_column() + n / 2 * 8);
}

// c = a bᵀ for rows first … first + 7 of b: 16 × D times D × 8
template <int D> __device__ void times_rows(float (&c)[4], const u32 (&a)[D / 16][4], const Tile<D>& b, int first)
{
    int row = first + threadIdx.x % 32 / 4;
    for (int n = 0; n < 4; ++n) c[n] = 0;
    for (int k = 0; k < D / 16; ++k) {
        u32 two[2] = {b.pair(row, 16 * k + own_column()), b.pair(row, 16 * k + own_column() + 8)};
        mma_16x8x16(c, a[k], two);
    }
}

// c += [left right] b for rows first … first + 15 of b: 16 × 16 times 16 × D
template <int D>
__device__ void add_product(float (&c)[D / 8][4], const float (&left)[4], const float (&right)[4], const Tile<D>& b, int first)
{
    u32 a[4], two[2];
    for (int n = 0; n < 4; ++n) {
        const float* from = n < 2 ? left : right;
        __nv_bfloat162 rounded = __floats2bfloat162_rn(from[n % 2 * 2], from[n % 2 * 2 + 1]);
        a[n] = *reinterpret_cast<u32*>(&rounded);
    }
    for (int n = 0; n < D / 8; ++n) {
        load_transposed(two, &b.at[first + threadIdx.x % 16][8 * n]);
        mma_16x8x16(c[n], a, two);
    }
}

// c, by `low` for own_row() and by `high` for own_row() + 8, as the tile's rows from `first` on, none of them from row `end` on
template <int N>
__device__ void store(bf16* array, long long batch, long long head, long long stride, int first, int end,
                      const float (&c)[N][4], float low, float high)
{
    for (int half = 0; half < 2; ++half) {
        int row = first + own_row() + 8 * half;
        float scale = half ? high : low;
        bf16* to = of_head(array, batch, head) + row * stride + own_column();
        for (int n = 0; n < N && row < end; ++n)
            *reinterpret_cast<__nv_bfloat162*>(to + 8 * n)
                = __floats2bfloat162_rn(c[n][2 * half] * scale, c[n][2 * half + 1] * scale);
    }
}

// The sum, or the largest, of the x of the 4 lanes that hold one row
__device__ inline float row_sum(float x)
{
    for (int lane = 1; lane < 4; lane *= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ inline float row_max(float x)
{
    for (int lane = 1; lane < 4; lane *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

// The mask of query i and the 16 keys from j on, key j + n in bit n; keys that the query does not see may have any bit
__device__ inline u32 kept(const u16* keep, int i, int j, int T, int S)
{
    if (i >= T || j > i + S - T) return 0;
    u64 row = (head_index() * T + i) * S, first = row + j, last = row + min(j + 15, S - 1);
    u32 bits = keep[first / 16];
    if (first % 16) bits |= static_cast<u32>(keep[last / 16]) << 16;
    return bits >> first % 16;
}

// [left right] ∘ m/p for the 16 keys from j on, i being the query of this thread's first row
__device__ inline void drop(float (&left)[4], float (&right)[4], const u16* keep, float inverse, int i, int j, int T, int S)
{
    for (int half = 0; half < 2; ++half) {
        u32 bits = kept(keep, i + 8 * half, j, T, S) >> own_column();
        for (int n = 0; n < 2; ++n) {
            left[2 * half + n] *= bits >> n & 1 ? inverse : 0.0f;
            right[2 * half + n] *= bits >> (8 + n) & 1 ? inverse : 0.0f;
        }
    }
}

// The probability of a score whose row has this log-sum-exp, both in units of ln 2. It exceeds 1 only by rounding, which
// must not be let grow into an infinity where scores are huge.
__device__ inline float probability(float score, float lse)
{
    float x = score - lse;
    return exp2f(x > 0.0f ? 0.0f : x);
}

template <int D>
__global__ void __launch_bounds__(THREADS) flash_forward(
    bf16* y, long long y_batch, long long y_head, long long y_row, float* lse,
    const bf16* q, long long q_batch, long long q_head, long long q_row,
    const bf16* k, long long k_batch, long long k_head, long long k_row,
    const bf16* v, long long v_batch, long long v_head, long long v_row,
    const u16* keep, float inverse, int T, int S)
{
    __shared__ Tile<D> keys, values;  // and, before the loop, what the block owns
    // The longest rows first, so that the last blocks to run are short
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, past = S - T;
    const int i = first + own_row(), reach = first + warp_row() + 15 + past, end = min(first + ROWS, T) + past;
    const float scale = LOG2_E * rsqrtf(D);

    u32 queries[D / 16][4];
    keys.load(q, q_batch, q_head, q_row, first, T);
    __syncthreads();
    own_rows(queries, keys);

    float out[D / 8][4] = {}, m[2] = {-infinity(), -infinity()}, l[2] = {};
    for (int j = 0; j < end; j += ROWS) {
        __syncthreads();
        keys.load(k, k_batch, k_head, k_row, j, end);
        values.load(v, v_batch, v_head, v_row, j, end);
        __syncthreads();

        float s[ROWS / 8][4];
        for (int n = 0; n < ROWS / 8; ++n) {
            if (j + 8 * n <= reach) times_rows(s[n], queries, keys, 8 * n);
            for (int e = 0; e < 4; ++e)
                if (j + 8 * n + own_column() + e % 2 > i + e / 2 * 8 + past) s[n][e] = -infinity();
        }
        for (int half = 0; half < 2; ++half) {
            float top = m[half];
            for (int n = 0; n < ROWS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = row_max(top);
            // Differences are scaled, not scores: the largest score must be 0 exactly, whatever its size
            float shrink = exp2f((m[half] - top) * scale);
            m[half] = top;
            l[half] *= shrink;
            for (int n = 0; n < D / 8; ++n)
                for (int e = 2 * half; e < 2 * half + 2; ++e) out[n][e] *= shrink;
            for (int n = 0; n < ROWS / 8; ++n)
                for (int e = 2 * half; e < 2 * half + 2; ++e) l[half] += s[n][e] = exp2f((s[n][e] - top) * scale);
        }
        for (int n = 0; n < ROWS / 8; n += 2) {
            if (j + 8 * n > reach) break;
            if (keep) drop(s[n], s[n + 1], keep, inverse, i, j + 8 * n, T, S);
            add_product(out, s[n], s[n + 1], values, 8 * n);
        }
    }
    for (int half = 0; half < 2; ++half) {
        l[half] = row_sum(l[half]);
        int row = i + 8 * half;
        if (row < T && own_column() == 0) lse[head_index() * T + row] = m[half] * rsqrtf(D) + logf(l[half]);
    }
    store(y, y_batch, y_head, y_row, first, T, out, 1 / l[0], 1 / l[1]);
}

// dq, and delta (B, H, T), which flash_backward_keys reads
template <int D>
__global__ void __launch_bounds__(THREADS) flash_backward_queries(
    bf16* dq, long long dq_batch, long long dq_head, long long dq_row, float* delta,
    const bf16* g, long long g_batch, long long g_head, long long g_row,
    const bf16* y, long long y_batch, long long y_head, long long y_row, const float* lse,
    const bf16* q, long long q_batch, long long q_head, long long q_row,
    const bf16* k, long long k_batch, long long k_head, long long k_row,
    const bf16* v, long long v_batch, long long v_head, long long v_row,
    const u16* keep, float inverse, int T, int S)
{
    __shared__ Tile<D> keys, values, outputs;  // the first two holding q and g before the loop
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, past = S - T;
    const int i = first + own_row(), reach = first + warp_row() + 15 + past, end = min(first + ROWS, T) + past;
    const float scale = LOG2_E * rsqrtf(D);

    u32 queries[D / 16][4], gradients[D / 16][4];
    keys.load(q, q_batch, q_head, q_row, first, T);
    values.load(g, g_batch, g_head, g_row, first, T);
    outputs.load(y, y_batch, y_head, y_row, first, T);
    __syncthreads();
    own_rows(queries, keys);
    own_rows(gradients, values);

    float exponent[2], mean[2];
    for (int half = 0; half < 2; ++half) {
        const bf16 *a = values.at[own_row() + 8 * half], *b = outputs.at[own_row() + 8 * half];
        float sum = 0.0f;
        for (int d = own_column(); d < D; d += 8)
            for (int e = d; e < d + 2; ++e) sum += __bfloat162float(a[e]) * __bfloat162float(b[e]);
        mean[half] = row_sum(sum);
        int row = i + 8 * half;
        exponent[half] = row < T ? lse[head_index() * T + row] * LOG2_E : 0.0f;
        if (row < T && own_column() == 0) delta[head_index() * T + row] = mean[half];
    }

    float out[D / 8][4] = {};
    for (int j = 0; j < end; j += ROWS) {
        __syncthreads();
        keys.load(k, k_batch, k_head, k_row, j, end);
        values.load(v, v_batch, v_head, v_row, j, end);
        __syncthreads();
        for (int n = 0; n < ROWS && j + n <= reach; n += 16) {
            float s[2][4], da[2][4];
            for (int side = 0; side < 2; ++side) {
                times_rows(s[side], queries, keys, n + 8 * side);
                times_rows(da[side], gradients, values, n + 8 * side);
            }
            if (keep) drop(da[0], da[1], keep, inverse, i, j + n, T, S);
            for (int side = 0; side < 2; ++side)
                for (int e = 0; e < 4; ++e) {
                    bool seen = j + n + 8 * side + own_column() + e % 2 <= i + e / 2 * 8 + past;
                    float a = seen ? probability(s[side][e] * scale, exponent[e / 2]) : 0.0f;
                    s[side][e] = a * (da[side][e] - mean[e / 2]);
                }
            add_product(out, s[0], s[1], keys, n);
        }
    }
    store(dq, dq_batch, dq_head, dq_row, first, T, out, rsqrtf(D), rsqrtf(D));
}

// dk and dv. Here the rows of a product are keys, its columns queries.
template <int D>
__global__ void __launch_bounds__(THREADS) flash_backward_keys(
    bf16* dk, long long dk_batch, long long dk_head, long long dk_row,
    bf16* dv, long long dv_batch, long long dv_head, long long dv_row,
    const bf16* g, long long g_batch, long long g_head, long long g_row, const float* lse, const float* delta,
    const bf16* q, long long q_batch, long long q_head, long long q_row,
    const bf16* k, long long k_batch, long long k_head, long long k_row,
    const bf16* v, long long v_batch, long long v_head, long long v_row,
    const u16* keep, float inverse, int T, int S)
{
    __shared__ Tile<D> queries, gradients;  // holding k and v before the loop
    __shared__ float exponent[ROWS], mean[ROWS];
    const int first = blockIdx.x * ROWS, past = S - T, j = first + own_row();
    const float scale = LOG2_E * rsqrtf(D);

    u32 keys[D / 16][4], values[D / 16][4];
    queries.load(k, k_batch, k_head, k_row, first, S);
    gradients.load(v, v_batch, v_head, v_row, first, S);
    __syncthreads();
    own_rows(keys, queries);
    own_rows(values, gradients);

    float out_k[D / 8][4] = {}, out_v[D / 8][4] = {};
    for (int i = max(first - past, 0) / ROWS * ROWS; i < T; i += ROWS) {
        __syncthreads();
        queries.load(q, q_batch, q_head, q_row, i, T);
        gradients.load(g, g_batch, g_head, g_row, i, T);
        if (threadIdx.x < ROWS) {
            int row = i + threadIdx.x;
            exponent[threadIdx.x] = row < T ? lse[head_index() * T + row] * LOG2_E : 0.0f;
            mean[threadIdx.x] = row < T ? delta[head_index() * T + row] : 0.0f;
        }
        __syncthreads();
        for (int n = 0; n < ROWS; n += 16) {
            if (i + n + 15 + past < first + warp_row()) continue;
            float a[2][4], da[2][4];
            for (int side = 0; side < 2; ++side) {
                times_rows(a[side], keys, queries, n + 8 * side);
                times_rows(da[side], values, gradients, n + 8 * side);
                for (int e = 0; e < 2; ++e) {
                    int row = n + 8 * side + own_column() + e;
                    u32 bits = keep ? kept(keep, i + row, first + warp_row(), T, S) >> (own_row() % 8) : ~0u;
                    for (int half = 0; half < 2; ++half) {
                        float &x = a[side][2 * half + e], &dx = da[side][2 * half + e];
                        float probable = j + 8 * half <= i + row + past ? probability(x * scale, exponent[row]) : 0.0f;
                        float share = bits >> 8 * half & 1 ? inverse : 0.0f;
                        x = probable * share;
                        dx = probable * (dx * share - mean[row]);
                    }
                }
            }
            add_product(out_v, a[0], a[1], gradients, n);
            add_product(out_k, da[0], da[1], queries, n);
        }
    }
    store(dk, dk_batch, dk_head, dk_row, first, S, out_k, rsqrtf(D), rsqrtf(D));
    store(dv, dv_batch, dv_head, dv_row, first, S, out_v, 1, 1);
}
