// torch.ops.fused_lars.config: what this library was built from, and what it uses on this machine.

#include <string>

#include <torch/library.h>

#include "cpu/tile_kernels.h"

namespace {

c10::Dict<std::string, std::string> config() {
  c10::Dict<std::string, std::string> result;
  result.insert("version", FUSED_LARS_VERSION);
  result.insert("torch", FUSED_LARS_TORCH_VERSION);
  result.insert("cuda", FUSED_LARS_CUDA_CONFIG);
  result.insert("simd", fused_lars::tile_kernels().name);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lars, library) { library.def("config() -> Dict(str, str)", config); }
