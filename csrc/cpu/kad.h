// What the KAD kernels share, in the order of dependence; once per instruction set, like its parts.

#include "cpu/row.h"

#include "cpu/mixture.h"

#include "cpu/knapsack_cut.h"

#include "cpu/rule.h"
