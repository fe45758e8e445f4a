# Finds LibTorch and defines the target fused_lars::torch. The build includes this file and so does the
# installed fused_lars-config.cmake. It does not call find_package(Torch), because the CMake package of a
# CUDA build of torch refuses on a machine without a CUDA toolkit, which nothing here needs to link it.
#
# LibTorch is looked for where Torch_DIR says, on CMAKE_PREFIX_PATH, then in the Python on the PATH
# (or Python3_EXECUTABLE), which need not import it. Sets FUSED_LARS_TORCH_ROOT, FUSED_LARS_TORCH_VERSION
# and FUSED_LARS_TORCH_CUDA_VERSION (empty for a CPU build).

if(TARGET fused_lars::torch)
  return()
endif()

find_path(FUSED_LARS_TORCH_CMAKE_DIR TorchConfig.cmake HINTS "${Torch_DIR}" ${FUSED_LARS_TORCH_HINTS}
          PATH_SUFFIXES share/cmake/Torch Torch)
if(NOT FUSED_LARS_TORCH_CMAKE_DIR)
  find_program(Python3_EXECUTABLE NAMES python3 python)
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c
              "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE _fused_lars_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_path(FUSED_LARS_TORCH_CMAKE_DIR TorchConfig.cmake HINTS "${_fused_lars_torch}/share/cmake/Torch")
endif()
if(NOT FUSED_LARS_TORCH_CMAKE_DIR)
  message(FATAL_ERROR "fused_lars: LibTorch not found. Install torch for ${Python3_EXECUTABLE}, or give "
                      "-DCMAKE_PREFIX_PATH=`python3 -c 'import torch; print(torch.utils.cmake_prefix_path)'`.")
endif()
get_filename_component(FUSED_LARS_TORCH_ROOT "${FUSED_LARS_TORCH_CMAKE_DIR}/../../.." ABSOLUTE)

# A wheel says what it is in version.py, a LibTorch archive in build-version: 2.14.1+cu130.
set(FUSED_LARS_TORCH_CUDA_VERSION "")
if(EXISTS "${FUSED_LARS_TORCH_ROOT}/version.py")
  file(READ "${FUSED_LARS_TORCH_ROOT}/version.py" _fused_lars_text)
  string(REGEX MATCH "__version__ = '([^']+)'" _ "${_fused_lars_text}")
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
  INTERFACE_LINK_LIBRARIES
    "${_fused_lars_lib}/libtorch.so;${_fused_lars_lib}/libtorch_cpu.so;${_fused_lars_lib}/libc10.so")
# Before 2.7 some builds of torch had the old ABI of std::string, and their own CMake package said so.
file(STRINGS "${FUSED_LARS_TORCH_CMAKE_DIR}/TorchConfig.cmake" _fused_lars_text REGEX "_GLIBCXX_USE_CXX11_ABI=[01]")
if(_fused_lars_text MATCHES "_GLIBCXX_USE_CXX11_ABI=[01]")
  set_target_properties(fused_lars::torch PROPERTIES INTERFACE_COMPILE_DEFINITIONS "${CMAKE_MATCH_0}")
endif()

# at::parallel_for is compiled into its callers: without OpenMP it runs on one thread. The runtime must be the
# one that LibTorch brings, for a second one would have threads of its own.
add_library(fused_lars::torch_openmp INTERFACE IMPORTED)
file(GLOB _fused_lars_gomp "${_fused_lars_lib}/libgomp*.so*")
if(NOT _fused_lars_gomp OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(_fused_lars_gomp -fopenmp)
endif()
set_target_properties(fused_lars::torch_openmp PROPERTIES
  INTERFACE_COMPILE_OPTIONS -fopenmp INTERFACE_LINK_LIBRARIES "${_fused_lars_gomp}")
