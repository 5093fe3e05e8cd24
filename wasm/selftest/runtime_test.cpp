// Tests of the guest runtime from inside: allocator, threads, locks, conditions, thread_local, exceptions, sleeps.
// Built as a command module beside upstream's tests and run by tests/upstream. One line "ok NAME" per case.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <future>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

static int n_failed = 0;

#define EXPECT(condition)                                                    \
    do {                                                                     \
        if (!(condition)) {                                                  \
            printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            n_failed++;                                                      \
        }                                                                    \
    } while (0)

// Random sizes and alignments; every block is filled with its own byte and checked before it is freed.
static void stress_heap(unsigned seed, int n_rounds) {
    struct block { unsigned char * data; size_t size; unsigned char byte; };
    std::mt19937 random(seed);
    std::vector<block> live;
    auto release = [&](size_t i) {
        for (size_t k = 0; k < live[i].size; k += 97) {
            EXPECT(live[i].data[k] == live[i].byte);
        }
        free(live[i].data);
        live[i] = live.back();
        live.pop_back();
    };
    for (int round = 0; round < n_rounds; round++) {
        const unsigned kind = random() % 8;
        if (live.size() > 200 || (kind < 3 && !live.empty())) {
            release(random() % live.size());
            continue;
        }
        const size_t size      = (random() % 16 == 0 ? random() % (1 << 20) : random() % 4096) + 1;
        const size_t alignment = size_t(16) << (random() % 5);
        block        fresh     = {nullptr, size, (unsigned char) random()};
        if (kind == 4) {
            fresh.data = (unsigned char *) aligned_alloc(alignment, size);
            EXPECT((uintptr_t) fresh.data % alignment == 0);
        } else if (kind == 5) {
            fresh.data = (unsigned char *) calloc(1, size);
            EXPECT(fresh.data[0] == 0 && fresh.data[size - 1] == 0);
        } else if (kind == 6) {
            fresh.data = (unsigned char *) realloc(malloc(size / 2 + 1), size);
        } else {
            fresh.data = (unsigned char *) malloc(size);
        }
        EXPECT(fresh.data != nullptr && (uintptr_t) fresh.data % 16 == 0);
        memset(fresh.data, fresh.byte, size);
        live.push_back(fresh);
    }
    while (!live.empty()) {
        release(live.size() - 1);
    }
}

static void test_heap_one_thread() { stress_heap(1, 200000); }

static void test_heap_four_threads() {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 4; i++) {
        threads.emplace_back(stress_heap, i + 2, 60000);
    }
    for (auto & thread : threads) {
        thread.join();
    }
}

// Through volatile pointers: clang removes an allocation that nobody uses, and with it its failure.
static void * (*volatile allocate)(size_t)              = malloc;
static void * (*volatile allocate_zeroed)(size_t, size_t) = calloc;

extern "C" size_t pw_heap_bytes(void);  // sysroot/heap.c

// An allocation larger than the free end of the heap takes from the memory only what is missing there.
static void test_heap_grows_at_its_end() {
    const size_t large = pw_heap_bytes() + ((size_t) 64 << 20);
    free(allocate(large));
    const size_t before = pw_heap_bytes();
    void *       larger = allocate(large + ((size_t) 32 << 20));
    EXPECT(larger != nullptr);
    EXPECT(pw_heap_bytes() - before <= ((size_t) 34 << 20));
    free(larger);
}

// A freed gigabyte must serve the next gigabyte: the heap coalesces and does not round up to powers of two.
static void test_heap_coalesces() {
    for (int round = 0; round < 4; round++) {
        std::vector<void *> parts;
        for (int i = 0; i < 70; i++) {
            parts.push_back(malloc(15 << 20));
            EXPECT(parts.back() != nullptr);
        }
        for (void * part : parts) {
            free(part);
        }
        void * whole = malloc((size_t) 1040 << 20);
        EXPECT(whole != nullptr);
        free(whole);
    }
}

static void test_heap_refuses() {
    EXPECT(allocate(SIZE_MAX - 100) == nullptr);
    EXPECT(allocate_zeroed(SIZE_MAX / 2, 3) == nullptr);
    EXPECT(allocate(SIZE_MAX / 2 + 1) == nullptr || sizeof(size_t) == 8);
    bool thrown = false;
    try {
        ::operator delete(::operator new(SIZE_MAX / 2 + 1));
    } catch (const std::bad_alloc &) {
        thrown = true;
    }
    EXPECT(thrown);
    void * again = allocate(1 << 20);
    EXPECT(again != nullptr);
    free(again);
}

static void test_more_threads_than_granted() {
    std::atomic<int> n_done{0};
    std::vector<std::future<void>> futures;
    for (int i = 0; i < 100; i++) {
        futures.push_back(std::async(std::launch::async, [&] { n_done++; }));
    }
    for (auto & future : futures) {
        future.get();
    }
    EXPECT(n_done == 100);
}

