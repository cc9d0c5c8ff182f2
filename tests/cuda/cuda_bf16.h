// The bfloat16 of CUDA's header of this name, as far as kernels here use it. Conversions are by name only, as a slip into float
// arithmetic or a second rounding would go unseen otherwise.
#pragma once
#include <cstring>

struct __nv_bfloat16 {
    unsigned short bits;
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    unsigned wide = unsigned(value.bits) << 16;
    float result;
    memcpy(&result, &wide, sizeof result);
    return result;
}

inline __nv_bfloat16 __float2bfloat16(float value) {  // to nearest, ties to even
    unsigned wide;
    memcpy(&wide, &value, sizeof wide);
    if (value != value) return {0x7fff};
    return {static_cast<unsigned short>((wide + 0x7fffu + (wide >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __float2bfloat16(value); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 pair) { return pair.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 pair) { return pair.y; }
inline float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
