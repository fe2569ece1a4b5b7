// The plans of programs, as the Python layer hands them over: every number that a kernel will trust is checked here.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace sparseprune {
[[noreturn]] inline void refuse_plan(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + ": the plan is not valid: " + what);
}

constexpr int64_t kWholeKind = -1;                        // sparseprune/encoder_program.py, WHOLE
constexpr int64_t kWeightInts = 10;                       // places of values, index, offsets and scale, and six numbers of sizes
constexpr int64_t kLargest = (int64_t(1) << 31) - 1;      // the product of two, twice, fits into 64 bits
constexpr int64_t kMostRounded = 65536;                   // columns whose sums of rounded products are within 32 bits
constexpr int64_t kSlack = 64;                            // sparseprune/packing/plan.py, SLACK
constexpr int kAnyDtype = -2, kInt16 = 4, kInt32 = 5, kUint8 = 6;  // beside those of values; sparseprune/native/_bound.py, DTYPE_CODES

// Reads a plan int by int.
class PlanReader {
 public:
  PlanReader(const char* op, const std::vector<int64_t>& plan) : op_(op), plan_(plan) {}
  int64_t next(const char* what, int64_t low, int64_t high) {
    if (at_ >= plan_.size()) refuse_plan(op_, std::string("it ends before ") + what);
    const int64_t found = plan_[at_++];
    if (found < low || found > high) {
      refuse_plan(op_, std::string(what) + " expected in [" + std::to_string(low) + ", " + std::to_string(high) + "], got " +
                           std::to_string(found));
    }
    return found;
  }
  void skip_to(size_t end) { at_ = end; }
  size_t place() const { return at_; }
  int64_t left() const { return static_cast<int64_t>(plan_.size() - at_); }
  bool done() const { return at_ == plan_.size(); }

 private:
  const char* op_;
  const std::vector<int64_t>& plan_;
  size_t at_ = 0;
};

// Rows, columns, height, k_block and row_block. Blocks that are larger than the weight are cut to it: memory is reserved for a block.
inline void read_sizes(PlanReader& in, Packed& w) {
  w.rows = in.next("a weight's rows", 1, kLargest);
  w.columns = in.next("a weight's columns", 1, kLargest);
  w.height = static_cast<int>(in.next("a weight's height", 1, 16));
  w.k_block = std::min(in.next("a weight's k_block", 1, kLargest), w.columns);
  w.row_block = std::min(in.next("a weight's row_block", w.height, kLargest), w.rows);
  w.k_blocks = (w.columns + w.k_block - 1) / w.k_block;
}

// Six numbers a layer: keys, values, their strides of a sequence and of a head.
inline std::vector<CacheLayer> cache_layers(const char* op, const std::vector<int64_t>& numbers) {
  if (numbers.size() % 6) throw std::invalid_argument(std::string(op) + ": the cache expected six numbers a layer");
  std::vector<CacheLayer> layers(numbers.size() / 6);
  for (size_t i = 0; i < layers.size(); ++i) {
    const int64_t* c = numbers.data() + 6 * i;
    layers[i] = {at<float>(static_cast<uintptr_t>(c[0])), at<float>(static_cast<uintptr_t>(c[1])), c[2], c[3], c[4], c[5]};
  }
  return layers;
}

// The tensors that a plan names by place. Whoever holds a program holds them too.
class PlanTensors {
 public:
  PlanTensors(const char* op, const std::vector<uintptr_t>& pointers, const std::vector<int>& dtypes, const std::vector<int64_t>& lengths)
      : op_(op), pointers_(pointers), dtypes_(dtypes), lengths_(lengths) {
    if (dtypes.size() != pointers.size() || lengths.size() != pointers.size()) refuse("its tensors have no dtype or length");
  }

