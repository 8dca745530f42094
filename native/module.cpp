// The Python side of the kernels: checks what it is given, lets go of the interpreter, calls the chosen table.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace nb = nanobind;

namespace {

using tempo::Table;

std::vector<const Table *> supported() {
    std::vector<const Table *> found;
#if defined(TEMPO_HAS_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("f16c"))
        found.push_back(&tempo::avx512::table());
#endif
#if defined(TEMPO_HAS_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&tempo::avx2::table());
#endif
    found.push_back(&tempo::generic::table());
    return found;
}

const Table *active = supported().front();

void choose(const std::string &name) {
    for (const Table *table : supported())
        if (name == table->name) {
            active = table;
            return;
        }
    throw std::invalid_argument("this processor, or this build, has no kernels for " + name);
}

}  // namespace

NB_MODULE(_kernels, m) {
    m.def("supported", [] {
        std::vector<std::string> names;
        for (const Table *table : supported()) names.emplace_back(table->name);
        return names;
    });
    m.def("selected", [] { return std::string(active->name); });
    m.def("select", &choose);
}
