// The kernels for AVX-512, and attention by AMX.
#include "attention_amx.h"
#include "table.h"

namespace tempo::TEMPO_ISA {

const Table &table() {
    static const Table found = [] {
        Table all = avx512::table();
        all.name = "amx";
        all.attend = attend_by_tiles;
        all.differentiate_attention = differentiate_attention_by_tiles;
        return all;
    }();
    return found;
}

}  // namespace tempo::TEMPO_ISA
