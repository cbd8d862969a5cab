// The GPU's memory: a limit that is kept, and a table of what lies where.
// Addresses are real (pages of the host, reserved without being used), so that small copies work in both directions.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nullgpu.h"

// Larger copies and fills are images, weights and activations: they mean nothing where no kernel computes, and would
// take the host's time and memory. Smaller ones are indices, sizes, scalars and flags, which the host may read back.
#define LARGE_FROM_HOST ((size_t)1 << 20)
#define LARGE_WITHIN_DEVICE ((size_t)1 << 16)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used[NULLGPU_MOST_DEVICES];

bool nullgpu_take(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    bool fits = bytes <= nullgpu_gpu()->memory - used[device];
    if (fits) used[device] += bytes;
    pthread_mutex_unlock(&lock);
    return fits;
}

void nullgpu_give_back(int device, size_t bytes) {
    pthread_mutex_lock(&lock);
    used[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

size_t nullgpu_free_memory(int device) {
    pthread_mutex_lock(&lock);
    size_t left = nullgpu_gpu()->memory - used[device];
    pthread_mutex_unlock(&lock);
    return left;
}

// Sorted by start: a look-up (every copy asks whether its source is pinned) is a binary search.
static struct nullgpu_range* ranges;
static size_t count, capacity;

// How many ranges start at or before the pointer.
static size_t position(const void* pointer) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].start <= (const char*)pointer)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void nullgpu_add_range(struct nullgpu_range range) {
    pthread_mutex_lock(&lock);
    if (count == capacity) {
        capacity = capacity ? 2 * capacity : 256;
        ranges = realloc(ranges, capacity * sizeof *ranges);
        if (!ranges) abort();
    }
    size_t at = position(range.start);
    memmove(ranges + at + 1, ranges + at, (count - at) * sizeof *ranges);
    ranges[at] = range;
    count++;
    pthread_mutex_unlock(&lock);
}

bool nullgpu_remove_range(const void* start, struct nullgpu_range* removed) {
    pthread_mutex_lock(&lock);
    size_t at = position(start);
    bool found = at && ranges[at - 1].start == start;
    if (found) {
        *removed = ranges[at - 1];
        memmove(ranges + at - 1, ranges + at, (count - at) * sizeof *ranges);
        count--;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

struct nullgpu_range nullgpu_find_range(const void* pointer) {
    struct nullgpu_range found = {0};
    pthread_mutex_lock(&lock);
    size_t at = position(pointer);
    if (at && (const char*)pointer < ranges[at - 1].start + ranges[at - 1].size) found = ranges[at - 1];
    pthread_mutex_unlock(&lock);
    return found;
}

CUresult nullgpu_malloc(void** pointer, size_t bytes) {
    COUNT(malloc);
    size_t size = bytes ? bytes : 1;
    if (!nullgpu_take(nullgpu_device, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    void* start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        nullgpu_give_back(nullgpu_device, size);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    nullgpu_add_range((struct nullgpu_range){start, size, NULLGPU_DEVICE, nullgpu_device, NULL});
    *pointer = start;
    return CUDA_SUCCESS;
}

CUresult nullgpu_free(void* pointer) {
    struct nullgpu_range range;
    if (!pointer) return CUDA_SUCCESS;
    if (!nullgpu_remove_range(pointer, &range)) return CUDA_ERROR_INVALID_VALUE;
    munmap(range.start, range.size);
    nullgpu_give_back(range.device, range.size);
    return CUDA_SUCCESS;
}

void nullgpu_copy_in(void* to, const void* from, size_t bytes) {
    if (bytes <= LARGE_FROM_HOST) memmove(to, from, bytes);
}

void nullgpu_copy_within(void* to, const void* from, size_t bytes) {
    if (bytes <= LARGE_WITHIN_DEVICE) memmove(to, from, bytes);
}

void nullgpu_fill(void* to, int value, size_t bytes) {
    if (bytes <= LARGE_WITHIN_DEVICE) memset(to, value, bytes);
}
