// Activations of a vector F of floats; kernels.h lists them.

template <class F>
struct Ints;
template <>
struct Ints<v8> {
  typedef v8i type;
};
#if SP_LANES != 8
template <>
struct Ints<vf> {
  typedef vi type;
};
#endif

// Where the mask (all bits or none) is set a, else b.
template <class F, class I>
static inline F choose(I mask, F a, F b) {
  return reinterpret_cast<F>((mask & reinterpret_cast<I>(a)) | (~mask & reinterpret_cast<I>(b)));
}

// e^x to about 1 ulp for x in [-87, 88.72]; below that e^-87, above it, where e^x leaves float, infinity. NaN stays NaN.
template <class F>
static inline F exponential(F x) {
  typedef typename Ints<F>::type I;
  const F low = F{} - 87.0f, high = F{} + 88.7228f;
  F t = choose<F, I>(x < low, low, x);
  t = choose<F, I>(t > high, high, t);
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = t * 1.44269504088896341f + magic;
  const F whole = shifted - magic;
  const F r = (t - whole * 0.693359375f) + whole * 2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I power = reinterpret_cast<I>(shifted) << 23;
  return choose<F, I>(x > high, F{} + __builtin_inff(), reinterpret_cast<F>(reinterpret_cast<I>(p) + power));
}

// The share of a normal distribution below x, for GELU: x times it is exact to 1e-6 (beyond 5 to float's own rounding). An odd
// polynomial of degree 27 on [-5.25, 5.25], written in u = 2 (x / 5.25)^2 - 1, whose powers stay below 1; no division.
template <class F>
static inline F normal_share(F x) {
  typedef typename Ints<F>::type I;
  constexpr float kCoefficients[] = {-0.0671265899f,  0.0496451366f,  -0.0397712712f,  0.032046234f,    -0.024965449f,  0.0184196536f,
                                     -0.0130881923f,  0.00885472383f, -0.00483600408f, 0.00209463673f,  -0.00160728643f, 0.00136961786f,
                                     -0.000456485845f};
  const F bound = F{} + 5.25f;
  F t = choose<F, I>(x > bound, bound, x);
  t = choose<F, I>(t < -bound, -bound, t);
  const F u = t * t * (2.0f / (5.25f * 5.25f)) - 1.0f;
  F p = F{} + kCoefficients[12];
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) p = p * u + kCoefficients[i];
  p = p * u + 0.13465935f;
  return choose<F, I>(x < -bound, F{}, t * p + 0.5f);
}

