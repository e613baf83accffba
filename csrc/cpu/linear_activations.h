// SPDX-License-Identifier: Apache-2.0
// Activations of the linear layers and their slopes, on one register of pre-activations.
#pragma once

#include "cpu/quantized.h"
#include "engine/vec.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

// The normal distribution's upper tail Phi(-a), and Phi(-a) - a phi(a), for a in [0, 5.5]; from there on both are
// below 6e-7 and count as 0. GELU is x Phi(x), which is max(x, 0) - |x| Phi(-|x|): that keeps small results exact to
// their own size, and the tail's error counts |x| times where |x| < 5.5 and not at all beyond.
inline constexpr float kTailEnd = 5.5f;

#if defined(__AVX512F__)
// Sixteen pieces of degree 5, coefficients looked up by a permutation, which leaves the multipliers to the product.
// Piece i is centred at i / kPieces. Absolute error 2.8e-8 (tail) and 4.9e-8 (slope), half a unit of 1 being 3e-8.
inline constexpr float kPieces = 31.0f / 11.0f;  // 15.5 / 5.5
// clang-format off
alignas(64) inline constexpr float kTailTable[6][16] = {
    {0.5f, 0.361355216f, 0.238952102f, 0.143547477f, 0.0778977956f, 0.0380155692f, 0.0166257946f, 0.00649814396f, 0.00226481741f, 0.000702679093f, 0.000193799232f, 4.74596335e-05f, 1.03102656e-05f, 1.9854314e-06f, 3.38689597e-07f, 5.11538028e-08f},
    {-0.141560163f, -0.132922939f, -0.110046587f, -0.0803287454f, -0.0516991195f, -0.0293368219f, -0.0146777922f, -0.00647479711f, -0.00251831097f, -0.000863595428f, -0.000261113378f, -6.96090602e-05f, -1.63613954e-05f, -3.39072778e-06f, -6.19560387e-07f, -9.98142739e-08f},
    {-3.23979919e-08f, 0.00836802037f, 0.0138558038f, 0.0151712337f, 0.0130189462f, 0.00923462876f, 0.00554434872f, 0.00285339587f, 0.0012683288f, 0.000489298057f, 0.00016437248f, 4.81977119e-05f, 1.2357292e-05f, 2.77392253e-06f, 5.45739119e-07f, 9.41776359e-08f},
    {0.00297091141f, 0.00243815708f, 0.0011462672f, -0.000224495395f, -0.00110068993f, -0.00132223352f, -0.00108815596f, -0.000702427433f, -0.000373013976f, -0.000166706567f, -6.35120509e-05f, -2.07929557e-05f, -5.88123023e-06f, -1.44265466e-06f, -3.07760196e-07f, -5.72188481e-08f},
    {-8.8993854e-07f, -0.000250462841f, -0.000360603433f, -0.000295930523f, -0.000134841191f, 1.33203385e-05f, 8.8273349e-05f, 9.44876211e-05f, 6.73004741e-05f, 3.70959678e-05f, 1.6671836e-05f, 6.263952e-06f, 1.99565577e-06f, 5.43981326e-07f, 1.27638199e-07f, 2.58916625e-08f},
    {-5.49173338e-05f, -3.94744159e-05f, -3.44548191e-06f, 2.64385426e-05f, 3.41428409e-05f, 2.31227974e-05f, 7.1447844e-06f, -3.37913073e-06f, -6.47126608e-06f, -5.21949981e-06f, -2.97388223e-06f, -1.33021652e-06f, -4.87108701e-07f, -1.49213033e-07f, -3.87297422e-08f, -8.5898279e-09f},
};
alignas(64) inline constexpr float kSlopeTable[6][16] = {
    {0.5f, 0.228432293f, 0.018858945f, -0.097438752f, -0.128898687f, -0.108668549f, -0.0714409642f, -0.0388254367f, -0.0178816691f, -0.0070696784f, -0.00241733384f, -0.000718239812f, -0.000186026462f, -4.2094051e-05f, -8.33517029e-06f, -1.44606597e-06f},
    {-0.283120316f, -0.249109478f, -0.164669091f, -0.0696293989f, 0.0007531566f, 0.0336717126f, 0.0371755986f, 0.0269974144f, 0.0152566156f, 0.00708040373f, 0.00276546429f, 0.00092128725f, 0.000263927207f, 6.5369293e-05f, 1.40506339e-05f, 2.62808516e-06f},
    {-2.58587792e-07f, 0.0324177846f, 0.0484441723f, 0.0434929198f, 0.0258487975f, 0.00787079991f, -0.0029535003f, -0.00619074303f, -0.00514741047f, -0.00303324845f, -0.00141227827f, -0.000541584787f, -0.000174653237f, -4.79407413e-05f, -1.12880163e-05f, -2.29204318e-06f},
    {0.0118846786f, 0.00874312959f, 0.00168171265f, -0.00446386545f, -0.00655650873f, -0.00500266147f, -0.00221269599f, -0.000152671505f, 0.00066205728f, 0.000663731332f, 0.000407674367f, 0.000189120269f, 7.06667759e-05f, 2.19028057e-05f, 5.72343286e-06f, 1.27375229e-06f},
    {-7.10577505e-06f, -0.00144569837f, -0.00183298009f, -0.00108135349f, 7.38146151e-06f, 0.000642450755f, 0.000654319337f, 0.000353926174f, 7.79795488e-05f, -4.90492969e-05f, -6.51526301e-05f, -4.17867686e-05f, -1.92438428e-05f, -6.98439476e-06f, -2.07659513e-06f, -5.16229873e-07f},
    {-0.00032714304f, -0.000206257075f, 5.34417876e-05f, 0.000217501677f, 0.000190016932f, 5.927345e-05f, -4.26012082e-05f, -6.58141282e-05f, -4.08196391e-05f, -1.17280314e-05f, 2.76018211e-06f, 5.30588768e-06f, 3.47646795e-06f, 1.55914041e-06f, 5.40683431e-07f, 1.51949309e-07f},
};
// clang-format on

