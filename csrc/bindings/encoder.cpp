#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/encoder_batch.h"
#include "plan.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sparseprune {
namespace {
constexpr int64_t kVersion = 1, kStepInts = 16;
constexpr int64_t kWholeBlock = 32;  // outputs of a piece of a dense weight

[[noreturn]] void refuse(const std::string& what) { refuse_plan("encoder", what); }

// The pointers and sizes of a stack; whoever holds it holds the tensors too.
class EncoderProgram {
 public:
  EncoderProgram(const std::vector<int64_t>& plan, const std::vector<double>& scalars, const std::vector<uintptr_t>& pointers,
                 const std::vector<int>& dtypes, const std::vector<int64_t>& lengths)
      : tensors_("encoder", pointers, dtypes, lengths) {
    PlanReader in("encoder", plan);
    in.next("version", kVersion, kVersion);
    rows_.resize(static_cast<size_t>(in.next("the number of buffers", 1, kMostBuffers)));
    rounded_.resize(rows_.size(), 0);
    for (auto& rows : rows_) rows = in.next("the features of a buffer", 1, kLargest);
    const int64_t buffers = static_cast<int64_t>(rows_.size());
    program_.result = static_cast<int>(in.next("the result's buffer", 0, buffers - 1));
    weights_.resize(static_cast<size_t>(in.next("the number of weights", 0, in.left())));
    scales_.resize(weights_.size());
    whole_.resize(weights_.size());
    for (size_t i = 0; i < weights_.size(); ++i) read_weight(in, i);
    steps_.resize(static_cast<size_t>(in.next("the number of steps", 0, in.left())));
    for (auto& step : steps_) read_step(in, scalars, step);
    if (!in.done()) refuse("it goes on behind its last step");
    program_.buffers = buffers;
    program_.rows = rows_.data();
    program_.steps = static_cast<int64_t>(steps_.size());
    program_.step = steps_.data();
  }

  void run(uintptr_t x, int64_t x_stride, uintptr_t mask, int64_t batch, int64_t length, const std::vector<uintptr_t>& tables,
           const std::vector<int64_t>& table_lengths, uintptr_t y, const std::vector<int64_t>& cache, int64_t room) const {
    for (const Table& t : tables_) {
      const int64_t needed = length * t.features * (t.squared ? length : 1) * (t.each ? batch : 1);
      if (tables.size() <= t.place || table_lengths.size() <= t.place || table_lengths[t.place] < needed) {
        throw std::invalid_argument("encoder: table " + std::to_string(t.place) + " expected at least " + std::to_string(needed) +
                                    " floats for sequences of " + std::to_string(length) + " tokens");
      }
    }
    const std::vector<CacheLayer> layers = cache_layers("encoder", cache);
    if (!layers.empty() && (static_cast<int64_t>(layers.size()) < cached_ || room < length)) {
      throw std::invalid_argument("encoder: the cache expected " + std::to_string(cached_) + " layers with room for " +
                                  std::to_string(length) + " tokens, got " + std::to_string(layers.size()) + " with " + std::to_string(room));
    }
    py::gil_scoped_release release;
    const uint8_t* real = at<const uint8_t>(mask);
    const int64_t width = rows_[static_cast<size_t>(program_.result)];
    if (real) {
      for (int64_t i = 0; i < batch * length; ++i) {
        if (!real[i]) std::memset(at<float>(y) + i * width, 0, static_cast<size_t>(width) * sizeof(float));
      }
    }
    int threads = 1;
#if defined(_OPENMP)
    threads = omp_in_parallel() ? 1 : omp_get_max_threads();
#endif
    const Batch found = batch_of(real, batch, length, kernels().lanes, products_, threads);
    if (found.units.empty()) return;
    std::vector<const float*> places(tables.size());
    for (size_t i = 0; i < tables.size(); ++i) places[i] = at<const float>(tables[i]);
    const Sequences sequences = {static_cast<int64_t>(found.units.size()), found.units.data(), found.row.data(),
                                 found.position.data(), found.start.data(), found.longest, length, places.data(),
                                 layers.empty() ? nullptr : layers.data()};
    kernels().encoder.encoder(program_, sequences, at<const float>(x), x_stride, at<float>(y), found.threads, found.shared);
  }

