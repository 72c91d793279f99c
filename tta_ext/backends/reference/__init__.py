"""The operators in plain PyTorch: readable, on any device, in float32 or, as the oracle, float64.

Each function has the arguments of the operator of the same name in :mod:`tta_ext.schemas`, returns
its outputs, and takes ``compute_dtype`` besides where floating-point arithmetic is done.
"""

from tta_ext.backends.reference.deferral import (  # noqa: F401
    deferral_mask,
    deferral_probs,
    deferral_propose,
    deferral_sample,
    deferral_stats,
)
from tta_ext.backends.reference.implicit_reward import (  # noqa: F401
    implicit_reward_probs,
    implicit_reward_sample,
)
from tta_ext.backends.reference.knapsack import greedy_knapsack  # noqa: F401
from tta_ext.backends.reference.philox import normal, philox  # noqa: F401
from tta_ext.backends.reference.prelogit import (  # noqa: F401
    control_merge,
    control_update,
    importance_weights,
    prelogit_perturb,
)
from tta_ext.backends.reference.sampling import categorical_sample  # noqa: F401
from tta_ext.backends.reference.verify import deferral_verify  # noqa: F401
