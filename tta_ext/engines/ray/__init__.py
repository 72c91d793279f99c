"""Ray: prompts, and the rollouts of one prompt, over processes and machines.

Workers are Ray actors that load their models once. Ray places them, restarts those that die
(``max_restarts``) and does their job again (``max_task_retries``); nothing of that is done here.
Answers depend neither on the number of workers nor on their deaths: random streams are named by
places, and what is computed together is fixed before it is handed out.
"""

from tta_ext.engines.ray.prompts import Decoder, map_prompts
from tta_ext.engines.ray.rollouts import Rollouts
from tta_ext.engines.ray.workers import Workers

__all__ = ["Decoder", "Rollouts", "Workers", "map_prompts"]
