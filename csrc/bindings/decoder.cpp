#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "plan.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sparseprune {
namespace {
constexpr int64_t kVersion = 1, kStepInts = 28, kCyclesOfThread = 1 << 15;

[[noreturn]] void refuse(const std::string& what) { refuse_plan("decoder", what); }
[[noreturn]] void refuse_call(const std::string& what) { throw std::invalid_argument("decoder: " + what); }

// The pointers and sizes of a stack; whoever holds it holds the tensors too.
class DecoderProgram {
 public:
  DecoderProgram(const std::vector<int64_t>& plan, const std::vector<double>& scalars, const std::vector<uintptr_t>& pointers,
                 const std::vector<int>& dtypes, const std::vector<int64_t>& lengths)
      : tensors_("decoder", pointers, dtypes, lengths), scalars_(scalars) {
    PlanReader in("decoder", plan);
    in.next("version", kVersion, kVersion);
    rows_.resize(static_cast<size_t>(in.next("the number of buffers", 1, kMostBuffers)));
    for (auto& rows : rows_) rows = in.next("the features of a buffer", 1, kLargest);
    const int64_t buffers = static_cast<int64_t>(rows_.size());
    program_.result = static_cast<int>(in.next("the result's buffer", 0, buffers - 1));
    weights_.resize(static_cast<size_t>(in.next("the number of weights", 0, in.left())));
    for (auto& weight : weights_) read_weight(in, weight);
    steps_.resize(static_cast<size_t>(in.next("the number of steps", 0, in.left())));
    for (auto& step : steps_) read_step(in, step);
    if (!in.done()) refuse("it goes on behind its last step");
    program_.buffers = buffers;
    program_.rows = rows_.data();
    program_.steps = static_cast<int64_t>(steps_.size());
    program_.step = steps_.data();
  }

  // cache: six numbers a layer, (keys, values, their strides of a sequence and of a head); room: places of each layer, sequences and
  // heads; masks: five numbers each, (seen, strides of a sequence and of a token, length); tables: (cos, sin, strides of a sequence and of
  // a token, features).
  void run(uintptr_t x, int64_t x_stride, int64_t batch, int64_t tokens, int64_t past, const std::vector<int64_t>& cache, int64_t room,
           const std::vector<int64_t>& masks, const std::vector<int64_t>& tables, uintptr_t y) const {
    const int64_t n = batch * tokens;
    if (batch < 0 || tokens < 0 || n > kMostRows) refuse_call("expected up to " + std::to_string(kMostRows) + " tokens, got " + std::to_string(n));
    if (past < 0 || past + tokens > room) refuse_call("the cache has " + std::to_string(room) + " places, needed " + std::to_string(past + tokens));
    if (n == 0) return;
    const std::vector<CacheLayer> layers = cache_layers("decoder", cache);
    std::vector<SeenKeys> seen(masks.size() / 4);
    std::vector<RotaryTable> turns(tables.size() / 5);
    if (masks.size() % 4 || tables.size() % 5) refuse_call("the call is not whole");
    for (size_t i = 0; i < seen.size(); ++i) {
      const int64_t* m = masks.data() + 4 * i;
      if (m[3] < past + tokens || m[3] > room) {
        refuse_call("a mask expected " + std::to_string(past + tokens) + " to " + std::to_string(room) + " keys, got " + std::to_string(m[3]));
      }
      seen[i] = {at<const uint8_t>(static_cast<uintptr_t>(m[0])), m[1], m[2], m[3]};
    }
    for (size_t i = 0; i < turns.size(); ++i) {
      const int64_t* t = tables.data() + 5 * i;
      turns[i] = {at<const float>(static_cast<uintptr_t>(t[0])), at<const float>(static_cast<uintptr_t>(t[1])), t[2], t[3]};
    }
    for (const Needs& needs : needs_) {
      if (needs.cache >= static_cast<int64_t>(layers.size())) refuse_call("a layer has no cache");
      if (needs.mask >= static_cast<int64_t>(seen.size())) refuse_call("a layer has no mask");
      if (needs.turned && (needs.table >= static_cast<int64_t>(turns.size()) || tables[static_cast<size_t>(5 * needs.table + 4)] < needs.turned)) {
        refuse_call("a layer has no rotary table of " + std::to_string(needs.turned) + " features");
      }
    }
    const RowCall call = {batch, tokens, past, at<const float>(x), x_stride, at<float>(y), layers.data(), seen.data(), turns.data()};
    py::gil_scoped_release release;
    int threads = 1;
#if defined(_OPENMP)
    threads = omp_in_parallel() ? 1 : omp_get_max_threads();
#endif
    const int64_t worth = program_.products * n / 8 / kCyclesOfThread;
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
    kernels().decoder.decoder(program_, call, threads);
  }