// N registers side by side, step by step: the steps of one wait for each other, those of its neighbours do not.
template <int N>
inline void piecewise(const float (&table)[6][16], const VecF (&a)[N], VecF (&p)[N]) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  VecF shifted[N], r[N];
  for (int j = 0; j < N; ++j) shifted[j] = a[j] * kPieces + kRound;
  for (int j = 0; j < N; ++j) r[j] = a[j] * kPieces - (shifted[j] - kRound);
  auto coefficient = [&](int i, int j) {  // the low four bits choose
#if defined(__clang__)
    return (VecF)_mm512_permutexvar_ps((__m512i)shifted[j], (__m512)load(table[i]));
#else
    return __builtin_shuffle(load(table[i]), (VecI)shifted[j]);
#endif
  };
  for (int j = 0; j < N; ++j) p[j] = coefficient(5, j) * r[j] + coefficient(4, j);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) {
    for (int j = 0; j < N; ++j) p[j] = p[j] * r[j] + coefficient(i, j);
  }
  for (int j = 0; j < N; ++j) p[j] = a[j] < kTailEnd ? p[j] : VecF{};
}

template <int N>
inline void normal_tail(const VecF (&a)[N], VecF (&out)[N]) {
  piecewise(kTailTable, a, out);
}
template <int N>
inline void normal_slope(const VecF (&a)[N], VecF (&out)[N]) {
  piecewise(kSlopeTable, a, out);
}
#else
// One polynomial in 2 a / 5.5 - 1, which is in [-1, 1] and so keeps its roundings small: absolute error 1.0e-7 (tail,
// degree 17) and 3.2e-7 (slope, degree 19).
// clang-format off
inline constexpr float kTailPolynomial[] = {0.00297975239f, -0.02500732f, 0.0945606448f, -0.206846117f, 0.271837746f, -0.176609961f, -0.0510475112f, 0.214877284f, -0.164064213f, -0.0231084559f, 0.13433103f, -0.0708285383f, -0.043356366f, 0.0523577038f, 0.00415107612f, -0.017268514f, 0.000607859068f, 0.00243392974f};
inline constexpr float kSlopePolynomial[] = {-0.0220275512f, 0.139103188f, -0.336862341f, 0.260152468f, 0.476383796f, -1.36883522f, 1.14340205f, 0.426568256f, -1.6624465f, 1.03854053f, 0.621403828f, -1.21640268f, 0.270391234f, 0.606399874f, -0.370700217f, -0.145148003f, 0.156344481f, 0.00683308036f, -0.0258890805f, 0.00278822573f};
// clang-format on

