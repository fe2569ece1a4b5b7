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

// Waits until ready() says so. Spins, which answers within a microsecond where putting a thread to sleep costs fifty; who waits long
// gives its core away.
template <class F>
static inline void spin_until(F ready) {
  for (int64_t turns = 0; !ready(); ++turns) {
    if (turns < 4096) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
      continue;
#elif defined(__aarch64__)
      __asm__ volatile("isb");  // as long as a pause; yield is over at once on most of these CPUs
      continue;
#endif
    }
    sched_yield();
  }
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
  // Waits for the units that others took; all are called done by last().
  void wait(int64_t units) {
    spin_until([&] { return __atomic_load_n(&done_, __ATOMIC_ACQUIRE) >= units; });
  }

 private:
  alignas(64) int64_t next_ = 0;
  int64_t done_ = 0;
};

// Units that lie in memory one behind the other: each of the team takes its own run of them in order, then what is left of the others'.
// turns: one for each of the team.
template <class F>
static inline void take_runs(Turns* turns, int64_t units, F unit) {
  const int team = team_size(), mine = thread_id();
  for (int i = 0; i < team; ++i) {
    const int of = mine + i < team ? mine + i : mine + i - team;
    const Range run = share(units, 1, of, team);
    turns[of].take(run.end - run.begin, [&](int64_t u) { unit(run.begin + u); });
  }
}

// The last thing in a parallel region. Its end puts whoever is early to sleep, and being woken costs as much as waking: so the caller
// stays out until the others are there.
class Ending {
 public:
  void leave() {
    if (thread_id() != 0) {
      __atomic_fetch_add(&left_, 1, __ATOMIC_RELEASE);
      return;
    }
    spin_until([&] { return __atomic_load_n(&left_, __ATOMIC_ACQUIRE) >= team_size() - 1; });
  }

 private:
  alignas(64) int64_t left_ = 0;
};
