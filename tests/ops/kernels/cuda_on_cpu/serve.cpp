// Launches kernels on request: reads requests from standard input, writes results to standard output, until the input ends.
//
// Request: int32 kernel, threads, seed, grid x and y, number of arguments, then the arguments. An argument is int64 kind and
// payload: NUMBER and the value; NULL_POINTER and 0; BUFFER and its size in bytes, then the bytes; SAME_AS and an argument's
// position; REAL and the bits of a 64-bit float. Answer: the bytes of all buffers, in order. A buffer is allocated with exactly
// its size, so the address sanitizer sees any access past it.
#include "cuda.h"

#include <utility>

using TopkId =
#ifdef TOPK_INT64
    long long;
#else
    int;
#endif

struct Bfloat16;
struct Float16;
extern "C" {
void sere_reroute(const float*, const TopkId*, TopkId*, const signed char*, const long long*, const uint4*, unsigned long long*,
                  int, int, int, int, int);
void sere_token_roles(const int*, signed char*, long long*, int, int, int, int, int);
void sere_route(float*, TopkId*, const signed char*, const long long*, unsigned long long*, float*, const uint4*, const float*,
                const void*, const float*, const double*, const float*, const signed char*, int, int, int, int, int, int, int,
                int, int, int, double, double, int, int, int, int, int, int, int, int);
#define DECLARE(NAME, T)                                                                                     \
    void sere_project_##NAME(const T*, const T*, const float*, float*, int, int, int, int);                  \
    void sere_compensate_##NAME(const T*, const T*, const T*, const float*, const float*, T*, double, int, int, int, int);
DECLARE(float32, float)
DECLARE(bfloat16, Bfloat16)
DECLARE(float16, Float16)
}

namespace {

enum Kind : int64_t { NUMBER, NULL_POINTER, BUFFER, SAME_AS, REAL };

struct Argument {
    int64_t kind = 0, payload = 0;
    void* pointer = nullptr;
    // Reading an argument as what it is not is a mistake in the caller's list of arguments.
    operator int() const {
        if (kind != NUMBER) std::abort();
        return static_cast<int>(payload);
    }
    operator double() const {
        if (kind != REAL) std::abort();
        return cuda_on_cpu::from_bits<double>(payload);
    }
    template <class T>
    operator T*() const {
        if (kind == NUMBER || kind == REAL) std::abort();
        return static_cast<T*>(pointer);
    }
};

bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }

using Arguments = std::vector<Argument>;

template <class... P, size_t... I>
std::function<void()> make_launch(void (*kernel)(P...), const Arguments& arguments, std::index_sequence<I...>) {
    if (arguments.size() != sizeof...(P)) {
        std::fprintf(stderr, "%zu arguments for a kernel of %zu\n", arguments.size(), sizeof...(P));
        std::exit(1);
    }
    return [kernel, &arguments] { kernel(static_cast<P>(arguments[I])...); };
}
template <class... P>
std::function<void()> make_launch(void (*kernel)(P...), const Arguments& arguments) {
    return make_launch(kernel, arguments, std::index_sequence_for<P...>());
}

std::function<void()> make_launch(int kernel, const Arguments& arguments) {
    switch (kernel) {
        case 0: return make_launch(sere_reroute, arguments);
        case 1: return make_launch(sere_token_roles, arguments);
        case 2: return make_launch(sere_route, arguments);
        case 3: return make_launch(sere_project_float32, arguments);
        case 4: return make_launch(sere_project_bfloat16, arguments);
        case 5: return make_launch(sere_project_float16, arguments);
        case 6: return make_launch(sere_compensate_float32, arguments);
        case 7: return make_launch(sere_compensate_bfloat16, arguments);
        case 8: return make_launch(sere_compensate_float16, arguments);
    }
    std::fprintf(stderr, "no kernel %d\n", kernel);
    std::exit(1);
}

}  // namespace

int main() {
    int32_t header[6];
    while (read(header, sizeof header)) {
        Arguments a(header[5]);
        for (Argument& argument : a) {
            if (!read(&argument.kind, 8) || !read(&argument.payload, 8)) return 1;
            if (argument.kind == BUFFER) {
                argument.pointer = std::malloc(argument.payload);
                if (!read(argument.pointer, argument.payload)) return 1;
            }
            if (argument.kind == SAME_AS) argument.pointer = a[argument.payload].pointer;
        }
        const std::function<void()> kernel = make_launch(header[0], a);
        cuda_on_cpu::grid_size = {static_cast<unsigned>(header[3]), static_cast<unsigned>(header[4])};
        for (unsigned y = 0; y < cuda_on_cpu::grid_size.y; ++y) {
            for (unsigned x = 0; x < cuda_on_cpu::grid_size.x; ++x) {
                cuda_on_cpu::block_index = {x, y};
                cuda_on_cpu::launch(header[1], header[2] + x, kernel);
            }
        }
        for (Argument& argument : a) {
            if (argument.kind != BUFFER) continue;
            std::fwrite(argument.pointer, 1, argument.payload, stdout);
            std::free(argument.pointer);
        }
        std::fflush(stdout);
    }
}