 private:
  // A table that a step reads: features [length] or, squared, features [length, length]; each: of every sequence.
  struct Table {
    size_t place;
    int64_t features;
    bool squared, each;
  };

  void read_weight(PlanReader& in, size_t i) {
    const size_t end = in.place() + kWeightInts;
    Packed& w = weights_[i];
    const int64_t values = tensors_.place(in, "a weight's values", 0, kAnyDtype),
                  index = tensors_.place(in, "a weight's index", 0, kInt16, true),
                  slots = tensors_.place(in, "a weight's offsets", 0, kInt32, true),
                  scale = tensors_.place(in, "a weight's scale", 0, kFloat32, true);
    const int64_t kind = in.next("a weight's kind (whole, groups or quads)", kWholeKind, kQuads);
    whole_[i] = kind == kWholeKind;
    if (whole_[i]) return read_whole(in, i, values, scale, end);
    w.kind = static_cast<int>(kind);
    if (w.kind != kGroups && w.kind != kQuads) refuse("a weight's kind expected whole, groups or quads");
    if (index < 0 || slots < 0) refuse("a packed weight expected an index and offsets");
    const bool quads = w.kind == kQuads;
    read_sizes(in, w);
    if (quads && (w.columns % 4 || w.columns > kMostRounded || w.k_block % 4)) {
      refuse("a weight of quads expected columns and k_block in fours, up to " + std::to_string(kMostRounded));
    }
    w.values = tensors_.pointer<void>(values);
    w.values_dtype = tensors_.value_dtype(values);
    if (quads && w.values_dtype != kInt8) refuse("a weight of quads expected values in int8");
    w.index = tensors_.pointer<uint16_t>(index);
    w.slots = tensors_.pointer<int32_t>(slots);
    if (quads && scale < 0) refuse("a weight of quads expected a scale");
    if (scale >= 0) tensors_.expect("a weight's scale", scale, quads ? 2 * w.rows : w.rows);  // quads: and the sum of each row
    (quads ? w.scale : scales_[i]) = tensors_.pointer<float>(scale);
    tensors_.check_groups(w, values, index, slots);
    products_ += int64_t{w.slots[2 * (w.rows / w.height * w.k_blocks)]} * w.height;
    program_.scratch = std::max(program_.scratch, w.row_block * 64 + w.height * w.k_block + 64);
    in.skip_to(end);
  }

  void read_whole(PlanReader& in, size_t i, int64_t values, int64_t scale, size_t end) {
    Packed& w = weights_[i];
    w.kind = kGroups;
    read_sizes(in, w);
    w.row_block = std::min(kWholeBlock, w.rows);
    w.values = tensors_.pointer<void>(values);
    w.values_dtype = tensors_.value_dtype(values);
    if (w.values_dtype == kInt8 && scale < 0) refuse("a weight in int8 expected a scale");
    if (scale >= 0) tensors_.expect("a weight's scale", scale, w.rows);
    scales_[i] = tensors_.pointer<float>(scale);
    tensors_.expect("a weight's values", values, w.rows * w.columns);
    products_ += w.rows * w.columns;
    program_.scratch = std::max(program_.scratch, w.row_block * 64 + kWholeScratch);
    in.skip_to(end);
  }

  // `count` heads of s.depth rows, s.every from one to the next, from the next int on of buffer `b`.
  int64_t heads_in(PlanReader& in, const char* what, int64_t b, const Step& s, int64_t count) {
    return rows_in(in, what, b, (count - 1) * s.every + s.depth);
  }

  // s.every, which the plan names behind the rows: an int further on, 0 for heads beside each other.
  int64_t every_at(PlanReader in, size_t place, const Step& s) const {
    in.skip_to(place);
    const int64_t every = in.next("features from one head to the next", 0, kLargest / s.heads);
    if (every && every < s.depth) refuse("features from one head to the next expected 0 or at least those of a head");
    return every ? every : s.depth;
  }

