# find_package(fused_lars) defines the target fused_lars::fused_lars. LibTorch is found as FusedLarsTorch.cmake
# says; a CUDA build of torch needs no CUDA toolkit.

if(TARGET fused_lars::fused_lars)
  return()
endif()
get_filename_component(_fused_lars_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(FUSED_LARS_TORCH_HINTS "${_fused_lars_prefix}/../torch/share/cmake/Torch")
include("${CMAKE_CURRENT_LIST_DIR}/FusedLarsTorch.cmake")

# The library for this torch, as _library.py in the Python package chooses it. In order: cpu, cuda12, cuda13.
set(_fused_lars_library "")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _fused_lars_series "${FUSED_LARS_TORCH_VERSION}")
string(REGEX MATCH "^[0-9]+" _fused_lars_major "0${FUSED_LARS_TORCH_CUDA_VERSION}")
file(GLOB _fused_lars_libraries "${_fused_lars_prefix}/lib/torch${_fused_lars_series}-*/libfused_lars.so")
list(SORT _fused_lars_libraries)
foreach(_fused_lars_file IN LISTS _fused_lars_libraries)
  if(NOT _fused_lars_file MATCHES "-cuda([0-9]+)/libfused_lars\\.so$" OR CMAKE_MATCH_1 LESS_EQUAL _fused_lars_major)
    set(_fused_lars_library "${_fused_lars_file}")
  endif()
endforeach()
if(NOT _fused_lars_library)
  file(GLOB _fused_lars_kinds RELATIVE "${_fused_lars_prefix}/lib" "${_fused_lars_prefix}/lib/torch*")
  list(JOIN _fused_lars_kinds ", " _fused_lars_kinds)
  set(fused_lars_FOUND FALSE)
  set(fused_lars_NOT_FOUND_MESSAGE
      "no library for torch ${FUSED_LARS_TORCH_VERSION} (CUDA ${FUSED_LARS_TORCH_CUDA_VERSION}) in ${FUSED_LARS_TORCH_ROOT}. ${_fused_lars_prefix}/lib has: ${_fused_lars_kinds}")
  return()
endif()

add_library(fused_lars::fused_lars SHARED IMPORTED)
set_target_properties(fused_lars::fused_lars PROPERTIES
  IMPORTED_LOCATION "${_fused_lars_library}" IMPORTED_SONAME libfused_lars.so
  INTERFACE_INCLUDE_DIRECTORIES "${_fused_lars_prefix}/include" INTERFACE_LINK_LIBRARIES fused_lars::torch
  # Some linkers do not look for OpenMP's and CUDA's functions behind LibTorch.
  INTERFACE_LINK_OPTIONS LINKER:--allow-shlib-undefined)
