// What every CUDA kernel of tta_ext starts from: the project's arithmetic on one thread's numbers
// (tta::device, the same core/vec.h and core/math.h that the CPU kernels are written in), shared
// memory and launches.
//
// The sources also compile with g++ and -DTTA_SIMT, where csrc/testing/simt runs a fiber per
// thread and checks every access; that is why shared memory and launches go through macros.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#if defined(TTA_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#define TTA_SHARED(type, name) __shared__ type name
#define TTA_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define TTA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
// TTA_UNPAREN takes the parentheses off a template-id that holds commas.
#define TTA_UNPAREN(...) __VA_ARGS__
#define TTA_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  TTA_UNPAREN kernel<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)
#endif

#include "core/config.h"
#include "core/half.h"
#include "core/order.h"
#include "core/params.h"
#include "core/philox.h"
#include "core/rounding.h"

#define TTA_ISA device
#define TTA_ISA_LEVEL 0
#include "core/vec.h"
// clang-format keeps this order: math.h is written in the operations of vec.h
#include "core/math.h"