template <int C, int N>
inline void polynomial(const float (&coefficients)[C], const VecF (&a)[N], VecF (&p)[N]) {
  VecF s[N];
  for (int j = 0; j < N; ++j) s[j] = a[j] * (2.0f / kTailEnd) - 1.0f;
  for (int j = 0; j < N; ++j) p[j] = splat(coefficients[C - 1]);
#pragma GCC unroll 20
  for (int i = C - 2; i >= 0; --i) {
    for (int j = 0; j < N; ++j) p[j] = p[j] * s[j] + coefficients[i];
  }
  for (int j = 0; j < N; ++j) p[j] = a[j] < kTailEnd ? p[j] : VecF{};
}

template <int N>
inline void normal_tail(const VecF (&a)[N], VecF (&out)[N]) {
  polynomial(kTailPolynomial, a, out);
}
template <int N>
inline void normal_slope(const VecF (&a)[N], VecF (&out)[N]) {
  polynomial(kSlopePolynomial, a, out);
}
#endif

inline VecF magnitude(VecF x) { return (VecF)((VecU)x & 0x7fffffffu); }

// min(|x|, kTailEnd), kTailEnd for NaN.
inline VecF tail_argument(VecF x) {
  const VecF a = magnitude(x);
  return a < kTailEnd ? a : splat(kTailEnd);
}

// 1 / (1 + exp(-x)); relative error of exp_nonpositive and two roundings.
inline VecF sigmoid(VecF x) {
  const VecF e = exp_nonpositive(-magnitude(x));
  const VecF r = 1.0f / (1.0f + e);
  return x < 0.0f ? e * r : r;
}

inline constexpr float kQuickGelu = 1.702f;
inline constexpr float kTanhScale = 1.5957691216057308f;  // 2 sqrt(2 / pi): 0.5 (1 + tanh u) is sigmoid(2 u)
inline constexpr float kTanhCubic = 0.044715f;

// Infinities give what the formulas give: NaN where they say 0 times infinity. NaN stays NaN.
template <Activation kind, int N>
inline void activate(VecF (&x)[N]) {
  if constexpr (kind == Activation::kGelu) {
    VecF a[N], tail[N];
    for (int j = 0; j < N; ++j) a[j] = tail_argument(x[j]);
    normal_tail(a, tail);
    for (int j = 0; j < N; ++j) x[j] = (x[j] > 0.0f ? x[j] : x[j] * 0.0f) - a[j] * tail[j];
  }
  for (int j = 0; j < N; ++j) {
    if constexpr (kind == Activation::kRelu) x[j] = x[j] < 0.0f ? VecF{} : x[j];
    if constexpr (kind == Activation::kGeluTanh)
      x[j] = x[j] * sigmoid(x[j] * (x[j] * x[j] * (kTanhScale * kTanhCubic) + kTanhScale));
    if constexpr (kind == Activation::kQuickGelu) x[j] = x[j] * sigmoid(x[j] * kQuickGelu);
    if constexpr (kind == Activation::kSilu) x[j] = x[j] * sigmoid(x[j]);
  }
}

// The derivative at x.
template <Activation kind>
inline VecF slope(VecF x) {
  if constexpr (kind == Activation::kRelu) return x <= 0.0f ? VecF{} : splat(1.0f);
  if constexpr (kind == Activation::kGelu) {
    const VecF a[1] = {tail_argument(x)};
    VecF d[1];
    normal_slope(a, d);
    return x > 0.0f ? 1.0f - d[0] : d[0] + x * 0.0f;
  }
  if constexpr (kind == Activation::kGeluTanh) {
    const VecF s = sigmoid(x * (x * x * (kTanhScale * kTanhCubic) + kTanhScale));
    return s + x * (x * x * (3.0f * kTanhScale * kTanhCubic) + kTanhScale) * (s * (1.0f - s));
  }
  if constexpr (kind == Activation::kQuickGelu) {
    const VecF s = sigmoid(x * kQuickGelu);
    return s + x * kQuickGelu * (s * (1.0f - s));
  }
  if constexpr (kind == Activation::kSilu) {
    const VecF s = sigmoid(x);
    return s + x * (s * (1.0f - s));
  }
  return splat(1.0f);
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE
