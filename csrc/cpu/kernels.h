// What a tier offers: one table of function pointers a family of kernels. Only pointers and sizes cross this line.
// Strides and lengths count elements unless a comment says bytes. Every kernel may be called from many threads at once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprune {

// Element types of buffers passed as void*.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// The scalars of one AdamW step, worked out in double: p = decay * p - rate * m / (sqrt(v) * scale + eps), where
// m = beta1 * m + new1 * g, v = beta2 * v + new2 * g^2, decay = 1 - lr * weight_decay, rate = lr / (1 - beta1^step),
// scale = 1 / sqrt(1 - beta2^step), new = 1 - beta.
struct AdamwStep {
  float beta1, new1, beta2, new2, decay, rate, scale, eps;
};

// Masks: n bool bytes, each 0 or 1.
struct MaskingKernels {
  // w[i] = mask[i] ? w[i] : 0, for n elements of `bytes` (2 or 4) each.
  void (*apply_mask)(void* w, const uint8_t* mask, int64_t n, int bytes);
  // The same into out [n].
  void (*masked_copy)(const void* w, const uint8_t* mask, void* out, int64_t n, int bytes);
  // mask[i] = |w[i]| >= threshold and out[i] = mask[i] ? w[i] : 0; returns how many, and in *nans how many w[i] are NaN.
  int64_t (*threshold_mask)(const void* w, Dtype dtype, float threshold, uint8_t* mask, void* out, int64_t n, int64_t* nans);
  // score_grad[i] += grad[i] * w[i] (score_grad may be null), then grad[i] = mask[i] ? grad[i] : 0.
  void (*mask_gradient)(void* grad, const void* w, Dtype dtype, const uint8_t* mask, float* score_grad, int64_t n);
  // One AdamW step on p with its gradient and moments m, v; mask may be null; where it is 0 p, m and v become 0.
  void (*masked_adamw)(void* p, const void* grad, Dtype dtype, float* m, float* v, const uint8_t* mask, int64_t n, const AdamwStep& step);
};

// Buffers of one dtype that are selected from as if they were one: data[i] holds sizes[i] elements. Values are compared through
// int32 keys that sort as the values do: magnitude ? |x| : x.
struct Pieces {
  const void* const* data;
  const int64_t* sizes;
  int64_t count;
  Dtype dtype;
  bool magnitude;
};

struct Selected {
  int32_t key;     // of the k-th largest value
  int64_t above;   // how many are larger
  int64_t equal;   // how many are equal to it, itself included
  int64_t nans;    // above 0: nothing else is valid
};

struct SelectionKernels {
  // The k-th largest, 1 <= k <= total. force_radix: skip the sample and count digits, which is what a misleading sample ends in.
  // Returns false where memory ran out.
  bool (*kth)(const Pieces& pieces, int64_t k, bool force_radix, Selected* out);
  // masks[i][j]: the value's key is larger than `key`, or equal to it and among the first `ties` such ones
  // (INT64_MAX: all). Returns false where a value is NaN.
  bool (*cut_mask)(const Pieces& pieces, int32_t key, int64_t ties, uint8_t* const* masks);
  // counts [2048] += how many 32-bit keys (unsigned order) begin with `prefix` and have this digit at [shift, shift + width);
  // returns how many values are NaN.
  int64_t (*histogram)(const Pieces& pieces, uint32_t prefix, int shift, int width, int64_t* counts);
  // scores [groups, m]; mask keeps the n largest of each group, ties to the lower index; m <= 256. Returns how many are NaN.
  int64_t (*nm_mask)(const void* scores, Dtype dtype, int64_t groups, int n, int m, uint8_t* mask);
  // scores [rows, cols], out [rows / r, cols / c]: the sum of each block.
  void (*block_scores)(const void* scores, Dtype dtype, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out);
};

// The machine's limits, for the benchmarks. Each returns the work done: floating point operations or bytes, over all threads.
struct PeakKernels {
  double (*fma)(int64_t rounds);      // multiply-adds on registers
  double (*l1_fma)(int64_t rounds);   // multiply-adds fed by one L1 vector load each
  double (*read)(const float* data, int64_t n, int64_t repeats);
  double (*update)(float* data, int64_t n);  // data[i] *= 1
};

// Codes shared with sparseprune/packing.
constexpr int kGroups = 0, kBitmask = 1, kQuads = 2, kBitmask8 = 3;  // Packed.kind; bindings/packed.h refuses others
constexpr int kFloat32 = 0, kBfloat16 = 1, kInt8 = 3;    // Packed.values_dtype

// A packed sparse weight [rows, columns]; linear_groups.inl and linear_bitmask.inl say in which order.
struct Packed {
  int kind;
  int64_t rows, columns;
  int height;                 // rows that share their columns: 1, 2, 4, 8 or 16
  int64_t k_block, k_blocks;  // columns of a K-block (at most 65536), and how many
  int64_t row_block;          // rows of a row block: a multiple of height
  const void* values;
  int values_dtype;
  const uint16_t* index;      // groups: [entries]; bitmask, bitmask8: the bits
  const int32_t* slots;       // groups: [slots + 1][2]; bitmask, bitmask8: [rows + 1], the first value of each row
  // quads: as groups, but an entry is a quad of columns, four int8 values a row; index counts quads within the K-block
  const float* scale = nullptr;  // quads, bitmask8: [2][rows], the scale of each row and the sum of its values, an integer

  int64_t value_bytes() const { return values_dtype == kFloat32 ? 4 : values_dtype == kBfloat16 ? 2 : 1; }
  const char* value_at(int64_t place) const { return static_cast<const char*>(values) + place * value_bytes(); }
};

// Codes shared with sparseprune/activations.py, in its order; bindings refuse others.
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
constexpr int kActivations = 5;

// What happens to each sum before it is written: * scale, + bias, activation, + residual. And to each finished row of y: LayerNorm.
struct Epilogue {
  const float* scale;     // [rows] or null
  const float* bias;      // [rows] or null
  const float* residual;  // [tokens, rows] or null
  int64_t residual_stride;
  int activation;         // Activation
  const float* gain = nullptr;   // [rows] of a LayerNorm, or null
  const float* shift = nullptr;  // [rows], its bias, where gain is not null
  float eps = 0.0f;
};

struct LinearKernels {
  // y [n, rows] = epilogue(x [n, columns] W^T); rows of x and residual are dense, strides count floats between them.
  void (*linear)(const Packed& w, const float* x, int64_t x_stride, int64_t n, float* y, const Epilogue& e);
};

struct SddmmKernels {
  // grad [entries * height], packed order: the gradient of the values; x [n, columns], dy [n, rows]. Kind "groups" only.
  void (*sddmm)(const Packed& w, const float* x, int64_t x_stride, const float* dy, int64_t dy_stride, int64_t n, float* grad);
};

struct PackingKernels {
  // packed [n] = canonical [size] at perm, 0 where perm is -1. Returns how many places of perm lie outside canonical: nothing is
  // read there, and packed is then of no use.
  int64_t (*gather_values)(const float* canonical, int64_t size, const int32_t* perm, int64_t n, void* packed, int dtype);
  // canonical [size] at perm = packed [n] where perm is not -1; returns as gather_values does, and writes nothing outside.
  int64_t (*scatter_values)(const float* packed, const int32_t* perm, int64_t n, float* canonical, int64_t size);
  // 64 bits that any change to these bytes changes, but for a chance of 2^-64; the same for any number of threads.
  uint64_t (*fingerprint)(const void* data, int64_t bytes);
};

struct NormKernels {
  // y [n, d] = LayerNorm(x + residual) * weight + bias; residual may be null.
  void (*add_layer_norm)(const float* x, int64_t x_stride, const float* residual, int64_t residual_stride, const float* weight,
                         const float* bias, float eps, int64_t n, int64_t d, float* y);
  // y [n, d] = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, int64_t x_stride, const float* weight, float eps, int64_t n, int64_t d, float* y);
};

// Dense weights that are held in fewer bits than they are multiplied in.
struct RoundedKernels {
  // y [n, rows] = x [n, columns] W^T * scale + bias, W [rows, columns] of a dtype as Packed.values_dtype; scale and bias may be null.
  void (*rounded_linear)(const void* w, int dtype, const float* scale, int64_t rows, int64_t columns, const float* x, int64_t x_stride,
                         int64_t n, const float* bias, float* y);
};

// Activations in 8 bits (rounding.inl): quads [columns / 4][T] of four bytes a lane, and of each lane's token scale and zero.
struct RoundedPanel {
  const int32_t* quads;
  const float* scale;
  const int32_t* zero;
};

// The same of whole tokens: bytes [tokens][width], width a multiple of 64.
struct RoundedRows {
  const uint8_t* bytes;
  int64_t width;
  const float* scale;
  const int32_t* zero;
};
constexpr int kMostRoundedRows = 8;

struct Int8Kernels {
  // sums [rows of row block b][T] = W x as floats, for a weight of kind "quads".
  void (*block)(const Packed& w, int64_t b, int T, const RoundedPanel& x, float* sums);
  // sums [tokens][r1 - r0] = rows [r0, r1) of W x as floats, for a weight of kind "bitmask8"; tokens: 1, 2, 4 or 8, rows: up to 16.
  void (*rows)(const Packed& w, int64_t r0, int64_t r1, int tokens, const RoundedRows& x, float* sums);
};

// A stack of encoder layers as steps on panels (encoder.inl); sparseprune/encoder_program.py says what each does. Codes shared with it.
enum StepKind : int { kLinear = 0, kNorm = 1, kRotary = 2, kAttention = 3, kRound = 4, kKeep = 5 };
enum Combine : int { kReplace = 0, kAdd = 1, kMultiply = 2 };
constexpr int kMostBuffers = 8;
constexpr int64_t kWholeScratch = 16 * 256 + 8 * 64 + 64;  // floats that a step with a dense weight takes beside its sums

struct Step {
  int kind, to, from;        // buffers
  int64_t to_row, from_row;
  bool together;             // the next step does not need this one's result
  // linear: to (combine)= activation(W from * scale + bias); whole: weight.values is [rows, columns], only its sizes and values are set
  const Packed* weight;
  bool whole;
  const float *scale, *bias; // [rows of W] or null
  int activation, combine;
  // round: `rows` features of `from` as a rounded panel (rounding.inl), which is all of `to`
  // norm: over `rows` features; shift may be null; without `centred` an RMSNorm
  int64_t rows;
  const float *gain, *shift;
  float eps;
  bool centred;
  // rotary, attention and keep: `heads` heads of `depth` features, `every` from one to the next; attention reads keys and values from
  // `from` too, kv_heads of them, keep writes these to a layer of the call's cache
  int64_t heads, kv_heads, depth, every, k_row, v_row, window;
  bool causal;               // a token sees none behind it
  float factor;              // of the scores
  int table;                 // rotary: cos, followed by sin; attention: the bias, or -1
  bool each;                 // a rotary step's tables have rows for every sequence
  int cache;
};

struct Program {
  int64_t buffers;
  const int64_t* rows;       // [buffers], features of each
  int64_t steps;
  const Step* step;
  int result;                // buffer; x enters buffer 0
  int64_t scratch;           // floats that the largest linear step takes beside the buffers
};

// Sequences that lie side by side in the same panels.
struct Unit {
  int64_t first, tokens;         // in the token list
  int64_t sequence, sequences;   // the first, and how many
};

// Keys and values of one layer: strides in floats, a head's tokens one behind the other.
struct CacheLayer {
  float *keys, *values;
  int64_t key_batch, key_head, value_batch, value_head;
};

struct Sequences {
  int64_t units;
  const Unit* unit;
  const int32_t *row, *position; // [tokens]: the token's row of x and y, and its place in its sequence
  const int64_t* start;          // [sequences + 1] in the token list
  int64_t longest;               // tokens of the longest sequence
  int64_t length;                // places a sequence has, those under the mask included
  const float* const* tables;    // rotary cos and sin [length, depth] or [batch, length, depth]; biases [heads, length keys, length queries]
  const CacheLayer* cache;       // to which steps keep keys and values; null: to none
};