  // The place of a tensor of at least `length` elements of this dtype; -1: none, where it is optional.
  int64_t place(PlanReader& in, const char* what, int64_t length, int dtype, bool optional = false) const {
    const int64_t i = in.next(what, optional ? -1 : 0, static_cast<int64_t>(pointers_.size()) - 1);
    if (i >= 0 && dtype != kAnyDtype && this->dtype(i) != dtype) refuse(std::string(what) + " has another dtype than expected");
    if (i >= 0) expect(what, i, length);
    return i;
  }
  // Its elements as floats; null: none.
  const float* floats(PlanReader& in, const char* what, int64_t length, bool optional = false) const {
    return pointer<float>(place(in, what, length, kFloat32, optional));
  }
  template <class T>
  const T* pointer(int64_t i) const {
    return i < 0 ? nullptr : at<const T>(pointers_[static_cast<size_t>(i)]);
  }
  int dtype(int64_t i) const { return dtypes_[static_cast<size_t>(i)]; }
  // Of a weight's values.
  int value_dtype(int64_t i) const {
    const int found = dtype(i);
    if (found != kFloat32 && found != kBfloat16 && found != kInt8) refuse("a weight's values expected in float32, bfloat16 or int8");
    return found;
  }
  void expect(const std::string& what, int64_t i, int64_t length) const {
    const int64_t found = lengths_[static_cast<size_t>(i)];
    if (found < length) refuse(what + " expected at least " + std::to_string(length) + " elements, got " + std::to_string(found));
  }

  // Height, offsets, index and values of a weight of kind groups or quads: every number that the kernels take from them without looking.
  void check_groups(const Packed& w, int64_t values, int64_t index, int64_t slots) const {
    if (dtype(index) != kInt16) refuse("a weight's index expected int16");
    if ((w.height & (w.height - 1)) != 0 || w.rows % w.height != 0 || w.row_block % w.height != 0 || w.k_block > 65536) {
      refuse("a weight expected a height that is a power of two and divides rows and row_block, and k_block up to 65536, got height " +
             std::to_string(w.height) + " and k_block " + std::to_string(w.k_block));
    }
    const int64_t slot_count = w.rows / w.height * w.k_blocks, quad = w.kind == kQuads ? 4 : 1;
    expect("a weight's offsets", slots, 2 * (slot_count + 1));
    const int64_t entries = w.slots[2 * slot_count];
    if (entries < 0) refuse("a weight's offsets expected to rise");
    expect("a weight's index", index, entries + kSlack);
    expect("a weight's values", values, (entries + kSlack) * w.height * quad);
    check_slots(w, entries);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const { refuse_plan(op_, what); }

  void check_slots(const Packed& w, int64_t entries) const {
    const int64_t groups = w.rows / w.height, per_block = w.row_block / w.height;
    const int32_t* slot = w.slots;
    if (slot[0] != 0) refuse("a weight's offsets expected to begin with 0");
    for (int64_t first = 0; first < groups; first += per_block) {
      const int64_t here = std::min(per_block, groups - first);
      for (int64_t k = 0; k < w.k_blocks; ++k) {
        const int64_t columns = std::min(w.k_block, w.columns - k * w.k_block) / (w.kind == kQuads ? 4 : 1);
        for (int64_t g = 0; g < here; ++g, slot += 2) {
          if (slot[2] < slot[0] || slot[2] > entries) refuse("a weight's offsets expected to rise");
          if (slot[2] - slot[0] > columns) refuse("a weight has more entries than a K-block has columns");  // scratch is for so many
          if (slot[1] < 0 || slot[1] >= here || (w.height >= 8 && slot[1] != g)) refuse("a weight's offsets name a group that is not there");
          uint16_t largest = 0;
          for (int32_t e = slot[0]; e < slot[2]; ++e) largest = std::max(largest, w.index[e]);
          if (slot[2] > slot[0] && largest >= columns) refuse("a weight's index is not below its columns");
        }
      }
    }
  }

  const char* op_;
  std::vector<uintptr_t> pointers_;
  std::vector<int> dtypes_;
  std::vector<int64_t> lengths_;
};
}  // namespace sparseprune
