# Decides whether to build the CUDA part, with which toolkit and for which GPUs, and enables the CUDA
# language. Sets FUSED_LARS_WITH_CUDA, FUSED_LARS_CUDA_MAJOR (the toolkit's version), and for show_config()
# FUSED_LARS_CUDA_CONFIG and FUSED_LARS_NO_CUDA_CONFIG.
#
# FUSED_LARS_CUDA is an option or an environment variable. 1: an error if the CUDA part cannot be built. 0:
# skip it. Otherwise: build it if LibTorch is a CUDA build and a toolkit is found that is not newer than
# LibTorch's CUDA. TORCH_CUDA_ARCH_LIST is set in the same ways, such as "8.0;9.0+PTX".
#
# No CUDA runtime is linked. The loader finds its functions as LibTorch's dependency. Those that are called are
# the same in CUDA 12 and 13, so one library serves builds of torch of both, and there is never a second runtime.

set(FUSED_LARS_CUDA "" CACHE STRING "1: CUDA or an error, 0: CPU only, empty: CUDA where possible")
if(FUSED_LARS_CUDA STREQUAL "")
  set(FUSED_LARS_CUDA "$ENV{FUSED_LARS_CUDA}")
endif()

# Returns the first nvcc of no newer major version that finds its headers, or the reason why there is none. What
# a newer one compiles may need a newer driver than torch does. A toolkit that the user asks for is the only
# candidate. Otherwise the toolkit that pip puts beside torch comes first, because it has torch's exact version.
function(fused_lars_find_nvcc newest_major nvcc_variable reason_variable)
  set(reason "no nvcc found (CUDACXX, CUDA_HOME, beside torch, PATH, /usr/local/cuda)")
  find_program(on_path nvcc NO_CACHE)
  set(candidates "${CMAKE_CUDA_COMPILER}")
  if(NOT candidates)
    set(candidates "$ENV{CUDACXX}")
  endif()
  if(NOT candidates AND DEFINED ENV{CUDA_HOME})
    set(candidates "$ENV{CUDA_HOME}/bin/nvcc")
  endif()
  if(NOT candidates)
    get_filename_component(site_packages "${FUSED_LARS_TORCH_ROOT}/.." ABSOLUTE)
    set(candidates "${site_packages}/nvidia/cu${newest_major}/bin/nvcc"
        "/usr/local/cuda-${FUSED_LARS_TORCH_CUDA_VERSION}/bin/nvcc" ${on_path} /usr/local/cuda/bin/nvcc)
  endif()
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe.cu")
  file(WRITE "${probe}" "#include <cub/block/block_reduce.cuh>\n")
  foreach(nvcc IN LISTS candidates)
    if(NOT EXISTS "${nvcc}")
      continue()
    endif()
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
    if(NOT text MATCHES "release (([0-9]+)\\.[0-9]+)")
      set(reason "${nvcc} does not run")
    elseif(CMAKE_MATCH_2 GREATER newest_major)
      set(reason "${nvcc} is CUDA ${CMAKE_MATCH_1}, torch is built for CUDA ${FUSED_LARS_TORCH_CUDA_VERSION}")
    elseif(CMAKE_MATCH_1 VERSION_LESS 12.1)  # older ones do not take kernel parameters of 32 KB
      set(reason "${nvcc} is CUDA ${CMAKE_MATCH_1}, the kernels need 12.1 or newer")
    else()
      execute_process(COMMAND "${nvcc}" -std=c++17 -E "${probe}" RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
      if(NOT failed)
        set(${nvcc_variable} "${nvcc}" PARENT_SCOPE)
        return()
      endif()
      set(reason "${nvcc} does not find cuda_runtime.h and cub (pip: cuda-toolkit[nvcc,cccl,cudart])")
    endif()
  endforeach()
  set(${reason_variable} "${reason}" PARENT_SCOPE)
endfunction()

# Converts "8.0;9.0+PTX" to CMake's form: 80-real;90.
function(fused_lars_cuda_architectures list architectures_variable)
  string(REGEX REPLACE "[ ,]+" ";" list "${list}")
  set(architectures "")
  foreach(entry IN LISTS list)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "fused_lars: TORCH_CUDA_ARCH_LIST has ${entry}; allowed: numbers such as 9.0 and 9.0+PTX")
    elseif(CMAKE_MATCH_3)
      list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    else()
      list(APPEND architectures "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
    endif()
  endforeach()
  set(${architectures_variable} "${architectures}" PARENT_SCOPE)
endfunction()

set(FUSED_LARS_WITH_CUDA OFF)
set(FUSED_LARS_NO_CUDA_CONFIG "none, CPU only")
set(_fused_lars_nvcc "")
string(REGEX MATCH "^[0-9]+" _fused_lars_newest_major "${FUSED_LARS_TORCH_CUDA_VERSION}")
if(_fused_lars_newest_major AND FUSED_LARS_PORTABLE)
  set(_fused_lars_newest_major 99)  # the same series of torch is built for other versions of CUDA too
endif()
if(FUSED_LARS_CUDA STREQUAL "0")
  set(_fused_lars_reason "FUSED_LARS_CUDA=0")
elseif(NOT _fused_lars_newest_major)
  set(_fused_lars_reason "torch ${FUSED_LARS_TORCH_VERSION} is a CPU build")
else()
  fused_lars_find_nvcc("${_fused_lars_newest_major}" _fused_lars_nvcc _fused_lars_reason)
endif()
if(NOT _fused_lars_nvcc)
  if(FUSED_LARS_CUDA STREQUAL "1")
    message(FATAL_ERROR "fused_lars: FUSED_LARS_CUDA=1, but ${_fused_lars_reason}")
  endif()
  message(STATUS "fused_lars: CPU only, no CUDA: ${_fused_lars_reason}")
  return()
endif()

set(FUSED_LARS_WITH_CUDA ON)
set(CMAKE_CUDA_COMPILER "${_fused_lars_nvcc}")
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
set(CMAKE_CUDA_ARCHITECTURES OFF)
# CMake links a program to check that nvcc works. nvcc looks in lib64, but the pip toolkit has lib.
get_filename_component(_fused_lars_toolkit_lib "${_fused_lars_nvcc}/../../lib" ABSOLUTE)
set(_fused_lars_cuda_flags "${CMAKE_CUDA_FLAGS}")
set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L\"${_fused_lars_toolkit_lib}\"")
enable_language(CUDA)
set(CMAKE_CUDA_FLAGS "${_fused_lars_cuda_flags}")

if(NOT TORCH_CUDA_ARCH_LIST)
  set(TORCH_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
if(NOT TORCH_CUDA_ARCH_LIST)
  # One architecture of each generation: machine code runs on later members of it (8.0 on 8.6 and 8.9).
  set(TORCH_CUDA_ARCH_LIST "7.5;8.0;9.0+PTX")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(TORCH_CUDA_ARCH_LIST "7.5;8.0;9.0;10.0;12.0+PTX")
  endif()
endif()
fused_lars_cuda_architectures("${TORCH_CUDA_ARCH_LIST}" CMAKE_CUDA_ARCHITECTURES)
string(REGEX MATCH "^[0-9]+" FUSED_LARS_CUDA_MAJOR "${CMAKE_CUDA_COMPILER_VERSION}")
string(REPLACE ";" " " FUSED_LARS_CUDA_CONFIG "${CMAKE_CUDA_COMPILER_VERSION} for ${TORCH_CUDA_ARCH_LIST}")
message(STATUS "fused_lars: CUDA ${FUSED_LARS_CUDA_CONFIG}, ${_fused_lars_nvcc}")
