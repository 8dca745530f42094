// The Python side of the kernels: each binding checks what it is given, lets go of the interpreter, calls the table.
#include <stdexcept>

#if defined(TEMPO_HAS_amx)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bind.h"

namespace {

using tempo::Table;

#if defined(TEMPO_HAS_amx)
// Whether the processor has AMX for bfloat16, and Linux lets this process use its registers, which has to be asked for.
bool amx_granted() {
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTiles) &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

std::vector<const Table *> find_supported() {
    std::vector<const Table *> found;
#if defined(TEMPO_HAS_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("aes")) {
#if defined(TEMPO_HAS_amx)
        if (amx_granted()) found.push_back(&tempo::amx::table());
#endif
        found.push_back(&tempo::avx512::table());
    }
#endif
#if defined(TEMPO_HAS_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("aes"))
        found.push_back(&tempo::avx2::table());
#endif
    found.push_back(&tempo::generic::table());
    return found;
}

const std::vector<const Table *> &supported() {
    static const std::vector<const Table *> found = find_supported();
    return found;
}

void choose(const std::string &name) {
    for (const Table *table : supported())
        if (name == table->name) {
            tempo::active = table;
            return;
        }
    throw std::invalid_argument("this processor, or this build, has no kernels for " + name);
}

}  // namespace

const Table *tempo::active = supported().front();

NB_MODULE(_kernels, m) {
    nb::set_leak_warnings(false);  // masks of a session that is open when the interpreter exits
    m.def("supported", [] {
        std::vector<std::string> names;
        for (const Table *table : supported()) names.emplace_back(table->name);
        return names;
    });
    m.def("selected", [] { return std::string(tempo::active->name); });
    m.def("select", &choose);
    tempo::bind_haar(m);
    tempo::bind_sandwich(m);
    tempo::bind_sums(m);
    tempo::bind_layers(m);
    tempo::bind_lanczos(m);
    tempo::bind_patches(m);
    tempo::bind_shares(m);
    tempo::bind_zeros(m);
}