 private:
  // What a step reads of a call.
  struct Needs {
    int64_t cache, mask, table, turned;
  };

  void read_weight(PlanReader& in, RowWeight& weight) {
    const size_t end = in.place() + kWeightInts;
    Packed& w = weight.packed;
    const int64_t values = tensors_.place(in, "a weight's values", 0, kAnyDtype),
                  index = tensors_.place(in, "a weight's index", 0, kAnyDtype, true),
                  slots = tensors_.place(in, "a weight's offsets", 0, kInt32, true),
                  scale = tensors_.place(in, "a weight's scale", 0, kFloat32, true);
    const int64_t kind = in.next("a weight's kind (whole, groups, bitmask, quads or bitmask8)", kWholeKind, kBitmask8);
    weight.whole = kind == kWholeKind;
    w.kind = weight.whole ? kGroups : static_cast<int>(kind);
    read_sizes(in, w);
    w.values = tensors_.pointer<void>(values);
    w.values_dtype = tensors_.value_dtype(values);
    weight.scale = tensors_.pointer<float>(scale);
    const bool rounds = w.kind == kBitmask8 || w.kind == kQuads;
    if (scale >= 0) tensors_.expect("a weight's scale", scale, rounds ? 2 * w.rows : w.rows);  // and the sum of each row
    if (w.values_dtype == kInt8 && scale < 0) refuse("a weight in int8 expected a scale");
    if (!weight.whole && (index < 0 || slots < 0)) refuse("a packed weight expected an index and offsets");
    if (weight.whole) {
      tensors_.expect("a weight's values", values, w.rows * w.columns);
      program_.products += w.rows * w.columns;
    } else {
      w.index = tensors_.pointer<uint16_t>(index);
      w.slots = tensors_.pointer<int32_t>(slots);
      if (rounds) {
        if (w.values_dtype != kInt8 || w.columns % 4 || w.columns > kMostRounded || (w.kind == kQuads && w.k_block % 4)) {
          refuse("a weight of kind bitmask8 or quads expected int8, columns and k_block in fours up to " + std::to_string(kMostRounded));
        }
        w.scale = weight.scale;
      }
      if (w.kind != kGroups && w.kind != kQuads) {
        check_bits(w, values, index, slots);
        program_.products += int64_t{w.slots[w.rows]} * 2;
      } else {
        tensors_.check_groups(w, values, index, slots);
        program_.products += int64_t{w.slots[2 * (w.rows / w.height * w.k_blocks)]} * w.height * (rounds ? 2 : 8);
      }
    }
    program_.widest = std::max(program_.widest, w.columns);
    in.skip_to(end);
  }

  void check_bits(const Packed& w, int64_t values, int64_t index, int64_t slots) const {
    const int64_t row_bytes = (w.columns + 63) / 64 * 8;
    if (tensors_.dtype(index) != kUint8 || w.height != 1) refuse("a weight's index expected uint8, its height 1");
    tensors_.expect("a weight's index", index, w.rows * row_bytes);
    tensors_.expect("a weight's offsets", slots, w.rows + 1);
    if (w.slots[0] != 0) refuse("a weight's offsets expected to begin with 0");
    const uint8_t* bits = reinterpret_cast<const uint8_t*>(w.index);
    for (int64_t r = 0; r < w.rows; ++r) {
      int64_t count = 0;
      for (int64_t b = 0; b < row_bytes; ++b) count += __builtin_popcount(bits[r * row_bytes + b]);
      if (w.slots[r] + count != w.slots[r + 1]) refuse("a weight's offsets do not count its bits");
    }
    tensors_.expect("a weight's values", values, w.slots[w.rows] + kSlack);
  }

  // `count` features from the next int on of buffer `b`.
  int64_t features(PlanReader& in, const char* what, int64_t b, int64_t count) {
    const int64_t room = rows_[static_cast<size_t>(b)] - count;
    if (room < 0) refuse(std::string(what) + " do not fit into buffer " + std::to_string(b));
    return in.next(what, 0, room);
  }

  // Four ints: weight and bias over `count` features, eps, centred; weight -1: none.
  RowNorm norm(PlanReader& in, int64_t count, bool optional) {
    const float* gain = tensors_.floats(in, "a norm's weight", count, optional);
    const float* shift = tensors_.floats(in, "a norm's bias", count, true);
    const int64_t eps = in.next("a scalar", -1, static_cast<int64_t>(scalars_.size()) - 1);
    const bool centred = in.next("centred", 0, 1) == 1;
    if (gain && eps < 0) refuse("a norm expected its eps");
    return {gain, gain ? shift : nullptr, eps < 0 ? 0.0f : static_cast<float>(scalars_[static_cast<size_t>(eps)]), centred};
  }

