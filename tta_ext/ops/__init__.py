"""Public operators of tta_ext.

Every function validates its arguments, calls the operator ``torch.ops.tta_ext.<name>`` and returns
tensors or a named tuple of them. The backend is the compiled one of the tensors' device if there is
one, the reference in plain PyTorch otherwise; :class:`tta_ext.use_backend` forces one.
"""

from tta_ext.ops.deferral import (
    Mask,
    Proposal,
    Stats,
    deferral_mask,
    deferral_probs,
    deferral_propose,
    deferral_sample,
    deferral_stats,
)
from tta_ext.ops.implicit_reward import implicit_reward_probs, implicit_reward_sample
from tta_ext.ops.knapsack import Knapsack, greedy_knapsack
from tta_ext.ops.philox import normal, philox
from tta_ext.ops.prelogit import (
    Weights,
    control_merge,
    control_update,
    importance_weights,
    prelogit_perturb,
)
from tta_ext.ops.sampling import categorical_sample
from tta_ext.ops.verify import Verified, deferral_verify

__all__ = [
    "Knapsack",
    "Mask",
    "Proposal",
    "Stats",
    "Verified",
    "Weights",
    "categorical_sample",
    "control_merge",
    "control_update",
    "deferral_mask",
    "deferral_probs",
    "deferral_propose",
    "deferral_sample",
    "deferral_stats",
    "deferral_verify",
    "greedy_knapsack",
    "implicit_reward_probs",
    "implicit_reward_sample",
    "importance_weights",
    "normal",
    "philox",
    "prelogit_perturb",
]
