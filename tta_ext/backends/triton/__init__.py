"""The operators in Triton, for GPUs where the CUDA library cannot be had.

Each function is the ``X.out`` form of the operator of the same name in :mod:`tta_ext.schemas`.
Results are the CPU's bit for bit; ``greedy_knapsack`` alone is left to the reference.
"""

from tta_ext.backends.triton.deferral import (  # noqa: F401
    deferral_mask,
    deferral_probs,
    deferral_propose,
    deferral_sample,
    deferral_stats,
)
from tta_ext.backends.triton.implicit_reward import (  # noqa: F401
    implicit_reward_probs,
    implicit_reward_sample,
)
from tta_ext.backends.triton.philox import normal, philox  # noqa: F401
from tta_ext.backends.triton.prelogit import (  # noqa: F401
    control_merge,
    control_update,
    importance_weights,
    prelogit_perturb,
)
from tta_ext.backends.triton.sampling import categorical_sample  # noqa: F401
from tta_ext.backends.triton.verify import deferral_verify  # noqa: F401
