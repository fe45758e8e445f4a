# Finds LibTorch and defines the target fused_lars::torch. The build and the installed fused_lars-config.cmake
# include this file. It does not call find_package(Torch): for a CUDA build of torch that fails on a machine
# without a CUDA toolkit, and linking needs no toolkit.
#
# The search order is Torch_DIR, the Python of Python3_EXECUTABLE, CMAKE_PREFIX_PATH, FUSED_LARS_TORCH_HINTS,
# and the Python on the PATH. Torch is not imported. Sets FUSED_LARS_TORCH_ROOT, FUSED_LARS_TORCH_VERSION and
# FUSED_LARS_TORCH_CUDA_VERSION (empty for a CPU build).

if(TARGET fused_lars::torch)
  return()
endif()

function(fused_lars_torch_of_python python dir_variable)
  execute_process(
    COMMAND "${python}" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(root)
    set(${dir_variable} "${root}/share/cmake/Torch" PARENT_SCOPE)
  endif()
endfunction()

# Not cached, so that a build folder follows the Python that it is given.
set(_fused_lars_dir "${Torch_DIR}")
if(NOT _fused_lars_dir AND Python3_EXECUTABLE)
  fused_lars_torch_of_python("${Python3_EXECUTABLE}" _fused_lars_dir)
endif()
if(NOT _fused_lars_dir)
  unset(_fused_lars_dir)
  find_path(_fused_lars_dir TorchConfig.cmake HINTS ${FUSED_LARS_TORCH_HINTS} PATH_SUFFIXES share/cmake/Torch Torch
            NO_CACHE)
endif()
if(NOT _fused_lars_dir)
  find_program(_fused_lars_python NAMES python3 python NO_CACHE)
  fused_lars_torch_of_python("${_fused_lars_python}" _fused_lars_dir)
endif()
if(NOT EXISTS "${_fused_lars_dir}/TorchConfig.cmake")
  message(FATAL_ERROR "fused_lars: LibTorch not found, looked in \"${_fused_lars_dir}\". Install torch, or give "
                      "-DCMAKE_PREFIX_PATH=`python3 -c 'import torch; print(torch.utils.cmake_prefix_path)'`")
endif()
get_filename_component(FUSED_LARS_TORCH_ROOT "${_fused_lars_dir}/../../.." ABSOLUTE)

# A wheel has its version in version.py, a LibTorch archive in build-version: 2.14.1+cu130.
set(FUSED_LARS_TORCH_CUDA_VERSION "")
if(EXISTS "${FUSED_LARS_TORCH_ROOT}/version.py")
  file(READ "${FUSED_LARS_TORCH_ROOT}/version.py" _fused_lars_text)
  string(REGEX MATCH "__version__ = '([^']+)'" _fused_lars_match "${_fused_lars_text}")
  set(FUSED_LARS_TORCH_VERSION "${CMAKE_MATCH_1}")
  if(_fused_lars_text MATCHES "cuda[^=\n]*= '([0-9.]+)'")
    set(FUSED_LARS_TORCH_CUDA_VERSION "${CMAKE_MATCH_1}")
  endif()
else()
  file(STRINGS "${FUSED_LARS_TORCH_ROOT}/build-version" FUSED_LARS_TORCH_VERSION LIMIT_COUNT 1)
  if(FUSED_LARS_TORCH_VERSION MATCHES "\\+cu([0-9]+)([0-9])")
    set(FUSED_LARS_TORCH_CUDA_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  endif()
endif()

set(_fused_lars_lib "${FUSED_LARS_TORCH_ROOT}/lib")
add_library(fused_lars::torch INTERFACE IMPORTED)
set_target_properties(fused_lars::torch PROPERTIES
  INTERFACE_COMPILE_FEATURES cxx_std_20
  INTERFACE_INCLUDE_DIRECTORIES
    "${FUSED_LARS_TORCH_ROOT}/include;${FUSED_LARS_TORCH_ROOT}/include/torch/csrc/api/include"
  # Libraries that only register operators, such as libtorch_cuda.so and this one, must not be dropped.
  INTERFACE_LINK_OPTIONS LINKER:--no-as-needed
  INTERFACE_LINK_LIBRARIES
    "${_fused_lars_lib}/libtorch.so;${_fused_lars_lib}/libtorch_cpu.so;${_fused_lars_lib}/libc10.so")

# at::parallel_for is compiled into its callers. Without OpenMP it runs on one thread. The OpenMP runtime must be
# the one that LibTorch brings, because a second one would have its own threads. LibTorch's file of it has another
# name in every build, so it is not linked: the loader finds its functions as LibTorch's dependency.
add_library(fused_lars::torch_openmp INTERFACE IMPORTED)
set_target_properties(fused_lars::torch_openmp PROPERTIES INTERFACE_COMPILE_OPTIONS -fopenmp)
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # whose runtime LibTorch does not bring
  set_target_properties(fused_lars::torch_openmp PROPERTIES INTERFACE_LINK_LIBRARIES -fopenmp)
endif()
