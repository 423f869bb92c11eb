// Threads that go through the same phases together: they share out each phase's work and wait for one another behind it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

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
        work(0);
        for (int left; (left = busy_.load(std::memory_order_acquire));) await(busy_, left);
    }

    // Share `count` pieces of work out to whoever comes first, `step` at a time; `phase` counts the calls of a run.
    template <typename F>
    void share(int& phase, int64_t count, int64_t step, F&& work) {
        std::atomic<int64_t>& next = next_[phase % COUNTERS];
        // Everyone is past the barrier behind the phase that used this counter last.
        next_[(phase + COUNTERS / 2) % COUNTERS].store(0, std::memory_order_relaxed);
        phase++;
        if (size_ == 1) {
            for (int64_t i = 0; i < count; i += step) work(i, std::min(count, i + step));
            return;
        }
        for (int64_t i; (i = next.fetch_add(step, std::memory_order_relaxed)) < count;)
            work(i, std::min(count, i + step));
        wait();
    }

   private:
    static constexpr int COUNTERS = 16;
    static constexpr uint64_t SPINNING = 200'000;  // the clock's ticks: some fifty microseconds

    // Until `value` is not `old`. Who waits for longer sleeps: a thread that was pushed off its core by another program
    // then finds this one free, which a thread that only yields would keep.
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
