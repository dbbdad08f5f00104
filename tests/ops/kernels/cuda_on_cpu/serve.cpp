// Launches kernels on request: reads requests from standard input, writes results to standard output, until the input ends.
//
// Request: int32 kernel, threads, seed, number of arguments, then the arguments. An argument is int64 kind and payload:
// NUMBER and the value; NULL_POINTER and 0; BUFFER and its size in bytes, then the bytes; SAME_AS and an argument's position.
// Answer: the bytes of all buffers, in order. A buffer is allocated with exactly its size, so the address sanitizer sees any
// access past it.
#include "cuda.h"

using TopkId =
#ifdef TOPK_INT64
    long long;
#else
    int;
#endif

extern "C" void sere_reroute(const float*, const TopkId*, TopkId*, const signed char*, const long long*, const uint4*,
                             unsigned long long*, int, int, int, int, int);
extern "C" void sere_token_roles(const int*, signed char*, long long*, int, int, int, int, int);

namespace {

enum Kind : int64_t { NUMBER, NULL_POINTER, BUFFER, SAME_AS };

struct Argument {
    int64_t kind = 0, payload = 0;
    void* pointer = nullptr;
    // Reading an argument as what it is not is a mistake in the caller's list of arguments.
    operator int() const {
        if (kind != NUMBER) std::abort();
        return static_cast<int>(payload);
    }
    template <class T>
    operator T*() const {
        if (kind == NUMBER) std::abort();
        return static_cast<T*>(pointer);
    }
};

bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

}  // namespace

int main() {
    int32_t header[4];
    while (read(header, sizeof header)) {
        std::vector<Argument> a(header[3]);
        for (Argument& argument : a) {
            if (!read(&argument.kind, 8) || !read(&argument.payload, 8)) return 1;
            if (argument.kind == BUFFER) {
                argument.pointer = std::malloc(argument.payload);
                if (!read(argument.pointer, argument.payload)) return 1;
            }
            if (argument.kind == SAME_AS) argument.pointer = a[argument.payload].pointer;
        }
        std::function<void()> kernel;
        if (header[0] == 0 && a.size() == 12) {
            kernel = [&a] { sere_reroute(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]); };
        } else if (header[0] == 1 && a.size() == 8) {
            kernel = [&a] { sere_token_roles(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); };
        } else {
            std::fprintf(stderr, "no kernel %d with %zu arguments\n", header[0], a.size());
            return 1;
        }
        cuda_on_cpu::launch(header[1], header[2], kernel);
        for (Argument& argument : a) {
            if (argument.kind != BUFFER) continue;
            std::fwrite(argument.pointer, 1, argument.payload, stdout);
            std::free(argument.pointer);
        }
        std::fflush(stdout);
    }
}
