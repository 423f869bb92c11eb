// Threads that go through the same phases together: they share out each phase's work and wait for one another behind it.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

// Keeps this thread on a core of its own while it works in a team that has all cores. Else the system may bring two of
// the team together on one core, while another program has the other one, and part them again only some ticks later.
class Seat {
   public:
    Seat(int thread, int size) {
        CPU_ZERO(&before_);
        if (sched_getaffinity(0, sizeof(before_), &before_) != 0 || CPU_COUNT(&before_) != size) return;
        int core = 0;
        for (int passed = 0; !CPU_ISSET(core, &before_) || passed++ < thread;) core++;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        taken_ = sched_setaffinity(0, sizeof(one), &one) == 0;
    }
    ~Seat() {
        if (taken_) sched_setaffinity(0, sizeof(before_), &before_);
    }
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;

   private:
    cpu_set_t before_;
    bool taken_ = false;
};

class Team {
   public:
    explicit Team(int size) : size_(size) {
        for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
    }

    ~Team() {
        work_ = nullptr;
        epoch_.fetch_add(1, std::memory_order_release);
        epoch_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Run `work(thread)` on every thread, this one included, and wait until all are done.
    void run(const std::function<void(int)>& work) {
        for (auto& counter : next_) counter.store(0, std::memory_order_relaxed);
        work_ = &work;
        busy_.store(size_ - 1, std::memory_order_relaxed);
        epoch_.fetch_add(1, std::memory_order_release);
        if (size_ > 1) epoch_.notify_all();
        const Seat seat(0, size_);
        work(0);
        for (int left; (left = busy_.load(std::memory_order_acquire));) await(busy_, left);
    }

    // Share `count` pieces of work out to whoever comes first, `step` at a time; `phase` counts the calls of a run. `work`
    // is told from where to where, and by a function, if it calls that, where this thread goes on.
    template <typename F>
    void share_ahead(int& phase, int64_t count, int64_t step, F&& work) {
        std::atomic<int64_t>& next = next_[phase % COUNTERS];
        // Everyone is past the barrier behind the phase that used this counter last.
        next_[(phase + COUNTERS / 2) % COUNTERS].store(0, std::memory_order_relaxed);
        phase++;
        const auto take = [&] { return next.fetch_add(step, std::memory_order_relaxed); };
        for (int64_t i = take(), then; i < count; i = then) {
            then = -1;
            const auto taken = [&] { return then < 0 ? then = take() : then; };
            work(i, std::min(count, i + step), taken);
            taken();
        }
        if (size_ > 1) wait();
    }

    template <typename F>
    void share(int& phase, int64_t count, int64_t step, F&& work) {
        share_ahead(phase, count, step, [&](int64_t first, int64_t last, const auto&) { work(first, last); });
    }

   private:
    static constexpr int COUNTERS = 16;
    static constexpr uint64_t SPINNING = 200'000;  // the clock's ticks: some fifty microseconds

    // Until `value` is not `old`. Who waits for longer sleeps: another program, which may have pushed the thread that is
    // waited for off its core, then finds this one free, which a thread that only yields would keep.
    template <typename T>
    static void await(const std::atomic<T>& value, T old) {
        for (const uint64_t began = __rdtsc(); __rdtsc() - began < SPINNING; _mm_pause())
            if (value.load(std::memory_order_acquire) != old) return;
        value.wait(old, std::memory_order_acquire);
    }

    void wait() {
        const uint32_t generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.fetch_add(1, std::memory_order_release);
            generation_.notify_all();
            return;
        }
        await(generation_, generation);
    }

    void serve(int thread) {
        const Seat seat(thread, size_);
        uint32_t seen = 0;
        while (true) {
            epoch_.wait(seen, std::memory_order_acquire);
            seen = epoch_.load(std::memory_order_acquire);
            if (work_ == nullptr) return;
            (*work_)(thread);
            busy_.fetch_sub(1, std::memory_order_release);
            busy_.notify_all();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    struct alignas(64) Counter : std::atomic<int64_t> {};
    Counter next_[COUNTERS];
};