// GELU, x times the share of a normal distribution below x, to 5e-7 absolute and without a division: 0.5 x + |x| q(|x|), where q is
// that share less a half. Tables of coefficients, one entry a lane, are picked from by permutation where the tier can: a polynomial
// a piece of the axis, q = 0.5 beyond the last. Else one odd polynomial of degree 27 serves [-5.25, 5.25].
#if defined(__AVX512F__) && SP_LANES == 16
constexpr bool kPiecesOfVector = true;
#else
constexpr bool kPiecesOfVector = SP_LANES == 8;
#endif
#if defined(__AVX2__)
template <class F>
struct GeluPieces;
template <>
struct GeluPieces<v8> {
  static constexpr int kDegree = 5;
  static constexpr float kWidth = 0.75f;
  alignas(32) static constexpr float kTable[kDegree + 1][8] = {
      {0.146169767f, 0.369705379f, 0.469603747f, 0.495667577f, 0.499630898f, 0.499981463f, 0.499999464f, 0.5f},
      {0.278889507f, 0.158907428f, 0.0515899509f, 0.00954308733f, 0.00100582326f, 6.04086672e-05f, 2.06783375e-06f, 0.0f},
      {-0.039215304f, -0.0670311749f, -0.0362824127f, -0.00939593837f, -0.0012718325f, -9.30460519e-05f, -3.73687112e-06f, 0.0f},
      {-0.0224196631f, 0.00395518634f, 0.0121628996f, 0.00527176121f, 0.000980041339f, 9.05655397e-05f, 4.3851428e-06f, 0.0f},
      {0.00515848817f, 0.0053641675f, -0.000785722921f, -0.0016929002f, -0.000513411942f, -6.55718832e-05f, -4.11882411e-06f, 0.0f},
      {0.00134645216f, -0.00121843559f, -0.000766359095f, 0.000216875356f, 0.000170294967f, 3.14969402e-05f, 2.51860911e-06f, 0.0f},
  };
  static v8 pick(v8i piece, int power) {
    return reinterpret_cast<v8>(_mm256_permutevar8x32_ps(_mm256_load_ps(kTable[power]), reinterpret_cast<__m256i>(piece)));
  }
};
#if defined(__AVX512F__) && SP_LANES == 16
template <>
struct GeluPieces<vf> {
  static constexpr int kDegree = 4;
  static constexpr float kWidth = 0.35f;
  alignas(64) static constexpr float kTable[kDegree + 1][16] = {
      {0.0694602355f, 0.200208411f, 0.309213042f, 0.389712393f, 0.442371786f, 0.472885311f, 0.488547027f, 0.495667547f, 0.498535067f,
       0.499557912f, 0.499881089f, 0.499971509f, 0.49999392f, 0.499998838f, 0.499999791f, 0.5f},
      {0.137507826f, 0.121653736f, 0.0952194706f, 0.0659364313f, 0.0403945968f, 0.0218936261f, 0.010498005f, 0.00445336569f,
       0.00167131971f, 0.000554903178f, 0.000162988843f, 4.23523488e-05f, 9.7357979e-06f, 1.9798631e-06f, 3.56174468e-07f, 0.0f},
      {-0.00421433849f, -0.0111771384f, -0.014580057f, -0.0141346538f, -0.0111334911f, -0.00737536f, -0.0041795834f, -0.00204585865f,
       -0.000870203367f, -0.000322926004f, -0.000104841529f, -2.98394043e-05f, -7.4564191e-06f, -1.63778782e-06f, -3.16494607e-07f, 0.0f},
      {-0.00271346699f, -0.00179252843f, -0.00045931054f, 0.000664347259f, 0.00121208199f, 0.00120467856f, 0.000894446974f,
       0.000537180167f, 0.000269741431f, 0.000115216215f, 4.22918711e-05f, 1.34292086e-05f, 3.70571092e-06f, 8.91549234e-07f,
       1.87471855e-07f, 0.0f},
      {0.000147970713f, 0.00031018423f, 0.000329873554f, 0.000214672531f, 5.89646115e-05f, -5.23539347e-05f, -9.21042883e-05f,
       -8.09285921e-05f, -5.19611676e-05f, -2.66587031e-05f, -1.13382303e-05f, -4.07490188e-06f, -1.25176928e-06f, -3.31139717e-07f,
       -7.58285168e-08f, 0.0f},
  };
  static vf pick(vi piece, int power) {
    return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(piece), _mm512_load_ps(kTable[power])));
  }
};
#endif
#endif

template <class F>
static inline F gelu(F x) {
#if defined(__AVX2__)
  if constexpr (sizeof(F) == 32 || kPiecesOfVector) {
    typedef typename Ints<F>::type I;
    typedef GeluPieces<F> P;
    const F size = reinterpret_cast<F>(reinterpret_cast<I>(x) & 0x7fffffff), last = F{} + static_cast<float>(lanes_of<F>() - 1);
    F place = size * (1.0f / P::kWidth) - 0.5f;
    place = choose<F, I>(place > last, last, place);
    const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const F shifted = place + magic;
    const F r = place - (shifted - magic);
    const I piece = reinterpret_cast<I>(shifted);
    F q = P::pick(piece, P::kDegree);
#pragma GCC unroll 8
    for (int d = P::kDegree - 1; d >= 0; --d) q = q * r + P::pick(piece, d);
    return size * q + x * 0.5f;
  }
#endif
  return x * normal_share<F>(x);
}

template <class F>
static inline F activate(F x, int activation) {
  typedef typename Ints<F>::type I;
  static_assert(kActivations == 5, "activate: a new activation needs a case here");
  switch (activation) {
    case kRelu: return choose<F, I>(x < F{}, F{}, x);
    case kGelu: return gelu<F>(x);
    case kGeluTanh: {  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
      const F u = x * (x * x * 0.0713548162726f + 1.59576912160573f);
      return x / (exponential<F>(-u) + 1.0f);
    }
    case kSilu: return x / (exponential<F>(-x) + 1.0f);
    case kNone: return x;
    default: __builtin_trap();  // bindings let no other code in
  }
}
