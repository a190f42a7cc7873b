# The second extension, _cuda. The first never needs it and does not change with it.
#
#   FASTCONV_CUDA=AUTO      built where nvcc and an NVIDIA driver are found (the default)
#                 ON        built; needs nvcc alone
#                 OFF       not built
#                 EMULATED  built by the C++ compiler: kernels run on the host in loops. For tests without a GPU; slow.
set(FASTCONV_CUDA AUTO CACHE STRING "AUTO, ON, OFF or EMULATED")
set_property(CACHE FASTCONV_CUDA PROPERTY STRINGS AUTO ON OFF EMULATED)
# sm_90a has wgmma and the bulk tensor copies; the PTX of sm_80 serves what is neither.
set(FASTCONV_CUDA_ARCHITECTURES "80;90a" CACHE STRING "what nvcc compiles for")

set(build_cuda ${FASTCONV_CUDA})
if(build_cuda STREQUAL "AUTO")
  include(CheckLanguage)
  find_library(cuda_driver NAMES libcuda.so.1 PATHS /usr/local/nvidia/lib64 /usr/lib64 /usr/lib/x86_64-linux-gnu)
  set(build_cuda OFF)
  if(cuda_driver)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(build_cuda ON)
    endif()
  endif()
endif()
message(STATUS "CUDA extension: ${build_cuda}")
if(NOT build_cuda)
  return()
endif()

set(cuda_kernels
  csrc/cuda/batch_norm.cu
  csrc/cuda/channels.cu
  csrc/cuda/conv2d_depthwise.cu
  csrc/cuda/conv2d_simt.cu
  csrc/cuda/conv2d_sm80.cu
  csrc/cuda/conv2d_sm90.cu
  csrc/cuda/copy.cu
  csrc/cuda/elementwise.cu
  csrc/cuda/loss.cu
  csrc/cuda/optimizer.cu
  csrc/cuda/pool2d.cu
  csrc/cuda/reduce.cu
  csrc/cuda/response_norm.cu
  csrc/cuda/training.cu)
set(cuda_sources
  csrc/core/allocator.cpp
  csrc/core/batch_norm_problem.cpp
  csrc/core/channels_problem.cpp
  csrc/core/loss_problem.cpp
  csrc/core/pool_problem.cpp
  csrc/core/problem.cpp
  csrc/core/response_norm_problem.cpp
  csrc/cuda/conv2d.cpp
  csrc/cuda/step_numbers.cpp
  csrc/cuda/tables.cpp
  csrc/device/linear.cpp
  csrc/bindings/array_device.cpp
  csrc/bindings/bind_batch_norm.cpp
  csrc/bindings/bind_channels.cpp
  csrc/bindings/bind_conv2d.cpp
  csrc/bindings/bind_conv2d_batch_norm.cpp
  csrc/bindings/bind_device.cpp
  csrc/bindings/bind_elementwise.cpp
  csrc/bindings/bind_linear.cpp
  csrc/bindings/bind_loss.cpp
  csrc/bindings/bind_optimizer.cpp
  csrc/bindings/bind_pool2d.cpp
  csrc/bindings/bind_response_norm.cpp
  csrc/bindings/bind_training.cpp
  csrc/bindings/convert.cpp
  csrc/bindings/cuda_module.cpp
  csrc/bindings/dlpack.cpp
  csrc/bindings/operands.cpp)

if(build_cuda STREQUAL "EMULATED")
  list(APPEND cuda_sources csrc/cuda/device_emulated.cpp)
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
else()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${FASTCONV_CUDA_ARCHITECTURES})
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  list(APPEND cuda_kernels csrc/cuda/device.cu)
  if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
    set_source_files_properties(csrc/cuda/conv2d_sm90.cu PROPERTIES COMPILE_DEFINITIONS FASTCONV_CUDA_SM90A)
  endif()
endif()

pybind11_add_module(_cuda MODULE NO_EXTRAS ${cuda_sources} ${cuda_kernels})
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE FASTCONV_DEVICE=cuda FASTCONV_CUDA)
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
target_link_options(_cuda PRIVATE $<$<CONFIG:Release>:-s>)
if(build_cuda STREQUAL "EMULATED")
  target_compile_definitions(_cuda PRIVATE FASTCONV_CUDA_EMULATED)
else()
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
endif()
install(TARGETS _cuda LIBRARY DESTINATION fastconv)

# For the first runs of a changed kernel: a wait for a copy that never comes ends with an error, not in a hang.
option(FASTCONV_CUDA_BOUNDED_WAITS "Bound every wait on an mbarrier" OFF)
if(FASTCONV_CUDA_BOUNDED_WAITS OR CMAKE_BUILD_TYPE STREQUAL "Debug")
  target_compile_definitions(_cuda PRIVATE FASTCONV_CUDA_BOUNDED_WAITS)
endif()
