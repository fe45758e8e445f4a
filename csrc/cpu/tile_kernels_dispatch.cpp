#include <cstdlib>
#include <string_view>

#include "tile_kernels.h"

namespace fused_lars {

extern const TileKernels tile_kernels_baseline;
#ifdef __x86_64__
extern const TileKernels tile_kernels_avx2;
extern const TileKernels tile_kernels_avx512;
#endif

const TileKernels& tile_kernels() {
  static const TileKernels& best = []() -> const TileKernels& {
#ifdef __x86_64__
    // This is torch's own switch. One variable limits the whole process to an instruction set.
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view wanted = variable ? variable : "";
    if (wanted == "default") return tile_kernels_baseline;
    if (wanted != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return tile_kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return tile_kernels_avx2;
#endif
    return tile_kernels_baseline;
  }();
  return best;
}

}  // namespace fused_lars
