"""vLLM: base and proxy as one model, deferral in its batch, searches on its rollouts.

``plugin`` tells vLLM of ``model``; ``processor_v1`` and ``sampler_v2`` draw, one for each of its
two model runners; ``pair`` writes the folder that names two models; ``aisp`` draws rollouts.
"""
