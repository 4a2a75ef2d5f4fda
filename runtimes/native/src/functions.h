// exp and its kin for sixteen numbers. Included by kernels.cpp alone, behind simd.h.
//
// Errors, measured over float32 by the tests, in units of the last place: see tests/test_math.cpp. Below the
// smallest normal number (1.2e-38) results are 0 or that number. The polynomials are of tools/polynomials.py.

static constexpr float kMagic =
    12582912.0f;  // 1.5 * 2^23: added to a number, it leaves the nearest integer in the low bits
static constexpr float kLog2e = 1.44269504f;
// ln 2 in two parts; the first is the nearest float32.
static constexpr float kLn2 = 0.693147182f, kLn2Rest = -1.90465421e-09f;
static constexpr float kLeastExp = -87.3365402f, kMostExp = 88.3762589f;
static constexpr float kExp[] = {0.49999988f, 0.16666518f, 0.041669544f, 0.008368988f, 0.001375115f};
static constexpr float kLog1p[] = {0.33333337f, 0.19999483f, 0.1430729f, 0.10725827f, 0.12107076f};
static constexpr float kTanh[] = {-0.3333333f, 0.13333204f, -0.053946517f, 0.021699317f, -0.00817385f, 0.0021396133f};
static constexpr float kErf[] = {0.12837917f,  -0.37612626f,   0.112835854f, -0.026853822f,
                                 0.005188346f, -0.0008010338f, 7.854303e-05f};
static constexpr float kErfc[] = {3.4188308e-06f, 0.28199032f, 0.2834969f,   0.23596795f, 0.22998248f,
                                  -0.091784604f,  0.37516463f, -0.57416284f, 0.3268287f,  -0.06744549f};

template <int N>
AFFECT_INLINE V polynomial(const float (&c)[N], V x) {
    V y = set(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) {
        y = fma(y, x, set(c[i]));
    }
    return y;
}

// exp(x) as p * 2^n: gives p, and n both as a number and in the low bits of `whole`.
AFFECT_INLINE V exp_parts(V x, V &whole, V &n) {
    whole = fma(x, set(kLog2e), set(kMagic));
    n = whole - set(kMagic);
    const V r = nfma(n, set(kLn2Rest), nfma(n, set(kLn2), x));
    return fma(r * r, polynomial(kExp, r), r) + set(1.0f);
}

// exp of numbers up to 0: an instruction less than `exp_small`, in the innermost loop that there is.
AFFECT_INLINE V exp_decay(V x) {
    V whole, n;
    // max, and min below, in this order let NaN through.
    const V p = exp_parts(max(set(kLeastExp), x), whole, n);
    return scaled(p, whole, n);
}

// exp of numbers that are at most 88.37, which larger ones are taken for: logarithms of probabilities, and the like.
AFFECT_INLINE V exp_small(V x) { return exp_decay(min(set(kMostExp), x)); }

AFFECT_INLINE V exp(V x) {
    V whole, n;
    const V p = exp_parts(min(set(89.0f), max(set(kLeastExp), x)), whole, n);
    // 2^n in two factors, as 2^128 is no float32.
    const V half = fma(n, set(0.5f), set(kMagic));
    const V rest = (n - (half - set(kMagic))) + set(kMagic);
    return select(less(x, set(kLeastExp)), set(0.0f), p * power_of_two(half) * power_of_two(rest));
}

// exp(-|x|), and 0 where that is no normal number.
AFFECT_INLINE V exp_down(V x) {
    const V down = set(-0.0f) - abs(x);
    return select(less(down, set(kLeastExp)), set(0.0f), exp_small(down));
}

AFFECT_INLINE V sigmoid(V x) {
    const V e = exp_down(x);
    return select(less(x, set(0.0f)), e, set(1.0f)) / (e + set(1.0f));
}

// log(1 + t) for t from 0 to 1.
AFFECT_INLINE V log1p(V t) {
    const V s = t / (t + set(2.0f));
    const V square = s * s;
    const V twice = s + s;
    return fma(twice * square, polynomial(kLog1p, square), twice);
}

AFFECT_INLINE V softplus(V x) { return max(set(0.0f), x) + log1p(exp_down(x)); }

AFFECT_INLINE V tanh(V x) {
    const V size = abs(x), square = x * x;
    const V e = exp_small(set(-2.0f) * size);
    const V far = with_sign((set(1.0f) - e) / (set(1.0f) + e), x);
    return select(less(size, set(0.625f)), fma(x * square, polynomial(kTanh, square), x), far);
}

// erfc(x + rest) for x >= 1 and a rest that x has lost by rounding.
AFFECT_INLINE V erfc_far(V x, V rest) {
    // exp(-x^2), with what x * x loses by rounding.
    const V square = x * x;
    const V lost = fma(x + x, rest, fma(x, x, set(-0.0f) - square));
    const V e = exp_small(set(-0.0f) - square);
    const V exact = nfma(e, lost, e);
    return exact * polynomial(kErfc, set(1.0f) / fma(x, set(0.5f), set(1.0f)));
}
AFFECT_INLINE V erf_near(V x) {
    const V square = x * x;
    return fma(x, polynomial(kErf, square), x);
}
AFFECT_INLINE V erf(V x) {
    const V size = abs(x);
    const V far = with_sign(set(1.0f) - erfc_far(min(set(9.0f), max(set(1.0f), size)), set(0.0f)), x);
    return select(less(size, set(1.0f)), erf_near(x), far);
}

AFFECT_INLINE V gelu(V x) {
    const V u = x * set(0.707106769f);
    // The second constant is what the first has lost of the root of 1/2.
    const V rest = fma(x, set(1.21016175e-08f), fma(x, set(0.707106769f), set(-0.0f) - u));
    const V size = abs(u);
    const V lost = select(less(size, set(9.2f)), with_sign(set(1.0f), u) * rest, set(0.0f));
    const V far = erfc_far(min(set(9.2f), max(set(1.0f), size)), lost);
    // 1 + erf(u), which is erfc(-u).
    V twice = select(less(u, set(0.0f)), far, set(2.0f) - far);
    twice = select(less(size, set(1.0f)), set(1.0f) + erf_near(u), twice);
    return x * set(0.5f) * twice;
}

// (exp(z) - 1) / z for z <= 0, and its limit 1 at 0: expm1(z) = 2 t / (1 - t) with t = tanh(z / 2) keeps every digit.
AFFECT_INLINE V expm1_ratio(V z) {
    const auto limit = less(set(-1e-30f), z);
    const V safe = select(limit, set(-1.0f), z);
    const V t = tanh(safe * set(0.5f));
    return select(limit, set(1.0f), (t + t) / (set(1.0f) - t) / safe);
}

AFFECT_INLINE V activated(int64_t act, V x) {
    switch (static_cast<Activation>(act)) {
        case Activation::relu:
            return max(set(0.0f), x);
        case Activation::silu:
            return x * sigmoid(x);
        case Activation::sigmoid:
            return sigmoid(x);
        case Activation::tanh:
            return tanh(x);
        case Activation::softplus:
            return softplus(x);
        case Activation::gelu:
            return gelu(x);
        default:
            return x;
    }
}
