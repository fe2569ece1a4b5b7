// Threads: torch's own OpenMP pool, sized by torch.set_num_threads. Never call omp_set_num_threads here.

#if defined(_OPENMP)
static inline int thread_id() { return omp_get_thread_num(); }
static inline int team_size() { return omp_get_num_threads(); }
static inline int max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }
#else
static inline int thread_id() { return 0; }
static inline int team_size() { return 1; }
static inline int max_threads() { return 1; }
#endif

// How many threads `work` units are worth when a thread should get at least `grain` of them.
static inline int threads_for(int64_t work, int64_t grain) {
  const int64_t useful = work / (grain > 0 ? grain : 1);
  const int most = max_threads();
  return useful <= 1 ? 1 : (useful < most ? static_cast<int>(useful) : most);
}

// How many threads a kernel of about `cycles` cycles is worth. Where OMP_WAIT_POLICY=passive lets the team sleep, waking it takes
// about 40 us; else it spins for a while and answers within one.
static inline int threads_for_cycles(int64_t cycles) {
  static const bool sleeps = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy != nullptr && (policy[0] == 'p' || policy[0] == 'P');
  }();
  return threads_for(cycles, sleeps ? int64_t(1) << 17 : int64_t(1) << 14);
}

// The part [begin, end) of n units, in multiples of `step`, that belongs to thread `id` of `team`.
struct Range {
  int64_t begin, end;
};
static inline Range share(int64_t n, int64_t step, int id, int team) {
  const int64_t units = (n + step - 1) / step;
  int64_t begin = units * id / team * step, end = units * (id + 1) / team * step;
  if (begin > n) begin = n;
  if (end > n) end = n;
  return {begin, end};
}

// Units of work that a team shares, each taken by who is free: a sleeping thread comes late, by more than many a product takes.
class Turns {
 public:
  // Runs unit(u) for one u in [0, units) after the other until none is left to take.
  template <class F>
  void take(int64_t units, F unit) {
    for (int64_t u; (u = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED)) < units;) unit(u);
  }
  int64_t taken() const { return __atomic_load_n(&next_, __ATOMIC_RELAXED); }
  // Called once for each unit that is done: true for the last of them, who then sees what all have written.
  bool last(int64_t units) { return __atomic_add_fetch(&done_, 1, __ATOMIC_ACQ_REL) == units; }

 private:
  alignas(64) int64_t next_ = 0;
  int64_t done_ = 0;
};

// The last thing in a parallel region. Its end puts whoever is early to sleep, and being woken costs as much as waking: so the caller
// stays out until the others are there. Who waits long gives its core away.
class Ending {
 public:
  void leave() {
    if (thread_id() != 0) {
      __atomic_fetch_add(&left_, 1, __ATOMIC_RELEASE);
      return;
    }
    for (int64_t turns = 0; __atomic_load_n(&left_, __ATOMIC_ACQUIRE) < team_size() - 1; ++turns) {
#if defined(__x86_64__)
      if (turns < 4096) {
        __builtin_ia32_pause();
        continue;
      }
#endif
      sched_yield();
    }
  }

 private:
  alignas(64) int64_t left_ = 0;
};
