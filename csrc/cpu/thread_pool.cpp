#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace robustgate {
namespace {

struct Job {
  ChunkFunction function;
  void* context;
  int64_t chunks;
  int seats;                     // workers still welcome
  std::atomic<int64_t> next{0};  // first chunk nobody has taken

  void run() {
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      function(context, c);
    }
  }
};

// Lets the other thread of a core run, and saves power, while a worker spins.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(Job& job, int workers) {
    bool wake;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < workers; ++started_) {
        try {
          std::thread(&Pool::work, this).detach();
        } catch (const std::system_error&) {
          break;  // no more threads to be had: the caller does their share
        }
      }
      job_ = &job;
      published_.fetch_add(1, std::memory_order_release);
      wake = sleeping_ > 0;
    }
    if (wake) wake_.notify_all();
    job.run();
    // Close the job, then wait only for workers that hold a chunk of it.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [&] { return active_ == 0; });
  }

  std::mutex busy;  // one job at a time

 private:
  // About 20 us: ops called one after the other find their workers awake.
  static constexpr int kSpins = 500;

  void work() {
    for (;;) {
      const uint64_t seen = published_.load(std::memory_order_acquire);
      std::unique_lock<std::mutex> lock(mutex_);
      if (job_ != nullptr && job_->seats > 0) {
        Job& job = *job_;
        --job.seats;
        ++active_;
        lock.unlock();
        job.run();
        lock.lock();
        if (--active_ == 0) idle_.notify_one();
        continue;
      }
      lock.unlock();
      for (int i = 0; i < kSpins && published_.load(std::memory_order_relaxed) == seen; ++i) {
        pause();
      }
      lock.lock();
      ++sleeping_;
      wake_.wait(lock, [&] { return published_.load(std::memory_order_relaxed) != seen; });
      --sleeping_;
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::atomic<uint64_t> published_{0};  // jobs so far
  Job* job_ = nullptr;
  int active_ = 0;
  int sleeping_ = 0;
  int started_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};

std::atomic<bool> g_forked{false};

// Never destroyed: detached workers may outlive static destructors. A forked child has none of the
// parent's threads, so it drops the pointer and starts afresh.
Pool& pool() {
  static const bool registered = [] {
    pthread_atfork(nullptr, nullptr, [] {
      g_pool.store(nullptr);
      g_forked.store(true);
    });
    return true;
  }();
  (void)registered;
  Pool* current = g_pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (g_pool.compare_exchange_strong(current, fresh)) {
      current = fresh;
    } else {
      delete fresh;
    }
  }
  return *current;
}

// The OpenMP runtime that torch has loaded, or null. Its threads spin for milliseconds after every
// torch op; threads of ours beside them would share their cores. It hangs in a forked child.
using OpenMPParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                                unsigned flags);

OpenMPParallel openmp() {
  static const OpenMPParallel found = []() -> OpenMPParallel {
    void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<OpenMPParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
  }();
  return g_forked.load() ? nullptr : found;
}

thread_local bool t_inside = false;

}  // namespace

void parallel_for(int64_t chunks, int threads, ChunkFunction function, void* context) {
  Job job{function, context, chunks, static_cast<int>(threads < chunks ? threads : chunks) - 1};
  if (job.seats <= 0 || t_inside) {
    job.run();
    return;
  }
  Pool& shared = pool();
  std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
  if (!lock.owns_lock()) {
    job.run();
    return;
  }
  t_inside = true;
  if (const OpenMPParallel run = openmp()) {
    run([](void* data) { static_cast<Job*>(data)->run(); }, &job,
        static_cast<unsigned>(job.seats + 1), 0);
  } else {
    shared.run(job, job.seats);
  }
  t_inside = false;
}

}  // namespace robustgate