  void read_step(PlanReader& in, RowStep& s) {
    const size_t end = in.place() + kStepInts;
    const int64_t last = static_cast<int64_t>(rows_.size()) - 1;
    s = RowStep();
    s.kind = static_cast<int>(in.next("a step's kind", kRowLinear, kRowNorm));
    s.to = static_cast<int>(in.next("a step's buffer", 0, last));
    s.from = static_cast<int>(in.next("a step's buffer", 0, last));
    s.together = in.next("together", 0, 1) == 1;
    s.mask = -1;
    switch (s.kind) {
      case kRowLinear: {
        s.weight = &weights_[static_cast<size_t>(in.next("a step's weight", 0, static_cast<int64_t>(weights_.size()) - 1))];
        s.add = in.next("add", 0, 1) == 1;
        s.gated = in.next("gated", 0, 1) == 1;
        const int64_t rows = s.weight->packed.rows, columns = s.weight->packed.columns, read = s.gated ? 2 * columns : columns;
        s.to_row = features(in, "a linear step's outputs", s.to, rows);
        s.from_row = features(in, "a linear step's inputs", s.from, read);
        s.bias = tensors_.floats(in, "a bias", rows, true);
        s.activation = static_cast<int>(in.next("an activation", 0, kActivations - 1));
        s.norm = norm(in, columns, true);
        if (s.gated && s.norm.gain) refuse("a linear step is gated and normed");
        if (s.to == s.from) refuse("a linear step writes the buffer that it reads");
        break;
      }
      case kRowNorm:
        s.rows = in.next("a norm's features", 1, kLargest);
        s.to_row = features(in, "a norm's outputs", s.to, s.rows);
        s.from_row = features(in, "a norm's inputs", s.from, s.rows);
        s.norm = norm(in, s.rows, false);
        if (s.to == s.from && s.to_row != s.from_row) refuse("a norm writes other rows of the buffer that it reads");
        break;
      default: read_attention(in, s);
    }
    in.skip_to(end);
  }

  void read_attention(PlanReader& in, RowStep& s) {
    s.heads = in.next("heads", 1, kLargest);
    s.kv_heads = in.next("heads of keys", 1, s.heads);
    if (s.heads % s.kv_heads) refuse("heads of keys expected to divide heads");
    s.depth = in.next("a head's features", 1, kLargest / s.heads);
    s.to_row = features(in, "attention's outputs", s.to, s.heads * s.depth);
    const int64_t width = rows_[static_cast<size_t>(s.from)];
    const auto heads = [&](const char* what, int64_t count, int64_t& row, int64_t& step) {
      row = in.next(what, 0, width);
      step = in.next(what, s.depth, kLargest);
      if (row + (count - 1) * step + s.depth > width) refuse(std::string(what) + " do not fit into buffer " + std::to_string(s.from));
    };
    heads("queries", s.heads, s.q_row, s.q_step);
    heads("keys", s.kv_heads, s.k_row, s.k_step);
    heads("values", s.kv_heads, s.v_row, s.v_step);
    const int64_t factor = in.next("a scalar", 0, static_cast<int64_t>(scalars_.size()) - 1);
    s.factor = static_cast<float>(scalars_[static_cast<size_t>(factor)]);
    s.turned = in.next("turned features", 0, s.depth);
    if (s.turned % 2) refuse("turned features expected even");
    s.cache = static_cast<int>(in.next("a layer of the cache", 0, 1 << 16));
    s.mask = static_cast<int>(in.next("a mask", -1, 1 << 16));
    s.table = static_cast<int>(in.next("a table", 0, 1 << 16));
    s.norm = norm(in, s.depth, true);
    s.key_norm = norm(in, s.depth, true);
    if (s.to == s.from) refuse("attention writes the buffer that it reads");
    needs_.push_back({s.cache, s.mask, s.table, s.turned});
  }

  PlanTensors tensors_;
  std::vector<int64_t> rows_;
  std::vector<double> scalars_;
  std::vector<RowWeight> weights_;
  std::vector<RowStep> steps_;
  std::vector<Needs> needs_;
  RowProgram program_ = {};
};
}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<DecoderProgram>(m, "DecoderProgram")
      .def(py::init<const std::vector<int64_t>&, const std::vector<double>&, const std::vector<uintptr_t>&, const std::vector<int>&,
                    const std::vector<int64_t>&>())
      .def("run", &DecoderProgram::run);
}
}  // namespace sparseprune
