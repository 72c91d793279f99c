// Compiles the including file once per instruction set, in one translation unit and with one set of
// compiler flags. A kernel file starts with
//
//   #define TTA_TARGET_FILE "cpu/NAME.cpp"
//   #include "cpu/foreach_isa.h"
//
// and puts its kernels in namespace tta::TTA_ISA. On x86-64 with GCC or Clang the file is then read
// three times, for AVX-512, AVX2 and scalar code; elsewhere once, scalar. What must exist once
// stands under `#if TTA_ISA_LEVEL == 0`, which is read last.
// Everything from the standard library is included here, outside any target region, so that no
// inline function of it is ever compiled for a wider machine than the one that runs it.

#ifndef TTA_FOREACH_ISA_ONCE
#define TTA_FOREACH_ISA_ONCE
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "core/config.h"
#include "core/half.h"
#include "core/order.h"
#include "core/philox.h"
#include "core/rounding.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#if TTA_X86_64
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 writes "undefined" vectors as `__m512 __Y = __Y` and warns of itself.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
#if defined(__GNUC__) || defined(__clang__)
// The shared headers define static functions (a copy for each instruction set); no kernel file
// calls all of them.
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#endif

#ifndef TTA_ISA  // the file itself asks: open the wider regions and read it again in each

#if TTA_X86_64
#if defined(__clang__)
// A pragma takes one literal: the targets are put into it as it is made a string.
#define TTA_PRAGMA(text) _Pragma(#text)
#define TTA_BEGIN_TARGET(targets) \
  TTA_PRAGMA(clang attribute push(__attribute__((target(targets))), apply_to = function))
#define TTA_BEGIN_TARGET_512 \
  TTA_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#define TTA_BEGIN_TARGET_256 TTA_BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2")
#define TTA_END_TARGET _Pragma("clang attribute pop")
#else
#define TTA_BEGIN_TARGET_512  \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2\")")
#define TTA_BEGIN_TARGET_256 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,bmi,bmi2\")")
#define TTA_END_TARGET _Pragma("GCC pop_options")
#endif

#define TTA_ISA avx512
#define TTA_ISA_LEVEL 2
TTA_BEGIN_TARGET_512
#include "core/vec.h"
// clang-format keeps this order: math.h is written in the operations of vec.h
#include "core/math.h"
#include TTA_TARGET_FILE
TTA_END_TARGET
#undef TTA_ISA
#undef TTA_ISA_LEVEL

#define TTA_ISA avx2
#define TTA_ISA_LEVEL 1
TTA_BEGIN_TARGET_256
#include "core/vec.h"
// clang-format keeps this order: math.h is written in the operations of vec.h
#include "core/math.h"
#include TTA_TARGET_FILE
TTA_END_TARGET
#undef TTA_ISA
#undef TTA_ISA_LEVEL
#endif  // TTA_X86_64

#define TTA_ISA scalar
#define TTA_ISA_LEVEL 0
#include "core/vec.h"
// clang-format keeps this order: math.h is written in the operations of vec.h
#include "core/math.h"

#endif  // TTA_ISA
