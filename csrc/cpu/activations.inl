// Activations of a vector F of floats; the codes are those of sparseprune/native/matmul.py.
constexpr int kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4;

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

// e^x to about 1 ulp for x in [-87, 88]; clamped outside. NaN stays NaN.
template <class F>
static inline F exponential(F x) {
  typedef typename Ints<F>::type I;
  const F low = F{} - 87.0f, high = F{} + 88.0f;
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
  return reinterpret_cast<F>(reinterpret_cast<I>(p) + power);
}

// erf as an odd rational function on [-4, 4], beyond which it is 1 in float.
template <class F>
static inline F error_function(F x) {
  typedef typename Ints<F>::type I;
  const F bound = F{} + 4.0f;
  F t = choose<F, I>(x > bound, bound, x);
  t = choose<F, I>(t < -bound, -bound, t);
  const F s = t * t;
  F p = F{} - 2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  F q = F{} - 1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return t * p / q;
}

template <class F>
static inline F activate(F x, int activation) {
  typedef typename Ints<F>::type I;
  switch (activation) {
    case kRelu: return choose<F, I>(x < F{}, F{}, x);
    case kGelu: return x * 0.5f * (error_function<F>(x * 0.70710678118654752f) + 1.0f);
    case kGeluTanh: {  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
      const F u = x * (x * x * 0.0713548162726f + 1.59576912160573f);
      return x / (exponential<F>(-u) + 1.0f);
    }
    case kSilu: return x / (exponential<F>(-x) + 1.0f);
    default: return x;
  }
}
