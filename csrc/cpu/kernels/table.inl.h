// Gathers the kernels of one ISA. Included after its simd_<isa>.h by isa_<isa>.cpp alone.
#pragma once

#include "cpu/kernels/batch_norm.inl.h"
#include "cpu/kernels/channels.inl.h"
#include "cpu/kernels/conv2d.inl.h"
#include "cpu/kernels/depthwise.inl.h"
#include "cpu/kernels/dot.inl.h"
#include "cpu/kernels/elementwise.inl.h"
#include "cpu/kernels/grouped.inl.h"
#include "cpu/kernels/layout.inl.h"
#include "cpu/kernels/loss.inl.h"
#include "cpu/kernels/optimizer.inl.h"
#include "cpu/kernels/outer.inl.h"
#include "cpu/kernels/pool2d.inl.h"
#include "cpu/kernels/response_norm.inl.h"
#include "cpu/kernels/roofline.inl.h"
#include "cpu/kernels/strip.inl.h"
#include "cpu/kernels/table.h"
#include "cpu/kernels/winograd.inl.h"

namespace fastconv::cpu {
namespace {

constexpr Conv2dKernels conv2d_kernels() {
  return {
      kLanes,
      kTilePixels,
      kTileVectors * kLanes,
      {{FC_DIRECT_ROW(1, 1), FC_DIRECT_ROW(1, 2)}, {FC_DIRECT_ROW(2, 1), FC_DIRECT_ROW(2, 2)}},
      {FC_STRIP_ROW(1), FC_STRIP_ROW(2)},
      kDotRows,
      dot<>,
      pack_pixels,
      pack_panels,
      pack_slice<float>,
      zero_pixels,
      pack_weights<float>,
      unpack_weights,
      pack_taps<float>,
      unpack_taps,
      stream_taps,
      weight_tile,
      kStripSums,
      strip_weight_tile,
      {FC_GROUPED_ROW},
      grouped_weight_tile,
      {planar_vectors<1>(), planar_vectors<2>(), planar_vectors<3>(), planar_vectors<4>()},
      planar_tile,
      depthwise_rows<DepthwiseRows>,
      depthwise_rows<DepthwiseWeightRows>,
      outer,
  };
}

constexpr KernelTable kernel_table() {
  return {
      FC_ISA_NAME,
      conv2d_kernels(),
      winograd_kernels(),
      {transpose},
      {pool2d_kernels<float>(), pool2d_kernels<double>()},
      {batch_norm_kernels<float>(), batch_norm_kernels<double>()},
      {response_norm_kernels<float>(), response_norm_kernels<double>()},
      {channel_kernels<float>(), channel_kernels<double>()},
      {elementwise_kernels<float>(), elementwise_kernels<double>()},
      {loss_kernels<float>(), loss_kernels<double>()},
      {optimizer_kernels<float>(), optimizer_kernels<double>()},
      roofline_kernels(),
  };
}

}  // namespace
}  // namespace fastconv::cpu
