#include <sys/mman.h>

#include <new>

#include "sandwich_types.h"

namespace tempo {

namespace {

constexpr int kBuffers = 9;
constexpr size_t kHugePage = size_t(2) << 20;

struct Buffer {
    void *memory = nullptr;
    size_t bytes = 0;
    void release() {
        if (memory) munmap(memory, bytes);
        memory = nullptr, bytes = 0;
    }
    ~Buffer() { release(); }
};

thread_local Buffer buffers[kBuffers];

}  // namespace

float *scratch(int which, size_t floats) {
    Buffer &buffer = buffers[which];
    const size_t wanted = (floats * sizeof(float) + 64 + kHugePage - 1) / kHugePage * kHugePage;
    if (wanted > buffer.bytes) {
        buffer.release();
        void *memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        madvise(memory, wanted, MADV_HUGEPAGE);  // only advice: it may be refused
#endif
        buffer.memory = memory, buffer.bytes = wanted;
    }
    return static_cast<float *>(buffer.memory);
}

}  // namespace tempo
