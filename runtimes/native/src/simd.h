// Sixteen float32 numbers, and sixteen sums of INT8 products, on whatever vectors the compiler was told of.
//
// Not a general library: just what kernels.cpp needs, so that it is written once. Every operation gives the same bits
// everywhere. Included by kernels.cpp alone, inside a namespace of its own for each instruction set: two copies of an
// inline function with one name would be merged by the linker, and the copy that survives might be the one that this
// processor cannot run. For the same reason nothing of the C++ library is used here.
//
// Why not Highway: it has no sums of unsigned by signed bytes in the releases that distributions carry, and a package
// that pip builds from source could not bring it along.

#define AFFECT_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)

struct V {
    __m512 v;
};
using Mask = __mmask16;
AFFECT_INLINE V load(const float *p) { return {_mm512_loadu_ps(p)}; }
AFFECT_INLINE V load_n(const float *p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<Mask>((1u << n) - 1), p)};
}
AFFECT_INLINE void store(float *p, V a) { _mm512_storeu_ps(p, a.v); }
AFFECT_INLINE void store_n(float *p, V a, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<Mask>((1u << n) - 1), a.v);
}
AFFECT_INLINE V set(float a) { return {_mm512_set1_ps(a)}; }
AFFECT_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
AFFECT_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
AFFECT_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
AFFECT_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
AFFECT_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
AFFECT_INLINE V nfma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// b where one of them is NaN.
AFFECT_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
AFFECT_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
AFFECT_INLINE V sqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
AFFECT_INLINE Mask less(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
AFFECT_INLINE Mask equal(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
AFFECT_INLINE V select(Mask m, V a, V b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
AFFECT_INLINE V abs(V a) { return {_mm512_abs_ps(a.v)}; }
// The low bytes of the integers in the low bits, put there by adding kMagic, plus `add`.
AFFECT_INLINE void store_bytes(uint8_t *p, V a, int32_t add) {
    const __m512i whole = _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(add));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(whole));
}
AFFECT_INLINE V floor(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// The sign of b on the magnitude a.
AFFECT_INLINE V with_sign(V a, V b) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(a.v), _mm512_and_si512(_mm512_castps_si512(b.v), sign)))};
}
// 2 to the integer in the low bits of a, put there by adding kMagic.
AFFECT_INLINE V power_of_two(V a) {
    return {_mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23), _mm512_set1_epi32(0x3F800000)))};
}
// p * 2^n, where n is the integer in the low bits of `whole`.
AFFECT_INLINE V scaled(V p, V, V n) { return {_mm512_scalef_ps(p.v, n.v)}; }
// Lane i gets a[i / (16 >> shift)...]: each of the first 16 / n of p, n times.
AFFECT_INLINE V spread(const float *p, int shift) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift));
    return {_mm512_permutexvar_ps(from, _mm512_maskz_loadu_ps(static_cast<Mask>((1u << (16 >> shift)) - 1), p))};
}
// Lane i gets lane i ^ 8, 4, 2, 1.
AFFECT_INLINE V swap8(V a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0x4E)}; }
AFFECT_INLINE V swap4(V a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xB1)}; }
AFFECT_INLINE V swap2(V a) { return {_mm512_permute_ps(a.v, 0x4E)}; }
AFFECT_INLINE V swap1(V a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
// The sum of row i in lane i, each in the order of sum(): halves, quarters, pairs.
AFFECT_INLINE V row_sums(const V *rows) {
    V quads[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 a = rows[k].v, b = rows[4 + k].v, c = rows[8 + k].v, d = rows[12 + k].v;
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        quads[k].v = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    }
    __m512 pairs[2];
    for (int k = 0; k < 2; ++k) {
        const __m512d a = _mm512_castps_pd(quads[2 * k].v), b = _mm512_castps_pd(quads[2 * k + 1].v);
        pairs[k] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return {_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xDD))};
}

#elif defined(__AVX2__)

