// Numbers of 16 bits without a header of CUDA's, and what every kernel takes of a warp.

namespace {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

}  // namespace

struct Bfloat16 {
    unsigned short bits;

    __device__ __forceinline__ operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

struct Float16 {
    unsigned short bits;

    __device__ __forceinline__ operator float() const {
        const unsigned sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
        // Shifted into place, the exponent is 112 too small; that of infinity and NaN is all ones.
        const float magnitude = __uint_as_float(rest << 13) * __uint_as_float(0x77800000u);
        return __uint_as_float(__float_as_uint(magnitude) | (rest >= 0x7c00u ? 0x7f800000u : 0) | sign);
    }
};