static void test_detached_threads() {
    static std::atomic<int> n_done;
    for (int i = 0; i < 50; i++) {
        std::thread([] { n_done++; }).detach();
    }
    while (n_done < 50) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

static void test_mutexes() {
    std::mutex mutex;
    std::recursive_mutex recursive;
    std::shared_mutex shared;
    long count = 0, reads = 0;
    auto work = [&] {
        for (int i = 0; i < 20000; i++) {
            std::lock_guard lock(mutex);
            count++;
        }
        for (int i = 0; i < 1000; i++) {
            std::lock_guard outer(recursive);
            std::lock_guard inner(recursive);
            count++;
            std::shared_lock read(shared);
            reads += count < 0;
        }
        std::unique_lock write(shared);
        count++;
    };
    std::thread a(work), b(work);
    a.join();
    b.join();
    EXPECT(count >= 40000 && reads == 0);
    std::timed_mutex timed;
    timed.lock();
    std::thread([&] { EXPECT(!timed.try_lock_for(std::chrono::milliseconds(30))); }).join();
    timed.unlock();
}

static void test_conditions() {
    std::mutex mutex;
    std::condition_variable ready;
    std::deque<int> queue;
    long sum = 0;
    std::thread consumer([&] {
        for (int i = 0; i < 5000; i++) {
            std::unique_lock lock(mutex);
            ready.wait(lock, [&] { return !queue.empty(); });
            sum += queue.front();
            queue.pop_front();
        }
    });
    for (int i = 0; i < 5000; i++) {
        std::lock_guard lock(mutex);
        queue.push_back(i);
        ready.notify_one();
    }
    consumer.join();
    EXPECT(sum == 5000L * 4999 / 2);

    std::unique_lock lock(mutex);
    const auto start = std::chrono::steady_clock::now();
    EXPECT(!ready.wait_for(lock, std::chrono::milliseconds(60), [] { return false; }));
    EXPECT(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(55));
}

static std::atomic<int> n_destroyed;
struct counted {
    std::string text = "thread local";
    ~counted() { n_destroyed++; }
};

static thread_local counted value;
static thread_local int number = 7;

static void test_thread_local() {
    std::thread([] {
        EXPECT(value.text == "thread local" && number == 7);
        number = 8;
    }).join();
    EXPECT(n_destroyed == 1);
    EXPECT(value.text == "thread local" && number == 7);
}

static void test_exceptions() {
    auto fail = [](int depth, auto & self) -> int {
        std::string cleaned = "unwound";
        return depth == 0 ? throw std::runtime_error("deep") : self(depth - 1, self);
    };
    for (int i = 0; i < 1000; i++) {
        try {
            fail(20, fail);
            EXPECT(false);
        } catch (const std::exception & error) {
            EXPECT(strcmp(error.what(), "deep") == 0);
        }
    }
    auto future = std::async(std::launch::async, [&] { return fail(3, fail); });
    bool crossed = false;
    try {
        future.get();
    } catch (const std::runtime_error &) {
        crossed = true;   // exception_ptr carries it from the other thread
    }
    EXPECT(crossed);
}

// Against loops over bytes, which the compiler must not make one of the functions that are tested.
static bool holds(const std::vector<unsigned char> & bytes, size_t begin, size_t end, const volatile unsigned char * expected) {
    for (size_t i = begin; i < end; i++) {
        if (bytes[i] != expected[i - begin]) {
            return false;
        }
    }
    return true;
}

static void test_memory() {
    const size_t large = (size_t) 3 << 20;   // sysroot/memory.c works on pieces of 1 MiB
    const size_t sizes[] = {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, large};
    std::vector<unsigned char> pattern(large + 64), buffer(large + 64);
    for (size_t i = 0; i < pattern.size(); i++) {
        pattern[i] = static_cast<unsigned char>(i * 2654435761u >> 13);
    }
    for (size_t n : sizes) {
        for (size_t from : {0, 5, 32}) {
            for (size_t to : {0, 1, 5, 64}) {
                memcpy(buffer.data(), pattern.data(), buffer.size());
                EXPECT(memmove(buffer.data() + to, buffer.data() + from, n) == buffer.data() + to);
                EXPECT(holds(buffer, 0, to, pattern.data()));
                EXPECT(holds(buffer, to, to + n, pattern.data() + from));
                EXPECT(holds(buffer, to + n, std::min(to + n + 64, buffer.size()), pattern.data() + to + n));
            }
        }
        memcpy(buffer.data(), pattern.data(), buffer.size());
        EXPECT(memset(buffer.data() + 3, 0x1a5, n) == buffer.data() + 3);
        EXPECT(std::count(buffer.begin() + 3, buffer.begin() + 3 + n, 0xa5) == (ptrdiff_t) n);
        EXPECT(holds(buffer, 0, 3, pattern.data()));
        EXPECT(holds(buffer, 3 + n, std::min(n + 64, buffer.size()), pattern.data() + 3 + n));
    }
    EXPECT(std::vector<int>(large).back() == 0);
    EXPECT(std::string(large, 'x').find_first_not_of('x') == std::string::npos);
}

static void test_clock_and_sleep() {
    const auto start = std::chrono::steady_clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(80));
    const auto slept = std::chrono::steady_clock::now() - start;
    EXPECT(slept >= std::chrono::milliseconds(75));
    EXPECT(std::thread::hardware_concurrency() >= 1);
}

int main() {
    const std::pair<const char *, void (*)()> cases[] = {
        {"heap grows at its end", test_heap_grows_at_its_end},
        {"heap one thread", test_heap_one_thread},
        {"heap four threads", test_heap_four_threads},
        {"heap coalesces", test_heap_coalesces},
        {"heap refuses", test_heap_refuses},
        {"more threads than granted", test_more_threads_than_granted},
        {"detached threads", test_detached_threads},
        {"mutexes", test_mutexes},
        {"conditions", test_conditions},
        {"thread local", test_thread_local},
        {"exceptions", test_exceptions},
        {"memory", test_memory},
        {"clock and sleep", test_clock_and_sleep},
    };
    for (const auto & [name, run] : cases) {
        const int before = n_failed;
        run();
        printf("%s %s\n", n_failed == before ? "ok" : "FAILED", name);
        fflush(stdout);
    }
    return n_failed != 0;
}
