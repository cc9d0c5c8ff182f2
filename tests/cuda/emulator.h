// CUDA's language and functions for a CPU: a `.cu` file included after this header is plain C++ (see fibers.h for its threads).
//
// Blocks, warps and lanes are taken in a scrambled order, and `__shared__` memory is filled with NaN before each block, so that a
// kernel that leans on an order, or on what it never wrote, goes wrong here too. Operations of part of a warp are refused.
#pragma once
#include <math.h>

#include <type_traits>

#include "cuda_bf16.h"
#include "fibers.h"

#define EMULATED
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __align__(n)  // which may follow __shared__, as nvcc has it
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // with guards around it, which thread-local memory does not get
#else
#define __shared__ static thread_local  // so that it all lies in one place, with nothing else there, and can be filled
#endif

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__low2float(pair), __high2float(pair)}; }

constexpr int warpSize = emulated::WARP;
inline void __syncthreads(int line = __builtin_LINE()) { emulated::wait(emulated::BARRIER, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulated::exchange(0, line, mask); }

namespace emulated {
template <class T, class F>
T shuffle(unsigned mask, T value, int width, int line, const F& source) {
    if (width != WARP) fail("line %d: a shuffle of width %d is not emulated", line, width);
    return exchange(value, line, mask)(source(state.current % WARP));
}
inline unsigned ballot(unsigned mask, int predicate, int line) {
    auto all = exchange(predicate, line, mask);
    unsigned bits = 0;
    for (int lane = 0; lane < WARP; ++lane) bits |= unsigned(all(lane) != 0) << lane;
    return bits;
}
}  // namespace emulated

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int) { return lane % 32; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int me) { return me ^ flip; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](int me) { return me + by < 32 ? me + by : me; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
    return emulated::shuffle(mask, value, width, line, [=](unsigned me) { return me >= by ? me - by : me; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulated::ballot(mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulated::ballot(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return emulated::ballot(mask, predicate, line) == ~0u;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. In lane 4g + t, a holds rows g and g + 8 at columns 2t, 2t + 1 (registers
// 0, 1) and 2t + 8, 2t + 9 (2, 3); b the same rows of column g; c columns 2t, 2t + 1 of rows g (0, 1) and g + 8 (2, 3).
inline void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    struct Fragments { __nv_bfloat16 a[4][2], b[2][2]; } mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    auto all = emulated::exchange(mine, line);
    int lane = emulated::state.current % 32, g = lane / 4, t = lane % 4;
    for (int k = 0; k < 16; ++k) {
        Fragments left = all(4 * g + k % 8 / 2);
        for (int column = 0; column < 2; ++column) {
            float right = __bfloat162float(all(4 * (2 * t + column) + k % 8 / 2).b[k / 8][k % 2]);
            for (int half = 0; half < 2; ++half) c[2 * half + column] += __bfloat162float(left.a[k / 8 * 2 + half][k % 2]) * right;
        }
    }
}

// ldmatrix.sync.aligned.m8n8.x2.trans.b16: lanes 0 to 15 name the rows of two 8×8 matrices, and lane 4g + t gets, of each, the
// elements of column g in rows 2t and 2t + 1.
inline void load_transposed(unsigned (&b)[2], const __nv_bfloat16* row, int line = __builtin_LINE()) {
    auto rows = emulated::exchange(row, line);
    int lane = emulated::state.current % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 16; ++i)
        if (reinterpret_cast<uintptr_t>(rows(i)) % 16) emulated::fail("line %d: lane %d gives a row that is not 16-byte aligned", line, i);
    for (int i = 0; i < 2; ++i) {
        __nv_bfloat162 pair = {rows(8 * i + 2 * t)[g], rows(8 * i + 2 * t + 1)[g]};
        memcpy(&b[i], &pair, sizeof pair);
    }
}

#define __expf expf  // the C library declares, and does not export, functions of these names
#define __logf logf
#define __powf powf
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned x, unsigned y) { return 1ull * x * y >> 32; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned __int128>(x) * y >> 64;
}

namespace emulated {
template <class To, class From>
To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
}  // namespace emulated
inline int __float_as_int(float x) { return emulated::reinterpret<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated::reinterpret<unsigned>(x); }
inline float __int_as_float(int x) { return emulated::reinterpret<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated::reinterpret<float>(x); }

template <class T>
T __ldg(const T* from) { return *from; }
template <class T>
T atomicAdd(T* to, std::common_type_t<T> value) { return std::exchange(*to, *to + value); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