  // `count` rows from the next int on of buffer `b`.
  int64_t rows_in(PlanReader& in, const char* what, int64_t b, int64_t count) {
    const int64_t room = rows_[static_cast<size_t>(b)] - count;
    if (room < 0) refuse(std::string(what) + " do not fit into buffer " + std::to_string(b));
    return in.next(what, 0, room);
  }

  float scalar(PlanReader& in, const std::vector<double>& scalars) {
    if (scalars.empty()) refuse("it has no scalars");
    return static_cast<float>(scalars[static_cast<size_t>(in.next("a scalar", 0, static_cast<int64_t>(scalars.size()) - 1))]);
  }

  // Whether the linear step that follows has a weight of quads.
  bool reads_quads(PlanReader in) const {
    return weights_[static_cast<size_t>(in.next("a step's weight", 0, static_cast<int64_t>(weights_.size()) - 1))].kind == kQuads;
  }

  void read_step(PlanReader& in, const std::vector<double>& scalars, Step& s) {
    const size_t end = in.place() + kStepInts;
    const int64_t last = static_cast<int64_t>(rows_.size()) - 1;
    s = Step();
    s.kind = static_cast<int>(in.next("a step's kind", kLinear, kKeep));
    s.to = static_cast<int>(in.next("a step's buffer", 0, last));
    s.from = static_cast<int>(in.next("a step's buffer", 0, last));
    s.together = in.next("together", 0, 1) == 1;
    s.table = -1;
    const bool quads = s.kind == kLinear && reads_quads(in);
    if (!quads && rounded_[static_cast<size_t>(s.from)]) refuse("a step reads floats from a rounded buffer");
    if (s.kind != kRound && rounded_[static_cast<size_t>(s.to)]) refuse("a step writes floats to a rounded buffer");
    switch (s.kind) {
      case kLinear: {
        const int64_t w = in.next("a step's weight", 0, static_cast<int64_t>(weights_.size()) - 1);
        s.weight = &weights_[static_cast<size_t>(w)];
        s.scale = scales_[static_cast<size_t>(w)];
        s.whole = whole_[static_cast<size_t>(w)];
        s.to_row = rows_in(in, "a linear step's outputs", s.to, s.weight->rows);
        if (quads) {
          if (rounded_[static_cast<size_t>(s.from)] != s.weight->columns) {
            refuse("a linear step of quads expected a buffer rounded from " + std::to_string(s.weight->columns) + " features");
          }
          s.from_row = in.next("a linear step's inputs", 0, 0);
        } else {
          s.from_row = rows_in(in, "a linear step's inputs", s.from, s.weight->columns);
        }
        s.bias = tensors_.floats(in, "a bias", s.weight->rows, true);
        s.activation = static_cast<int>(in.next("an activation", 0, kActivations - 1));
        s.combine = static_cast<int>(in.next("combine", kReplace, kMultiply));
        if (s.to == s.from && s.to_row < s.from_row + s.weight->columns && s.from_row < s.to_row + s.weight->rows) {
          refuse("a linear step writes the rows that it reads");
        }
        break;
      }
      case kNorm:
        s.rows = in.next("a norm's features", 1, kLargest);
        s.to_row = rows_in(in, "a norm's outputs", s.to, s.rows);
        s.from_row = rows_in(in, "a norm's inputs", s.from, s.rows);
        s.gain = tensors_.floats(in, "a norm's weight", s.rows);
        s.shift = tensors_.floats(in, "a norm's bias", s.rows, true);
        s.eps = scalar(in, scalars);
        s.centred = in.next("centred", 0, 1) == 1;
        if (s.to == s.from && s.to_row != s.from_row && s.to_row < s.from_row + s.rows && s.from_row < s.to_row + s.rows) {
          refuse("a norm writes a part of the rows that it reads");
        }
        break;
      case kRound: {
        s.rows = in.next("a rounding's features", 4, kMostRounded);
        if (s.rows % 4) refuse("a rounding's features expected in fours");
        s.from_row = rows_in(in, "a rounding's inputs", s.from, s.rows);
        if (s.to == s.from || rows_[static_cast<size_t>(s.to)] < s.rows / 4 + 2 || s.to == program_.result || s.to == 0) {
          refuse("a rounding expected a buffer of its own with " + std::to_string(s.rows / 4 + 2) + " features");
        }
        rounded_[static_cast<size_t>(s.to)] = s.rows;
        break;
      }
      case kRotary:
        s.heads = in.next("heads", 1, kLargest);
        s.depth = in.next("a head's features", 2, kLargest / s.heads);
        if (s.depth % 2) refuse("a rotary head's features expected even");
        s.every = every_at(in, in.place() + 2, s);
        s.to_row = heads_in(in, "rotary heads", s.to, s, s.heads);
        s.table = static_cast<int>(in.next("a table", 0, 1 << 16));
        in.next("features from one head to the next", 0, kLargest);
        s.each = in.next("each", 0, 1) == 1;
        for (int i = 0; i < 2; ++i) tables_.push_back({static_cast<size_t>(s.table + i), s.depth, false, s.each});
        break;
      case kAttention:
        s.heads = in.next("heads", 1, kLargest);
        s.kv_heads = in.next("heads of keys", 1, s.heads);
        if (s.heads % s.kv_heads) refuse("heads of keys expected to divide heads");
        s.depth = in.next("a head's features", 1, kLargest / s.heads);
        s.every = every_at(in, in.place() + 7, s);
        s.to_row = rows_in(in, "attention's outputs", s.to, s.heads * s.depth);
        s.from_row = heads_in(in, "queries", s.from, s, s.heads);
        s.k_row = heads_in(in, "keys", s.from, s, s.kv_heads);
        s.v_row = heads_in(in, "values", s.from, s, s.kv_heads);
        s.window = in.next("window", -1, kLargest);
        s.factor = scalar(in, scalars);
        s.table = static_cast<int>(in.next("a table", -1, 1 << 16));
        if (s.table >= 0) tables_.push_back({static_cast<size_t>(s.table), s.heads, true, false});
        if (s.to == s.from) refuse("attention writes the buffer that it reads");
        in.next("features from one head to the next", 0, kLargest);
        s.causal = in.next("causal", 0, 1) == 1;
        break;
      case kKeep:
        s.heads = s.kv_heads = in.next("heads of keys", 1, kLargest);
        s.depth = in.next("a head's features", 1, kLargest / s.heads);
        s.every = every_at(in, in.place() + 2, s);
        s.k_row = heads_in(in, "keys", s.from, s, s.kv_heads);
        s.v_row = heads_in(in, "values", s.from, s, s.kv_heads);
        in.next("features from one head to the next", 0, kLargest);
        s.cache = static_cast<int>(in.next("a layer of the cache", 0, 1 << 16));
        cached_ = std::max(cached_, int64_t{s.cache} + 1);
        break;
      default: refuse("no such kind of step: " + std::to_string(s.kind));
    }
    in.skip_to(end);
  }

  PlanTensors tensors_;
  std::vector<int64_t> rows_, rounded_;  // rounded_: the features that a buffer holds in 8 bits, 0: floats
  std::vector<Packed> weights_;
  std::vector<const float*> scales_;
  std::vector<bool> whole_;  // dense weights: what they would have to be packed is not set
  std::vector<Step> steps_;
  Program program_ = {};
  std::vector<Table> tables_;
  int64_t products_ = 0, cached_ = 0;  // layers of a cache that steps write to
};
}  // namespace

void bind_encoder(py::module_& m) {
  py::class_<EncoderProgram>(m, "EncoderProgram")
      .def(py::init<const std::vector<int64_t>&, const std::vector<double>&, const std::vector<uintptr_t>&, const std::vector<int>&,
                    const std::vector<int64_t>&>())
      .def("run", &EncoderProgram::run);
}
}  // namespace sparseprune