struct V {
    __m256 a, b;
};
struct Mask {
    __m256 a, b;
};
AFFECT_INLINE V load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
AFFECT_INLINE void store(float *p, V a) {
    _mm256_storeu_ps(p, a.a);
    _mm256_storeu_ps(p + 8, a.b);
}
AFFECT_INLINE V set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
#define AFFECT_BOTH(name, function) \
    AFFECT_INLINE V name(V a, V b) { return {function(a.a, b.a), function(a.b, b.b)}; }
AFFECT_BOTH(operator+, _mm256_add_ps)
AFFECT_BOTH(operator-, _mm256_sub_ps)
AFFECT_BOTH(operator*, _mm256_mul_ps)
AFFECT_BOTH(operator/, _mm256_div_ps)
AFFECT_BOTH(max, _mm256_max_ps)
AFFECT_BOTH(min, _mm256_min_ps)
#undef AFFECT_BOTH
AFFECT_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
AFFECT_INLINE V nfma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)}; }
AFFECT_INLINE V sqrt(V a) { return {_mm256_sqrt_ps(a.a), _mm256_sqrt_ps(a.b)}; }
AFFECT_INLINE Mask less(V a, V b) { return {_mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ), _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ)}; }
AFFECT_INLINE Mask equal(V a, V b) {
    return {_mm256_cmp_ps(a.a, b.a, _CMP_EQ_OQ), _mm256_cmp_ps(a.b, b.b, _CMP_EQ_OQ)};
}
AFFECT_INLINE V select(Mask m, V a, V b) { return {_mm256_blendv_ps(b.a, a.a, m.a), _mm256_blendv_ps(b.b, a.b, m.b)}; }
AFFECT_INLINE V abs(V a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.a), _mm256_andnot_ps(sign, a.b)};
}
AFFECT_INLINE V floor(V a) { return {_mm256_floor_ps(a.a), _mm256_floor_ps(a.b)}; }
AFFECT_INLINE V with_sign(V a, V b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(a.a, _mm256_and_ps(b.a, sign)), _mm256_or_ps(a.b, _mm256_and_ps(b.b, sign))};
}
AFFECT_INLINE __m256 power_of_two_half(__m256 a) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(a), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3F800000)));
}
AFFECT_INLINE V power_of_two(V a) { return {power_of_two_half(a.a), power_of_two_half(a.b)}; }
AFFECT_INLINE V swap8(V a) { return {a.b, a.a}; }
AFFECT_INLINE V swap4(V a) { return {_mm256_permute2f128_ps(a.a, a.a, 0x01), _mm256_permute2f128_ps(a.b, a.b, 0x01)}; }
AFFECT_INLINE V swap2(V a) { return {_mm256_permute_ps(a.a, 0x4E), _mm256_permute_ps(a.b, 0x4E)}; }
AFFECT_INLINE V swap1(V a) { return {_mm256_permute_ps(a.a, 0xB1), _mm256_permute_ps(a.b, 0xB1)}; }
AFFECT_INLINE __m256 row_sums_half(const V *rows) {
    __m256 quads[4];
    for (int k = 0; k < 4; ++k) {
        const __m256 x = _mm256_add_ps(rows[k].a, rows[k].b), y = _mm256_add_ps(rows[4 + k].a, rows[4 + k].b);
        quads[k] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
    __m256 pairs[2];
    for (int k = 0; k < 2; ++k) {
        const __m256d x = _mm256_castps_pd(quads[2 * k]), y = _mm256_castps_pd(quads[2 * k + 1]);
        pairs[k] =
            _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88), _mm256_shuffle_ps(pairs[0], pairs[1], 0xDD));
}
AFFECT_INLINE V row_sums(const V *rows) { return {row_sums_half(rows), row_sums_half(rows + 8)}; }

#elif defined(AFFECT_NEON)

