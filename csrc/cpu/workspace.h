// Scratch memory of the calling thread, aligned to 64 bytes and kept between calls up to kKeep floats; freed when the thread ends.
// No two calls share one: every thread, Python's or OpenMP's, has its own.

class Workspace {
 public:
  static constexpr int64_t kKeep = int64_t(1) << 22;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // At least n floats; what was there before is lost.
  float* reserve(int64_t n) {
    if (n > size_) {
      std::free(data_);
      size_ = 0;
      data_ = nullptr;
      const size_t bytes = (static_cast<size_t>(n) * sizeof(float) + 4095) / 4096 * 4096;
      if (posix_memalign(reinterpret_cast<void**>(&data_), 4096, bytes) != 0) std::abort();  // out of memory inside a kernel
      size_ = static_cast<int64_t>(bytes / sizeof(float));
    }
    return data_;
  }

  // Gives back what one unusually large call took.
  void trim() {
    if (size_ <= kKeep) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// Two a thread: what a team shares (panels) is the caller's; each member, the caller too, has its own for the rest.
static Workspace& shared_workspace() {
  static thread_local Workspace mine;
  return mine;
}
static Workspace& workspace() {
  static thread_local Workspace mine;
  return mine;
}

// n fresh ones in this memory, with room for `floats` behind them.
static inline Turns* turns_in(Workspace& memory, int64_t n, int64_t floats = 0) {
  Turns* turns = reinterpret_cast<Turns*>(memory.reserve(n * static_cast<int64_t>(sizeof(Turns) / sizeof(float)) + floats));
  for (int64_t i = 0; i < n; ++i) turns[i] = Turns();
  return turns;
}