struct EncoderKernels {
  // y [places, rows of the result] for every token in `sequences`; other rows of y are left alone. shared: the threads share each
  // unit; else each takes whole units.
  void (*encoder)(const Program& program, const Sequences& sequences, const float* x, int64_t x_stride, float* y, int threads,
                  bool shared);
};

// A stack of decoder layers as steps on the rows of few tokens (decoder.inl); sparseprune/decoder_program.py says what each does. Codes
// shared with it.
enum RowStepKind : int { kRowLinear = 0, kRowAttention = 1, kRowNorm = 2 };
constexpr int kMostRows = 16;  // tokens of a call: sequences times new tokens

// A weight [rows, columns]: packed, or `whole`, where packed.values is [rows, columns] and only its sizes and values are set.
struct RowWeight {
  Packed packed;
  bool whole;
  const float* scale;  // [rows] or null
};

// LayerNorm, or RMSNorm where `centred` is false; gain null: none.
struct RowNorm {
  const float *gain, *shift;
  float eps;
  bool centred;
};

struct RowStep {
  int kind, to, from;        // buffers
  int64_t to_row, from_row;
  bool together;             // the next step neither reads what this one writes nor writes what it reads
  // linear: to = (add ? to : 0) + activation(W x * scale + bias), x: the columns from from_row on, `norm` of them, or gated: the
  // products of these with as many behind them
  const RowWeight* weight;
  const float* bias;
  int activation;
  bool add, gated;
  RowNorm norm;              // norm: over `rows` features
  int64_t rows;
  // attention: of `heads` heads of `depth` features; a head's begins at q_row + h * q_step, k_row + kv * k_step, v_row + kv * v_step of
  // `from`. Each query and key is normed (key_norm, norm), then its first `turned` features by the rotary table.
  int64_t heads, kv_heads, depth, q_row, k_row, v_row, q_step, k_step, v_step, turned;
  RowNorm key_norm;
  float factor;              // of the scores
  int cache, mask, table;    // places in the call; mask -1: none
};

struct RowProgram {
  int64_t buffers;
  const int64_t* rows;       // [buffers], features of each
  int64_t steps;
  const RowStep* step;
  int result;                // buffer; x enters buffer 0
  int64_t widest;            // columns of the widest weight
  int64_t products;          // of a token
};

// Which keys a token sees, a byte each: seen + b * batch + t * token, `length` keys; seen null: all up to itself.
struct SeenKeys {
  const uint8_t* seen;
  int64_t batch, token, length;
};
struct RotaryTable {
  const float *cos, *sin;
  int64_t batch, token;      // strides of both
};

struct RowCall {
  int64_t batch, tokens, past;   // rows are [batch][tokens]; the first new token has place `past`
  const float* x;
  int64_t x_stride;
  float* y;                      // [batch * tokens, rows of the result]
  const CacheLayer* cache;
  const SeenKeys* masks;
  const RotaryTable* tables;
};

struct DecoderKernels {
  // Writes y and, at [past, past + tokens), the new keys and values of every layer.
  void (*decoder)(const RowProgram& program, const RowCall& call, int threads);
};

struct Kernels {
  const char* tier;
  int lanes;
  MaskingKernels masking;
  SelectionKernels selection;
  PeakKernels peaks;
  LinearKernels linear;
  SddmmKernels sddmm;
  PackingKernels packing;
  NormKernels norms;
  RoundedKernels rounded;
  EncoderKernels encoder;
  Int8Kernels int8;
  DecoderKernels decoder;
};

// The table of each tier that was compiled (tiers/*.cpp).
const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512vnni_kernels();
#endif
#if defined(__aarch64__)
const Kernels& neon_kernels();
#endif

// The table picked at load; see dispatch.cpp.
const Kernels& kernels();
}  // namespace sparseprune