struct V {
    float32x4_t v[4];
};
struct Mask {
    uint32x4_t v[4];
};
#define AFFECT_EACH for (int i = 0; i < 4; ++i)
AFFECT_INLINE V load(const float *p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
AFFECT_INLINE void store(float *p, V a) { AFFECT_EACH vst1q_f32(p + 4 * i, a.v[i]); }
AFFECT_INLINE V set(float a) { return {{vdupq_n_f32(a), vdupq_n_f32(a), vdupq_n_f32(a), vdupq_n_f32(a)}}; }
#define AFFECT_FOUR(name, expression)    \
    AFFECT_INLINE V name(V a, V b) {     \
        V y;                             \
        AFFECT_EACH y.v[i] = expression; \
        return y;                        \
    }
AFFECT_FOUR(operator+, vaddq_f32(a.v[i], b.v[i]))
AFFECT_FOUR(operator-, vsubq_f32(a.v[i], b.v[i]))
AFFECT_FOUR(operator*, vmulq_f32(a.v[i], b.v[i]))
AFFECT_FOUR(operator/, vdivq_f32(a.v[i], b.v[i]))
// By comparison: NEON's own maximum is NaN where one of them is.
AFFECT_FOUR(max, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]))
AFFECT_FOUR(min, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]))
AFFECT_FOUR(with_sign, vbslq_f32(vdupq_n_u32(0x80000000u), b.v[i], a.v[i]))
#undef AFFECT_FOUR
AFFECT_INLINE V fma(V a, V b, V c) {
    AFFECT_EACH c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}
AFFECT_INLINE V nfma(V a, V b, V c) {
    AFFECT_EACH c.v[i] = vfmsq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}
AFFECT_INLINE V sqrt(V a) {
    AFFECT_EACH a.v[i] = vsqrtq_f32(a.v[i]);
    return a;
}
AFFECT_INLINE V abs(V a) {
    AFFECT_EACH a.v[i] = vabsq_f32(a.v[i]);
    return a;
}
AFFECT_INLINE V floor(V a) {
    AFFECT_EACH a.v[i] = vrndmq_f32(a.v[i]);
    return a;
}
AFFECT_INLINE Mask less(V a, V b) {
    Mask m;
    AFFECT_EACH m.v[i] = vcltq_f32(a.v[i], b.v[i]);
    return m;
}
AFFECT_INLINE Mask equal(V a, V b) {
    Mask m;
    AFFECT_EACH m.v[i] = vceqq_f32(a.v[i], b.v[i]);
    return m;
}
AFFECT_INLINE V select(Mask m, V a, V b) {
    AFFECT_EACH a.v[i] = vbslq_f32(m.v[i], a.v[i], b.v[i]);
    return a;
}
AFFECT_INLINE V power_of_two(V a) {
    AFFECT_EACH {
        const int32x4_t shifted = vshlq_n_s32(vreinterpretq_s32_f32(a.v[i]), 23);
        a.v[i] = vreinterpretq_f32_s32(vaddq_s32(shifted, vdupq_n_s32(0x3F800000)));
    }
    return a;
}
AFFECT_INLINE V swap8(V a) { return {{a.v[2], a.v[3], a.v[0], a.v[1]}}; }
AFFECT_INLINE V swap4(V a) { return {{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
AFFECT_INLINE V swap2(V a) {
    AFFECT_EACH a.v[i] = vextq_f32(a.v[i], a.v[i], 2);
    return a;
}
AFFECT_INLINE V swap1(V a) {
    AFFECT_EACH a.v[i] = vrev64q_f32(a.v[i]);
    return a;
}
AFFECT_INLINE V row_sums(const V *rows) {
    V y;
    AFFECT_EACH {
        float32x4_t quads[4];
        for (int k = 0; k < 4; ++k) {
            const V &r = rows[4 * i + k];
            quads[k] = vaddq_f32(vaddq_f32(r.v[0], r.v[2]), vaddq_f32(r.v[1], r.v[3]));
        }
        float32x4_t pairs[2];
        for (int k = 0; k < 2; ++k) {
            const float64x2_t a = vreinterpretq_f64_f32(quads[2 * k]), b = vreinterpretq_f64_f32(quads[2 * k + 1]);
            pairs[k] = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)));
        }
        y.v[i] = vaddq_f32(vuzp1q_f32(pairs[0], pairs[1]), vuzp2q_f32(pairs[0], pairs[1]));
    }
    return y;
}
#undef AFFECT_EACH

#else

// What the others are compared with, and what runs where nothing else does.
struct V {
    float v[16];
};
struct Mask {
    bool v[16];
};
#define AFFECT_EACH for (int i = 0; i < 16; ++i)
AFFECT_INLINE V load(const float *p) {
    V y;
    AFFECT_EACH y.v[i] = p[i];
    return y;
}
AFFECT_INLINE void store(float *p, V a) { AFFECT_EACH p[i] = a.v[i]; }
AFFECT_INLINE V set(float a) {
    V y;
    AFFECT_EACH y.v[i] = a;
    return y;
}
#define AFFECT_LANES(name, expression)   \
    AFFECT_INLINE V name(V a, V b) {     \
        AFFECT_EACH a.v[i] = expression; \
        return a;                        \
    }
AFFECT_LANES(operator+, a.v[i] + b.v[i])
AFFECT_LANES(operator-, a.v[i] - b.v[i])
AFFECT_LANES(operator*, a.v[i] * b.v[i])
AFFECT_LANES(operator/, a.v[i] / b.v[i])
AFFECT_LANES(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
AFFECT_LANES(min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
AFFECT_LANES(with_sign, __builtin_copysignf(a.v[i], b.v[i]))
#undef AFFECT_LANES
AFFECT_INLINE V fma(V a, V b, V c) {
    AFFECT_EACH c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
AFFECT_INLINE V nfma(V a, V b, V c) {
    AFFECT_EACH c.v[i] = __builtin_fmaf(-a.v[i], b.v[i], c.v[i]);
    return c;
}
AFFECT_INLINE V sqrt(V a) {
    AFFECT_EACH a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
}
AFFECT_INLINE V abs(V a) {
    AFFECT_EACH a.v[i] = __builtin_fabsf(a.v[i]);
    return a;
}
AFFECT_INLINE V floor(V a) {
    AFFECT_EACH a.v[i] = __builtin_floorf(a.v[i]);
    return a;
}
AFFECT_INLINE Mask less(V a, V b) {
    Mask m;
    AFFECT_EACH m.v[i] = a.v[i] < b.v[i];
    return m;
}
AFFECT_INLINE Mask equal(V a, V b) {
    Mask m;
    AFFECT_EACH m.v[i] = a.v[i] == b.v[i];
    return m;
}
AFFECT_INLINE V select(Mask m, V a, V b) {
    AFFECT_EACH a.v[i] = m.v[i] ? a.v[i] : b.v[i];
    return a;
}
AFFECT_INLINE V power_of_two(V a) {
    AFFECT_EACH {
        uint32_t bits;
        __builtin_memcpy(&bits, &a.v[i], sizeof bits);
        bits = (bits << 23) + 0x3F800000u;
        __builtin_memcpy(&a.v[i], &bits, sizeof bits);
    }
    return a;
}
AFFECT_INLINE V swapped(V a, int by) {
    V y;
    AFFECT_EACH y.v[i] = a.v[i ^ by];
    return y;
}
AFFECT_INLINE V swap8(V a) { return swapped(a, 8); }
AFFECT_INLINE V swap4(V a) { return swapped(a, 4); }
AFFECT_INLINE V swap2(V a) { return swapped(a, 2); }
AFFECT_INLINE V swap1(V a) { return swapped(a, 1); }
AFFECT_INLINE V row_sums(const V *rows) {
    V y;
    AFFECT_EACH {
        V r = rows[i];
        for (int half = 8; half > 0; half /= 2) {
            for (int k = 0; k < half; ++k) {
                r.v[k] += r.v[k + half];
            }
        }
        y.v[i] = r.v[0];
    }
    return y;
}
#undef AFFECT_EACH

#endif

#if !defined(__AVX512F__)
AFFECT_INLINE V scaled(V p, V whole, V) { return p * power_of_two(whole); }
AFFECT_INLINE void store_bytes(uint8_t *p, V a, int32_t add) {
    alignas(64) float part[16];
    alignas(64) int32_t bits[16];
    store(part, a);
    __builtin_memcpy(bits, part, sizeof bits);
    for (int i = 0; i < 16; ++i) {
        p[i] = static_cast<uint8_t>(bits[i] + add);
    }
}
AFFECT_INLINE V load_n(const float *p, int64_t n) {
    alignas(64) float part[16] = {};
    for (int64_t i = 0; i < n; ++i) {
        part[i] = p[i];
    }
    return load(part);
}
AFFECT_INLINE void store_n(float *p, V a, int64_t n) {
    alignas(64) float part[16];
    store(part, a);
    for (int64_t i = 0; i < n; ++i) {
        p[i] = part[i];
    }
}
AFFECT_INLINE V spread(const float *p, int shift) {
    alignas(64) float part[16];
    for (int i = 0; i < 16; ++i) {
        part[i] = p[i >> shift];
    }
    return load(part);
}
#endif

AFFECT_INLINE float first(V a) {
    float y;
    store_n(&y, a, 1);
    return y;
}
// Of all lanes: halves, quarters, pairs.
AFFECT_INLINE float sum(V a) {
    a = a + swap8(a);
    a = a + swap4(a);
    a = a + swap2(a);
    return first(a + swap1(a));
}

// Sums of products of unsigned bytes (activations) and signed ones (weights), four at a time for each of 16 outputs.
// Exact: no step of any of these can overflow or saturate (255 * 128 * 32,768 inputs stay below 2^31).
[[maybe_unused]] AFFECT_INLINE float as_number(int32_t total, int32_t sum, int32_t zero) {
    // Unsigned: a file may claim any sum of codes, and signed overflow is undefined.
    return static_cast<float>(
        static_cast<int32_t>(static_cast<uint32_t>(total) - static_cast<uint32_t>(zero) * static_cast<uint32_t>(sum)));
}
#if defined(__AVX512VNNI__)

struct Sums {
    __m512i v;
};
struct Codes {
    __m512i v;
};
struct Bytes {
    __m512i v;
};
AFFECT_INLINE Sums no_sums() { return {_mm512_setzero_si512()}; }
AFFECT_INLINE Codes load_codes(const int8_t *p) { return {_mm512_loadu_si512(p)}; }
AFFECT_INLINE Bytes repeat(const uint8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) { return {_mm512_dpbusd_epi32(s.v, a.v, w.v)}; }
// As numbers, less `zero` times the sum of the codes.
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    const __m512i off = _mm512_mullo_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi32(zero));
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(s.v, off))};
}

#elif defined(__AVXVNNI__)

struct Sums {
    __m256i v[2];
};
struct Codes {
    __m256i v[2];
};
struct Bytes {
    __m256i v;
};
AFFECT_INLINE Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
AFFECT_INLINE Codes load_codes(const int8_t *p) {
    return {{_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
             _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32))}};
}
AFFECT_INLINE Bytes repeat(const uint8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four)};
}
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    return {{_mm256_dpbusd_avx_epi32(s.v[0], a.v, w.v[0]), _mm256_dpbusd_avx_epi32(s.v[1], a.v, w.v[1])}};
}
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    __m256 y[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i of = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums + 8 * i));
        y[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(s.v[i], _mm256_mullo_epi32(of, _mm256_set1_epi32(zero))));
    }
    return {y[0], y[1]};
}

#elif defined(__AVX512BW__) || defined(__AVX2__)

// vpmaddubsw would saturate: both are widened to 16 bits first. A 32-bit lane has the sum of two products, so 16
// outputs fill two (or four) registers, and neighbours are added at the end.
#if defined(__AVX512BW__)
struct Sums {
    __m512i v[2];
};
struct Codes {
    __m512i v[2];
};
struct Bytes {
    __m512i v;
};
AFFECT_INLINE Sums no_sums() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
AFFECT_INLINE Codes load_codes(const int8_t *p) {
    return {{_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))),
             _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32)))}};
}
AFFECT_INLINE Bytes repeat(const uint8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm512_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)))};
}
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    for (int i = 0; i < 2; ++i) {
        s.v[i] = _mm512_add_epi32(s.v[i], _mm512_madd_epi16(a.v, w.v[i]));
    }
    return s;
}
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    alignas(64) int32_t pairs[32];
    alignas(64) float y[16];
    for (int i = 0; i < 2; ++i) {
        _mm512_store_si512(pairs + 16 * i, s.v[i]);
    }
    for (int i = 0; i < 16; ++i) {
        y[i] = as_number(pairs[2 * i] + pairs[2 * i + 1], sums[i], zero);
    }
    return load(y);
}
#else
struct Sums {
    __m256i v[4];
};
struct Codes {
    __m256i v[4];
};
struct Bytes {
    __m256i v;
};
AFFECT_INLINE Sums no_sums() {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
}
AFFECT_INLINE Codes load_codes(const int8_t *p) {
    Codes w;
    for (int i = 0; i < 4; ++i) {
        w.v[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16 * i)));
    }
    return w;
}
AFFECT_INLINE Bytes repeat(const uint8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)))};
}
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    for (int i = 0; i < 4; ++i) {
        s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(a.v, w.v[i]));
    }
    return s;
}
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    alignas(64) int32_t pairs[32];
    alignas(64) float y[16];
    for (int i = 0; i < 4; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i *>(pairs + 8 * i), s.v[i]);
    }
    for (int i = 0; i < 16; ++i) {
        y[i] = as_number(pairs[2 * i] + pairs[2 * i + 1], sums[i], zero);
    }
    return load(y);
}
#endif

#elif defined(AFFECT_NEON)

// NEON multiplies signed by signed: 128 is taken from the activations, and comes back with the sum of the codes.
struct Bytes {
    int8x16_t v;
};
struct Codes {
    int8x16_t v[4];
};
AFFECT_INLINE Bytes repeat(const uint8_t *p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    return {vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u))};
}
AFFECT_INLINE Codes load_codes(const int8_t *p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
}
#if defined(__ARM_FEATURE_DOTPROD)
struct Sums {
    int32x4_t v[4];
};
AFFECT_INLINE Sums no_sums() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    for (int i = 0; i < 4; ++i) {
        s.v[i] = vdotq_s32(s.v[i], a.v, w.v[i]);
    }
    return s;
}
AFFECT_INLINE int32x4_t quarter(const Sums &s, int i) { return s.v[i]; }
#else
struct Sums {
    int32x4_t v[8];
};
AFFECT_INLINE Sums no_sums() {
    Sums s;
    for (int i = 0; i < 8; ++i) {
        s.v[i] = vdupq_n_s32(0);
    }
    return s;
}
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    for (int i = 0; i < 4; ++i) {
        // -128 * -127 fits into 16 bits; the sum of two would not, so it is taken in 32.
        s.v[2 * i] = vpadalq_s16(s.v[2 * i], vmull_s8(vget_low_s8(a.v), vget_low_s8(w.v[i])));
        s.v[2 * i + 1] = vpadalq_s16(s.v[2 * i + 1], vmull_high_s8(a.v, w.v[i]));
    }
    return s;
}
AFFECT_INLINE int32x4_t quarter(const Sums &s, int i) { return vpaddq_s32(s.v[2 * i], s.v[2 * i + 1]); }
#endif
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    V y;
    for (int i = 0; i < 4; ++i) {
        y.v[i] = vcvtq_f32_s32(vmlaq_s32(quarter(s, i), vld1q_s32(sums + 4 * i), vdupq_n_s32(128 - zero)));
    }
    return y;
}

#else

struct Sums {
    int32_t v[16];
};
struct Codes {
    const int8_t *p;
};
struct Bytes {
    const uint8_t *p;
};
AFFECT_INLINE Sums no_sums() { return {}; }
AFFECT_INLINE Codes load_codes(const int8_t *p) { return {p}; }
AFFECT_INLINE Bytes repeat(const uint8_t *p) { return {p}; }
AFFECT_INLINE Sums add_products(Sums s, Bytes a, Codes w) {
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 4; ++k) {
            s.v[i] += a.p[k] * w.p[4 * i + k];
        }
    }
    return s;
}
AFFECT_INLINE V finished(Sums s, const int32_t *sums, int32_t zero) {
    V y;
    for (int i = 0; i < 16; ++i) {
        y.v[i] = as_number(s.v[i], sums[i], zero);
    }
    return y;
}

#endif
